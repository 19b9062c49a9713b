"""A journal keeps what SP does not have, whatever happens to its process, and little more."""

import contextlib
import itertools
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpgan_jax.cluster import journal as module
from lpgan_jax.cluster.journal import Journal
from lpgan_jax.cluster.wire import Result

SMALL = 400
"""Bytes of a segment here: three or four results."""


def result(attempt, serial, step, size=3, kind="told"):
    return Result(attempt=attempt, serial=serial, kind=kind, step=step, seconds=0.0, size=size)


def payload(head):
    return bytes([head.attempt % 256]) * head.size


def there(journal, after=(0, 0)):
    """What SP would read now."""
    entries = itertools.takewhile(lambda entry: entry is not None, journal.results(after, 0))
    found = [*entries]
    assert all(data == payload(head) for head, data in found)
    return [head for head, _ in found]


def files(path):
    return sorted(path.glob("*.msgpack"))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", SMALL)


def order(head):
    return head.attempt, head.serial


# What happens to a journal, in any order; numbers choose the place.
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["append"] * 6 + ["drop", "drop", "forget", "reopen", "cut", "learnt"]),
        st.integers(0, 10**6),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_nothing_is_lost_that_sp_has_not_said_to_have(events):
    """Beside a list, through additions, crashes at any byte, new attempts and what SP says."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(module, "SEGMENT", SMALL)
        path = Path(directory) / "results" / "s1"
        journal, model, sp = Journal(path), [], (0, 0)
        attempt, serial, step = 1, 0, 0
        for event, number in events:
            if event in ("append", "learnt") and not (model and model[-1].kind == "learnt"):
                serial, step = serial + 1, step + (event == "append")
                kind = "told" if event == "append" else "learnt"
                model.append(result(attempt, serial, step, number % 150, kind))
                journal.append(model[-1], payload(model[-1]))
            elif event == "drop" and model:
                sp = max(sp, order(model[number % len(model)]))
                journal.drop(sp)
            elif event == "forget":  # a new attempt, from a checkpoint
                attempt, serial, step = attempt + 1, 0, number % (step + 1)
                journal.forget(step)
                model = [h for h in model if h.step <= step and h.kind != "learnt"]
            elif event in ("cut", "reopen"):
                journal.close()
                if event == "cut":
                    last = files(path)[-1]
                    whole = last.read_bytes()
                    last.write_bytes(whole[: number % (len(whole) + 1)])
                journal = Journal(path)
                if event == "cut":  # what is there is what was there, but for the end
                    kept, left = there(journal, sp), [h for h in model if order(h) > sp]
                    assert kept == left[: len(kept)]
                    gone = {order(h) for h in left[len(kept) :]}
                    model = [h for h in model if order(h) not in gone]
            assert there(journal, sp) == [h for h in model if order(h) > sp]
            missing = sum(h.size + 130 for h in model if order(h) > sp)
            assert sum(f.stat().st_size for f in files(path)) == journal.waiting
            assert journal.waiting <= missing + SMALL + 2 * 280
        journal.close()


def test_a_journal_survives_a_cut_at_any_byte(small, tmp_path):
    heads = [result(1, n, n, size=10 * n) for n in range(1, 12)]
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        for head in heads:
            journal.append(head, payload(head))
    *before, last = files(tmp_path / "j")
    assert len(before) > 1
    whole, most = last.read_bytes(), None
    for size in range(len(whole), -1, -1):
        last.write_bytes(whole[:size])
        with contextlib.closing(Journal(tmp_path / "j")) as journal:
            kept = there(journal)
            assert kept == heads[: len(kept)]
            assert len(kept) >= 6
            assert most is None or most - 1 <= len(kept) <= most, "one result at a time"
            most = len(kept)
            again = heads[len(kept)] if len(kept) < len(heads) else None
            if again is not None:
                journal.append(again, payload(again))
        with contextlib.closing(Journal(tmp_path / "j")) as journal:
            assert there(journal) == heads[: len(kept) + (again is not None)]


def test_what_a_damaged_segment_held_is_missing_and_the_rest_is_there(small, tmp_path):
    heads = [result(1, n, n, size=50) for n in range(1, 12)]
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        for head in heads:
            journal.append(head, payload(head))
        first, second, *_ = files(tmp_path / "j")
        second.write_bytes(b"\0" * second.stat().st_size)
        found = there(journal)
        assert 0 < len(found) < len(heads)
        assert found[-1] == heads[-1]
        journal.drop((1, 11))
        assert not first.exists()
        assert not second.exists()


def test_a_killed_forget_is_done_again(small, tmp_path):
    """It removes the newest segments first, so that what is left is in order, without a gap."""
    heads = [result(1, n, n, size=50) for n in range(1, 20)]
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        for head in heads:
            journal.append(head, payload(head))
    files(tmp_path / "j")[-1].unlink()
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        kept = there(journal)
        assert kept == heads[: len(kept)]
        journal.forget(after=4)
        journal.append(result(2, 1, 5), payload(result(2, 1, 5)))
        assert there(journal) == [*heads[:4], result(2, 1, 5)]


def test_what_was_learnt_stays_until_it_is_computed_again(small, tmp_path):
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        for n in range(1, 12):
            journal.append(result(1, n, n, 99), payload(result(1, n, n, 99)))
        learnt = result(1, 12, 11, 700, "learnt")
        journal.append(learnt, payload(learnt))
        journal.drop((2, 5))
        assert there(journal)[-1] == learnt
        assert len(files(tmp_path / "j")) == 1
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        assert there(journal)[-1] == learnt
        journal.forget(after=11)
        assert learnt not in there(journal)


def test_readers_end_when_results_become_void(tmp_path):
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        journal.append(result(1, 1, 1), payload(result(1, 1, 1)))
        reader = journal.results((0, 0), 0)
        assert next(reader)[0].step == 1
        assert next(reader) is None
        journal.forget(after=0)
        assert [*reader] == []


def test_thousands_of_results_take_little_disk_and_memory(tmp_path):
    """With a reader that says what it has, once in a while, for 50 MB of results."""
    count, size = 50_000, 900
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        reader, most = journal.results((0, 0), 0), 0
        tracemalloc.start()
        try:
            for n in range(1, count + 1):
                head = result(1, n, n, size)
                journal.append(head, payload(head))
                assert next(reader)[0].serial == n
                if n % 500 == 0:
                    journal.drop((1, n))
                if n == 5000:
                    early = tracemalloc.get_traced_memory()[0]
                if n % 97 == 0:
                    most = max(most, journal.waiting)
            later = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert most < module.SEGMENT + 500 * 1100 + 2000
        assert len(files(tmp_path / "j")) <= 2
        assert later - early < 2**23  # Python's own tables are resized now and then


def test_without_a_reader_memory_stays_small(tmp_path):
    with contextlib.closing(Journal(tmp_path / "j")) as journal:
        tracemalloc.start()
        try:
            for n in range(1, 20_001):
                journal.append(result(1, n, n, 100), bytes([1]) * 100)
            used = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert used < 2**18
        assert journal.waiting > 20_000 * 100
        serials = [head.serial for head in there(journal, (1, 19_000))]
        assert serials == [*range(19_001, 20_001)]
