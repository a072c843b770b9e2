"""The harness in a contestant's own environment: its file says what to do, this one when, and speaks to who measures.

    peer_X.py install            make the schema
    peer_X.py client             submit what the standard input asks for: ``bulk FIRST COUNT``, ``whole FIRST COUNT``
                                 (in one transaction) or ``one NUMBER``; answer with two times, before the call and
                                 after its commit (CLOCK_MONOTONIC, ns)
    peer_X.py work FILE WORKER   run jobs until SIGTERM, and stamp them in FILE

The databases' addresses come as BENCH_DSN (a Unix socket) and BENCH_TCP_DSN. Standard library and uvloop only.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from stamps import Stamps


class Peer:
    """One contestant. Settings are those its authors advise for throughput."""

    uvloop = True

    def __init__(self) -> None:
        self.dsn = os.environ["BENCH_DSN"]
        self.tcp_dsn = os.environ["BENCH_TCP_DSN"]

    async def install(self) -> None:
        raise NotImplementedError

    async def connect(self) -> None:
        """Opens what ``bulk`` and ``one`` submit through."""
        raise NotImplementedError

    async def bulk(self, numbers: range) -> None:
        """Submits a job for each number, by the fastest way that its interface has."""
        raise NotImplementedError

    async def whole(self, numbers: range) -> None:
        """The same in one transaction; only where workers are measured that wait for it."""
        raise NotImplementedError

    async def one(self, number: int) -> None:
        raise NotImplementedError

    async def work(self, stamps: Stamps) -> None:
        """Calls ``stamps.begin()`` when it is ready, then works until it is canceled."""
        raise NotImplementedError


def main(peer: type[Peer]) -> None:
    if peer.uvloop:
        import uvloop

        uvloop.install()
    asyncio.run(_main(peer(), *sys.argv[1:]))


async def _main(peer: Peer, role: str, file: str = "", worker: str = "0") -> None:
    if role == "install":
        await peer.install()
    elif role == "client":
        await peer.connect()
        await _serve(peer)
        sys.stdout.flush()
        os._exit(0)  # pools and threads of the peer's have nothing left to say
    else:
        await peer.work(Stamps(file, int(worker)))


async def _serve(peer: Peer) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("ready", flush=True)
    while line := await reader.readline():
        what, *numbers = line.split()
        first = int(numbers[0])
        before = time.monotonic_ns()
        if what == b"one":
            await peer.one(first)
        else:
            some = range(first, first + int(numbers[1]))
            await (peer.bulk(some) if what == b"bulk" else peer.whole(some))
        print(before, time.monotonic_ns(), flush=True)


def slices(numbers: range, size: int) -> list[range]:
    return [numbers[at : at + size] for at in range(0, len(numbers), size)]
