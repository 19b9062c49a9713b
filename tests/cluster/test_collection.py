"""SP's directory: what is in it after restarts of SP, of servers, and from older checkpoints."""

import contextlib
import json

import numpy as np
import pytest
from clusters import Deaf, tiny

from lpgan_jax.cluster import journal as journals
from lpgan_jax.cluster import provider
from lpgan_jax.cluster.collection import Collection
from lpgan_jax.cluster.journal import Journal
from lpgan_jax.cluster.provider import Results
from lpgan_jax.cluster.reporting import BadInput, Lost
from lpgan_jax.cluster.roles import local_cluster
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.cluster.wire import Received, Result
from lpgan_jax.training.building import training_of
from lpgan_jax.training.config import ConfigError
from lpgan_jax.training.run_directory import RunDirectory
from lpgan_jax.training.tasks import tasks

SETTINGS = tiny(steps=24, log_every=2)
TRAINING = training_of(SETTINGS)
RESULTS = Results(TRAINING)


class Line:
    """SP's line to a server's journal; it ends when there is no more for now."""

    def __init__(self, server, journal, fails):
        self.server, self._journal, self._fails = server, journal, fails

    def results(self, after, sizes):
        for entry in self._journal.results((after.attempt, after.serial), 0):
            if entry is None:
                return
            yield entry[0], bytearray(entry[1])

    def received(self, received):
        if self._fails():
            raise Lost(self.server, "as it happens")
        self._journal.drop((received.attempt, received.serial))

    def close(self):
        pass


class Servers:
    """Both servers' journals, and what they put into them."""

    def __init__(self, directory):
        self.paths = [directory / "results" / server for server in ("s1", "s2")]
        self.journals = [Journal(path) for path in self.paths]
        self.rows = {}

    def restart(self):
        for journal in self.journals:
            journal.close()
        self.journals = [Journal(path) for path in self.paths]

    def attempt(self, number, start):
        """The results of an attempt, one after the other; yields steps done."""
        for journal in self.journals:
            journal.forget(start if start else -1)
        for serial, task in enumerate(tasks(TRAINING, start, True)):
            kind = {"train": "told", "answer": "answer", "finish": "learnt"}.get(task.kind)
            if kind is not None:
                step = task.step + (kind == "told")
                self.put(number, serial, kind, step, self.journals)
                yield step

    def put(self, attempt, serial, kind, step, journals):
        size = RESULTS.size_of(kind)
        head = Result(
            attempt=attempt, serial=serial, kind=kind, step=step, seconds=attempt, size=size
        )
        halves = [np.full(size // 8, (step << 12) + attempt * n, "<u8").tobytes() for n in (1, 2)]
        for journal, half in zip(journals, halves, strict=False):
            journal.append(head, half)
        if kind == "told" and (step % 2 == 0 or step == 1):
            row = TRAINING.row(RESULTS.put_together("told", [bytearray(h) for h in halves]))
            self.rows[step] = [row["loss_d"], row["loss_g"], float(attempt)]

    def close(self):
        for journal in self.journals:
            journal.close()


def table(out):
    lines = (out / "metrics.csv").read_text().splitlines()[1:]
    rows = [[float(value) for value in line.split(",")] for line in lines]
    steps = [row[0] for row in rows]
    assert steps == sorted(set(steps)), "each step once, in order"
    return {int(row[0]): row[1:4] for row in rows}


@pytest.fixture
def cluster(tmp_path):
    return load_cluster(local_cluster(tmp_path / "cluster", "state"))


@pytest.fixture
def servers(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "SEGMENT", 600)
    monkeypatch.setattr(provider, "_TELL_EVERY_S", -1.0)
    servers = Servers(tmp_path / "state")
    yield servers
    servers.close()


def collect(cluster, out, servers, monkeypatch, fails=lambda: False, reporter=None):
    """Have SP take what there is now; whether it is done."""

    def connect(*_):
        names = ("s1", "s2")
        lines = [Line(n, j, fails) for n, j in zip(names, servers.journals, strict=True)]
        return lines, SETTINGS.public(), TRAINING

    monkeypatch.setattr(provider, "connect", connect)
    return provider._collect_from_both(cluster, out, reporter or Deaf("sp"), None, None)


@pytest.mark.parametrize("seed", range(6))
def test_sp_has_every_row_whatever_restarts(cluster, servers, tmp_path, monkeypatch, seed):
    """At random SP comes, or fails after it has, or has not, told a server; attempts begin."""
    rng, out, attempt, start, done = np.random.default_rng(seed), tmp_path / "run", 0, 0, False
    while not done:
        attempt += 1
        last = 25 if attempt > 6 else start + int(rng.integers(0, 12))
        for step in servers.attempt(attempt, start):
            if rng.random() < 0.3:
                with contextlib.suppress(Lost):
                    done = collect(cluster, out, servers, monkeypatch, lambda: rng.random() < 0.05)
            if step > last:
                break
        else:
            done = done or collect(cluster, out, servers, monkeypatch)
        if not done:
            servers.put(attempt, 99, "told", step + 1, servers.journals[:1])  # of one server only
            servers.rows.pop(step + 1, None)
            servers.restart()
            if rng.random() < 0.5:
                assert not collect(cluster, out, servers, monkeypatch)
            start = int(rng.integers(0, min(step, 24) // 4 + 1)) * 4
    assert table(out) == servers.rows
    assert sorted(servers.rows) == [1, *range(2, 25, 2)]
    samples = sorted(path.name for path in (out / "samples").iterdir())
    assert samples == [f"step_{step:06d}.png" for step in range(0, 25, 6)]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["attempts"]) == (24, attempt)
    assert summary["loss_d"] == servers.rows[24][0]
    # What was learnt is the last result, and stays for an SP that comes again.
    (out / "parameters.msgpack").unlink()
    assert collect(cluster, out, servers, monkeypatch)
    assert (out / "parameters.msgpack").exists()
    assert json.loads((out / "summary.json").read_text())["loss_d"] == summary["loss_d"]


def test_an_empty_directory_begins_with_what_is_there_and_says_what_is_not(
    cluster, servers, tmp_path, monkeypatch
):
    going = servers.attempt(1, 0)
    while next(going) < 13:
        pass
    assert not collect(cluster, tmp_path / "one", servers, monkeypatch)
    assert table(tmp_path / "one") == servers.rows
    for _ in going:
        pass
    reporter = Deaf("sp")
    assert collect(cluster, tmp_path / "two", servers, monkeypatch, reporter=reporter)
    (warning,) = [line for line in reporter.lines if line["event"] == "warning"]
    found = table(tmp_path / "two")
    first = min(found)
    assert 6 < first <= 14
    assert f"results up to step {first - 2} " in warning["reason"] or (
        f"results up to step {first - 1} " in warning["reason"]
    )
    assert found == {step: row for step, row in servers.rows.items() if step >= first}
    # The first directory would have a hole: it is told where, and stays as it is.
    before = (tmp_path / "one" / "metrics.csv").read_text()
    with pytest.raises(BadInput, match=r"one: has results up to step 1\d, and the servers have "):
        collect(cluster, tmp_path / "one", servers, monkeypatch)
    assert (tmp_path / "one" / "metrics.csv").read_text() == before


def test_a_server_keeps_everything_until_sp_comes(cluster, servers, tmp_path, monkeypatch):
    for _ in servers.attempt(1, 0):
        servers.restart()
    assert collect(cluster, tmp_path / "run", servers, monkeypatch)
    assert table(tmp_path / "run") == servers.rows


def _collection(tmp_path, session, **fields):
    run = RunDirectory(tmp_path)
    known = Received(session="mine", role="sp", attempt=1, serial=3, step=2)
    (tmp_path / "received.json").write_text(json.dumps(known.model_dump() | fields))
    return Collection(run, session, TRAINING, Deaf("sp"))


def test_another_sessions_directory_is_refused(tmp_path):
    assert _collection(tmp_path, "mine").received.serial == 3
    with pytest.raises(BadInput, match="has results of session 'mine', expected those of 'other'"):
        _collection(tmp_path, "other")
    with pytest.raises(ConfigError, match=r"received\.json.*step"):
        _collection(tmp_path, "mine", step=-1)
    (tmp_path / "received.json").write_text("{")
    with pytest.raises(ConfigError, match=r"received\.json: damaged"):
        Collection(RunDirectory(tmp_path), "mine", TRAINING, Deaf("sp"))
