"""Without root there is one uid: everything works but what needs others, and ``status`` says what is absent."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
from yard import Yard, children, is_alive, until

pytestmark = pytest.mark.root  # to become someone else

SOMEONE = 251_900


@pytest.fixture
def plain_yard(make_yard: Callable[..., Yard]) -> Iterator[Yard]:
    yard = make_yard(with_uids=False, as_uid=SOMEONE)
    yard.launch()
    yield yard
    assert yard.link.ask(do="status")["live"] == []
    until(lambda: children(yard.pid) == [], "no process is left")


def test_it_says_what_is_absent(plain_yard: Yard) -> None:
    isolation = plain_yard.link.ask(do="status")["isolation"]
    assert isolation["users"].startswith("absent: not root")
    assert isolation["tmp"].startswith("absent: not root")


def test_a_step_runs_as_the_same_uid_with_tmpdir_for_tmp(plain_yard: Yard) -> None:
    ended = plain_yard.run("id -u; echo $TMPDIR; exit 2", private_tmp=True)
    assert ended.how == (2, None, None)
    assert ended.out.decode().split() == [str(SOMEONE), f"{plain_yard.state}/work/r-1/tmp"]
    assert '"private_tmp":false' in (ended.step / "started").read_text()


@pytest.mark.parametrize("uid", [0, 251_000, SOMEONE + 1])
def test_no_other_uid_is_given(plain_yard: Yard, uid: int) -> None:
    plain_yard.workspace()
    step = plain_yard.write_step("true", **{"uid": uid})
    assert plain_yard.link.ask(do="start", dir=str(step))["code"] == "policy"


def test_an_escapee_that_scrubbed_its_environment_is_killed(plain_yard: Yard) -> None:
    step = plain_yard.start(
        "cd /; (setsid env -i WORDS=$WORDS sh -c 'trap \"\" TERM; (sleep 1000 & echo $! > $WORDS) &'"
        " < /dev/null > /dev/null 2>&1 &); read x < $GO"
    )
    pid = int(plain_yard.word())
    plain_yard.go()
    plain_yard.ended(step)
    assert not is_alive(pid)


def test_stop_kills_all_after_the_grace(plain_yard: Yard) -> None:
    step = plain_yard.start("trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$ > $WORDS; sleep 1000'; sleep 1000")
    pid = int(plain_yard.word())
    plain_yard.link.ask(do="stop", dir=str(step.parent), grace=0.2, kill=False)
    assert plain_yard.ended(step).how == (None, signal.SIGKILL, "stop")
    assert not is_alive(pid)


def test_directories_that_were_shut_are_removed(plain_yard: Yard) -> None:
    plain_yard.run("mkdir -p a/b && touch a/b/c && chmod 0 a/b && chmod 0 a")
    assert plain_yard.link.ask(do="remove", path=str(plain_yard.state / "work" / "r-1"))["ok"]
    assert not (plain_yard.state / "work" / "r-1").exists()
