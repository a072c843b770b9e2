"""The shepherd: the small process that is the parent of every job's process and lives on when the daemon dies.

It starts steps, copies their output to files, writes down how they ended, and kills everything they leave behind; when
the fence passes it ends all work, daemon or none. ``server`` takes requests from the daemon's uid on a Unix socket,
``host`` owns the live steps, ``step`` is the life of one, ``spawn`` is what happens between fork and exec, ``output``
moves bytes, ``kill`` finds and ends processes, ``sweep`` cleans up after a shepherd that died, ``files``, ``spec`` and
``fence`` read and write the state directory, ``loop`` waits. ``linux`` holds the calls Python has no name for.

Standard library only, and everything is imported at the start: it outlives upgrades of the package on disk. Nothing
imports it but its own tests; its client (``runners/shepherd_client.py``) shares with it the files and the socket's
words.
"""
