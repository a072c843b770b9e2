"""In-process kinds: loading them, the one that is built in, and the job that a handler is given. On a virtual clock."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from supervisor.kinds import InProcessJob, load, noop
from supervisor.model.errors import InvalidInput
from supervisor.model.job import Lease, LeaseId
from tests.actors.virtual_loop import VirtualLoop

pytestmark = pytest.mark.anyio

AT = datetime(2024, 1, 1, tzinfo=UTC)
LEASE = Lease(LeaseId("5e55" * 8, 1), 7, 3, "noop", "a job", msgspec.Raw(b"{}"), {"TOKEN": "hunter2"}, {}, 1, 0, 0, AT)


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


async def test_a_handler_is_given_all_that_it_needs() -> None:
    job = InProcessJob(LEASE, {"path": "a"})
    assert (job.id, job.name, job.kind, job.attempt, job.args) == (7, "a job", "noop", 3, {"path": "a"})
    assert dict(job.secrets) == {"TOKEN": "hunter2"}
    assert "hunter2" not in repr(job)


async def test_the_example_of_the_docs_runs(tmp_path: Path) -> None:
    """It is what people begin from."""
    text = (Path(__file__).parents[1] / "docs/how-to/run-python-functions.md").read_text()
    example: dict[str, Any] = {"__name__": "gallery.jobs"}
    exec(text.partition("```python\n")[2].partition("```")[0], example)
    checksums = example["checksums"]
    digest = hashlib.sha256(b"x").hexdigest()
    archives = {"a.tar.gz": "x", "b.tar.gz": "x"}
    for name, content in archives.items():
        (tmp_path / name).write_text(content)

    def folder() -> dict[str, str]:
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    stopped = InProcessJob(LEASE, {"folder": str(tmp_path)})
    stopped.ask_to_stop()
    await checksums(stopped)
    assert stopped.has_looked and folder() == archives
    for _ in range(2):
        await checksums(InProcessJob(LEASE, {"folder": str(tmp_path)}))
    assert folder() == {**archives, "a.tar.gz.sha256": digest, "b.tar.gz.sha256": digest}
    with pytest.raises(InvalidInput, match=r"args\.folder"):
        await checksums(InProcessJob(LEASE, {}))


async def test_a_stop_is_seen_by_who_looks_before_it_and_by_who_looks_after() -> None:
    before, after = InProcessJob(LEASE, {}), InProcessJob(LEASE, {})
    event = before.stop_asked
    assert not event.is_set() and before.has_looked and not after.has_looked
    for job in (before, after):
        job.ask_to_stop()
    assert not after.has_looked, "to be asked is not to have looked"
    assert event.is_set() and after.stop_asked.is_set() and after.has_looked


@pytest.mark.parametrize(
    ("args", "takes"), [({}, 0.0), ({"sleep": 0}, 0.0), ({"sleep": 2.5}, 2.5), ({"sleep": 3}, 3.0)]
)
async def test_noop_sleeps_as_it_is_told(args: dict[str, Any], takes: float) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await noop(InProcessJob(LEASE, args))
    assert loop.time() - began == pytest.approx(takes)


@pytest.mark.parametrize(
    "args", [{"sleep": -1}, {"sleep": "1"}, {"sleep": None}, {"sleep": True}, {"sleep": 1e9}, {"seconds": 1}]
)
async def test_noop_refuses_what_it_does_not_know(args: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="args"):
        await noop(InProcessJob(LEASE, args))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module of this text that can be imported; its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(text: str) -> str:
        name = f"kinds_of_a_test_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return make


async def test_kinds_are_loaded_by_module_and_function(module: Callable[[str], str]) -> None:
    name = module("async def thumbnail(job): pass\n")
    found = load({"noop": "supervisor.kinds:noop", "thumbnail": f"{name}:thumbnail"})
    assert found["noop"] is noop and found["thumbnail"].__name__ == "thumbnail"
    assert load({}) == {}


@pytest.mark.parametrize(
    ("text", "function", "words"),
    [
        ("", "thumbnail", ["no attribute 'thumbnail'"]),
        ("thumbnail = 5", "thumbnail", ["not a coroutine function"]),
        ("def thumbnail(job): pass", "thumbnail", ["not a coroutine function"]),
        ("import no_such_module_here", "thumbnail", ["no_such_module_here"]),
        ("def (", "thumbnail", ["SyntaxError"]),
        ("1 / 0", "thumbnail", ["ZeroDivisionError"]),
    ],
)
async def test_a_kind_that_can_not_be_loaded_names_its_key(
    module: Callable[[str], str], text: str, function: str, words: list[str]
) -> None:
    with pytest.raises(InvalidInput) as raised:
        load({"thumbnail": f"{module(text)}:{function}"})
    assert raised.value.field == "jobs.kinds.thumbnail"
    for word in [*words, "module:function"]:
        assert word in str(raised.value)
