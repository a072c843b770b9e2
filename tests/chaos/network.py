"""Hosts that can be cut off: network namespaces that a test makes for itself, each joined by a cable of its own to a
hub in which the database listens.

    with Network() as network:
        wire = network.join("a")              # ``wire.prefix`` runs a command on that host
        network.cut(wire)                     # all of its packets vanish; nobody is told
        network.heal(wire)
        network.kill_flows([41234])           # those of one connection do, by the client's port

No name or address is shared with the machine or another test: namespaces are named by this process, and the addresses
exist within them only. A cut is a drop in the hub (nftables): no reset, no ICMP, the cable looks well. Needs root,
``ip`` and ``nft``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

NAMESPACES = Path("/run/netns")
_NAME = re.compile(r"bsup-(\d+)-\d+-\w+")
_numbers = itertools.count()

_RULES = """
table inet bsup {
    set cut { type ifname; }
    set dead { type inet_service; }
    chain arriving {
        type filter hook input priority 0;
        iifname @cut drop
        tcp sport @dead drop
    }
    chain leaving {
        type filter hook output priority 0;
        oifname @cut drop
        tcp dport @dead drop
    }
}
"""


def is_there() -> bool:
    """Whether this machine has what it takes."""
    tools = all(shutil.which(tool) for tool in ("ip", "nft", "nsenter"))
    return os.geteuid() == 0 and tools and Path("/proc/self/ns/net").exists()


@dataclass(frozen=True)
class Wire:
    """A host's end. ``address``: its own; ``database``: where it finds the hub."""

    namespace: str
    interface: str
    address: str
    database: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return inside(self.namespace)


def inside(namespace: str) -> tuple[str, ...]:
    """What a command runs behind to be in that namespace. Not ``ip netns exec``, which hides the cgroups too."""
    return ("nsenter", f"--net={NAMESPACES / namespace}", "--")


class Network:
    """A hub, and what is joined to it. All is gone when it is left, however."""

    def __init__(self) -> None:
        self._name = f"bsup-{os.getpid()}-{next(_numbers)}"
        self.hub = f"{self._name}-hub"
        self._namespaces: list[str] = []

    def __enter__(self) -> Network:
        _remove_leftovers()
        try:
            self._add(self.hub)
            run(*inside(self.hub), "nft", "-f", "-", stdin=_RULES)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def prefix(self) -> tuple[str, ...]:
        """Runs a command in the hub."""
        return inside(self.hub)

    def join(self, name: str) -> Wire:
        """A new host with a cable to the hub."""
        number = len(self._namespaces)
        namespace, port = f"{self._name}-{name}", f"h{number}"
        here, there = f"10.0.{number}.1", f"10.0.{number}.2"
        self._add(namespace)
        run(
            "ip", "-n", self.hub, "link", "add", "name", port, "type", "veth", "peer", "name", "up0", "netns", namespace
        )
        for where, interface, address in ((self.hub, port, here), (namespace, "up0", there)):
            run("ip", "-n", where, "address", "add", f"{address}/24", "dev", interface)
            run("ip", "-n", where, "link", "set", interface, "up")
        return Wire(namespace, port, there, here)

    def cut(self, *wires: Wire) -> None:
        self._change("add", "cut", (wire.interface for wire in wires))

    def heal(self, *wires: Wire) -> None:
        self._change("delete", "cut", (wire.interface for wire in wires))

    def kill_flows(self, ports: Iterable[int]) -> None:
        """The connections from these ports of clients get nothing through any more, in either direction."""
        self._change("add", "dead", map(str, ports))

    def close(self) -> None:
        while self._namespaces:
            _remove(self._namespaces.pop())

    def _add(self, namespace: str) -> None:
        run("ip", "netns", "add", namespace)
        self._namespaces.append(namespace)
        run("ip", "-n", namespace, "link", "set", "lo", "up")

    def _change(self, verb: str, what: str, elements: Iterable[str]) -> None:
        listed = ", ".join(elements)
        run(*self.prefix, "nft", verb, "element", "inet", "bsup", what, f"{{ {listed} }}")


def run(*command: str, stdin: str | None = None) -> str:
    """What it printed. Fails the test with what it complained of."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} ended {done.returncode}: {done.stderr}")
    return done.stdout


def _remove(namespace: str) -> None:
    """Its cables go with it; a process that is still in it keeps it, nameless, until it ends."""
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=60)


def _remove_leftovers() -> None:
    """Those of test runs that were killed."""
    with contextlib.suppress(FileNotFoundError):
        for entry in NAMESPACES.iterdir():
            made = _NAME.fullmatch(entry.name)
            if made is not None and not Path(f"/proc/{made[1]}").exists():
                _remove(entry.name)
