"""What a host is short of, by its own file systems and limits: free space, open files; and that it doesn't waver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from supervisor.runners.host_room import MIN_FILES, StateRoom

PROGRAM = f"""
import os, resource
from pathlib import Path
from supervisor.runners.host_room import StateRoom
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
room = StateRoom(Path("/"), 0)
opened = []
while room.lacking() is None:
    opened.append(os.open("/", os.O_RDONLY))
print(opened[-1], room.lacking())
os.close(opened.pop())
print(room.lacking() is None)
while opened[-1] > 512 - 1.1 * {MIN_FILES} - 2:
    os.close(opened.pop())
print(room.lacking())
try:
    while True:
        opened.append(os.open("/", os.O_RDONLY))
except OSError:
    print(room.lacking())
"""


def free(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def test_a_disk_with_less_free_than_its_mark_is_said_to_be_short_of_it(tmp_path: Path) -> None:
    assert StateRoom(tmp_path, 0).lacking() is None
    assert StateRoom(tmp_path, free(tmp_path) // 2).lacking() is None
    said = StateRoom(tmp_path, 1 << 50).lacking()
    assert said is not None
    assert str(tmp_path) in said and said.endswith("state.min_free is 1024TiB")


def test_it_has_room_again_only_a_tenth_above_its_mark(tmp_path: Path) -> None:
    at_the_mark = int(free(tmp_path) / 1.05)
    room = StateRoom(tmp_path, at_the_mark)
    assert room.lacking() is None
    room.min_free = 1 << 50
    assert room.lacking() is not None
    room.min_free = at_the_mark
    assert room.lacking() is not None
    room.min_free = free(tmp_path) // 2
    assert room.lacking() is None


def test_a_state_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    said = StateRoom(tmp_path / "gone", 0).lacking()
    assert said is not None and "can't be looked at" in said


def test_a_process_that_has_nearly_all_its_files_open_is_said_to() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    limit, mark = 512, 512 - MIN_FILES
    assert done.stdout.splitlines() == [
        f"{mark} the daemon has {mark + 1} files open, its limit is {limit}",
        "False",
        "None",
        f"the daemon can open no more files: Too many open files; its limit is {limit}",
    ]
