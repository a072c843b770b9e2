"""A fake daemon, and ``bsup`` as a function."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cli_world import Done, FakeDaemon

from supervisor.cli.entry import main


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BSUP_SOCKET", "BSUP_CONFIG", "BSUP_DSN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def daemon(short_tmp: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(short_tmp / "s")
    yield fake
    fake.close()


@pytest.fixture
def bsup(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[..., Done]:
    """Runs a command line in this process; against the fake daemon if the test has one."""

    def run(*words: object, stdin: bytes = b"") -> Done:
        argv = [str(word) for word in words]
        if "daemon" in request.fixturenames and "--socket" not in argv:
            argv += ["--socket", str(request.getfixturevalue("daemon").path)]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        # Streams of their own on the captured descriptors: pytest's have no `buffer` that flushes as a real one does.
        with open(1, "w", closefd=False) as out, open(2, "w", closefd=False) as err:
            monkeypatch.setattr(sys, "stdout", out)
            monkeypatch.setattr(sys, "stderr", err)
            code = main(argv)
        shown = capfdbinary.readouterr()
        return Done(code, shown.out.decode(errors="surrogateescape"), shown.err.decode())

    return run
