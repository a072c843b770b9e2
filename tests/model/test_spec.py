"""A job's spec: what is taken, its canonical form, and a clear error for all that is refused."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.errors import InvalidInput
from supervisor.model.spec import JobSpec, TaskSpec, decode_spec, decode_task, normalize, split_secrets

STEP = {"name": "hi", "run": ["echo", "hi"]}
SHORT: dict[str, Any] = {"kind": "steps", "steps": [STEP]}
REPOSITORY = {"url": "https://example.org/team/thing.git", "commit": "main"}
FULL: dict[str, Any] = {
    "kind": "steps",
    "name": "nightly",
    "steps": [
        {"name": "build", "run": "make", "dir": "./src//x/", "env": {"PORT": 8080, "A": "b"}, "timeout": "1h30m"},
        {"name": "clean", "run": ["rm", "-rf", "x"], "always": True},
    ],
    "repository": {
        **REPOSITORY,
        "depth": 1,
        "filter": "blob:none",
        "sparse": ["lib/", "doc", "lib"],
        "submodules": "recursive",
        "credential": {"secret": "TOKEN"},
    },
    "files": {"a/./b": "x", "c": ""},
    "labels": ["linux", "arch=amd64", "linux"],
    "priority": 200,
    "timeout": 60,
    "attempts": 3,
    "backoff": "1m",
    "secrets": {"TOKEN": "s3cret"},
    "redact": {"hunter2": "[password]"},
    "cpu": 1.5,
    "memory": "512MiB",
    "keep_workspace": True,
}


def job(**changes: Any) -> dict[str, Any]:
    return {**SHORT, **changes}


def task(**changes: Any) -> dict[str, Any]:
    return {"kind": "noop", **changes}


def step(**changes: Any) -> dict[str, Any]:
    return job(steps=[{**STEP, **changes}])


def repository(**changes: Any) -> dict[str, Any]:
    return job(repository={**REPOSITORY, **changes})


def test_the_shortest_job() -> None:
    assert normalize(SHORT) == {"kind": "steps", "name": "hi", "steps": [{"name": "hi", "run": ["echo", "hi"]}]}


def test_everything_at_once_is_made_canonical() -> None:
    assert normalize(FULL) == {
        "kind": "steps",
        "name": "nightly",
        "steps": [
            {"name": "build", "run": "make", "dir": "src/x", "env": {"PORT": "8080", "A": "b"}, "timeout": 5400.0},
            {"name": "clean", "run": ["rm", "-rf", "x"], "always": True},
        ],
        "repository": {
            **REPOSITORY,
            "depth": 1,
            "filter": "blob:none",
            "sparse": ["doc", "lib"],
            "submodules": "recursive",
            "credential": {"secret": "TOKEN"},
        },
        "files": {"a/b": "x", "c": ""},
        "labels": ["arch=amd64", "linux"],
        "priority": 200,
        "timeout": 60.0,
        "attempts": 3,
        "backoff": 60.0,
        "secrets": {"TOKEN": "s3cret"},
        "redact": {"hunter2": "[password]"},
        "cpu": 1.5,
        "memory": 512 << 20,
        "keep_workspace": True,
    }


def test_the_input_is_not_changed() -> None:
    before = json.dumps(FULL)
    normalize(FULL)
    assert json.dumps(FULL) == before


def test_name_comes_from_the_repository_else_the_first_step() -> None:
    assert normalize(repository())["name"] == "thing"
    assert normalize(repository(url="git@host:thing"))["name"] == "thing"
    assert normalize(repository(url="/srv/git/thing/"))["name"] == "thing"
    assert normalize(SHORT)["name"] == "hi"


def test_null_is_as_good_as_left_out() -> None:
    assert normalize(job(repository=None, timeout=None, files=None, labels=None)) == normalize(SHORT)
    assert normalize(step(env=None, timeout=None, dir=None)) == normalize(SHORT)


def test_secrets_are_taken_apart_for_the_store_and_a_stored_spec_is_read() -> None:
    shown, secrets, redact = split_secrets(normalize(FULL))
    assert "s3cret" not in json.dumps(shown)
    assert "hunter2" not in json.dumps(shown)
    assert (secrets, redact) == ({"TOKEN": "s3cret"}, {"hunter2": "[password]"})
    for kept in (["TOKEN"], {"TOKEN": None}, {"TOKEN": "***"}):
        spec = decode_spec(json.dumps({**shown, "secrets": kept}).encode())
        assert isinstance(spec, JobSpec)
        assert spec.secrets == {"TOKEN": None}
        assert spec.steps[0].run == "make"
        assert spec.has_checkout


def test_a_task_is_made_canonical() -> None:
    assert normalize({"kind": "noop"}) == {"kind": "noop", "name": "noop"}
    assert normalize(task(args={}, labels=[], priority=127, attempts=1, memory=0)) == normalize(task())
    assert normalize(
        task(
            name=" mail ",
            args={"to": ["a", None], "deep": {"x": 1.5, "y": {}}, "big": 2**70},
            labels=["b", "a", "b"],
            timeout="1m",
            backoff="2s",
            memory="1KiB",
            secrets={"T": "s3cret"},
            redact={"hunter2": "***"},
        )
    ) == {
        "kind": "noop",
        "name": "mail",
        "args": {"to": ["a", None], "deep": {"x": 1.5, "y": {}}, "big": 2**70},
        "labels": ["a", "b"],
        "timeout": 60.0,
        "backoff": 2.0,
        "memory": 1024,
        "secrets": {"T": "s3cret"},
        "redact": {"hunter2": "***"},
    }


def test_a_stored_task_is_read_without_its_secrets() -> None:
    shown, secrets, _ = split_secrets(normalize(task(args={"a": [1]}, secrets={"T": "s3cret"}, attempts=3)))
    assert secrets == {"T": "s3cret"} and "s3cret" not in json.dumps(shown)
    spec = decode_task(json.dumps(shown).encode())
    assert spec == TaskSpec("noop", "noop", args={"a": [1]}, attempts=3, secrets=("T",))
    for damaged in (b"{", b"[]", b'{"kind": "noop"}', b'{"kind": "noop", "name": "x", "steps": []}'):
        with pytest.raises(InvalidInput):
            decode_task(damaged)


def test_a_stored_job_is_read_as_its_kind_says() -> None:
    with pytest.raises(InvalidInput, match=r"^kind: is 'noop', which has no steps"):
        decode_spec(json.dumps(normalize(task())).encode())


def test_a_stored_spec_is_checked_in_full() -> None:
    with pytest.raises(InvalidInput, match=r"^steps\[0\]\.timeout"):
        decode_spec(b'{"kind": "steps", "steps": [{"name": "a", "run": "b", "timeout": "soon"}]}')
    with pytest.raises(InvalidInput, match="is not JSON"):
        decode_spec(b"{")


BAD: list[tuple[str, object, str, str]] = [
    # what, job, the field that is named, words of the error
    ("not a mapping", [], "job", "not a mapping"),
    ("unknown key", job(timout=1), "timout", "did you mean `timeout`"),
    ("unknown key that is null", job(nothing=None), "nothing", "not a known key"),
    ("unknown key of a step", step(comand="x"), "steps[0].comand", "allowed: always, dir, env, name, run, timeout"),
    ("unknown key of the repository", repository(branch="x"), "repository.branch", "not a known key"),
    ("no kind", {"steps": [STEP]}, "kind", "missing"),
    ("what is no kind", job(kind="Container"), "kind", "there is no kind 'Container' (allowed: lower-case"),
    ("a kind too long", {"kind": "a" * 65}, "kind", "at most 64"),
    ("steps of another kind", job(kind="container"), "steps", "are for jobs of kind `steps`"),
    ("args of steps", job(args={}), "args", "is not a known key"),
    ("kind of the wrong type", job(kind=5), "kind", ""),
    ("no steps", {"kind": "steps"}, "steps", "missing"),
    ("empty steps", job(steps=[]), "steps", "empty"),
    ("steps as a mapping", job(steps={}), "steps", "not a list"),
    ("a step that is text", job(steps=["make"]), "steps[0]", "not a mapping"),
    ("a step without a name", job(steps=[{"run": "x"}]), "steps[0].name", "missing"),
    ("a step without a command", job(steps=[{"name": "x"}]), "steps[0].run", "missing"),
    ("a command of the wrong type", step(run=5), "steps[0].run", "is a whole number (allowed: text or a list)"),
    ("a word of the wrong type", step(run=["a", 5]), "steps[0].run[1]", "is a whole number (allowed: text)"),
    ("an empty command", step(run=[]), "steps[0].run", "empty"),
    ("a blank command", step(run="  "), "steps[0].run", "empty"),
    ("an empty first word", step(run=["", "x"]), "steps[0].run", "empty"),
    ("two steps of one name", job(steps=[STEP, STEP]), "steps[1].name", "earlier step"),
    ("a name too long", step(name="x" * 65), "steps[0].name", "65 characters"),
    ("a blank name", step(name=" "), "steps[0].name", "empty"),
    ("a name that can't be printed", step(name="a\nb"), "steps[0].name", "can't be printed"),
    ("bsup's own name", {**repository(), "steps": [{**STEP, "name": "checkout"}]}, "steps[0].name", "own first step"),
    ("a container step", step(image="debian"), "steps[0].image", "container steps are not supported by this version"),
    ("a dir that leaves", step(dir="../x"), "steps[0].dir", "leaves the workspace"),
    ("an absolute dir", step(dir="/etc"), "steps[0].dir", "absolute"),
    ("a bad name in env", step(env={"A-B": "x"}), "steps[0].env.A-B", "not a name of an environment variable"),
    ("bsup's variable", step(env={"BSUP_RUN": "x"}), "steps[0].env.BSUP_RUN", "set by bsup"),
    ("a boolean in env", step(env={"A": True}), "steps[0].env.A", "in quotes"),
    ("env as a list", step(env=["A=b"]), "steps[0].env", "not a mapping"),
    ("no time at all", step(timeout=0), "steps[0].timeout", "more than zero"),
    ("a timeout that is none", job(timeout="soon"), "timeout", "'soon' is not a duration"),
    ("a name of the wrong type", job(name=5), "name", "is a whole number (allowed: text)"),
    ("missing commit", job(repository={"url": "https://h/x"}), "repository.commit", "missing"),
    ("missing url", job(repository={"commit": "x"}), "repository.url", "missing"),
    ("a repository as text", job(repository="https://h/x"), "repository", "not a mapping"),
    ("a commit that is a number", repository(commit=1234567), "repository.commit", "allowed: text"),
    ("a commit that is an option", repository(commit="--upload-pack=x"), "repository.commit", "not a revision"),
    ("a commit with a space", repository(commit="a b"), "repository.commit", "characters"),
    ("a relative repository", repository(url="thing"), "repository.url", "not a git URL"),
    ("a remote helper", repository(url="ext::sh -c x"), "repository.url", "not a git URL"),
    ("another helper", repository(url="fd::3/x"), "repository.url", "not a git URL"),
    ("another scheme", repository(url="ftp://h/x"), "repository.url", "'ftp'"),
    ("a url that is an option", repository(url="--x"), "repository.url", "not a git URL"),
    ("a url out of its path", repository(url="/srv/git/../secret"), "repository.url", "`..`"),
    ("a url without a host", repository(url="https:///x"), "repository.url", "names no host"),
    ("a depth of none", repository(depth=0), "repository.depth", "out of range"),
    ("a strange filter", repository(filter="sparse:oid=x"), "repository.filter", "not a filter"),
    ("strange submodules", repository(submodules="all"), "repository.submodules", 'true, false or "recursive"'),
    ("sparse that leaves", repository(sparse=["../x"]), "repository.sparse[0]", "leaves the workspace"),
    (
        "a credential of no secret",
        repository(credential={"secret": "X"}),
        "repository.credential.secret",
        "not the name",
    ),
    ("a file above", job(files={"../x": ""}), "files['../x']", "leaves the workspace"),
    ("a file above, deeper", job(files={"a/../../x": ""}), "files['a/../../x']", "leaves the workspace"),
    ("an absolute file", job(files={"/etc/passwd": ""}), "files['/etc/passwd']", "absolute"),
    ("a file without a name", job(files={"": ""}), "files['']", "names no file"),
    ("a directory as a file", job(files={"a/": ""}), "files['a/']", "names a directory"),
    ("a file twice", job(files={"a": "", "./a": ""}), "files['./a']", "given twice"),
    ("a file below a file", job(files={"a": "", "a/b": ""}), "files['a/b']", "lies below"),
    ("a content that is no text", job(files={"a": 5}), "files['a']", "not text"),
    ("a NUL", job(files={"a": "x\0y"}), "files.a", "NUL"),
    ("half a character", step(run="\ud800"), "steps[0].run", "Unicode"),
    ("a date, as YAML makes them", step(env={"D": datetime.date(2024, 1, 1)}), "steps[0].env.D", "is a date"),
    ("keys that are no text", job(files={1: "x"}), "files", "text as keys"),
    ("a label with a space", job(labels=["a b"]), "labels[0]", "not a label"),
    ("labels as text", job(labels="linux"), "labels", "is text (allowed: a list)"),
    ("a priority too high", job(priority=256), "priority", "0 to 255"),
    ("a priority in words", job(priority="high"), "priority", "is text (allowed: a whole number)"),
    ("true as a number", job(priority=True), "priority", "true or false (allowed: a whole number)"),
    ("no attempts", job(attempts=0), "attempts", "1 to 1000"),
    ("a backoff too long", job(backoff="1h"), "backoff", "600 seconds"),
    ("a secret of no name", job(secrets={"a b": "x"}), "secrets.a b", "not a name"),
    ("a secret that is a number", job(secrets={"A": 12345}), "secrets.A", "not text"),
    ("an empty secret", job(secrets={"A": ""}), "secrets.A", "empty"),
    ("an empty value to redact", job(redact={"": "x"}), "redact", "empty"),
    ("less than no cpu", job(cpu=-1), "cpu", "out of range"),
    ("memory in words", job(memory="much"), "memory", "'much' is not a size"),
    ("yes for true", job(keep_workspace="yes"), "keep_workspace", "true or false"),
    ("an endless number", job(cpu=float("nan")), "cpu", "finite"),
    ("a checkout of a task", task(repository=REPOSITORY), "repository", "is not a known key"),
    ("args that are a list", task(args=[1]), "args", "not a mapping"),
    ("args too deep", task(args={"a": [[[[[[[1]]]]]]]}), "args.a[0][0][0][0][0][0][0]", "nested too deep"),
    ("a number that no double holds", task(args={"a": [10**400]}), "args", "out of range"),
    ("a number of too many digits", task(args={"a": 10**5000}), "args", "out of range"),
    ("a task's name of the wrong type", task(name=5), "name", "is a whole number (allowed: text)"),
    ("a task's name that can't be printed", task(name="a\nb"), "name", "can't be printed"),
    ("a task's priority", task(priority=-1), "priority", "0 to 255"),
    ("a task's label", task(labels=["a b"]), "labels[0]", "not a label"),
    ("a task's empty secret", task(secrets={"A": ""}), "secrets.A", "empty"),
    ("a task's timeout", task(timeout="soon"), "timeout", "'soon' is not a duration"),
]


@pytest.mark.parametrize(("raw", "field", "words"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_bad_input_names_the_field_and_says_what_is_allowed(raw: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        normalize(raw)
    assert caught.value.field == field
    assert words in str(caught.value)


SECRET = "correct-horse-battery"


@pytest.mark.parametrize(
    "raw",
    [
        repository(url=f"https://user:{SECRET}@h/x"),
        repository(url=f"https://{SECRET}@h/x"),
        repository(url=f"ssh://git:{SECRET}@h/x"),
        repository(url=f"https://user:{SECRET}@h:port/x"),
        repository(credential={"secret": SECRET}),
        repository(credential={"secret": [SECRET]}),
        repository(credential=SECRET),
        job(secrets={"A": [SECRET]}),
        job(secrets=SECRET),
        job(redact={SECRET: 5}),
        job(redact={SECRET: "\0"}),
        job(redact={f"{SECRET}\0": ""}),
        job(redact={SECRET: {1: 2}}),
        job(files={"a": [SECRET]}),
    ],
)
def test_no_error_holds_a_secret(raw: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as caught:
        normalize(raw)
    assert SECRET not in str(caught.value)


KEYS = [*FULL, "timeot", "", "image"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["steps", "main", "10m", "../x", "a/b", "https://h/x", "recursive", "\0", "\ud800"]),
)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from([*KEYS, *FULL["repository"], *STEP]), st.text(max_size=4)), inner),
    ),
    max_leaves=12,
)
MANGLED = st.dictionaries(st.sampled_from(KEYS), ANY_JSON, max_size=4).map(lambda changes: {**FULL, **changes})
STEPS = st.dictionaries(st.sampled_from(["name", "run", "dir", "env", "timeout", "always", "x"]), ANY_JSON).map(
    lambda changes: job(steps=[{**STEP, **changes}])
)
REPOSITORIES = st.dictionaries(st.sampled_from([*FULL["repository"], "x"]), ANY_JSON).map(
    lambda changes: {**FULL, "repository": {**FULL["repository"], **changes}}
)


TASKS = st.dictionaries(st.sampled_from([*KEYS, "args"]), ANY_JSON, max_size=4).map(lambda changes: task(**changes))


@given(st.one_of(ANY_JSON, MANGLED, STEPS, REPOSITORIES, TASKS))
def test_whatever_comes_is_made_canonical_or_refused(raw: Any) -> None:
    """Nothing but InvalidInput is raised; what is taken is canonical already, and survives JSON and the store."""
    try:
        canonical = normalize(raw)
    except InvalidInput as error:
        assert error.field
        assert error.problem
        return
    assert normalize(canonical) == canonical
    assert json.loads(json.dumps(canonical)) == canonical
    decode = decode_spec if canonical["kind"] == "steps" else decode_task
    assert decode(json.dumps(split_secrets(canonical)[0]).encode()).name == canonical["name"]


@given(st.dictionaries(st.text(max_size=12), st.text(max_size=3), max_size=4))
def test_no_file_path_leaves_the_workspace(files: dict[str, str]) -> None:
    try:
        canonical = normalize(job(files=files))
    except InvalidInput:
        return
    for path in canonical.get("files", {}):
        parts = path.split("/")
        assert not path.startswith("/")
        assert not {"", ".", ".."} & set(parts)


@pytest.mark.parametrize("change", [lambda spec: spec.pop("name"), lambda spec: spec.update(priority=127)])
def test_defaults_are_left_out(change: Callable[[dict[str, Any]], object]) -> None:
    """So that one job has one canonical form, which the digest of a submission's key is made of."""
    spec = {**SHORT, "name": "hi"}
    change(spec)
    assert normalize(spec) == normalize(SHORT)
