"""Job files: what each format and ``--set`` make of a job."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.cli import jobfile
from supervisor.model.errors import InvalidInput

JOB = {"kind": "steps", "priority": 5, "steps": [{"name": "hi", "run": ["echo", "hi"]}]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "kind: steps\npriority: 5\nsteps: [{name: hi, run: [echo, hi]}]"),
        ("a.YML", "kind: steps\npriority: 5\nsteps:\n- name: hi\n  run: [echo, hi]\n"),
        ("a.json", '{"kind": "steps", "priority": 5, "steps": [{"name": "hi", "run": ["echo", "hi"]}]}'),
        ("a.toml", 'kind = "steps"\npriority = 5\n[[steps]]\nname = "hi"\nrun = ["echo", "hi"]\n'),
        ("standard input", "# a job\nkind: steps\npriority: 5\nsteps: [{name: hi, run: [echo, hi]}]"),
        ("standard input", '# a job\nkind = "steps"\npriority = 5\n[[steps]]\nname = "hi"\nrun = ["echo", "hi"]\n'),
        ("standard input", '\n{"kind": "steps", "priority": 5, "steps": [{"name": "hi", "run": ["echo", "hi"]}]}'),
        ("standard input", "{kind: steps, priority: 5, steps: [{name: hi, run: [echo, hi]}]}"),
        ("job", '[[steps]]\nname = "hi"\nrun = ["echo", "hi"]\n'),
    ],
)
def test_the_same_job_in_every_format(name: str, text: str) -> None:
    job = jobfile.decode(name, text.encode())
    assert job["steps"] == JOB["steps"]
    assert name == "job" or job == JOB


def test_yaml_means_what_it_says() -> None:
    """YAML 1.2's core schema: 1.1 would read no, on, 12:30, 0o17 and a date as something else."""
    text = "{a: no, b: on, c: 12:30, d: 2026-01-02, e: 0o17, f: 1e3, g: ~, h: true, i: 010, j: 1_000, k: .5, l: '1'}"
    assert jobfile.decode("x.yaml", text.encode()) == {
        "a": "no",
        "b": "on",
        "c": "12:30",
        "d": "2026-01-02",
        "e": 15,
        "f": 1000.0,
        "g": None,
        "h": True,
        "i": 10,
        "j": "1_000",
        "k": 0.5,
        "l": "1",
    }


def test_yaml_anchors_and_merges_work() -> None:
    text = "x: &base {env: {A: '1'}}\nsteps:\n- <<: *base\n  name: hi\n"
    assert jobfile.decode("x.yaml", text.encode())["steps"] == [{"env": {"A": "1"}, "name": "hi"}]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.yaml", b"a: 1\na: 2\n", ["twice", "line 2"]),
        ("x.json", b'{"a": 1, "a": 2}', ["twice"]),
        ("x.json", b'{"a": }', ["is not JSON", "line 1"]),
        ("x.toml", b"a = ", ["is not TOML"]),
        ("x.yaml", b"a: !!python/object:os.system {}", ["is not YAML"]),
        ("x.yaml", b"? [1, 2]\n: x", ["x.yaml"]),
        ("x.yaml", b"\xff", ["UTF-8"]),
        ("x.yaml", b"1: 2", ["is not text"]),
        ("x.yaml", b"[" * 5000, ["x.yaml"]),
    ],
)
def test_what_is_wrong_is_said_with_the_file(name: str, text: bytes, words: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        jobfile.decode(name, text)
    for word in [name, *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["priority=7"], {"priority": 7}),
        (["name=7 up"], {"name": "7 up"}),
        (["a.b.c=true"], {"a": {"b": {"c": True}}}),
        (["labels=[x, y]"], {"labels": ["x", "y"]}),
        (["labels=[x]", "labels[1]=z", "labels[0]=y"], {"labels": ["y", "z"]}),
        (['files."a/b.txt"=hi'], {"files": {"a/b.txt": "hi"}}),
        (["name="], {"name": ""}),
        (["env.URL=http://x/?a=b"], {"env": {"URL": "http://x/?a=b"}}),
        (["steps[0].run=make"], {"steps": [{"run": "make"}]}),
    ],
)
def test_set(settings: list[str], expected: dict[str, Any]) -> None:
    job = {"steps": [{"run": "x"}]} if "steps" in expected else {}
    assert jobfile.apply(job, settings) == expected


@pytest.mark.parametrize(
    "setting", ["name", "=x", "a..b=1", "steps[9].run=x", "[0]=x", "name.x=1", "steps.x=1", "a[=1"]
)
def test_a_bad_set_names_itself_and_changes_nothing(setting: str) -> None:
    job = {"name": "n", "steps": [{}]}
    with pytest.raises(InvalidInput, match="--set"):
        jobfile.apply(job, [setting])
    assert job == {"name": "n", "steps": [{}]}


@given(st.binary(max_size=200), st.sampled_from(["x.yaml", "x.json", "x.toml", "standard input"]))
def test_any_bytes_are_a_job_or_an_error_that_names_the_file(data: bytes, name: str) -> None:
    try:
        assert isinstance(jobfile.decode(name, data), dict)
    except InvalidInput as error:
        assert name in str(error)
