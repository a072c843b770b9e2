"""DSNs are read as libpq reads them, handed to asyncpg as it wants them, and shown without their secrets."""

from __future__ import annotations

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.model.errors import InvalidInput
from supervisor.store.dsn import Dsn, Host, parse, safe_dsn

READ = [
    ("postgresql://", Dsn((), None, None, None, {})),
    ("postgres://localhost", Dsn((Host("localhost"),), None, None, None, {})),
    ("postgresql://ann:p%40ss@db:5433/builds", Dsn((Host("db", 5433),), "ann", "p@ss", "builds", {})),
    ("postgresql://ann@/builds?host=/run/postgresql", Dsn((Host("/run/postgresql"),), "ann", None, "builds", {})),
    ("postgresql://%2Frun%2Fpg/builds", Dsn((Host("/run/pg"),), None, None, "builds", {})),
    ("postgresql://[::1]:5433,[fe80::2]/x", Dsn((Host("::1", 5433), Host("fe80::2")), None, None, "x", {})),
    (
        "postgresql://u@a,b:5433/x?target_session_attrs=read-write",
        Dsn((Host("a"), Host("b", 5433)), "u", None, "x", {"target_session_attrs": "read-write"}),
    ),
    (
        "host=a,b port=5432,5433 dbname=x user=u target_session_attrs=read-write",
        Dsn((Host("a", 5432), Host("b", 5433)), "u", None, "x", {"target_session_attrs": "read-write"}),
    ),
    ("host=a,b port=5433", Dsn((Host("a", 5433), Host("b", 5433)), None, None, None, {})),
    (r"password = 'it\'s \\ here'  user=u", Dsn((), "u", "it's \\ here", None, {})),
    ("host='' user=u", Dsn((), "u", None, None, {})),
    ("postgresql://u@h/x?ssl=true", Dsn((Host("h"),), "u", None, "x", {"sslmode": "require"})),
]


@pytest.mark.parametrize(("text", "dsn"), READ, ids=[text for text, _ in READ])
def test_both_forms_are_read(text: str, dsn: Dsn) -> None:
    assert parse(text) == dsn


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("builds", "not a connection string"),
        ("host=a hots=b", "unknown keyword 'hots'"),
        ("host=a,b,c port=1,2", "3 hosts and 2 ports"),
        ("host=a port=http", "a port is not a number"),
        ("host=a port=0", "1 to 65535"),
        ("postgresql://[::1/x", "not closed"),
        ("postgresql://h/x?sslmode", "no '='"),
        ("postgresql://h/x?nonsense=1", "unknown keyword 'nonsense'"),
        ("host=a target_session_attrs=master", "read-write"),
        ("host=a connect_timeout=soon", "whole seconds"),
        ("host=a channel_binding=require", "channel_binding is not supported"),
        ("host=a requirepeer=postgres", "requirepeer is not supported"),
        ("host='a", "a quote is not closed"),
        ("postgresql://%ff@h/x", "not UTF-8"),
        ("postgresql://h/x%00", "zero byte"),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem) as caught:
        parse(text)
    assert caught.value.field == "database.dsn"


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ann:hunter2@db/x",
        "postgresql://ann@db/x?password=hunter2",
        "postgresql://ann@db/x?sslpassword=hunter2",
        "host=db user=ann password=hunter2 dbname=x",
        "host=db user=ann password='hunter2",
        "postgresql://ann:hunter2@db/x?wrong=1",
        "postgresql://ann:hunter2@db:port/x",
        "hunter2",
    ],
)
def test_a_password_is_never_shown(text: str) -> None:
    """Neither by ``safe_dsn``, nor by an error, nor by ``repr``."""
    assert "hunter2" not in safe_dsn(text)
    try:
        dsn = parse(text)
    except InvalidInput as error:
        assert "hunter2" not in str(error)
    else:
        assert "hunter2" not in repr(dsn)


def test_what_only_libpq_knows_is_kept_from_asyncpg() -> None:
    """asyncpg would send it to the server as a setting, which refuses the connection."""
    dsn = parse("host=db keepalives=1 channel_binding=prefer connect_timeout=7 application_name=ci")
    assert dsn.url() == "postgresql://db/?application_name=ci"
    assert dsn.connect_timeout == 7
    assert parse("host=db").connect_timeout is None


@pytest.mark.anyio
async def test_asyncpg_connects_with_the_url(dsn: str) -> None:
    """The same server by the given URL and by the words it stands for."""
    taken = parse(dsn)
    words = [f"host='{','.join(h.name for h in taken.hosts)}'", f"dbname={taken.database}"]
    words += [f"port={taken.hosts[0].port}"] if taken.hosts[0].port else []
    words += [f"user={taken.user}"] if taken.user else []
    words += [f"password='{taken.password}'"] if taken.password else []
    for text in (dsn, " ".join(words) + " connect_timeout=5 target_session_attrs=read-write"):
        connection = await asyncpg.connect(parse(text).url())
        try:
            assert await connection.fetchval("SELECT current_database()") == taken.database
        finally:
            await connection.close()


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
names = st.from_regex(r"[a-z][a-z0-9.-]{0,9}", fullmatch=True)
paths = st.from_regex(r"/[a-z /]{1,9}", fullmatch=True)
hosts = st.builds(Host, st.one_of(names, paths), st.integers(1, 65535))


@given(
    st.builds(
        Dsn,
        st.lists(hosts, max_size=3).map(tuple),
        st.none() | texts,
        st.none() | texts,
        st.none() | texts,
        st.dictionaries(st.sampled_from(["application_name", "options", "sslcert"]), texts),
    )
)
def test_a_dsn_survives_being_written_and_read(dsn: Dsn) -> None:
    assert parse(dsn.url()) == dsn
    assert parse(dsn.safe()).password is None
