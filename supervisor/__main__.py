"""``python -m supervisor`` and the ``bsup`` command."""

from __future__ import annotations

import sys

from supervisor.cli.entry import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
