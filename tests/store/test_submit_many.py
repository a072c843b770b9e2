"""``bsup.submit_many`` as any language uses it, and as the store does: many jobs in one call, all or none."""

from __future__ import annotations

import json
from typing import Any

import asyncpg
import msgspec
import pytest

from supervisor.model.errors import InvalidInput
from supervisor.model.job import State
from supervisor.model.spec import decode_task, normalize, split_secrets
from supervisor.store.pg import PgStore
from tests.store.store_bench import Daemon, spec
from tests.store.test_submit_sql import INVALID, VALID, task

pytestmark = pytest.mark.anyio

ARGS_OF_ALL = {"a": [1, None, {"b": None}]}


async def submit_many(connection: asyncpg.Connection, jobs: Any, key: str | None = None) -> list[int]:
    found: list[int] = await connection.fetchval("SELECT bsup.submit_many($1::jsonb, key => $2)", json.dumps(jobs), key)
    return found


async def submit_each(
    connection: asyncpg.Connection, job: Any, args: list[Any] | None, key: str | None = None
) -> list[int]:
    each = None if args is None else [None if one is None else json.dumps(one) for one in args]
    statement = "SELECT bsup.submit_many($1::jsonb, $2::jsonb[], key => $3)"
    found: list[int] = await connection.fetchval(statement, json.dumps(job), each, key)
    return found


class TestWhatIsMade:
    async def test_each_is_what_a_single_submission_makes_of_it(self, sql: asyncpg.Connection) -> None:
        jobs = VALID + VALID
        many = await submit_many(sql, jobs)
        assert many == sorted(many) and len(set(many)) == len(jobs)
        one_by_one = [await sql.fetchval("SELECT bsup.submit($1)", json.dumps(job)) for job in jobs]
        for table, key, rest in (
            ("job", "id", "t.id, submitted_at"),
            ("ready", "job_id", "ready_at"),
            ("job_secret", "job_id", ""),
        ):
            left = "".join(f" - '{column.strip().removeprefix('t.')}'" for column in rest.split(",") if column)
            statement = (
                f"SELECT to_jsonb(t){left} - '{key}' FROM unnest($1::bigint[]) WITH ORDINALITY i (id, ord)"
                f' JOIN bsup.{table} t ON t.{key} = i.id ORDER BY i.ord, t::text COLLATE "C"'
            )
            made, expected = await sql.fetch(statement, many), await sql.fetch(statement, one_by_one)
            assert sorted(row[0] for row in made) == sorted(row[0] for row in expected)
            if table != "job_secret":
                assert [row[0] for row in made] == [row[0] for row in expected]

    async def test_names_and_args_are_each_jobs_own(self, sql: asyncpg.Connection, store: PgStore) -> None:
        jobs = [
            task(name=" first ", args={"i": 1}),
            task(args={"i": 2}),
            task(name="caf\u00e9"),
            task(args={}, name=None),
            task(priority=200, args={"i": 5}),
            spec("other"),
        ]
        many = await submit_many(sql, jobs)
        daemon = await Daemon.begin(store)
        leases = {lease.job: lease for lease in await daemon.claim()}
        assert list(leases) == [many[4], *many[:4], many[5]]
        names = [leases[job].name for job in many]
        assert names == ["first", "noop", "caf\u00e9", "noop", "noop", "other"]
        tasks = [decode_task(leases[job].spec) for job in many[:5]]
        assert [one.args for one in tasks] == [{"i": 1}, {"i": 2}, {}, {}, {"i": 5}]
        assert [one.name for one in tasks] == names[:5]

    async def test_one_spec_and_many_args(self, sql: asyncpg.Connection, store: PgStore) -> None:
        many = await submit_each(sql, task(name="mail", secrets={"T": "s3cret"}), [{"i": 1}, None, {}, ARGS_OF_ALL])
        leases = await (await Daemon.begin(store)).claim()
        assert [lease.job for lease in leases] == many
        assert [decode_task(lease.spec).args for lease in leases] == [{"i": 1}, {}, {}, ARGS_OF_ALL]
        assert {lease.name for lease in leases} == {"mail"}
        assert [lease.secrets for lease in leases] == [{"T": "s3cret"}] * 4

    async def test_secrets_go_where_they_belong(self, sql: asyncpg.Connection, store: PgStore) -> None:
        jobs = [task(secrets={"T": "one"}), task(), task(secrets={"T": "two"}, redact={"hush": "***"}, args={"x": 1})]
        await submit_many(sql, jobs)
        leases = await (await Daemon.begin(store)).claim()
        assert [lease.secrets for lease in leases] == [{"T": "one"}, {}, {"T": "two"}]
        assert [lease.redact for lease in leases] == [{}, {}, {"hush": "***"}]
        shown = [split_secrets(normalize(job))[0] for job in jobs]
        assert [msgspec.json.decode(lease.spec) for lease in leases] == shown

    async def test_through_the_store(self, store: PgStore) -> None:
        jobs = [normalize(task(args={"i": at})) for at in range(20)]
        many = await store.submit_many(jobs, key="k", submitter="ann")
        assert await store.submit_many(jobs, key="k", submitter="bob") == many
        assert {(row.state, row.submitter) for row in await store.states(many)} == {(State.READY, "ann")}
        with pytest.raises(InvalidInput) as refused:
            await store.submit_many([*jobs, task(priority=999)], key=None, submitter="ann")
        assert (refused.value.field, refused.value.problem) == ("jobs[20].priority", "is out of range")
        assert await store.submit_many([], key=None, submitter="ann") == []

    async def test_none_is_none(self, sql: asyncpg.Connection) -> None:
        assert await submit_many(sql, [], key="k") == await submit_each(sql, task(), []) == []

    async def test_hosts_that_wait_are_woken_once(self, sql: asyncpg.Connection, store: PgStore) -> None:
        daemon = await Daemon.begin(store)
        await store.set_idle(daemon.me, True)
        told: list[str] = []
        await sql.add_listener("bsup", lambda *_: told.append("ready"))
        await submit_many(sql, [task()] * 10)
        await sql.execute("SELECT 1")
        assert told == ["ready"]


class TestRefusals:
    @pytest.mark.parametrize(("raw", "field", "problem"), INVALID, ids=range(len(INVALID)))
    async def test_the_job_is_named_and_none_is_made(
        self, sql: asyncpg.Connection, raw: Any, field: str, problem: str
    ) -> None:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await submit_many(sql, [task(), task(), raw, raw], key="k")
        error = refused.value
        named = "jobs[2]" if field == "job" else f"jobs[2].{field}"
        assert (error.sqlstate, error.column_name) == ("22023", named)
        assert problem in (error.detail or "")
        assert "s3cret" not in repr(error.as_dict())
        assert await sql.fetchval("SELECT count(*) FROM bsup.job") == 0
        assert await sql.fetchval("SELECT count(*) FROM bsup.submission_key") == 0

    @pytest.mark.parametrize(
        ("args", "field"),
        [([{}, 3], "args[1]"), ([{}, None, [1]], "args[2]"), ([{"a": [[[[[[[1]]]]]]]}], "args[0]"), (None, "args")],
    )
    async def test_args_are_named_by_their_place(
        self, sql: asyncpg.Connection, args: list[Any] | None, field: str
    ) -> None:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await submit_each(sql, task(), args)
        assert (refused.value.sqlstate, refused.value.column_name) == ("22023", field)

    @pytest.mark.parametrize(
        ("job", "field"), [(spec(), "kind"), (task(args={}), "args"), (task(kind="x"), "kind"), (3, "job")]
    )
    async def test_what_all_share_is_checked_as_a_job(self, sql: asyncpg.Connection, job: Any, field: str) -> None:
        with pytest.raises(asyncpg.PostgresError) as refused:
            await submit_each(sql, job, [{}])
        assert (refused.value.sqlstate, refused.value.column_name) == ("22023", field)

    async def test_the_number_is_bounded(self, sql: asyncpg.Connection) -> None:
        for call in (
            'bsup.submit_many((SELECT jsonb_agg(\'{"kind": "noop"}\'::jsonb) FROM generate_series(1, 100001)))',
            "bsup.submit_many('{\"kind\": \"noop\"}'::jsonb, array_fill('{}'::jsonb, ARRAY[100001]))",
        ):
            with pytest.raises(asyncpg.PostgresError, match="has 100001 jobs"):
                await sql.execute(f"SELECT {call}")
        for jobs in ({}, None, "x"):
            with pytest.raises(asyncpg.PostgresError, match="jobs: is not a list"):
                await submit_many(sql, jobs)


class TestKeys:
    async def test_a_repeat_gives_the_same_jobs(self, sql: asyncpg.Connection) -> None:
        jobs = [task(args={"i": 1}), task(name="b"), spec()]
        first = await submit_many(sql, jobs, key="k")
        assert await submit_many(sql, [task(args={"i": 1}, priority=127, name="noop"), *jobs[1:]], key="k") == first
        (alone,) = await submit_many(sql, jobs[:1], key="l")
        assert await submit_many(sql, jobs[:1], key="l") == [alone]
        assert await sql.fetchval("SELECT count(*) FROM bsup.job") == 4

    @pytest.mark.parametrize(
        "other",
        [[task()], [task(), task(), task()], [task(), task(args={"i": 1})], [task(name="b"), task()], [task(), spec()]],
    )
    async def test_another_batch_is_refused(self, sql: asyncpg.Connection, other: list[Any]) -> None:
        first, _ = await submit_many(sql, [task(), task()], key="k")
        with pytest.raises(asyncpg.PostgresError, match=f"key: was used for job {first}, which is different"):
            await submit_many(sql, other, key="k")

    async def test_names_and_args_are_not_mistaken_for_each_other(self, sql: asyncpg.Connection) -> None:
        """What a key stands for is each part at its place."""
        await submit_many(sql, [task(name="a"), task(args={"n": "b"})], key="k")
        with pytest.raises(asyncpg.PostgresError, match="key: was used"):
            await submit_many(sql, [task(args={"n": "b"}), task(name="a")], key="k")


class TestRoles:
    async def test_a_submitter_may_and_its_name_is_kept(self, sql: asyncpg.Connection) -> None:
        await sql.execute("SET ROLE bsup_submitter")
        many = await submit_many(sql, [task()]) + await submit_each(sql, task(), [{}])
        for statement in (
            "SELECT bsup.submit_many_as('[]'::jsonb, NULL, 'root')",
            "SELECT bsup.insert_jobs('{}', '{}', NULL, NULL, NULL, 'root')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await sql.execute(statement)
        await sql.execute("RESET ROLE")
        rows = await sql.fetch("SELECT submitter = session_user AS mine FROM bsup.job WHERE id = ANY ($1)", many)
        assert [row["mine"] for row in rows] == [True, True]

    async def test_a_reader_may_not(self, sql: asyncpg.Connection) -> None:
        await sql.execute("SET ROLE bsup_reader")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await submit_many(sql, [task()])
        await sql.execute("RESET ROLE")
