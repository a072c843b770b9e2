"""Runs, inside the machine, what a test sends; copies a FIFO to the outside. The only file of the tests in the image.

Standard library only; started by ``machine-agent.service`` as root. Two virtio ports lead out of the machine:

- ``agent``: a request a line, JSON, each answered by a line with its ``id``, in any order. ``run`` is a bash command,
  ended with all it started in the foreground after ``seconds``; ``put`` is a file's content, ``get`` a file's path.
- ``wire``: what is written to the FIFO ``/run/wire`` by anyone, at once. The test stamps it with its own clock, so it
  tells when work was done in a machine whose clocks stand still or lie.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import threading
import time

PORTS = "/dev/virtio-ports"
WIRE = "/run/wire"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def port(name: str) -> int:
    while not os.path.exists(f"{PORTS}/{name}"):
        time.sleep(0.02)  # udev makes it when it has loaded the driver
    return os.open(f"{PORTS}/{name}", os.O_RDWR | os.O_CLOEXEC)


def run(asked: dict) -> dict:
    process = subprocess.Popen(
        ["/bin/bash", "-c", asked["run"]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd="/",
        # PostgreSQL's own programs first: Debian's wrappers around them are Perl, which takes a second here.
        env={"PATH": f"/usr/lib/postgresql/15/bin:{PATH}", "HOME": "/root", "LANG": "C.UTF-8"},
    )
    try:
        out, _ = process.communicate(timeout=asked["seconds"])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate(timeout=10)
        out += f"\n(ended: not within {asked['seconds']} s)".encode()
    return {"code": process.returncode, "data": base64.b64encode(out).decode()}


def put(asked: dict) -> dict:
    path = asked["put"]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(base64.b64decode(asked["data"]))
    os.chmod(path, asked["mode"])
    return {}


def get(asked: dict) -> dict:
    with open(asked["get"], "rb") as file:
        return {"data": base64.b64encode(file.read()).decode()}


class Agent:
    def __init__(self) -> None:
        self.out = port("agent")
        self.lock = threading.Lock()

    def answer(self, asked: dict) -> None:
        try:
            found = next(do for name, do in (("run", run), ("put", put), ("get", get)) if name in asked)(asked)
        except Exception as error:  # told to the test, whose fault or finding it is
            found = {"error": f"{type(error).__name__}: {error}"}
        line = memoryview(json.dumps({"id": asked["id"], **found}).encode() + b"\n")
        with self.lock:
            while line:
                line = line[os.write(self.out, line) :]

    def serve(self) -> None:
        with os.fdopen(os.dup(self.out), "rb") as requests:
            while True:
                line = requests.readline()
                if line.strip():
                    threading.Thread(target=self.answer, args=(json.loads(line),), daemon=True).start()
                elif not line:
                    time.sleep(0.02)  # nobody is at the other end


def carry(fifo: int) -> None:
    wire = port("wire")
    while True:
        data = memoryview(os.read(fifo, 65536))
        while data:
            data = data[os.write(wire, data) :]


def fifo() -> int:
    """Opened for both, so that it has no end when a writer leaves."""
    if not os.path.exists(WIRE):
        os.mkfifo(WIRE)
    os.chmod(WIRE, 0o666)
    return os.open(WIRE, os.O_RDWR | os.O_CLOEXEC)


def network() -> None:
    while not os.path.exists("/sys/class/net/eth0"):
        time.sleep(0.02)  # udev loads its driver
    for words in ("link set lo up", "addr add 10.0.2.15/24 dev eth0", "link set eth0 up"):
        subprocess.run(["ip", *words.split()], check=True)


def ready() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])


if __name__ == "__main__":
    network()
    threading.Thread(target=carry, args=(fifo(),), daemon=True).start()
    ready()
    Agent().serve()
