"""bsup in a machine: the daemon as the service of ``systemd/``, and jobs of the chaos tests whose stamps come out at
once.

The jobs are those of ``tests/chaos/stamps``. In a machine each stamp is synced to its file there before it is told on
the wire, and what comes from the wire goes to the same file of this computer with the time at which it came: so the
machine's own clocks don't matter, and the history checker reads the runs of all hosts, in machines and beside them, as
one history.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from machine import Machine, Wired
from world import World

RELAYED = "10.0.2.100"
PORT = 5432
OWN_DSN = "postgresql://postgres@/bsup?host=/run/postgresql"

_STAMP = """
stamp() {
    read -r up _ </proc/uptime
    read -r boot </proc/sys/kernel/random/boot_id
    said="$up $boot@$BSUP_CHAOS_HOST $BSUP_JOB_ID $BSUP_LEASE $BSUP_ATTEMPT $i $$ $born $*"
    echo "$said" >>"$f"
    if [ -p /run/wire ]; then
        sync "$f"
        echo "$said" >/run/wire
    fi
}
stamp start
"""


def told(spec: dict[str, Any], *, then: str = "") -> dict[str, Any]:
    """A process job of ``stamps.job`` that also stamps on the wire; ``then``: what it does first of all."""
    steps = [{**step, "run": step["run"].replace("\nstamp start\n", f"{_STAMP}{then}\n", 1)} for step in spec["steps"]]
    return {**spec, "steps": steps}


def linked(dsn: str) -> tuple[str, Path] | None:
    """The DSN by which a machine reaches a server of this computer, and the server's socket to link to its port 5432;
    None where the server has no Unix socket."""
    url = urlsplit(dsn)
    query = parse_qs(url.query)
    directory = unquote(query.get("host", [""])[0])
    if not directory.startswith("/"):
        return None
    socket = Path(directory) / f".s.PGSQL.{query.get('port', ['5432'])[0]}"
    return f"postgresql://{url.username or 'postgres'}@{RELAYED}:{PORT}{url.path}", socket


class Guest:
    """One daemon in a machine, the service ``name``; several may be in one. Its state is on the machine's disk."""

    def __init__(self, machine: Machine, world: World, name: str, dsn: str) -> None:
        self.machine = machine
        self.world = world
        self.name = name
        self.socket = f"/run/{name}/control.sock"
        self._dsn = dsn

    def install(
        self, terms: tuple[float, float, float], *, slots: int = 2, labels: tuple[str, ...] = (), before: str = ""
    ) -> Guest:
        """``before``: a shell command for each start, before the daemon's."""
        renew, term, margin = terms
        number = int.from_bytes(self.name.encode()) % 100
        named = ", ".join(f'"{label}"' for label in labels)
        self.machine.push(
            f"/etc/bsup/{self.name}.toml",
            f'[host]\nname = "{self.name}"\nslots = {slots}\nlabels = [{named}]\n[database]\ndsn = "{self._dsn}"\n'
            f"[lease]\nrenew = {renew}\nterm = {term}\nmargin = {margin}\n"
            f'[jobs]\nuid_base = {300_000 + 1000 * number}\npass_env = ["BSUP_CHAOS_HOST"]\n',
        )
        unit = f"/etc/systemd/system/{self.name}.service"
        daemon = f"daemon --config /etc/bsup/{self.name}.toml --state /var/lib/{self.name} --socket {self.socket}"
        edit = f"sed 's#Directory=bsup$#Directory={self.name}#; s#bin/bsup daemon#bin/bsup {daemon}#'"
        self.machine.check(f"{edit} /opt/bsup/systemd/bsup.service >{unit}; mkdir -p -m 777 {self.world.stamps}")
        # Jobs of other users than root append to files there.
        self.machine.check(f"chmod 777 {self.world.stamps}; chmod 755 {self.world.root}")
        prepare = f"ExecStartPre=/bin/sh -c '{before}'\n" if before else ""
        self.machine.push(
            f"{unit}.d/tests.conf",
            "[Unit]\nAfter=machine-agent.service postgresql.service\n"
            f"[Service]\nEnvironment=BSUP_CHAOS_HOST={self.name}\n{prepare}",
        )
        self.machine.check("systemctl daemon-reload")
        return self

    def start(self) -> Guest:
        """Returns when it is ready: it has compared what runs with its leases."""
        self.machine.check(f"systemctl start {self.name}", 120)
        return self


def own_server(machine: Machine) -> None:
    """Starts the machine's PostgreSQL, now and at each boot, with a database ``bsup``."""
    machine.check("systemctl enable --now postgresql && createdb -U postgres bsup", 120)


class Wire:
    """Puts the stamps of one daemon's jobs in a machine into the world's files. Their host is ``<boot
    id>@<daemon>``."""

    def __init__(self, guest: Guest) -> None:
        self._machine = guest.machine
        self._world = guest.world
        self._name = guest.name
        self._told: set[str] = set()
        guest.machine.listeners.append(self._take)

    def _take(self, wired: Wired) -> None:
        said = wired.line.partition(" ")[2]
        if said.split()[0].partition("@")[2] != self._name:
            return
        self._told.add(said)
        self._append(said, wired.at)

    def _append(self, said: str, at: float) -> None:
        fd = os.open(self._world.stamps / said.split()[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.fchmod(fd, 0o666)  # runs of the same job on this computer append to it too
        with open(fd, "a") as file:
            file.write(f"{at:.2f} {said}\n")

    def complete(self) -> int:
        """Adds what the machine's files hold and the wire lost with the power, as of then. How many stamps those are.
        Fails where a stamp that was told is in no file: then the machine's disk lost what was synced."""
        files = self._machine.check(f"ls {self._world.stamps}").split()
        kept = {
            line.partition(" ")[2]
            for file in files
            # What follows the last line break is a line that the power went in the middle of.
            for line in self._machine.pull(f"{self._world.stamps}/{file}").decode().split("\n")[:-1]
        }
        assert self._told <= kept, f"synced, and lost with the power: {sorted(self._told - kept)[:5]}"
        late = kept - self._told
        for said in late:
            self._append(said, self._machine.ends[said.partition("@")[0]])
        return len(late)
