"""What a step writes reaches the files exactly, with an index that tells streams and cuts; whoever holds the FIFOs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from yard import Yard


def test_bytes_are_kept_exactly(yard: Yard) -> None:
    every = b"".join(bytes([n]) for n in range(256))
    (yard.workspace() / "src" / "data").write_bytes(every * 1000)
    (yard.state / "work" / "r-1" / "src" / "data").chmod(0o644)
    ended = yard.run("cat data; cat data >&2; cat data")
    assert ended.out == every * 2000
    assert ended.err == every * 1000


def test_fifty_megabytes_on_one_line_pass_without_a_newline(yard: Yard) -> None:
    size = 50_000_000
    ended = yard.run(f"head -c {size} /dev/zero | tr '\\0' x; echo end >&2")
    assert hashlib.sha256(ended.out).digest() == hashlib.sha256(b"x" * size).digest()
    assert ended.err == b"end\n"


def test_memory_stays_flat(yard: Yard) -> None:
    def resident() -> int:
        return int(Path(f"/proc/{yard.pid}/statm").read_text().split()[1]) * 4096

    yard.run("echo warm")
    before = resident()
    ended = yard.run("head -c 200000000 /dev/zero", index=1, max_output=100_000_000)
    assert ended.closed["out_bytes"] == 100_000_000
    assert resident() - before < 4 << 20


def test_the_order_of_the_streams_is_in_the_index(yard: Yard) -> None:
    """A step that waits between its writes is read in between: the index interleaves as it wrote."""
    ended = yard.run("echo 1; sleep 0.2; echo 2 >&2; sleep 0.2; echo 3")
    assert [what for _, _, what in ended.index] == [1, 2, 1]
    assert [offset for _, offset, _ in ended.index] == [2, 2, 4]


def test_times_are_when_it_was_written(yard: Yard) -> None:
    ended = yard.run("echo a; sleep 0.3; echo b")
    (first, _, _), (second, _, _) = ended.index
    assert second - first > 0.2


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1"])
def test_a_redirection_to_dev_stdout_truncates_nothing(yard: Yard, name: str) -> None:
    ended = yard.run(f"echo one; echo two > {name}; echo three >> {name}; echo four > /dev/stderr")
    assert ended.out == b"one\ntwo\nthree\n"
    assert ended.err == b"four\n"


def test_a_step_may_close_its_output_and_go_on(yard: Yard) -> None:
    step = yard.start("echo before; exec >&- 2>&-; echo closed > $WORDS; read x < $GO; exit 5")
    assert yard.word() == "closed"
    assert yard.link.ask(do="status")["live"][0]["state"] == "running"
    assert not (step / "exit").exists()
    yard.go()
    ended = yard.ended(step)
    assert ended.how == (5, None, None)
    assert ended.out == b"before\n"


def test_past_the_cap_output_is_drained_counted_and_marked(yard: Yard) -> None:
    ended = yard.run("head -c 300000 /dev/zero; head -c 50000 /dev/zero >&2; echo done > $WORDS", max_output=100_000)
    assert yard.word() == "done"
    assert ended.how == (0, None, None)
    kept = ended.closed["out_bytes"] + ended.closed["err_bytes"]
    dropped = ended.closed["out_dropped"] + ended.closed["err_dropped"]
    assert kept == 100_000
    assert kept + dropped == 350_000
    assert any(what in (4, 5) for _, _, what in ended.index)


def test_output_up_to_the_cap_is_not_marked(yard: Yard) -> None:
    ended = yard.run("head -c 1000 /dev/zero", max_output=1000)
    assert len(ended.out) == 1000
    assert [what for _, _, what in ended.index] == [1]


def test_a_step_that_writes_byte_by_byte_costs_few_records(yard: Yard) -> None:
    ended = yard.run("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done")
    assert ended.out.split() == [str(n).encode() for n in range(20000)]
    assert len(ended.index) < 5000


def test_what_is_left_in_the_background_loses_nothing_it_wrote(yard: Yard) -> None:
    """A child that outlives the main process is killed, but what it had written by then is output."""
    step = yard.start("(head -c 60000 /dev/zero; echo written > $WORDS; sleep 1000) & read x < $GO; exit 0")
    yard.word()
    yard.go()
    ended = yard.ended(step)
    assert ended.out == bytes(60000)
    assert ended.closed["output_closed"]


def test_a_full_disk_cuts_the_output_and_the_step_goes_on(shared_yard: Yard) -> None:
    """A file-size limit of the shepherd's stands in for the full disk: the write fails in the same place."""
    import resource

    resource.prlimit(shared_yard.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    ended = shared_yard.run("head -c 500000 /dev/zero; exit 4")
    assert ended.how == (4, None, None)
    assert len(ended.out) == 200_000
    assert ended.closed["out_dropped"] == 300_000
