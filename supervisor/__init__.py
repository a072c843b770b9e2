"""bsup: a build supervisor. One asyncio daemon per build host leases jobs from PostgreSQL and never loses one.

The map, top-down: ``app`` puts everything together; ``actors`` act; ``store``, ``runners`` and ``sinks`` touch the
outside; ``protocol``, ``messages``, ``mailbox`` and ``ports`` are the words between them; ``model`` decides, without
I/O;
``shepherd`` owns the jobs' processes and lives on when the daemon dies.
"""

__version__ = "0.1.0"
