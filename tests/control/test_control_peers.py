"""Who a peer is comes from the kernel; what it may do from names, groups and uids."""

from __future__ import annotations

import grp
import json
import os
import pwd
import socket
import subprocess
import sys

import pytest
from anyio import to_thread
from control_world import World

from supervisor.actors.control_peers import Credentials, Peer, Roles, by_number, credentials_of, identify, role_of
from supervisor.protocol import Role

AS_ANOTHER = """
import json, os, socket, sys
uid, gid, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.setgroups([]); os.setgid(gid); os.setuid(uid)
peer = socket.socket(socket.AF_UNIX); peer.connect(path)
def call(method, more=False, **parameters):
    peer.sendall(json.dumps({"method": method, "more": more, "parameters": parameters}).encode() + b"\\0")
    data = b""
    while not data.endswith(b"\\0"):
        data += peer.recv(65536)
    return json.loads(data[:-1].split(b"\\0")[0]).get("error", "")
names = ["Version", "Resume"]
print(json.dumps([call("org.varlink.service.GetInfo")] + [call("io.bsup.Supervisor." + name) for name in names]
                 + [call("io.bsup.Supervisor.Stop", True, ids=[1])]))
"""

DENIED = "io.bsup.Supervisor.PermissionDenied"
UNKNOWN = "io.bsup.Supervisor.UnknownJob"


def peer(uid: int = 4242, user: str = "alice", groups: tuple[str, ...] = ("builders",)) -> Peer:
    return Peer(pid=1, uid=uid, gid=uid, user=user, groups=frozenset(groups))


@pytest.mark.parametrize(
    ("roles", "role"),
    [
        (Roles(), None),
        (Roles(viewer=["alice"]), Role.VIEWER),
        (Roles(viewer=["alice"], operator=["@builders"]), Role.OPERATOR),
        (Roles(admin=[4242], viewer=["alice"]), Role.ADMIN),
        (Roles(admin=["builders", "@alice", "4242", 4243]), None),
    ],
)
def test_the_highest_role_holds(roles: Roles, role: Role | None) -> None:
    """A name is a user, ``@name`` a group, a number a uid; they are never mixed up."""
    assert role_of(peer(), roles) is role


def test_root_and_the_daemons_own_user_are_admins() -> None:
    assert role_of(peer(uid=0, user="root"), Roles()) is Role.ADMIN
    assert role_of(peer(uid=os.geteuid()), Roles()) is Role.ADMIN


def test_a_user_is_known_by_name_and_groups_and_one_without_an_entry_by_number() -> None:
    entry = pwd.getpwuid(os.getuid())
    me = identify(Credentials(1, os.getuid(), os.getgid()), Roles())
    assert me.user == entry.pw_name and grp.getgrgid(entry.pw_gid).gr_name in me.groups
    nobody = identify(Credentials(1, 3_999_999_999, 3_999_999_999), Roles(viewer=[3_999_999_999]))
    assert (nobody.user, nobody.groups, nobody.role) == ("uid 3999999999", frozenset(), Role.VIEWER)


def test_what_the_kernel_alone_knows_gives_the_roles_of_numbers() -> None:
    roles = Roles(operator=[4242], admin=["daemon"])
    assert by_number(Credentials(1, 4242, 1), roles).role is Role.OPERATOR
    assert by_number(Credentials(1, 0, 0), roles).role is Role.ADMIN
    assert by_number(Credentials(1, 1, 1), roles).role is None


def test_credentials_come_from_the_kernel() -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert credentials_of(here) == Credentials(os.getpid(), os.getuid(), os.getgid())


@pytest.mark.root
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("roles", "answers"),
    [
        (Roles(), ["", DENIED, DENIED, DENIED]),
        (Roles(viewer=["nobody"]), ["", "", DENIED, DENIED]),
        (Roles(operator=["@nogroup"]), ["", "", DENIED, UNKNOWN]),
        (Roles(admin=[pwd.getpwnam("nobody").pw_uid]), ["", "", "", UNKNOWN]),
    ],
)
async def test_another_user_gets_the_role_of_the_configuration(world: World, roles: Roles, answers: list[str]) -> None:
    world.identify = None
    world.roles = roles
    entry = pwd.getpwnam("nobody")
    command = [sys.executable, "-c", AS_ANOTHER, str(entry.pw_uid), str(entry.pw_gid), world.path]
    async with world.serve():
        done = await to_thread.run_sync(lambda: subprocess.run(command, capture_output=True, check=True))
    assert json.loads(done.stdout) == answers
