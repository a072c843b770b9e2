"""What goes wrong at the database, in bsup's own errors. Used by ``connection``, ``migrate`` and ``listen``.

The SQL functions of the schema raise SQLSTATEs of their own (class BS) and 22023 with the field in COLUMN; see the
migrations. Everything that means *not reachable*, *not now*, or *outcome unknown* is StoreUnavailable.
"""

from __future__ import annotations

import asyncpg

from supervisor.model.errors import BsupError, InvalidInput, SessionRefused, StoreUnavailable, UnknownJob, WrongState

# What a connection or a statement on it may raise.
FAULTS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError, EOFError)

# SQLSTATEs after which the same statement may well succeed later, or on another server of the DSN.
_PASSING = (
    "08",  # connection exceptions
    "25006",  # a server that has become a standby
    "40",  # rolled back: serialization, deadlock, unknown completion
    "53",  # out of resources: connections, disk, memory
    "55P03",  # a lock that did not come in time
    "55006",  # an object in use
    "57",  # canceled, shutting down, starting up
    "58",  # system errors
    "XX",  # internal errors
)
_REFUSED = (
    "28",  # authentication
    "3D000",  # no such database
    "42501",  # a missing grant
)
_NO_SCHEMA = ("3F000", "42P01", "42703", "42883")
_CLASHES = ("42P05", "26000")
# After these the connection itself is in order.
_CONNECTION_LIVES = ("22", "23", "40001", "40P01", "42", "55", "57014", "BS", "P0")


def translate(error: BaseException, doing: str) -> BsupError:
    """The error to raise for one of FAULTS; ``doing`` is the statement's name, for the message."""
    if not isinstance(error, asyncpg.PostgresError):
        return StoreUnavailable(f"{doing}: {_words(error)}")
    state = error.sqlstate or ""
    message = str(getattr(error, "message", None) or error)
    if state == "BS001":
        return UnknownJob(int(error.detail or 0))
    if state == "BS002":
        return WrongState(int(error.detail or 0), error.column_name or "", error.hint or message)
    if state == "BS003":
        return SessionRefused(message)
    if state == "22023" and error.column_name:
        return InvalidInput(error.column_name, error.detail or message, error.hint or "")
    if state.startswith("22"):
        # Not the message: it may quote the value.
        return InvalidInput(
            "input", f"{doing}: the database can't take a value (SQLSTATE {state})", "text without NULs"
        )
    if state.startswith(_NO_SCHEMA):
        return StoreUnavailable(
            f"the database lacks bsup's schema, or has an older one: run `bsup migrate` ({message})"
        )
    if state.startswith(_PASSING) or state.startswith(_REFUSED):
        return StoreUnavailable(f"{doing}: {message}")
    return BsupError(
        f"{doing}: the database refused a statement of bsup's own (SQLSTATE {state}); this is a fault of bsup"
    )


def is_of_a_pooler(error: asyncpg.PostgresError) -> bool:
    """Whether it tells that a pooler in transaction mode was connected to: it refuses settings that it doesn't track,
    or a statement that was prepared by name clashes with another client's."""
    state, message = error.sqlstate or "", str(error)
    return state in _CLASHES or (state in ("08P01", "42704") and "startup parameter" in message)


def breaks_connection(error: BaseException) -> bool:
    """Whether the connection must not be used again: anything but an error that the server reported and survived."""
    if not isinstance(error, asyncpg.PostgresError) or isinstance(error, asyncpg.PostgresConnectionError):
        return True
    return not (error.sqlstate or "").startswith(_CONNECTION_LIVES)


def _words(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "the database did not answer in time"
    return str(error) or type(error).__name__
