"""Every example of ``config/jobs`` is read and run as it is written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from checkout_world import World
from steps_bench import Bench, lease_of

from supervisor.model.spec import normalize

pytestmark = pytest.mark.anyio

JOBS = Path(__file__).parents[2] / "config/jobs"
ALL = sorted(JOBS.glob("*.yaml"))

CODES: dict[str, dict[str, int]] = {
    "hello": {"hi": 0},
    "files": {"checkout": 0, "greet": 0, "count": 0},
    "build": {"checkout": 0, "show": 0, "build": 0, "test": 0},
    "cleanup": {"prepare": 0, "fail": 3, "tidy": 0},
    "secrets": {"use": 0, "show": 0},
}
LAST_LINE = {
    "hello": ("hi", "hi"),
    "files": ("greet", "bsup says: hello from a file"),
    "build": ("test", "lib/a.txt"),
    "cleanup": ("tidy", "tidied up"),
    "secrets": ("show", "connecting to internal.example.org"),
}


@pytest.fixture
async def bench(short_tmp: Path) -> AsyncIterator[Bench]:
    bench = Bench(short_tmp, uids=0)
    await bench.open()
    yield bench
    await bench.close()


def test_there_is_a_test_for_each() -> None:
    assert {path.stem for path in ALL} == set(CODES)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
async def test_example(path: Path, bench: Bench, world: World) -> None:
    job: dict[str, Any] = yaml.safe_load(await anyio.Path(path).read_text())
    if "repository" in job:
        job["repository"]["url"] = f"file://{world.repository()}"
    run = await bench.attempt(lease_of(job))
    assert run.codes == CODES[path.stem], run.err
    step, line = LAST_LINE[path.stem]
    assert run.out[step].splitlines()[-1] == line


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_example_is_valid_as_it_is(path: Path) -> None:
    assert normalize(yaml.safe_load(path.read_text()))["kind"] == "steps"
