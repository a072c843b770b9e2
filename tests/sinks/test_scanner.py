"""With the scanner and without it the redacted bytes are the same, wherever the output is cut."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from supervisor.model.job import Stream
from supervisor.model.redaction import Redactor, SecretSet
from supervisor.sinks import scanner
from supervisor.sinks.scanner import Scanner
from supervisor.sinks.transcript import SLICE
from tests.sinks.fakes import FakeStep, a_lease, local_log
from tests.sinks.test_transcript import make, run_out

hyperscan = pytest.importorskip("hyperscan")


@pytest.fixture(autouse=True, scope="module")
def at_once() -> Iterator[None]:
    """The scanner is used for every buffer and every set: what it saves does not count here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanner, "_SHORT", 0)
        patch.setattr(scanner, "_FEWEST", 1)
        yield


def redacted(chunks: Sequence[bytes], secrets: SecretSet, with_scanner: bool) -> bytes:
    finder = Scanner(secrets.sought, worth=0) if with_scanner else None
    redactor = Redactor(secrets, finder)
    out = b"".join([redactor.feed(chunk) for chunk in chunks]) + redactor.finish()
    assert finder is None or finder.is_on or not any(chunks) or not secrets
    return out


# Few letters and short values, so that secrets overlap, contain, prefix and suffix one another; a NUL and no UTF-8.
letters = st.sampled_from(b"ab\n\0\xff")
text = st.lists(letters, max_size=60).map(bytes)
values = st.lists(letters, min_size=1, max_size=9).map(bytes)
# Some are longer than what is searched for of them, with beginnings in common.
long_values = st.tuples(st.sampled_from([b"ab" * 16, b"a" * 31, b"b" * 40]), values).map(b"".join)
secrets = st.dictionaries(st.one_of(values, long_values), st.sampled_from([b"***", b"", b"<ab>"]), max_size=8)


@given(st.lists(st.one_of(text, long_values), max_size=6).map(b"".join), secrets, st.lists(st.integers(0, 999)))
@example(b"abab", {b"aba": b"***", b"ab": b"<x>", b"b": b""}, [1, 2, 3])
def test_any_chunking_gives_the_same_bytes(output: bytes, secrets: dict[bytes, bytes], places: list[int]) -> None:
    borders = [0, *sorted(place % (len(output) + 1) for place in places), len(output)]
    chunks = [output[a:b] for a, b in pairwise(borders)]
    known = SecretSet(secrets)
    assert redacted(chunks, known, True) == redacted(chunks, known, False) == redacted([output], known, False)


KEY = b"-----BEGIN KEY-----\nMIIB\r\n9+/=\n-----END KEY-----"
SETS: list[Mapping[bytes, bytes]] = [
    {b"token": b"***", b"token-of-mine": b"[mine]", b"mine": b"***", b"of": b""},  # prefixes, suffixes, within
    {b"abcab": b"***", b"cabca": b"<2>", b"bc": b"#"},  # overlapping
    {KEY: b"***", KEY.replace(b"\n", b"\r\n"): b"***", KEY + b"2": b"[second]"},  # many lines, one beginning
    {b"\xff\xfe\x00\x01": b"***", b"\x00": b"0", b"p\xe4ss": b"***", b"(a|b)*[\\x41]$^.": b"***"},
    {b"x" * 33: b"***", b"x" * 32: b"[32]", b"x" * 100 + b"y": b"[101]"},
]


@pytest.mark.parametrize("secrets", SETS)
def test_every_cut_gives_the_same_bytes(secrets: Mapping[bytes, bytes]) -> None:
    known = SecretSet(secrets)
    order = sorted(secrets)
    output = b"begin " + b"".join(order) + b"\n".join(order[::-1]) + b"abcabcab token-of-min" + order[0][:-1]
    expected = redacted([output], known, False)
    assert expected != output
    for cut in range(len(output) + 1):
        assert redacted([output[:cut], output[cut:]], known, True) == expected, cut
    for size in (1, 2, 3, 7, 31, 32, 33):
        pieces = [output[at : at + size] for at in range(0, len(output), size)]
        assert redacted(pieces, known, True) == expected, size


def test_secrets_across_the_slices_of_a_log(tmp_path: Path) -> None:
    secrets = {b"%032d" % number: b"***" for number in range(50)}
    line = b"cc -O2 -c a.c -o a.o\n"
    filler = line * (SLICE // len(line))
    output = b"".join(filler[: SLICE - at] + b"%032d" % at + filler[: at - 32 if at > 32 else 0] for at in range(40))
    logs = []
    for name in ("with", "without"):
        lease = a_lease()
        transcript = make(tmp_path / name, lease, secrets=secrets)
        if name == "without":
            assert transcript._scanner is not None
            transcript._scanner._is_off = True
        step = FakeStep(tmp_path / name, lease, 0)
        step.write(Stream.OUT, output)
        step.exit()
        transcript.end(0)
        run_out(transcript)
        assert transcript.is_settled
        assert transcript._scanner is not None and transcript._scanner.is_on is (name == "with")
        logs.append(local_log(tmp_path / name, lease))
    assert logs[0] == logs[1]
    assert logs[0].count(b"***") == 40 and b"0" * 30 not in logs[0]


def test_it_is_compiled_only_when_that_pays() -> None:
    finder = Scanner([b"%032d" % number for number in range(50)], worth=50 * 10_000)
    assert finder(b"x" * 9_000) is None
    assert not finder.is_on
    assert finder(b"x" * 9_000 + b"%032d" % 7) == [(7, 9_000)]


def test_without_the_library_each_secret_is_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hyperscan", None)
    known = SecretSet(SETS[0])
    finder = Scanner(known.sought, worth=0)
    assert finder(b"token") is None
    assert Redactor(known, finder).feed(b"my token-of-mine\n") == b"my [mine]\n"


def test_a_library_that_misses_what_it_was_given_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Blind:
        def __init__(self, mode: int) -> None: ...
        def compile(self, **_: object) -> None: ...
        def scan(self, *_: object, **__: object) -> None: ...

    fake = SimpleNamespace(
        **{name: getattr(hyperscan, name) for name in dir(hyperscan) if name.startswith("HS_")},
        Database=Blind,
        Scratch=lambda _: None,
        error=hyperscan.error,
    )
    monkeypatch.setitem(sys.modules, "hyperscan", fake)
    finder = Scanner([b"hush"], worth=0)
    assert finder(b"hush") is None and not finder.is_on
    assert "hyperscan can't be used" in caplog.text and "hush" not in caplog.text
