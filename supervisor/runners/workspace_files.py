"""Writes a job's files into its checkout, never through a symbolic link. Standard library only.

Called by ``checkout``, in the checkout's own process, before anything of the job's own has run. The tree may hold
whatever a repository can (symbolic links to anywhere among it), so every part of a path is opened below the one before,
and none of them is followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping

from supervisor.runners.git import CheckoutError, printable

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO must fail, not wait.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def write_files(root: str, files: Mapping[str, str]) -> None:
    """Writes each file (path relative to ``root`` → text), making its directories; CheckoutError names a bad path.

    A file that is there is overwritten and keeps its mode; a new one gets 0644, or 0755 if it begins with ``#!``.
    """
    top = os.open(root, _DIRECTORY)
    try:
        for path, text in files.items():
            try:
                _write(top, path, text.encode())
            except OSError as error:
                raise CheckoutError(f"files[{printable(path)!r}]: {_reason(error)}") from error
    finally:
        os.close(top)


def _write(top: int, path: str, content: bytes) -> None:
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise CheckoutError(f"files[{printable(path)!r}]: the path leaves the workspace, or is none")
    with contextlib.ExitStack() as opened:
        directory = top
        for part in parts[:-1]:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=directory)
            _refuse_link(part, directory)
            directory = os.open(part, _DIRECTORY, dir_fd=directory)
            opened.callback(os.close, directory)
        _refuse_link(parts[-1], directory)
        mode = 0o755 if content.startswith(b"#!") else 0o644
        fd = os.open(parts[-1], _NEW_FILE, mode, dir_fd=directory)
        with open(fd, "wb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            file.truncate()
            file.write(content)


def _refuse_link(part: str, directory: int) -> None:
    """For the words of the error alone: the opening itself refuses links with an errno that depends on the flags."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISLNK(os.stat(part, dir_fd=directory, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, f"leads through the symbolic link {part!r}")


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.ELOOP:
            return printable(error.strerror or "leads through a symbolic link")
        case errno.ENOTDIR:
            return "leads through a file"
        case errno.EISDIR:
            return "is a directory"
        case _:
            return printable(error.strerror or str(error))
