"""``bsup.submit`` and ``bsup.cancel`` as any language uses them: plain SQL, in the caller's own transaction."""

from __future__ import annotations

import json
from typing import Any

import anyio
import asyncpg
import pytest

from supervisor.model.errors import InvalidInput
from supervisor.model.job import Outcome, State
from supervisor.model.spec import decode_spec, decode_task, normalize, split_secrets
from supervisor.store.pg import PgStore
from tests.store.store_bench import Daemon, add, end_of, host, spec

pytestmark = pytest.mark.anyio

STEP = {"name": "s", "run": ["true"]}


def task(**changes: Any) -> dict[str, Any]:
    return {"kind": "noop", **changes}


async def submit(connection: asyncpg.Connection, job: Any, **more: Any) -> int:
    names = "".join(f", {name} => ${at}" for at, name in enumerate(more, 2))
    return int(await connection.fetchval(f"SELECT bsup.submit($1{names})", json.dumps(job), *more.values()))


VALID: list[dict[str, Any]] = [
    spec(),
    {"kind": "steps", "steps": [STEP]},
    {"kind": "steps", "name": None, "steps": [STEP], "labels": None, "files": None},
    {
        "kind": "steps",
        "repository": {"url": "https://git.example.org/group/thing.git/", "commit": "main"},
        "steps": [
            {"name": " a ", "run": "make", "dir": "./x//y/", "env": {"A": "1", "PORT": 8080}, "timeout": "1h30m"}
        ],
    },
    {
        "kind": "steps",
        "name": "all of it",
        "steps": [STEP | {"always": True}, {"name": "t", "run": "x", "always": False, "env": {}, "dir": "."}],
        "repository": {
            "url": "https://git.example.org:8443/x",
            "commit": "refs/heads/a+b",
            "depth": 3,
            "filter": "blob:limit=10k",
            "sparse": ["b", "a/./c", "a/c", "."],
            "submodules": "recursive",
            "credential": {"secret": "TOKEN", "username": "me"},
        },
        "files": {"b/./x": "1", "a": ""},
        "labels": ["docker", "arch=amd64", "docker"],
        "priority": 200,
        "timeout": 90,
        "attempts": 5,
        "backoff": "500ms",
        "secrets": {"TOKEN": "s3cret", "B": "x"},
        "redact": {"hush": "***"},
        "cpu": 1.5,
        "memory": "512MiB",
        "keep_workspace": True,
    },
    spec(priority=127, attempts=1, backoff=10, cpu=0, memory=0, keep_workspace=False, labels=[], files={}, redact={}),
    spec(memory="1.5GB", timeout="2d"),
    spec(memory="2k", timeout="1d2h3m4s5ms"),
    spec(repository={"url": "git@example.org:a/b.git", "commit": "v1.0", "submodules": False}, name=None),
    spec(repository={"url": "/srv/git/x.git", "commit": "0" * 40, "submodules": True}, name=None),
    spec(repository={"url": "ssh://me@example.org:22/x", "commit": "a", "sparse": []}),
    spec(repository={"url": "file:///srv/x", "commit": "a"}),
    {"kind": "noop"},
    {"kind": "noop", "name": None, "args": None, "labels": [], "secrets": {}},
    {
        "kind": "noop",
        "name": " n ",
        "args": {"a": [1, None, {"b": None}], "c": 1.5, "d": "\u00e9", "e": [[[[[[]]]]]]},
        "labels": ["docker", "arch=amd64", "docker"],
        "priority": 200,
        "timeout": "90s",
        "attempts": 5,
        "backoff": "500ms",
        "secrets": {"TOKEN": "s3cret"},
        "redact": {"hush": "***"},
        "cpu": 1.5,
        "memory": "512MiB",
    },
]

INVALID: list[tuple[Any, str, str]] = [
    ([], "job", "mapping"),
    ("x", "job", "mapping"),
    ({}, "kind", "missing"),
    ({"kind": "Other"}, "kind", "no kind"),
    (task(steps=[STEP]), "steps", "not a known key"),
    (task(keep_workspace=True), "keep_workspace", "not a known key"),
    (spec(args={}), "args", "not a known key"),
    (task(args=[]), "args", "mapping"),
    (task(args={"a": 10**400}), "args", "out of range"),
    (task(priority=256), "priority", "out of range"),
    (task(labels=["ok", ""]), "labels[1]", "not a label"),
    (task(name=3), "name", "not text"),
    (task(secrets={"A": 3}), "secrets.A", "not text"),
    (task(redact={"s3cret": 3}), "redact", "not text"),
    (task(backoff=601), "backoff", "too long"),
    (task(timeout=0), "timeout", "more than zero"),
    ({"kind": 3}, "kind", "not text"),
    (spec(colour="red"), "colour", "not a known key"),
    ({"kind": "steps"}, "steps", "missing"),
    ({"kind": "steps", "steps": {}}, "steps", "not a list"),
    ({"kind": "steps", "steps": []}, "steps", "0 steps"),
    ({"kind": "steps", "steps": [3]}, "steps[0]", "mapping"),
    ({"kind": "steps", "steps": [{"run": "x"}]}, "steps[0].name", "missing"),
    ({"kind": "steps", "steps": [{"name": "x"}]}, "steps[0].run", "missing"),
    ({"kind": "steps", "steps": [STEP, STEP]}, "steps[1].name", "earlier step"),
    ({"kind": "steps", "steps": [STEP | {"name": "x" * 65}]}, "steps[0].name", "65 characters"),
    ({"kind": "steps", "steps": [STEP | {"name": "a\nb"}]}, "steps[0].name", "printed"),
    ({"kind": "steps", "steps": [STEP | {"run": []}]}, "steps[0].run", "empty"),
    ({"kind": "steps", "steps": [STEP | {"run": " "}]}, "steps[0].run", "empty"),
    ({"kind": "steps", "steps": [STEP | {"run": 3}]}, "steps[0].run", "list or text"),
    ({"kind": "steps", "steps": [STEP | {"run": ["a", 3]}]}, "steps[0].run[1]", "not text"),
    ({"kind": "steps", "steps": [STEP | {"image": "debian"}]}, "steps[0].image", "container steps"),
    ({"kind": "steps", "steps": [STEP | {"shell": "sh"}]}, "steps[0].shell", "not a known key"),
    ({"kind": "steps", "steps": [STEP | {"dir": "../x"}]}, "steps[0].dir", "`..`"),
    ({"kind": "steps", "steps": [STEP | {"dir": "/etc"}]}, "steps[0].dir", "absolute"),
    ({"kind": "steps", "steps": [STEP | {"timeout": "soon"}]}, "steps[0].timeout", "not a duration"),
    ({"kind": "steps", "steps": [STEP | {"timeout": 0}]}, "steps[0].timeout", "more than zero"),
    ({"kind": "steps", "steps": [STEP | {"always": "yes"}]}, "steps[0].always", "true or false"),
    ({"kind": "steps", "steps": [STEP | {"env": {"1A": "x"}}]}, "steps[0].env.1A", "environment variable"),
    ({"kind": "steps", "steps": [STEP | {"env": {"BSUP_RUN": "x"}}]}, "steps[0].env.BSUP_RUN", "bsup itself"),
    ({"kind": "steps", "steps": [STEP | {"env": {"A": True}}]}, "steps[0].env.A", "not text"),
    (spec(timeout=-1), "timeout", "negative"),
    (spec(timeout="30m1h"), "timeout", "not a duration"),
    (spec(timeout=10**12), "timeout", "ten years"),
    (spec(timeout=[]), "timeout", "not a duration"),
    (spec(backoff=601), "backoff", "too long"),
    (spec(priority=256), "priority", "out of range"),
    (spec(priority=-1), "priority", "out of range"),
    (spec(priority=1.5), "priority", "whole number"),
    (spec(priority="high"), "priority", "not a number"),
    (spec(attempts=0), "attempts", "out of range"),
    (spec(cpu=-1), "cpu", "out of range"),
    (spec(cpu=5000), "cpu", "out of range"),
    (spec(memory="lots"), "memory", "not a size"),
    (spec(memory=1.5), "memory", "whole number of bytes"),
    (spec(memory=10**30), "memory", "too large"),
    (spec(labels=["a b"]), "labels[0]", "not a label"),
    (spec(labels=["ok", ""]), "labels[1]", "not a label"),
    (spec(labels="docker"), "labels", "not a list"),
    (spec(labels=[1]), "labels[0]", "not text"),
    (spec(name=""), "name", "empty"),
    (spec(name=3), "name", "not text"),
    (spec(files={"../x": ""}), "files['../x']", "`..`"),
    (spec(files={"a/../../x": ""}), "files['a/../../x']", "`..`"),
    (spec(files={"/etc/passwd": ""}), "files['/etc/passwd']", "absolute"),
    (spec(files={"a/": ""}), "files['a/']", "directory"),
    (spec(files={".": ""}), "files['.']", "names no file"),
    (spec(files={"a": "", "./a": ""}), "files['a']", "twice"),
    (spec(files={"a": "", "a/b": ""}), "files['a/b']", "which is a file"),
    (spec(files={"a": 3}), "files['a']", "not text"),
    (spec(files=[]), "files", "mapping"),
    (spec(files={"a": ""}, steps=[STEP | {"name": "checkout"}]), "steps[0].name", "own first step"),
    (spec(secrets={"A B": "s3cret"}), "secrets.A B", "environment variable"),
    (spec(secrets={"A": 3}), "secrets.A", "not text"),
    (spec(secrets={"A": ""}), "secrets.A", "empty"),
    (spec(secrets=["A"]), "secrets", "mapping"),
    (spec(redact={"": "x"}), "redact", "empty value"),
    (spec(redact={"s3cret": 3}), "redact", "not text"),
    (spec(repository={"url": "https://x.org/a"}), "repository.commit", "missing"),
    (spec(repository={"commit": "a"}), "repository.url", "missing"),
    (spec(repository={"url": "https://x.org/a", "commit": " "}), "repository.commit", "empty"),
    (spec(repository={"url": "https://x.org/a", "commit": "--upload-pack=x"}), "repository.commit", "revision"),
    (spec(repository={"url": "https://x.org/a", "commit": "a", "ref": "b"}), "repository.ref", "not a known key"),
    (spec(repository={"url": "https://me:s3cret@x.org/a", "commit": "a"}), "repository.url", "user or password"),
    (spec(repository={"url": "https://s3cret@x.org/a", "commit": "a"}), "repository.url", "user or password"),
    (spec(repository={"url": "ssh://me:s3cret@x.org/a", "commit": "a"}), "repository.url", "user or password"),
    (spec(repository={"url": "ext::sh -c x", "commit": "a"}), "repository.url", "not a git URL"),
    (spec(repository={"url": "ext::x", "commit": "a"}), "repository.url", "not a git URL"),
    (spec(repository={"url": "-x", "commit": "a"}), "repository.url", "not a git URL"),
    (spec(repository={"url": "ftp://x.org/a", "commit": "a"}), "repository.url", "scheme"),
    (spec(repository={"url": "https:///a", "commit": "a"}), "repository.url", "no host"),
    (spec(repository={"url": "https://x.org/../a", "commit": "a"}), "repository.url", "`..`"),
    (spec(repository={"url": "https://x.org/a", "commit": "a", "depth": 0}), "repository.depth", "out of range"),
    (spec(repository={"url": "https://x.org/a", "commit": "a", "filter": "x"}), "repository.filter", "filter"),
    (
        spec(repository={"url": "https://x.org/a", "commit": "a", "submodules": "deep"}),
        "repository.submodules",
        "known",
    ),
    (
        spec(repository={"url": "https://x.org/a", "commit": "a", "sparse": ["../x"]}),
        "repository.sparse[0]",
        "`..`",
    ),
    (
        spec(repository={"url": "https://x.org/a", "commit": "a", "credential": {"secret": "T"}}),
        "repository.credential.secret",
        "not the name",
    ),
]


class TestValidation:
    @pytest.mark.parametrize("raw", VALID, ids=range(len(VALID)))
    async def test_the_canonical_form_is_that_of_the_model(self, sql: asyncpg.Connection, raw: dict[str, Any]) -> None:
        stored, secrets, redact = split_secrets(normalize(raw))
        job = await submit(sql, raw)
        found = json.loads(await sql.fetchval("SELECT spec FROM bsup.job WHERE id = $1", job))
        # As jobs, not as text: the model may write out a number that equals the default.
        decode = decode_spec if stored["kind"] == "steps" else decode_task
        assert decode(json.dumps(found).encode()) == decode(json.dumps(stored).encode())
        assert normalize(found | raw) == normalize(raw)
        rows = await sql.fetch("SELECT name, value, replacement FROM bsup.job_secret WHERE job_id = $1", job)
        assert {row["name"]: row["value"] for row in rows if row["name"]} == secrets
        assert {row["value"]: row["replacement"] for row in rows if not row["name"]} == redact

    @pytest.mark.parametrize(("raw", "field", "problem"), INVALID, ids=range(len(INVALID)))
    async def test_bad_input_is_refused_and_changes_nothing(
        self, sql: asyncpg.Connection, raw: Any, field: str, problem: str
    ) -> None:
        with pytest.raises(InvalidInput):
            normalize(raw)
        with pytest.raises(asyncpg.PostgresError) as refused:
            await submit(sql, raw, key="k")
        error = refused.value
        assert error.sqlstate == "22023" and error.column_name == field
        assert problem in (error.detail or "")
        assert str(error).startswith(f"{field}: {error.detail}")
        assert "s3cret" not in repr(error.as_dict())
        assert await sql.fetchval("SELECT count(*) FROM bsup.job") == 0
        assert await sql.fetchval("SELECT count(*) FROM bsup.submission_key") == 0

    async def test_only_the_database_knows_which_kinds_there_are(self, store: PgStore) -> None:
        mail, fax = normalize(task(kind="mail")), normalize(task(kind="fax"))
        with pytest.raises(InvalidInput) as refused:
            await store.submit(mail, key=None, after=[], submitter="x")
        assert str(refused.value) == "kind: there is no kind 'mail' (allowed: noop, steps)"
        old = (await store.open_session(host(kinds=("steps", "mail")), 180.0)).me
        await store.submit(mail, key=None, after=[], submitter="x")
        more = host(kinds=("mail", "fax"))
        assert await store.resume_session(old.session, "0" * 32, more, 180.0, "1" * 32) is None
        with pytest.raises(InvalidInput, match=r"\(allowed: mail, noop, steps\)"):
            await store.submit(fax, key=None, after=[], submitter="x")
        assert await store.resume_session(old.session, old.incarnation, more, 180.0, "1" * 32) is not None
        await store.submit(fax, key=None, after=[], submitter="x")

    async def test_args_are_bounded_in_depth(self, sql: asyncpg.Connection) -> None:
        """The model names the place, SQL the key."""
        args: dict[str, Any] = {"a": [[[[[[[1]]]]]]]}
        with pytest.raises(InvalidInput, match="nested too deep"):
            normalize(task(args=args))
        with pytest.raises(asyncpg.PostgresError, match="args: is nested too deep"):
            await submit(sql, task(args=args))

    async def test_a_job_without_steps_runs_like_any(self, store: PgStore) -> None:
        job = await store.submit(task(args={"n": None}, attempts=2), key=None, after=[], submitter="x")
        daemon = await Daemon.begin(store)
        lease = await daemon.claim_one()
        assert (lease.job, lease.kind, lease.name, lease.attempts) == (job, "noop", "noop", 2)
        assert decode_task(lease.spec).args == {"n": None}
        assert await daemon.finish(lease) == (True, "succeeded")
        (row,) = await store.states([job])
        assert (row.steps_total, row.state) == (0, State.SUCCEEDED)
        (attempt,) = await store.attempts(job)
        assert (attempt.outcome, attempt.steps) == (Outcome.SUCCEEDED, [])

    async def test_what_text_can_not_hold_is_refused(self, store: PgStore) -> None:
        for name in ("a\0b", "a\ud800b"):
            with pytest.raises((InvalidInput, UnicodeEncodeError)):
                await store.submit(spec(name), key=None, after=[], submitter="x")

    async def test_an_error_comes_through_the_store_with_its_parts(self, store: PgStore) -> None:
        with pytest.raises(InvalidInput) as refused:
            await store.submit(spec(priority=999), key=None, after=[], submitter="x")
        error = refused.value
        assert (error.field, error.problem, error.allowed) == (
            "priority",
            "is out of range",
            "a whole number, 0 to 255",
        )


class TestTransactions:
    async def test_it_is_the_callers_transaction(self, sql: asyncpg.Connection, store: PgStore) -> None:
        daemon = await Daemon.begin(store)
        transaction = sql.transaction()
        await transaction.start()
        await submit(sql, spec())
        assert await daemon.claim() == []
        await transaction.rollback()
        assert await sql.fetchval("SELECT count(*) FROM bsup.job") == 0
        async with sql.transaction():
            job = await submit(sql, spec())
        assert [lease.job for lease in await daemon.claim()] == [job]

    async def test_the_submitter_is_who_logged_in(self, sql: asyncpg.Connection) -> None:
        job = await submit(sql, spec())
        assert await sql.fetchval("SELECT submitter = session_user FROM bsup.jobs WHERE id = $1", job)

    async def test_needs_become_visible_in_order(self, sql: asyncpg.Connection, store: PgStore) -> None:
        """A host asks for those after the last it knows: one with a lower id must not appear later."""
        await add(store)
        transaction = sql.transaction()
        await transaction.start()
        await submit(sql, spec(labels=["a"]))
        # A set of labels known already does not wait for the open transaction.
        await add(store)
        held = await sql.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")
        assert held == 1
        await transaction.commit()
        await add(store, labels=["b"])
        needs = await store.needs(0)
        assert [need.labels for need in needs] == [(), ("a",), ("b",)]
        assert [need.id for need in needs] == sorted(need.id for need in needs)


class TestKeys:
    async def test_the_same_key_and_job_gives_the_same_id(self, sql: asyncpg.Connection, store: PgStore) -> None:
        first = await submit(sql, spec(), key="k")
        assert await submit(sql, spec(priority=127), key="k") == first
        assert await store.submit(spec(), key="k", after=[], submitter="other") == first
        assert await sql.fetchval("SELECT count(*) FROM bsup.job") == 1

    async def test_the_same_key_for_another_job_is_refused(self, sql: asyncpg.Connection, store: PgStore) -> None:
        first = await submit(sql, spec(secrets={"T": "s3cret"}), key="k")
        for other in (spec(), spec(secrets={"T": "else"})):
            with pytest.raises(InvalidInput, match=f"key: was used for job {first}"):
                await store.submit(other, key="k", after=[], submitter="x")
        with pytest.raises(InvalidInput, match="key: was used"):
            await store.submit(spec(secrets={"T": "s3cret"}), key="k", after=[first], submitter="x")

    async def test_racing_submissions_with_one_key_make_one_job(self, store: PgStore, other: PgStore) -> None:
        ids = []

        async def send(to: PgStore) -> None:
            ids.append(await to.submit(spec(), key="k", after=[], submitter="x"))

        async with anyio.create_task_group() as tasks:
            for at in range(6):
                tasks.start_soon(send, (store, other)[at % 2])
        assert len(set(ids)) == 1

    async def test_a_key_is_bounded(self, store: PgStore) -> None:
        for key in ("", "x" * 256):
            with pytest.raises(InvalidInput, match=r"^key: "):
                await store.submit(spec(), key=key, after=[], submitter="x")


class TestParents:
    async def test_a_child_waits_for_all(self, store: PgStore) -> None:
        first, second = await add(store, 2)
        (child,) = await add(store, after=[second, first, first])
        daemon = await Daemon.begin(store)
        one, two = await daemon.claim()
        await daemon.finish(one)
        (row,) = await store.states([child])
        assert (row.state, row.parents_left) == (State.WAITING, 1)
        await daemon.finish(two)
        assert [lease.job for lease in await daemon.claim()] == [child]

    async def test_a_parent_that_succeeded_already_is_not_waited_for(self, store: PgStore) -> None:
        (parent,) = await add(store)
        daemon = await Daemon.begin(store)
        await daemon.finish(await daemon.claim_one())
        (child,) = await add(store, after=[parent])
        (row,) = await store.states([child])
        assert (row.state, row.parents_left) == (State.READY, 0)
        assert (await store.show(child))[2] == [parent]

    async def test_a_parent_that_failed_cancels_at_once(self, store: PgStore, sql: asyncpg.Connection) -> None:
        (parent,) = await add(store)
        daemon = await Daemon.begin(store)
        await daemon.finish(await daemon.claim_one(), Outcome.FAILED)
        (child,) = await add(store, after=[parent], secrets={"T": "s3cret"})
        (row,) = await store.states([child])
        assert (row.state, row.reason) == (State.CANCELED, "upstream")
        assert await sql.fetchval("SELECT count(*) FROM bsup.job_secret") == 0

    async def test_an_unknown_parent_is_refused(self, store: PgStore) -> None:
        with pytest.raises(InvalidInput, match="after: there is no job 77"):
            await store.submit(spec(), key="k", after=[77], submitter="x")

    async def test_a_failure_cancels_all_that_lies_behind(self, store: PgStore) -> None:
        (top,) = await add(store)
        (side,) = await add(store)
        left, right = await add(store, 2, after=[top])
        (bottom,) = await add(store, after=[left, right])
        (mixed,) = await add(store, after=[bottom, side])
        (apart,) = await add(store, after=[side])
        daemon = await Daemon.begin(store)
        leases = {lease.job: lease for lease in await daemon.claim()}
        await daemon.finish(leases[top], Outcome.FAILED)
        rows = await store.states([left, right, bottom, mixed])
        assert {(row.state, row.reason) for row in rows} == {(State.CANCELED, "upstream")}
        await daemon.finish(leases[side])
        assert [lease.job for lease in await daemon.claim()] == [apart]

    async def test_a_whole_batch_counts_down(self, store: PgStore) -> None:
        parents = await add(store, 8)
        (child,) = await add(store, after=parents)
        daemon = await Daemon.begin(store)
        await store.finish(daemon.me, [end_of(lease) for lease in await daemon.claim(8)])
        (row,) = await store.states([child])
        assert row.state is State.READY

    async def test_a_completion_waits_for_a_submission_that_names_its_job(
        self, sql: asyncpg.Connection, store: PgStore, other: PgStore
    ) -> None:
        """Else the child would wait for ever: its edge was not visible to the parent's completion."""
        (parent,) = await add(store)
        (neighbour,) = await add(store)
        daemon = await Daemon.begin(store)
        leases = await daemon.claim(2)
        transaction = sql.transaction()
        await transaction.start()
        child = await submit(sql, spec(), after=[parent])
        verdicts: list[Any] = []

        async def finish() -> None:
            verdicts.extend(await store.finish(daemon.me, [end_of(lease) for lease in leases]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(finish)
            # The neighbour's end does not wait for the stranger's transaction.
            while (await other.states([neighbour]))[0].state is not State.SUCCEEDED:
                await anyio.lowlevel.checkpoint()
            assert (await other.states([parent]))[0].state is State.RUNNING and not verdicts
            await transaction.commit()
        assert [verdict.state for verdict in verdicts] == ["succeeded", "succeeded"]
        assert [lease.job for lease in await daemon.claim()] == [child]


class TestCancel:
    async def test_what_does_not_run_is_canceled(self, sql: asyncpg.Connection, store: PgStore) -> None:
        job = await submit(sql, spec())
        assert await sql.fetchval("SELECT bsup.cancel($1)", job) == "canceled"
        assert await sql.fetchval("SELECT bsup.cancel($1)", job) == "canceled"

    async def test_the_host_of_what_runs_is_told(self, sql: asyncpg.Connection, store: PgStore) -> None:
        job = await submit(sql, spec())
        daemon = await Daemon.begin(store)
        await daemon.claim_one()
        assert await sql.fetchval("SELECT bsup.cancel($1, '30 s', true)", job) == "stopping"
        (order,) = await store.stop_orders(daemon.me)
        assert (order.grace, order.kill) == (30.0, True)

    async def test_an_unknown_job_is_an_error(self, sql: asyncpg.Connection) -> None:
        with pytest.raises(asyncpg.PostgresError, match="no job 5") as unknown:
            await sql.fetchval("SELECT bsup.cancel(5)")
        assert unknown.value.sqlstate == "BS001"


class TestRoles:
    async def test_a_submitter_may_submit_and_cancel_and_no_more(self, sql: asyncpg.Connection) -> None:
        await sql.execute("SET ROLE bsup_submitter")
        job = await submit(sql, spec(secrets={"T": "s3cret"}))
        assert await sql.fetchval("SELECT bsup.cancel($1)", job) == "canceled"
        for statement in (
            "SELECT * FROM bsup.job",
            "SELECT * FROM bsup.job_secret",
            "DELETE FROM bsup.ready",
            "SELECT bsup.submit_as('{}', NULL, NULL, 'root')",
            "SELECT bsup.forget('{1}')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await sql.execute(statement)
        await sql.execute("RESET ROLE")

    async def test_a_reader_sees_all_but_secrets(self, sql: asyncpg.Connection) -> None:
        job = await submit(sql, spec(secrets={"T": "s3cret"}))
        await sql.execute("SET ROLE bsup_reader")
        assert await sql.fetchval("SELECT state FROM bsup.jobs WHERE id = $1", job) == "ready"
        for statement in (
            "SELECT * FROM bsup.job_secret",
            "SELECT * FROM bsup.submission_key",
            "SELECT incarnation FROM bsup.session",
            "SELECT bsup.submit('{}')",
            "UPDATE bsup.job SET name = 'x'",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await sql.execute(statement)
        await sql.execute("RESET ROLE")

    async def test_a_host_can_do_all_that_a_daemon_does(self, migrated_dsn: str, sql: asyncpg.Connection) -> None:
        await sql.execute("GRANT USAGE ON SCHEMA test TO bsup_host; GRANT SELECT ON test.clock TO bsup_host")
        joiner = "&" if "?" in migrated_dsn else "?"
        async with PgStore(f"{migrated_dsn}{joiner}options=-crole%3Dbsup_host") as store:
            daemon = await Daemon.begin(store)
            first, second = await add(store, 2, secrets={"T": "s3cret"})
            lease = await daemon.claim_one()
            assert lease.secrets == {"T": "s3cret"}
            assert await daemon.finish(lease) == (True, "succeeded")
            await store.renew(daemon.me, 180.0, False)
            await store.pulse(180.0)
            await store.reap()
            await store.stop([second], grace=None, kill=False, by="x")
            await store.delete([first, second], by="x")
            await store.close_session(daemon.me)

    async def test_a_hostile_search_path_changes_nothing(self, sql: asyncpg.Connection) -> None:
        """Functions that run with their owner's rights must not call what the caller put in their way."""
        await sql.execute(
            "CREATE SCHEMA IF NOT EXISTS evil; GRANT USAGE ON SCHEMA evil TO bsup_submitter;"
            "CREATE OR REPLACE FUNCTION evil.length(text) RETURNS integer LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE 'called'; END $$;"
            "CREATE OR REPLACE FUNCTION evil.clock() RETURNS timestamptz LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE 'called'; END $$;"
        )
        try:
            await sql.execute("SET ROLE bsup_submitter; SET search_path = evil, pg_catalog")
            await submit(sql, spec())
        finally:
            await sql.execute("RESET ROLE; RESET search_path; DROP SCHEMA evil CASCADE")
