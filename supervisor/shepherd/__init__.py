"""The shepherd: the small process that is the parent of every job's process and lives on when the daemon dies.

It starts steps, copies their output to files, writes down how they ended, and kills everything they leave behind; when
the fence passes it ends all work, daemon or none. ``server`` takes requests from the daemon's uid on a Unix socket,
``host`` owns the live steps, ``step`` is the life of one, ``launcher`` makes their processes, ``spawn`` is what happens
between fork and exec, ``output`` moves bytes, ``kill`` finds and ends processes. ``guardian`` begins a killed shepherd
anew and keeps what it would lose (``bond``), ``heirs`` goes on with its steps, ``sweep`` ends those with which nobody
can. ``files``, ``spec`` and ``fence`` read and write the state directory, ``trees`` and ``spares`` make and remove what
is below it, ``loop`` waits, ``linux`` holds the calls Python has no name for.

Standard library only, and everything is imported at the start: it outlives upgrades of the package on disk. Nothing
imports it but its own tests; its client (``runners/shepherd_client.py``) shares with it the files and the socket's
words.
"""
