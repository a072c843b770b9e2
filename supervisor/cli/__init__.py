"""The command line. ``entry.main`` is where it begins; ``commands`` is the table of what there is.

May import everything. Each command is a function ``(args, terminal) -> exit code`` in a module that is imported
only when that command is called, so that ``bsup --help`` and ``bsup status`` start in the time of the interpreter:
none of them imports asyncio, and nothing here may do so at the top of a module.
"""
