"""Framing and decoding hold for any bytes: the same frames however they are split, typed refusals, nothing else."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.framing import (
    ERRORS,
    NONE,
    BadFrame,
    Call,
    FrameDecoder,
    FrameTooLarge,
    Reply,
    decode_call,
    decode_params,
    decode_reply,
    encode_frame,
    encode_stream,
    error_from,
    error_reply,
    pack,
    service_error,
)
from supervisor.model.errors import BsupError, Busy, InvalidInput, StoreUnavailable, UnknownJob, WrongState
from supervisor.model.job import State
from supervisor.protocol import JobView, ListParams, ListReply, LogsParams, StopParams, SubmitParams, WaitParams

frames = st.lists(st.binary(max_size=40).map(lambda data: data.replace(b"\0", b"0")), max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({min(c, len(data)) for c in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


@given(frames, st.binary(max_size=20).map(lambda d: d.replace(b"\0", b"")), st.lists(st.integers(0, 400), max_size=20))
def test_any_split_of_the_bytes_gives_the_same_frames(sent: list[bytes], rest: bytes, cuts: list[int]) -> None:
    """Where chunks end says nothing of where frames end; an unfinished frame stays pending."""
    data = b"".join(frame + b"\0" for frame in sent) + rest
    decoder = FrameDecoder(64)
    assert [frame for piece in cut(data, cuts) for frame in decoder.feed(piece)] == sent
    assert decoder.pending == len(rest)


@given(frames, st.integers(1, 50), frames, st.lists(st.integers(0, 800), max_size=20))
def test_a_frame_that_is_too_large_ends_it_after_those_before(
    before: list[bytes], excess: int, after: list[bytes], cuts: list[int]
) -> None:
    """All frames before it come out, none after it, and the decoder holds no more than its limit."""
    limit = 40
    data = b"".join(frame + b"\0" for frame in [*before, b"x" * (limit + excess), *after])
    decoder = FrameDecoder(limit)
    got: list[bytes] = []
    with pytest.raises(FrameTooLarge):
        for piece in cut(data, cuts):
            got += decoder.feed(piece)
            assert decoder.pending <= limit
        decoder.check()
    assert got == before
    with pytest.raises(FrameTooLarge):
        decoder.feed(b"{}\0")


def test_a_frame_of_exactly_the_limit_passes() -> None:
    assert FrameDecoder(5).feed(b"12345\0") == [b"12345"]


@given(st.binary(max_size=200))
def test_garbage_is_a_bad_frame_and_nothing_else(data: bytes) -> None:
    """Any bytes are either a call or BadFrame; parameters either right or InvalidInput."""
    with contextlib.suppress(BadFrame):
        decode_call(data)
    try:
        decode_params(msgspec.Raw(data), WaitParams)
    except InvalidInput as error:
        assert error.field and error.problem


@pytest.mark.parametrize("frame", [b"", b"[]", b"7", b'{"method": 7}', b"{}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_call_is_refused(frame: bytes) -> None:
    with pytest.raises(BadFrame):
        decode_call(frame)


@given(json_values)
def test_any_json_as_parameters_is_right_or_refused_by_name(value: Any) -> None:
    raw = msgspec.Raw(json.dumps(value).encode())
    for form in (ListParams, LogsParams, StopParams, SubmitParams):
        try:
            decode_params(raw, form)
        except InvalidInput as error:
            assert str(error)


@given(st.text(), st.dictionaries(st.text(), json_values, max_size=3), st.booleans(), st.booleans())
def test_a_call_comes_back_as_it_was(method: str, values: dict[str, Any], more: bool, oneway: bool) -> None:
    """NUL bytes in strings are escaped, so none is in a frame but its last."""
    call = Call(method=method, parameters=msgspec.Raw(msgspec.json.encode(values)), more=more, oneway=oneway)
    frame = encode_frame(call)
    assert frame.count(b"\0") == 1
    (got,) = FrameDecoder().feed(frame)
    back = decode_call(got)
    assert (back.method, back.more, back.oneway) == (method, more, oneway)
    assert msgspec.json.decode(back.parameters) == values


def test_a_null_parameter_counts_as_left_out() -> None:
    asked = decode_params(msgspec.Raw(b'{"ids": [3], "any": null, "timeout": null}'), WaitParams)
    assert (asked.ids, asked.any, asked.timeout) == ([3], False, None)
    assert decode_params(NONE, ListParams) == decode_params(msgspec.Raw(b"null"), ListParams) == ListParams()


@pytest.mark.parametrize(
    ("form", "given_", "field"),
    [
        (StopParams, {"ids": [1], "graec": 3}, "graec"),
        (StopParams, {"ids": [1, "2"]}, "ids[1]"),
        (StopParams, {"ids": []}, "ids"),
        (StopParams, {"ids": [0]}, "ids[0]"),
        (StopParams, {"ids": [1 << 63]}, "ids[0]"),
        (StopParams, {}, "ids"),
        (StopParams, {"ids": [1], "grace": -1}, "grace"),
        (ListParams, {"states": ["done"]}, "states[0]"),
        (LogsParams, {"id": 1, "stream": "stdout"}, "stream"),
        (SubmitParams, {"spec": []}, "spec"),
    ],
)
def test_a_wrong_parameter_is_named(form: type[msgspec.Struct], given_: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_params(msgspec.Raw(msgspec.json.encode(given_)), form)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "error",
    [
        UnknownJob(7),
        WrongState(7, "running", "stop it first"),
        InvalidInput("steps[0].run", "is empty", "a list"),
        StoreUnavailable("refused"),
        Busy("later"),
    ],
)
def test_an_error_arrives_as_what_it_was(error: BsupError) -> None:
    reply = decode_reply(encode_frame(error_reply(error))[:-1])
    back = error_from(reply)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_every_error_of_the_wire_has_a_class_that_takes_its_parameters() -> None:
    for name, (kind, fields) in ERRORS.items():
        values = {field: 7 if field == "job" else "x" for field in fields}
        reply = Reply(error=f"io.bsup.Supervisor.{name}", parameters=msgspec.Raw(msgspec.json.encode(values)))
        assert type(error_from(reply)) is kind


def test_an_error_of_another_version_still_says_its_name() -> None:
    assert "io.bsup.Supervisor.NewKind" in str(error_from(Reply(error="io.bsup.Supervisor.NewKind")))
    assert "update" in str(error_from(service_error("MethodNotFound", "io.bsup.Supervisor.Fly")))


@given(st.lists(st.text(max_size=20), max_size=5))
def test_replies_in_one_write_are_the_frames_they_are_alone(names: list[str]) -> None:
    replies = [ListReply(JobView(id=1, name=name, kind="steps", state=State.READY)) for name in names]
    assert encode_stream(replies) == b"".join(
        encode_frame(Reply(parameters=pack(reply), continues=True)) for reply in replies
    )
