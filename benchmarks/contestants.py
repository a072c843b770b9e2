"""Who takes part: bsup, the loop that is its floor, and the peers, with what the harness needs to know of each.

All are run in the same way: programs of theirs make the schema, submit, and work (see ``peers/driver.py``).
"""

from __future__ import annotations

import dataclasses
import json
import sys

import environments
from environments import PEERS, Missing

DRAIN = 20_000
# For those that would take most of a minute: what a queue does in a second hardly depends on how many there were.
DRAIN_SLOW = 2_000


@dataclasses.dataclass(frozen=True)
class Contestant:
    """``unfinished`` counts what the database has not recorded as finished. ``is_node``: its worker is a Node program.

    ``schema``: the contestant whose schema and client it uses (bsup's, for the bare loop).
    """

    key: str
    name: str
    unfinished: str
    settings: str
    jobs: int = DRAIN
    is_node: bool = False
    is_own: bool = False
    schema: str = ""

    @property
    def label(self) -> str:
        return self.name if self.is_own else f"{self.name} {self.version}"

    @property
    def version(self) -> str:
        if self.is_node:
            packages = json.loads((PEERS / "node/package.json").read_text())["dependencies"]
            return str(packages[{"graphile": "graphile-worker", "pgboss": "pg-boss"}[self.key]])
        package = {"awa": "awa-pg", "absurd": "absurd-sdk"}.get(self.key, self.key)
        pins = (PEERS / f"requirements/{self.key}.txt").read_text().splitlines()
        return next(pin.partition("==")[2] for pin in pins if pin.startswith(f"{package}=="))

    def command(self, role: str) -> tuple[list[str], dict[str, str]]:
        """The program of a role, and its environment. Raises Missing. May install what it needs first."""
        script = PEERS / f"peer_{self.schema if self.schema and role != 'work' else self.key}.py"
        if self.is_node and (role != "client" or not script.exists()):
            path = environments.node_path()
            return ["node", str(PEERS / f"node/{self.key}.js"), role], {"NODE_PATH": path}
        python = sys.executable if self.is_own or self.is_node else environments.python(self.key)
        return [python, str(script), role], {}


BSUP_UNFINISHED = "SELECT (SELECT count(*) FROM bsup.ready) + (SELECT count(*) FROM bsup.lease)"

BSUP = Contestant("bsup", "bsup", BSUP_UNFINISHED, "slots 2,000", is_own=True)
BARE = Contestant(
    "bare", "bare asyncpg loop", BSUP_UNFINISHED, "bsup's own claim and finish", is_own=True, schema="bsup"
)
PGQUEUER = Contestant("pgqueuer", "PgQueuer", "SELECT count(*) FROM pgqueuer", "5 consumers, batch 100")
GRAPHILE = Contestant(
    "graphile",
    "Graphile Worker",
    "SELECT count(*) FROM graphile_worker._private_jobs",
    "24 at a time, local queue 500, batched completion",
    is_node=True,
)
PROCRASTINATE = Contestant(
    "procrastinate",
    "procrastinate",
    "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')",
    "concurrency 10, pool 30",
    DRAIN_SLOW,
)
OBAN = Contestant("oban", "Oban", "SELECT count(*) FROM oban_jobs WHERE state <> 'completed'", "limit 500", DRAIN_SLOW)
OTHERS = (
    Contestant(
        "pgboss",
        "pg-boss",
        "SELECT count(*) FROM pgboss.job WHERE name = 'noop' AND state < 'completed'",
        "batch 5,000",
        is_node=True,
    ),
    Contestant(
        "awa",
        "awa",
        "SELECT count(*) FROM awa.jobs WHERE state NOT IN ('completed', 'failed', 'cancelled')",
        "256 workers, 2 claimers of 256",
    ),
    Contestant(
        "chancy",
        "chancy",
        "SELECT count(*) FROM chancy_jobs WHERE state <> 'succeeded'",
        "concurrency 1,000, eager polling",
        10_000,
    ),
    Contestant(
        "absurd",
        "absurd",
        "SELECT count(*) FROM absurd.t_default WHERE state <> 'completed'",
        "concurrency 500",
        DRAIN_SLOW,
    ),
    Contestant(
        "dbos",
        "DBOS",
        "SELECT count(*) FROM dbos.workflow_status WHERE status <> 'SUCCESS'",
        "concurrency 500, polls of 10 ms",
        DRAIN_SLOW,
    ),
)
PEERS_ALL = (PGQUEUER, GRAPHILE, PROCRASTINATE, OBAN, *OTHERS)

__all__ = [
    "BARE",
    "BSUP",
    "DRAIN",
    "GRAPHILE",
    "OBAN",
    "PEERS_ALL",
    "PGQUEUER",
    "PROCRASTINATE",
    "Contestant",
    "Missing",
]
