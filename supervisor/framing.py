"""The varlink envelope and its framing, and errors on the wire. No I/O, no sockets.

May import ``protocol``, ``model`` and msgspec. The control actor, ``client`` and the command line use it. Importing it
must stay cheap (the command line's start), so decoders are made when first used.

A frame is one JSON object and a NUL byte. A call names its method as ``io.bsup.Supervisor.Name``. Incomplete bytes are
an expected value: ``FrameDecoder`` keeps them, up to its limit.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

import msgspec

from supervisor.model.errors import (
    BsupError,
    Busy,
    InvalidInput,
    PermissionDenied,
    StoreUnavailable,
    UnknownJob,
    WrongState,
)
from supervisor.protocol import INTERFACE, MAX_FRAME, SERVICE, Parameters

S = TypeVar("S", bound=msgspec.Struct)

NONE: Final = msgspec.Raw(b"{}")
"""No parameters: left out of the frame. (``Raw | None`` would refuse all but null.)"""

_ENCODER: Final = msgspec.json.Encoder()


# --- envelope and frames -------------------------------------------------------------------------------------------


class Call(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A varlink call. Keys of the envelope that are not known are passed over, as varlink asks."""

    method: str
    parameters: msgspec.Raw = NONE
    more: bool = False
    oneway: bool = False
    upgrade: bool = False


class Reply(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A varlink reply; ``continues``: more will follow. With ``error``, the parameters are the error's."""

    parameters: msgspec.Raw = NONE
    continues: bool = False
    error: str | None = None


class _Streamed(msgspec.Struct):
    """A Reply whose parameters are not encoded yet."""

    parameters: msgspec.Struct
    continues: bool = True


class _Item(msgspec.Struct, Generic[S]):
    """A Reply that is no error, with its parameters decoded at once."""

    parameters: S
    continues: bool = False
    error: str | None = None


class FrameTooLarge(BsupError):
    """The peer sent a frame over the limit; the connection can't be used any further."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"a frame is larger than {limit} bytes")


class BadFrame(BsupError):
    """The peer sent what is no varlink call or reply."""


class UnexpectedReply(BadFrame):
    """A reply that is not of the form that its call's reply has: the daemon is not one that we can talk to."""


class FrameDecoder:
    """Cuts bytes, however they arrive, into frames; holds at most ``limit`` bytes of an unfinished one.

    Frames before one that is too large are still given out; ``check`` and the next ``feed`` then raise FrameTooLarge.
    """

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._failed = False

    @property
    def pending(self) -> int:
        """Bytes of the unfinished frame."""
        return len(self._buffer)

    def check(self) -> None:
        if self._failed:
            raise FrameTooLarge(self._limit)

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are complete now, without their NUL."""
        self.check()
        *ends, rest = data.split(b"\0")
        frames: list[bytes] = []
        for piece in ends:
            if len(self._buffer) + len(piece) > self._limit:
                return self._fail(frames)
            frames.append(bytes(self._buffer) + piece)
            self._buffer.clear()
        if len(self._buffer) + len(rest) > self._limit:
            return self._fail(frames)
        self._buffer += rest
        return frames

    def _fail(self, frames: list[bytes]) -> list[bytes]:
        self._failed = True
        self._buffer.clear()
        if not frames:
            self.check()
        return frames


def encode_frame(message: Call | Reply) -> bytes:
    return _ENCODER.encode(message) + b"\0"


def encode_stream(values: Iterable[msgspec.Struct]) -> bytes:
    """The frames of replies that others follow, made in one go: for streams of thousands."""
    # No JSON text holds a raw newline.
    return _ENCODER.encode_lines([_Streamed(value) for value in values]).replace(b"\n", b"\0")


def encode_call(method: str, params: Parameters, *, more: bool = False) -> bytes:
    """The frame of a call of our own interface."""
    return encode_frame(Call(method=f"{INTERFACE}.{method}", parameters=pack(params), more=more))


def pack(value: object) -> msgspec.Raw:
    """A value as the parameters of a Call or a Reply."""
    return msgspec.Raw(_ENCODER.encode(value))


def decode_call(frame: bytes) -> Call:
    """Raises BadFrame."""
    return _decode_envelope(frame, Call)


def decode_reply(frame: bytes) -> Reply:
    """Raises BadFrame."""
    return _decode_envelope(frame, Reply)


def _decode_envelope(frame: bytes, form: type[S]) -> S:
    try:
        envelope: S = _decoder(form).decode(frame)
        return envelope
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"not a varlink {form.__name__.lower()}: {error}") from None


def decode_params(raw: msgspec.Raw, form: type[S]) -> S:
    """A call's parameters; one that is null counts as left out, as varlink has it.

    Raises InvalidInput, naming the field as the caller wrote it.
    """
    try:
        given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw] | None) or {}
        params: S = _decoder(form).decode(_ENCODER.encode({k: v for k, v in given.items() if bytes(v) != b"null"}))
        return params
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _as_invalid(str(error), form) from None


def decode_result(raw: msgspec.Raw, form: type[S]) -> S:
    """A reply's parameters. Raises UnexpectedReply."""
    try:
        result: S = _decoder(form).decode(raw)
        return result
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UnexpectedReply(f"unexpected reply: {error}") from None


def decode_item(frame: bytes, form: type[S]) -> tuple[S, bool]:
    """A reply's parameters, and whether others follow. Raises the error that it tells, or BadFrame."""
    try:
        item: _Item[S] = _items(form).decode(frame)
        if item.error is None:
            return item.parameters, item.continues
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    # An error, whose parameters have a form of their own; or it is wrong, and ``decode_reply`` says in what.
    reply = decode_reply(frame)
    if reply.error is not None:
        raise error_from(reply)
    return decode_result(reply.parameters, form), reply.continues


@functools.cache
def _decoder(form: type[msgspec.Struct]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(form)


@functools.cache
def _items(form: type[msgspec.Struct]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_Item[form])  # type: ignore[valid-type]  # a type made while running


def _as_invalid(text: str, form: type[msgspec.Struct]) -> InvalidInput:
    at = re.search(r" - at `\$\.?(?P<path>[^`]*)`$", text)
    path = at["path"] if at else ""
    problem = text[: at.start()] if at else text
    prefix = f"{path}." if path else ""
    if unknown := re.match(r"Object contains unknown field `(?P<name>[^`]*)`", problem):
        return InvalidInput(prefix + unknown["name"], "unknown key", "" if path else ", ".join(form.__struct_fields__))
    if missing := re.match(r"Object missing required field `(?P<name>[^`]*)`", problem):
        return InvalidInput(prefix + missing["name"], "is missing")
    return InvalidInput(path or "parameters", problem[:1].lower() + problem[1:])


# --- errors --------------------------------------------------------------------------------------------------------


class DaemonUnreachable(BsupError):
    """Nothing answers on the socket, or the connection ended before the reply. Raised on the caller's side only."""


class CallTimeout(BsupError):
    """What was waited for did not come in the time that was asked for."""


class InternalError(BsupError):
    """The daemon's own fault; its log says more under the reference."""


class ExpectedMore(BsupError):
    """The method answers in a stream and was called without ``more``."""


class UnknownCall(BsupError):
    """The daemon has no such interface or method: it is of another version."""


ERRORS: Final[Mapping[str, tuple[type[BsupError], tuple[str, ...]]]] = MappingProxyType(
    {
        "UnknownJob": (UnknownJob, ("job",)),
        "PermissionDenied": (PermissionDenied, ("message",)),
        "InvalidInput": (InvalidInput, ("field", "problem", "allowed")),
        "WrongState": (WrongState, ("job", "state", "problem")),
        "StoreUnavailable": (StoreUnavailable, ("message",)),
        "Busy": (Busy, ("message",)),
        "Timeout": (CallTimeout, ("message",)),
        "InternalError": (InternalError, ("message",)),
    }
)
"""Name → the error it stands for and its parameters: the arguments of the error's constructor, in order."""

SERVICE_ERRORS: Final[Mapping[str, str]] = MappingProxyType(
    {"InterfaceNotFound": "interface", "MethodNotFound": "method", "InvalidParameter": "parameter", "ExpectedMore": ""}
)
"""The errors of org.varlink.service that we send, and the one parameter of each."""


def error_reply(error: BsupError) -> Reply:
    """An error as it goes out; one that has no name of its own is an InternalError."""
    for name, (kind, fields) in ERRORS.items():
        if isinstance(error, kind):
            values = {f: str(error) if f == "message" else getattr(error, f) for f in fields}
            return Reply(error=f"{INTERFACE}.{name}", parameters=pack(values))
    return Reply(error=f"{INTERFACE}.InternalError", parameters=pack({"message": str(error)}))


def service_error(name: str, value: str = "") -> Reply:
    """An error of org.varlink.service."""
    parameter = SERVICE_ERRORS[name]
    return Reply(error=f"{SERVICE}.{name}", parameters=pack({parameter: value} if parameter else {}))


def error_from(reply: Reply) -> BsupError:
    """The error that a reply tells, as the caller shall see it."""
    interface, _, name = (reply.error or "").rpartition(".")
    try:
        values = msgspec.json.decode(reply.parameters, type=dict[str, Any])
    except msgspec.MsgspecError:
        values = {}
    if interface == INTERFACE and name in ERRORS:
        kind, fields = ERRORS[name]
        if all(f in values for f in fields):
            return kind(*(values[f] for f in fields))
    if interface == SERVICE and name == "ExpectedMore":
        return ExpectedMore("this method answers in a stream: call it with `more`")
    if interface == SERVICE and name in ("InterfaceNotFound", "MethodNotFound"):
        return UnknownCall(f"the daemon does not know {next(iter(values.values()), 'this call')!r}: update it")
    return InternalError(f"{reply.error}: {values}")
