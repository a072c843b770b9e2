"""``python -m supervisor`` and the ``bsup`` command."""

from __future__ import annotations

import gc
import sys


def main() -> int:
    """One command, from the process's own arguments; its exit code."""
    # Nothing of what a start imports is garbage: to look for it there, and at all of it once more when the process
    # ends, takes a sixth of a command's time. ``entry`` collects again while a command runs.
    gc.disable()
    from supervisor.cli.entry import main as run

    code = run()
    gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(main())
