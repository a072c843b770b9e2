"""Carries one connection of a machine to a Unix socket: qemu runs it for each, with the connection as stdin and
stdout."""

import os
import select
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    to = {0: server.fileno(), server.fileno(): 1}
    while True:
        for ready in select.select(list(to), [], [])[0]:
            data = memoryview(os.read(ready, 65536))
            if not data:
                sys.exit()
            while data:
                data = data[os.write(to[ready], data) :]
