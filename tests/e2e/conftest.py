"""Fixtures of the end-to-end tests: a short directory (Unix sockets allow 107 bytes) and a way to start daemons in
it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Daemon

QUICK = "[lease]\nrenew = 1\nterm = 6\nmargin = 1.5\n"


@pytest.fixture
def short_dir() -> Iterator[Path]:
    # Not below /tmp: each job has one of its own, and the tests share files with jobs.
    path = Path(tempfile.mkdtemp(prefix="bsup-e2e-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def daemons(short_dir: Path, dsn: str) -> Iterator[Callable[..., Daemon]]:
    """``daemons(name, config=…)`` starts a daemon on this test's own database; all are ended afterwards."""
    started: list[Daemon] = []

    def start(name: str = "a", *, config: str = QUICK, args: tuple[str, ...] = (), **kw: object) -> Daemon:
        daemon = Daemon(short_dir, dsn, name=name, config=config, **kw)  # type: ignore[arg-type]  # passed on as given
        started.append(daemon)
        return daemon.start(*args)

    yield start
    for daemon in started:
        print(f"--- daemon {daemon.name}\n{daemon.tail()}")  # shown by pytest where the test failed
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()
        daemon.end_shepherd()
