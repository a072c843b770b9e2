"""Failpoints: what can be asked for, when a point strikes, and that a daemon without them has none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor import failpoints


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")
    assert frozenset() == failpoints.ARMED


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_a_point_strikes_at_the_hit_that_was_asked_for() -> None:
    program = """
from supervisor import failpoints
failpoints.arm("leased=kill:3, exited=kill:2")
for turn in range(1, 5):
    print(turn, sorted(failpoints.ARMED), flush=True)
    failpoints.hit("leased")
    failpoints.hit("recorded")
"""
    done = run(program)
    assert done.returncode == -9
    assert done.stdout.splitlines()[-1] == "3 ['exited', 'leased']"


def test_what_was_sent_is_not_answered_before_the_point_is_passed() -> None:
    """The request itself has begun: whatever it is, it may have come to pass."""
    program = """
import asyncio
from supervisor import failpoints
failpoints.arm("claim-sent=kill")
async def request():
    print("sent", flush=True)
    await asyncio.sleep(0.0)
    return 1
async def main():
    print("answered", await failpoints.sent("claim-sent", request()), flush=True)
asyncio.run(main())
"""
    done = run(program)
    assert (done.returncode, done.stdout) == (-9, "sent\n")


@pytest.mark.anyio
async def test_a_point_that_does_not_strike_passes_answers_and_errors_on() -> None:
    async def answer(value: int) -> int:
        if value < 0:
            raise ValueError(value)
        return value

    failpoints.arm("claim-sent=kill:100")
    assert await failpoints.sent("claim-sent", answer(7)) == 7
    with pytest.raises(ValueError):
        await failpoints.sent("claim-sent", answer(-1))


@pytest.mark.parametrize("text", ["leased", "leased=die", "leased=kill:0", "leased=kill:x", "nowhere=kill", "=kill"])
def test_words_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        failpoints.arm(f"exited=kill,{text}")
    assert frozenset() == failpoints.ARMED


def test_every_point_is_passed_somewhere_and_nowhere_else() -> None:
    """A point that nothing passes would make a test of it show nothing."""
    source = Path(failpoints.__file__).parent
    said = "".join(path.read_text() for path in source.rglob("*.py") if path.name != "failpoints.py")
    passed = {part.split('"')[1] for word in ("hit(", "sent(") for part in said.split(f"failpoints.{word}")[1:]}
    assert passed == set(failpoints.POINTS)
