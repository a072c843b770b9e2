"""Logs: one step that writes as fast as it can, with 50 secrets to redact, through a daemon; and the redactor alone.

What is timed is from the first raw byte to the last byte of the redacted copy on disk. The shepherd splices the step's
output to raw files, the daemon redacts them into the copy and stores the first 64 MiB (its default) in PostgreSQL,
which may lag. The step is ``cat`` of a file of lines like a compiler's, every thousandth with a secret in it. Memory
is what the daemon grows by from the first byte to the last of all samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import postgres
from measured import Bar, Findings, Measured, at_least, at_most, interleave, of_samples, rate, repeats, unmeasured

from supervisor.client import Client
from supervisor.model.errors import BsupError
from supervisor.model.redaction import Redactor, SecretSet
from supervisor.sinks.scanner import Scanner

SECRETS = 50
FILE = 32 << 20
PIECE = 256 << 10
MUST = 150.0
MUST_MB = 32.0
PATIENCE = 120.0
UID_BASE = 270_000
CONFIG = """
[host]
name = "bench"
[jobs]
{uids}
[logs]
max_disk = "16GiB"
keep_local = "64GiB"
"""


def output(secrets: Sequence[bytes], size: int = FILE) -> bytes:
    """Lines like a compiler's, every thousandth with a secret in it."""
    rng = random.Random(len(secrets))
    lines = []
    while size > 0:
        line = b"cc -O2 -Wall -c src/module_%d/file_%d.c -o build/%x.o" % (
            rng.randrange(100),
            rng.randrange(10_000),
            rng.getrandbits(64),
        )
        if secrets and rng.random() < 0.001:
            line += b" -DTOKEN=" + rng.choice(secrets)
        lines.append(line + b"\n")
        size -= len(lines[-1])
    return b"".join(lines)


def made_up(count: int) -> list[bytes]:
    rng = random.Random(count)
    return [b"%032x" % rng.getrandbits(128) for _ in range(count)]


@dataclasses.dataclass
class Bsup:
    """A running daemon. ``growth``: bytes of memory it took more, at most, than before each sample's first byte."""

    process: subprocess.Popen[bytes]
    state: Path
    client: Client
    growth: int = 0
    _before: int = 0

    async def write(self, file: Path, times: int, secrets: Sequence[bytes], whole: int) -> tuple[float, float]:
        """Runs a step that writes ``file`` so many times. MB/s until all was in the raw files, and until the redacted
        copy had its ``whole`` bytes."""
        self._before = self._before or rss(self.process.pid)
        others = set(self.state.glob("runs/*/0/out"))  # of the job before, about to go
        job = await self.client.submit(
            {
                "kind": "steps",
                "steps": [{"name": "write", "run": ["cat", *[str(file)] * times]}],
                "secrets": {f"SECRET_{number}": secret.decode() for number, secret in enumerate(secrets)},
            }
        )
        log = self.state / "logs" / str(job) / "1.log"
        amount = size_of(file) * times
        began = raw_done = 0.0
        raw: Path | None = None
        async with asyncio.timeout(PATIENCE):
            while size_of(log) < whole:
                await asyncio.sleep(0.005)
                now = time.perf_counter()
                if raw is None:
                    mine = set(self.state.glob("runs/*/0/out")) - others
                    raw = next((each for each in mine if size_of(each)), None)
                    began = now
                elif not raw_done:
                    raw_done = now if size_of(raw) in (0, amount) else 0.0
                self.growth = max(self.growth, rss(self.process.pid) - self._before)
            ended = time.perf_counter()
            async for view in self.client.wait([job]):
                assert view.state == "succeeded", view
        shutil.rmtree(log.parent, ignore_errors=True)
        return amount / (raw_done - began) / 1e6, amount / (ended - began) / 1e6


@contextlib.asynccontextmanager
async def bsup(home: Path, name: str, *, with_library: bool) -> AsyncIterator[Bsup]:
    """Started as a user would, with a database of its own; ended with all it left."""
    server = postgres.running()
    await server.create(name)
    root = home / name
    root.mkdir(mode=0o711)
    uids = f"uid_base = {UID_BASE}" if os.geteuid() == 0 else 'uids = "off"'
    (root / "bsup.toml").write_text(CONFIG.format(uids=uids))
    environment = dict(os.environ)
    if not with_library:
        (root / "without").mkdir()
        (root / "without" / "hyperscan.py").write_text("raise ImportError('this daemon goes without')\n")
        environment["PYTHONPATH"] = str(root / "without")
    words = ["--config", str(root / "bsup.toml"), "--dsn", server.dsn(name)]
    words += ["--state", str(root / "state"), "--socket", str(root / "socket")]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
            [sys.executable, "-m", "supervisor", "daemon", *words],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    try:
        async with await _ready(process, root / "socket") as client:
            yield Bsup(process, root / "state", client)
    except BaseException:
        print((root / "log").read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((root / "state" / "shepherd.pid").read_text()), signal.SIGTERM)
        await server.drop(name)


async def _ready(process: subprocess.Popen[bytes], socket: Path) -> Client:
    async with asyncio.timeout(PATIENCE):
        while process.poll() is None:
            with contextlib.suppress(BsupError):
                async with Client(str(socket)) as client:
                    if (await client.status()).actors["dispatcher"].get("reconciled"):
                        return Client(str(socket))
            await asyncio.sleep(0.1)
    raise RuntimeError(f"the daemon ended with {process.returncode} while it started")


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def has_library() -> bool:
    finder = Scanner(made_up(SECRETS), worth=0)
    finder(bytes(PIECE))
    return finder.is_on


async def through_bsup(home: Path, quick: bool) -> tuple[list[Measured], list[Bar]]:
    secrets, times = made_up(SECRETS), 24 if quick else 64
    samples: dict[str, list[float]] = {"raw": [], "with": [], "without": [], "none": []}
    files = {"secrets": (home / "secrets.txt", output(secrets)), "plain": (home / "plain.txt", output([]))}
    for path, data in files.values():
        path.write_bytes(data)
        path.chmod(0o644)
    known = SecretSet({secret: b"***" for secret in secrets})
    redacted = len(known.replace(files["secrets"][1], final=True)[0])
    is_there = has_library()
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(bsup(home, "log_with", with_library=is_there))
        second = None if quick else await stack.enter_async_context(bsup(home, "log_without", with_library=False))
        for _ in range(repeats(quick)):
            raw, all_of_it = await first.write(files["secrets"][0], times, secrets, redacted * times)
            samples["raw"].append(raw)
            samples["with"].append(all_of_it)
            if second is not None:
                plain = files["plain"]
                samples["none"].append((await first.write(plain[0], times, [], len(plain[1]) * times))[1])
                fewer = times // 8
                _, slow = await second.write(files["secrets"][0], fewer, secrets, redacted * fewer)
                samples["without"].append(slow)
        flowed = redacted * times * repeats(quick) / 1e9
        growth = first.growth / (1 << 20)
    how = f"`cat` of {FILE * times / 1e9:.1f} GB" + ("" if is_there else "; without hyperscan")
    measured = [
        of_samples(f"log: redacted copy on disk, {SECRETS} secrets", "MB/s", samples["with"], how),
        of_samples("log: the step's output in its raw file meanwhile", "MB/s", samples["raw"], "spliced"),
        of_samples("log: what the daemon grows by", "MB", [growth], f"{flowed:.1f} GB and more"),
    ]
    if samples["none"]:
        measured += [
            of_samples("log: redacted copy on disk, no secrets", "MB/s", samples["none"], how),
            of_samples(f"log: {SECRETS} secrets, without hyperscan", "MB/s", samples["without"], "one search each"),
        ]
    bars = [at_most("memory of the daemon while a log flows", growth, MUST_MB, "MB", f"{flowed:.1f} GB")]
    what = f"log with {SECRETS} secrets: redacted copy on disk"
    if is_there:
        bars.insert(0, at_least(what, measured[0].value, MUST, "MB/s", how))
    else:
        bars.insert(0, unmeasured(what, f"≥ {MUST:g} MB/s", "hyperscan is not installed"))
    return measured, bars


async def redactor_alone(quick: bool) -> list[Measured]:
    """In pieces as the log takes them."""
    found = []
    for count in (SECRETS,) if quick else (1, 10, SECRETS):
        secrets = made_up(count)
        data = output(secrets, FILE // 4)
        known = SecretSet({secret: b"***" for secret in secrets})

        def redact(finder: Scanner | None, data: bytes = data, known: SecretSet = known) -> None:
            redactor = Redactor(known, finder)
            for start in range(0, len(data), PIECE):
                redactor.feed(data[start : start + PIECE])
            redactor.finish()

        finder = Scanner(known.sought, worth=0)
        finder(bytes(PIECE))
        contestants = {"one search each": rate(len(data) / 1e6, lambda redact=redact: redact(None))}
        if finder.is_on:
            contestants["hyperscan"] = rate(len(data) / 1e6, lambda redact=redact, finder=finder: redact(finder))
        for name, samples in (await interleave(contestants, repeats(quick))).items():
            secrets_said = "1 secret" if count == 1 else f"{count} secrets"
            found.append(of_samples(f"redactor: {secrets_said}", "MB/s", samples, f"{name}; {PIECE >> 10} KiB pieces"))
    return found


async def run(quick: bool) -> Findings:
    # Not below /tmp: each job has one of its own, and that may be memory.
    home = Path(tempfile.mkdtemp(prefix="bsup-log-", dir=os.environ.get("BSUP_BENCH_DIR", "/var/tmp")))
    os.chmod(home, 0o711)
    try:
        measured, bars = await through_bsup(home, quick)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return Findings(measured=[*measured, *await redactor_alone(quick)], bars=bars)
