"""Real daemons for the end-to-end tests: started as a user would, driven through the command line, killed for real.

Used by the tests of this folder only. Nothing here sleeps for a fixed time in the hope that something has happened:
``until`` asks again until a condition holds, and fails loudly at its deadline.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

BSUP = [sys.executable, "-m", "supervisor"]


def until(condition: Callable[[], T | None], what: str, deadline: float = 60.0, every: float = 0.05) -> T:
    """The first true value of ``condition``; AssertionError naming ``what`` when ``deadline`` seconds pass without
    one.
    """
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(every)  # a poll of an outside process, bounded by the deadline
    raise AssertionError(f"not within {deadline} s: {what}")


class Cli:
    """``bsup`` as a subprocess against one socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def run(
        self, *args: str, stdin: str | bytes | None = None, check: bool = True, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[bytes]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [*BSUP, *args, "--socket", str(self.socket)], input=data, capture_output=True, timeout=timeout, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"bsup {' '.join(args)} ended {done.returncode}: {done.stderr.decode(errors='replace')}"
            )
        return done

    def lines(self, *args: str, **kw: Any) -> list[dict[str, Any]]:
        out = self.run(*args, "--json", **kw).stdout.decode()
        return [json.loads(line) for line in out.splitlines() if line.strip()]

    def submit(self, job: dict[str, Any], *args: str) -> int:
        return int(self.run("submit", "-", *args, stdin=json.dumps(job)).stdout.decode().strip())

    def show(self, job: int) -> dict[str, Any]:
        found = self.lines("show", str(job))[0]
        return dict(found.get("job", found))

    def state(self, job: int) -> str:
        return str(self.show(job)["state"])

    def attempts(self, job: int) -> list[dict[str, Any]]:
        return self.lines("attempts", str(job))

    def wait(self, *jobs: int, timeout: float = 120.0) -> int:
        return self.run("wait", *map(str, jobs), check=False, timeout=timeout).returncode

    def raw(self, job: int, *args: str, timeout: float = 120.0) -> bytes:
        return self.run("logs", str(job), "--raw", *args, timeout=timeout).stdout


class Daemon:
    """One ``bsup daemon`` process with a state directory of its own."""

    def __init__(self, root: Path, dsn: str, *, name: str = "a", config: str = "", env: dict[str, str] | None = None):
        self.root = root
        self.name = name
        self.state = root / name
        self.state.mkdir(parents=True, exist_ok=True)
        self.socket = root / f"{name}.sock"
        self.config = root / f"{name}.toml"
        self.config.write_text(f'[host]\nname = "{name}"\n' + config)
        self.dsn = dsn
        self.env = env or {}
        self.log = root / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.cli = Cli(self.socket)

    def start(self, *args: str, ready: bool = True) -> Daemon:
        words = ["--config", str(self.config), "--dsn", self.dsn]
        words += ["--state", str(self.state), "--socket", str(self.socket)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*BSUP, "daemon", *words, *args],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        if ready:
            self.until_ready()
        return self

    def until_ready(self) -> None:
        def answers() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"daemon {self.name} ended {self.process.returncode}:\n{self.tail()}")
            done = self.cli.run("status", "--json", check=False)
            return (
                done.returncode == 0
                and "session" in json.loads(done.stdout)["actors"]["keeper"]
                and json.loads(done.stdout)["actors"]["dispatcher"].get("reconciled")
            )

        until(answers, f"daemon {self.name} is ready\n{self.tail()}", every=0.1)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """kill -9, as an out-of-memory killer would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = 60.0) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"daemon {self.name} did not stop:\n{self.tail()}") from None
        return self.process.returncode

    def rss(self) -> int:
        """Resident bytes of the daemon's process."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    def end_shepherd(self) -> None:
        """Ends what outlives the daemon on purpose, so that a test leaves nothing behind."""
        try:
            pid = int((self.state / "shepherd.pid").read_text())
            # Told to end it takes its guardian with it; killed, it would be begun anew.
            os.kill(pid, signal.SIGTERM)
        except (OSError, ValueError):
            return
        end = time.monotonic() + 10.0
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process with this id runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def steps(*commands: Sequence[str] | str, **job: Any) -> dict[str, Any]:
    """A job of kind ``steps`` with a step a command."""
    return {
        "kind": "steps",
        "steps": [{"name": f"s{i}", "run": c if isinstance(c, str) else list(c)} for i, c in enumerate(commands, 1)],
        **job,
    }
