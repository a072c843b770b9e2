"""Linux calls that Python 3.11 has no name for, by ctypes. Standard library only; called by ``spawn`` and
``__main__``."""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWNS = 0x00020000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19

_LONG = ctypes.sizeof(ctypes.c_long)
_GET_FLAGS = 2 << 30 | _LONG << 16 | ord("f") << 8 | 1

# Loaded at the start: a child of a fork does as little as it can.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]


def become_subreaper() -> None:
    """Orphans below this process become its children, whatever they forked and setsid."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def give_up_new_privileges() -> None:
    """No setuid program gives this process or its children another uid: what has the job's uid is all there is."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent(signal: int) -> None:
    """Must follow the change of uid, which clears it."""
    _prctl(_PR_SET_PDEATHSIG, signal)


def name_process(name: str) -> None:
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(buffer))


def own_mounts() -> None:
    """A mount namespace of its own: mounts made here stay here, the host's later ones still come in."""
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None))


def enter_mounts(namespace: int) -> None:
    """The working directory is that namespace's root then."""
    _check(_libc.setns(namespace, _CLONE_NEWNS))


def bind(source: int, target: str, *, recursive: bool = False) -> None:
    """Shows the directory open as ``source`` at ``target`` too."""
    flags = _MS_BIND | (_MS_REC if recursive else 0)
    _check(_libc.mount(f"/proc/self/fd/{source}".encode(), os.fsencode(target), None, flags, None))


def inode_flags(fd: int) -> int:
    """What ``lsattr`` shows; 0 where the file system knows none."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, _GET_FLAGS, bytes(_LONG)), sys.byteorder)
    except OSError:
        return 0


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
