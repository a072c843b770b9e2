"""Who is at the other end of the control socket, and what that user may call.

May import ``protocol`` and the standard library. Called by the control actor for each connection; it asks the user
database, which may be slow (LDAP), so it runs in a thread. Identity comes from the kernel (SO_PEERCRED) as it was when
the peer connected; groups from the user database as it is now, so that leaving a group ends a role at once.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
from collections.abc import Sequence

import msgspec

from supervisor.protocol import Role

_CREDENTIALS = struct.Struct("iII")

Principal = str | int
"""A user name ("alice"), a group ("@builders") or a uid (1000)."""


class Roles(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds which role. root and the daemon's own user are admins whatever is said here."""

    admin: Sequence[Principal] = ()
    operator: Sequence[Principal] = ()
    viewer: Sequence[Principal] = ()


class Credentials(msgspec.Struct, frozen=True):
    """What the kernel says of a peer."""

    pid: int
    uid: int
    gid: int


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A user at the other end. ``role`` None: may call nothing. ``user``: the name, or ``uid 1234`` without one."""

    pid: int
    uid: int
    gid: int
    user: str
    groups: frozenset[str] = frozenset()
    role: Role | None = None

    def __str__(self) -> str:
        return f"{self.user} (uid {self.uid}, pid {self.pid})"


def credentials_of(connection: socket.socket) -> Credentials:
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Credentials(*_CREDENTIALS.unpack(packed))


def identify(credentials: Credentials, roles: Roles) -> Peer:
    """The user and the highest role. Blocks on the user database."""
    try:
        entry = pwd.getpwuid(credentials.uid)
    except KeyError:
        user, gids = f"uid {credentials.uid}", [credentials.gid]
    else:
        user, gids = entry.pw_name, [*os.getgrouplist(entry.pw_name, entry.pw_gid), credentials.gid]
    peer = Peer(
        pid=credentials.pid,
        uid=credentials.uid,
        gid=credentials.gid,
        user=user,
        groups=frozenset(name for gid in gids if (name := _group_name(gid)) is not None),
    )
    return msgspec.structs.replace(peer, role=role_of(peer, roles))


def by_number(credentials: Credentials, roles: Roles) -> Peer:
    """The peer as far as the kernel alone knows it."""
    pid, uid, gid = credentials.pid, credentials.uid, credentials.gid
    peer = Peer(pid=pid, uid=uid, gid=gid, user=f"uid {uid}")
    return msgspec.structs.replace(peer, role=role_of(peer, roles))


def role_of(peer: Peer, roles: Roles) -> Role | None:
    """The highest role that the user's name, uid or groups give."""
    if peer.uid in (0, os.geteuid()):
        return Role.ADMIN
    given = ((Role.ADMIN, roles.admin), (Role.OPERATOR, roles.operator), (Role.VIEWER, roles.viewer))
    return next((role for role, principals in given if any(_is(peer, one) for one in principals)), None)


def _is(peer: Peer, principal: Principal) -> bool:
    if isinstance(principal, int):
        return peer.uid == principal
    if principal.startswith("@"):
        return principal[1:] in peer.groups
    return peer.user == principal


def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None
