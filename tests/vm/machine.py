"""A whole Debian 12 machine under qemu's emulation: systemd, journald, PostgreSQL 15, Docker, cgroup v2, clocks of its
own.

``Machine(directory, name)`` has a disk, an overlay of the cached image that lives as long as its directory; ``boot``
starts qemu on it, ``cut`` takes its power. What the machine had not synced is lost then: what its kernel held, and, as
the overlay's own tables are qemu's to write, clusters that were new since the last flush. ``run`` and its like go
through a virtio port to the agent in the image. Every call has a deadline, and what fails shows the end of the console.

The machine reaches nothing. ``links`` opens single addresses: a name of a Unix socket of this computer for each port of
10.0.2.100, where the machine finds it (the tests' PostgreSQL). ``forward`` is a port of the machine that the loopback
of this computer reaches.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from image import bsup_drive, image
from qmp import Qmp

BOOT = 180.0
"""Seconds for a boot: it takes 20 on two cores of its own, much longer where others use them."""
RELAY = Path(__file__).with_name("relay.py")


class Ran(NamedTuple):
    """How a command ended; ``out`` holds both streams."""

    code: int
    out: str


class Wired(NamedTuple):
    """A line from the machine's ``/run/wire``, and when it arrived by this computer's boot-time clock."""

    at: float
    line: str


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Machine:
    def __init__(self, directory: Path, name: str = "vm", *, memory: int = 1024, cpus: int = 2) -> None:
        self.directory = directory
        self.name = name
        self.listeners: list[Callable[[Wired], None]] = []
        self.boots = 0
        self.boot_id = ""
        self.ends: dict[str, float] = {}
        self._options = ["-m", str(memory), "-smp", str(cpus)]
        self._qemu: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp | None = None
        self._agent: _Agent | None = None
        self._image = image()
        directory.mkdir(parents=True, exist_ok=True)
        self._disk = directory / "disk.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self._image / "disk", self._disk], check=True
        )
        self._drive = directory / "bsup.ext4"
        bsup_drive(self._drive)

    # --- power ------------------------------------------------------------------------------------------------

    def boot(self, *, links: Mapping[int, Path] | None = None, forward: Mapping[int, int] | None = None) -> Machine:
        """Returns when the machine has booted and answers. ``forward``: loopback port here → port there."""
        assert self._qemu is None, "it runs"
        # Else qemu would not end with the tests, however they end: PDEATHSIG follows the thread that forked.
        assert threading.current_thread() is threading.main_thread()
        self.boots += 1
        self._console = self.directory / f"console.{self.boots}"
        for socket_name in ("qmp", "agent", "wire"):
            (self.directory / socket_name).unlink(missing_ok=True)
        self._qemu = subprocess.Popen(
            self._command(links or {}, forward or {}),
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / "qemu.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + BOOT
        self._qmp = Qmp(self._connected("qmp", deadline))
        self._agent = _Agent(self._connected("agent", deadline))
        threading.Thread(target=self._listen, args=(self._connected("wire", deadline),), daemon=True).start()
        self.boot_id = self.check("cat /proc/sys/kernel/random/boot_id", deadline - time.monotonic()).strip()
        return self

    def _command(self, links: Mapping[int, Path], forward: Mapping[int, int]) -> list[str]:
        net = "user,id=net0,restrict=on,ipv6=off"
        for port, path in links.items():
            net += f",guestfwd=tcp:10.0.2.100:{port}-cmd:{sys.executable} -I -S {RELAY} {path}"
        for outer, inner in forward.items():
            net += f",hostfwd=tcp:127.0.0.1:{outer}-:{inner}"
        words = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"]
        words += [*self._options, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-kernel", str(self._image / "vmlinuz"), "-initrd", str(self._image / "initrd"), "-append"]
        words += [
            "root=/dev/vda rw console=ttyS0 loglevel=4 net.ifnames=0 mitigations=off panic=-1 "
            "clocksource=tsc tsc=reliable "
            f"systemd.show_status=no systemd.hostname={self.name}"
        ]
        words += ["-drive", f"file={self._disk},if=virtio,format=qcow2,cache=writeback"]
        words += ["-drive", f"file={self._drive},if=virtio,format=raw,readonly=on"]
        words += ["-serial", f"file:{self._console}", "-netdev", net, "-device", "virtio-net-pci,netdev=net0,id=nic0"]
        words += ["-qmp", f"unix:{self.directory}/qmp,server=on,wait=off", "-device", "virtio-serial-pci"]
        for port_name in ("agent", "wire"):
            words += ["-chardev", f"socket,id={port_name},path={self.directory}/{port_name},server=on,wait=off"]
            words += ["-device", f"virtserialport,chardev={port_name},name={port_name}"]
        return words

    def _connected(self, name: str, deadline: float) -> socket.socket:
        """A connection to one of qemu's sockets, as soon as it listens."""
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.directory / name))
                return connection
            except OSError:
                connection.close()
            if self._qemu is None or self._qemu.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"qemu did not start:\n{self.story()}")
            time.sleep(0.01)

    def cut(self) -> None:
        """Takes the power away, now."""
        if self._qemu is not None:
            self._qemu.kill()
            self._gone()

    def wait_for_end(self, deadline: float = 60.0) -> None:
        """Until the machine has ended itself: a panic, a power-off, a reboot."""
        assert self._qemu is not None
        try:
            self._qemu.wait(deadline)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {deadline} s:\n{self.story()}") from None
        self._gone()

    def _gone(self) -> None:
        assert self._qemu is not None
        self._qemu.wait()
        self._qemu = None
        self.ends[self.boot_id] = now()
        if self._agent is not None:
            self._agent.close()
        if self._qmp is not None:
            self._qmp.close()
        self._agent = self._qmp = None

    # --- the machine as a whole -------------------------------------------------------------------------------

    def pause(self) -> float:
        """Stops the machine's processors, and with them all its clocks but the battery's. Returns when."""
        self._control("stop")
        return now()

    def resume(self) -> float:
        at = now()
        self._control("cont")
        return at

    def plug(self, *, network: bool) -> None:
        """Puts its network cable in, or pulls it out: what is on its way is lost, and nobody is told."""
        self._control("set_link", name="nic0", up=network)

    def _control(self, what: str, **arguments: Any) -> None:
        assert self._qmp is not None, "it is off"
        self._qmp.ask(what, **arguments)

    def step_clock(self, seconds: float) -> None:
        """Sets the machine's wall clock forward or back. Boot-time and monotonic clocks don't step."""
        self.check(f"date -s @$(( $(date +%s) + {round(seconds)} ))")

    # --- commands ---------------------------------------------------------------------------------------------

    def run(self, command: str, deadline: float = 60.0) -> Ran:
        """Runs a bash command as root. What it leaves in the background goes on."""
        answer = self._ask({"run": command, "seconds": max(1.0, deadline - 2)}, deadline, command)
        return Ran(answer["code"], base64.b64decode(answer["data"]).decode(errors="replace"))

    def check(self, command: str, deadline: float = 60.0) -> str:
        """As ``run``, for a command that must succeed; its output."""
        done = self.run(command, deadline)
        if done.code != 0:
            raise AssertionError(f"{self.name}: {command!r} ended {done.code}:\n{done.out}")
        return done.out

    def until(self, condition: str, what: str, deadline: float = 60.0) -> str:
        """The output of a bash command once it succeeds: asked for again and again, in the machine."""
        loop = f'until out=$({condition}); do sleep 0.05; done; printf %s "$out"'
        done = self.run(loop, deadline)
        if done.code != 0:
            raise AssertionError(f"{self.name}: not within {deadline} s: {what}\n{done.out}\n{self.story()}")
        return done.out

    def push(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        raw = data.encode() if isinstance(data, str) else data
        self._ask({"put": path, "data": base64.b64encode(raw).decode(), "mode": mode}, 60.0, f"push {path}")

    def pull(self, path: str) -> bytes:
        return base64.b64decode(self._ask({"get": path}, 60.0, f"pull {path}")["data"])

    def _ask(self, asked: dict[str, Any], deadline: float, what: str) -> dict[str, Any]:
        assert self._agent is not None, "it is off"
        try:
            answer = self._agent.ask(asked, deadline)
        except (OSError, TimeoutError) as error:
            said = f"{self.name}: {what!r}: {error} (asked for {deadline:.0f} s)\n{self.story()}"
            raise AssertionError(said) from None
        if "error" in answer:
            raise AssertionError(f"{self.name}: {what!r}: {answer['error']}")
        return answer

    def _listen(self, wire: socket.socket) -> None:
        with wire, wire.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                if line.endswith(b"\n"):  # else the power went in the middle of it
                    for listener in self.listeners:
                        listener(Wired(now(), line.decode(errors="replace").rstrip("\n")))

    def story(self) -> str:
        """The end of the console, of what qemu says and, where the machine still answers, of its journal."""
        said = [f"--- {self.name}, boot {self.boots}"]
        for file in (self.directory / "qemu.log", self._console):
            if file.exists():
                said.append(file.read_text(errors="replace")[-4000:])
        if self._agent is not None and not self._agent.is_silent:
            try:
                answer = self._agent.ask({"run": _TOLD, "seconds": 10}, 12)
                said.append(base64.b64decode(answer.get("data", "")).decode(errors="replace"))
            except (OSError, TimeoutError) as error:
                said.append(f"no journal: {error}")
        return "\n".join(said)


_JOURNAL = "journalctl -b -o short-monotonic --no-pager"
_TOLD = f"systemctl --failed -q; {_JOURNAL} -u 'bsup*' -n 60; {_JOURNAL} -p warning -n 30; ps -eo pid,stat,args"


class _Agent:
    """This end of the port ``agent``. Calls of several threads go on at once; raises OSError, TimeoutError."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._ids = itertools.count(1)
        self._sending = threading.Lock()
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._is_open = True
        self.is_silent = False
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, asked: dict[str, Any], deadline: float) -> dict[str, Any]:
        id = next(self._ids)
        with self._sending:
            self._socket.sendall(json.dumps({"id": id, **asked}).encode() + b"\n")
        with self._changed:
            self._changed.wait_for(lambda: id in self._answers or not self._is_open, deadline)
            if id in self._answers:
                return self._answers.pop(id)
            if not self._is_open:
                raise ConnectionError("the machine is gone")
            self.is_silent = True
            raise TimeoutError("no answer in time")

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                for line in lines:
                    answer = json.loads(line)
                    with self._changed:
                        self._answers[answer["id"]] = answer
                        self._changed.notify_all()
        except (OSError, ValueError):
            pass  # qemu was killed in the middle of a line
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
