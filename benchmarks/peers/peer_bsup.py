"""bsup: jobs are submitted with its SQL functions, 5,000 a call: one spec and the args of each, or whole specs
(``BENCH_SUBMIT=specs``). Its worker is a real ``bsup daemon``, which this process becomes, with a configuration and a
state directory of its own. ``BENCH_SLOTS`` sets the slots.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import asyncpg
from driver import Peer, main, slices
from stamps import Stamps

SLOTS = "2000"
KIND = '{"kind": "bench"}'
CONFIG = """
[host]
name = "bench-{worker}"
slots = {slots}
[database]
dsn = "{dsn}"
[jobs.kinds]
bench = "bench_kinds:stamp"
"""


def spec(number: int) -> str:
    return json.dumps({"kind": "bench", "args": {"n": number}})


class BsupPeer(Peer):
    async def install(self):
        from supervisor.store.migrate import ensure_schema

        await ensure_schema(self.dsn, True)
        connection = await asyncpg.connect(self.dsn)
        # As the first daemon that brings the kind does.
        await connection.execute("INSERT INTO bsup.kind (name) VALUES ('bench')")

    async def connect(self):
        self.are_specs = os.environ.get("BENCH_SUBMIT") == "specs"
        self.connection = await asyncpg.connect(self.dsn)

    async def bulk(self, numbers):
        for some in slices(numbers, 5000):
            if self.are_specs:
                specs = f"[{','.join(map(spec, some))}]"
                await self.connection.fetchval("SELECT bsup.submit_many($1::jsonb)", specs)
            else:
                args = [f'{{"n": {number}}}' for number in some]
                await self.connection.fetchval("SELECT bsup.submit_many($1::jsonb, $2::jsonb[])", KIND, args)

    async def whole(self, numbers):
        async with self.connection.transaction():
            await self.bulk(numbers)

    async def one(self, number):
        await self.connection.fetchval("SELECT bsup.submit($1::jsonb)", spec(number))


def become_daemon(file: str, worker: str) -> None:
    home = Path(tempfile.mkdtemp(prefix="bsup-", dir=os.environ["BENCH_HOME"]))
    home.chmod(0o711)
    config = home / "bsup.toml"
    slots = os.environ.get("BENCH_SLOTS", SLOTS)
    config.write_text(CONFIG.format(worker=worker, slots=slots, dsn=os.environ["BENCH_DSN"]))
    os.environ.update(BENCH_STAMPS=file, BENCH_WORKER=worker, PYTHONPATH=str(Path(__file__).parent))
    Stamps(file, int(worker)).begin()
    words = ["--config", str(config), "--state", str(home / "state"), "--socket", str(home / "control")]
    os.execv(sys.executable, [sys.executable, "-m", "supervisor", "daemon", *words])


if __name__ == "__main__":
    if sys.argv[1] == "work":
        become_daemon(*sys.argv[2:])
    main(BsupPeer)
