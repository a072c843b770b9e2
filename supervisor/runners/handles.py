"""The files of a run's handle on disk: what the daemon has the shepherd write, and what it reads back. No other I/O.

A run is a directory ``runs/<lease>/`` with one directory a step, ``<index>/``. The daemon says what the ``spec`` of
each is to hold; the shepherd writes them, and then ``claim``, ``started``, the raw output, ``exit`` and ``closed``, in
this order, each by write and rename. These files are the truth; what the shepherd says on its socket is a hint.

May import msgspec and ``model``. Called by the kind-``steps`` runner and by ``shepherd_client``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from supervisor.model.errors import RunnerError

Cause = Literal["stop", "timeout", "fence", "exec"]
F = TypeVar("F", bound=msgspec.Struct)


UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises: text that is not UTF-8 is no error of msgspec's own."""


class Damaged(RunnerError):
    """A file is there and was read, and holds something else than it should. Any other RunnerError of a read says
    nothing about the file: it could not be read now."""


class StepFile(msgspec.Struct, kw_only=True, frozen=True):
    """``<index>/spec``: the intent, all that the shepherd knows of a step.

    ``cwd`` is relative to ``workspace`` (absolute, below ``work/``). ``timeout`` and ``grace`` in seconds;
    ``max_output`` in bytes, both streams together. ``token`` becomes the step's ``BSUP_RUN``. ``as_service``: runs as
    the daemon's own uid (``uid`` and ``gid`` are then ignored). ``HOME`` and ``TMPDIR`` default to the workspace's
    ``home`` and ``tmp``.
    """

    argv: tuple[str, ...]
    workspace: str
    token: str
    cwd: str = "src"
    env: dict[str, str] = {}
    uid: int | None = None
    gid: int | None = None
    timeout: float | None = None
    grace: float = 10.0
    max_output: int = 1 << 30
    private_tmp: bool = True
    as_service: bool = False


class Started(msgspec.Struct, kw_only=True, frozen=True):
    """``<index>/started``. ``at`` in unix seconds, ``at_boot`` by CLOCK_BOOTTIME; ``start_time``: field 22 of
    /proc/pid/stat."""

    pid: int
    start_time: int
    boot_id: str
    at: float
    at_boot: float
    private_tmp: bool = False


class Exit(msgspec.Struct, kw_only=True, frozen=True):
    """``<index>/exit``: how the main process ended; the byte counts are those at that moment, final ones are in
    ``Closed``.

    ``cause`` says why it was ended from outside; ``exec``: it was never started, ``error`` says why (exit code 126 or
    127).
    """

    exit_code: int | None
    signal: int | None
    at: float
    cause: Cause | None = None
    error: str | None = None
    out_bytes: int = 0
    err_bytes: int = 0
    out_dropped: int = 0
    err_dropped: int = 0
    output_closed: bool = False


class Closed(msgspec.Struct, kw_only=True, frozen=True):
    """``<index>/closed``: everything of the step is dead and its output is in the files.

    ``gone``: there will be no ``exit``: the shepherd that ran the step died or was told to end (a loss).
    ``output_closed`` False: something still held the output open when the shepherd gave up waiting.
    """

    at: float
    gone: bool = False
    out_bytes: int = 0
    err_bytes: int = 0
    out_dropped: int = 0
    err_dropped: int = 0
    output_closed: bool = True


def write_step(step_dir: Path, spec: StepFile) -> None:
    """Makes the step's directory (0700) and its ``spec``; overwrites an older intent that was never started."""
    step_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json_atomic(step_dir / "spec", spec)


def read_started(step_dir: Path) -> Started | None:
    return _read(f"{step_dir}/started", Started)


def read_exit(step_dir: Path) -> Exit | None:
    """The exit record; None while the main process runs, or for ever if ``read_closed`` says ``gone``."""
    return _read(f"{step_dir}/exit", Exit)


def read_closed(step_dir: Path) -> Closed | None:
    return _read(f"{step_dir}/closed", Closed)


def is_there(run_dir: Path) -> bool:
    """Whether anything of the run is."""
    return os.path.lexists(run_dir)


def is_claimed(step_dir: Path) -> bool:
    """Whether the shepherd ever took the step: it may have run."""
    return os.path.exists(f"{step_dir}/claim")


def is_exited(step_dir: Path) -> bool:
    """Whether there is an exit record that can be read, or may be one that can't be read now."""
    try:
        return read_exit(step_dir) is not None
    except Damaged:
        return False
    except RunnerError:
        return True


def is_closed(step_dir: Path) -> bool:
    """Whether nothing of the step runs any more and all of its output is in the files."""
    return os.path.exists(f"{step_dir}/closed")


def write_json_atomic(path: Path, value: Any, *, durable: bool = False, mode: int = 0o600) -> None:
    """Writes JSON (anything msgspec encodes) by write and rename. ``durable``: survives a power cut, not only a crash.

    Raises RunnerError when the disk refuses.
    """
    data = msgspec.json.encode(value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with open(fd, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunnerError(f"{path}: can't be written: {error.strerror}") from error


ROOM = 4096
"""Bytes that ``write_json_in_room`` takes at most: what it keeps."""


def write_json_in_room(path: Path, value: Any, *, durable: bool = False, mode: int = 0o600) -> None:
    """As ``write_json_atomic``, but into room that was kept since the last time: a disk that is full, after the first,
    can't refuse it. For what a host can't go on without; at most ``ROOM`` bytes, by one writer.

    Two files take turns: the one that is replaced becomes the room for the next. A reader that opened it before and
    reads it now may find it in the making: its first byte is written last, so that this is no JSON.

    Raises RunnerError when the disk refuses.
    """
    data = msgspec.json.encode(value)
    spare, kept = path.with_name(f".{path.name}.spare"), path.with_name(f".{path.name}.kept")
    try:
        _fill_room(spare, data, durable, mode)
        kept.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.link(path, kept)
        os.replace(spare, path)
        with contextlib.suppress(FileNotFoundError):
            os.replace(kept, spare)
        if durable:
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        raise RunnerError(f"{path}: can't be written: {error.strerror}") from error
    if not spare.exists():
        with contextlib.suppress(OSError):  # the next write says it
            _fill_room(spare, b"", durable, mode)


def _fill_room(spare: Path, data: bytes, durable: bool, mode: int) -> None:
    if len(data) > ROOM:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(spare).st_nlink > 1:  # a copy made of links shares it: what is written here would be there
            spare.unlink()
    fd = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.posix_fallocate(fd, 0, ROOM)
        os.pwrite(fd, b"\0", 0)
        os.pwrite(fd, data[1:], 1)
        os.pwrite(fd, data[:1], 0)
        os.ftruncate(fd, max(len(data), 1))  # to nothing, the room would be gone
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)


def is_running(started: Started) -> bool:
    """Whether that very process lives (a zombie doesn't): a pid means nothing without its start time and its boot."""
    if started.boot_id != boot_id():
        return False
    try:
        fields = Path(f"/proc/{started.pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return int(fields[19]) == started.start_time and fields[0] not in (b"Z", b"X")


def age(step_dir: Path) -> float | None:
    """Seconds since the step was started, by the boot-time clock, which nobody sets; None: not known, or before this
    boot."""
    with contextlib.suppress(RunnerError):
        started = read_started(step_dir)
        if started is not None and started.boot_id == boot_id():
            return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started.at_boot)
    return None


def own_start_time() -> int:
    """This process's, as ``Started.start_time``."""
    return int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])


def boot_id() -> str:
    """This boot's id: a pid or a CLOCK_BOOTTIME written under another one means nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _read(path: str, kind: type[F]) -> F | None:
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunnerError(f"{path}: can't be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE as error:
        raise Damaged(f"{path}: is damaged: {error}") from error
