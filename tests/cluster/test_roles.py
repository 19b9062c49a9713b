"""Configuration, certificates, supervision and the command line of a cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from clusters import Deaf, events, tiny
from flax import serialization

from lpgan_jax import cli
from lpgan_jax.cluster import provider
from lpgan_jax.cluster.certificates import make_certificates
from lpgan_jax.cluster.provider import _Pairs
from lpgan_jax.cluster.reporting import BadInput
from lpgan_jax.cluster.roles import local_cluster, up
from lpgan_jax.cluster.settings import (
    Address,
    changed_field,
    load_cluster,
)
from lpgan_jax.cluster.supervisor import Supervisor
from lpgan_jax.cluster.wire import Layout, Malformed, Result, buffers, chunks, receive
from lpgan_jax.cluster.worker import Job
from lpgan_jax.training import config
from lpgan_jax.training.building import training_of
from lpgan_jax.training.config import ConfigError
from lpgan_jax.training.run_directory import RunDirectory

GUIDE = Path(__file__).parent.parent.parent / "docs" / "deployment.md"


# Configuration ------------------------------------------------------------------------------------


def _guides_example():
    return re.search(r"```yaml\n(.*?)```", GUIDE.read_text(), re.S)[1]


def test_the_guides_example_is_a_configuration(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(_guides_example())
    cluster = load_cluster(file)
    assert cluster.roles == ["ds", "s1", "s2", "sp"]
    assert cluster.certificates == str(tmp_path / "certificates")
    assert cluster.timeouts == type(cluster.timeouts)(), "the example shows the defaults"
    file.write_text(config.dump(cluster))
    assert load_cluster(file) == cluster


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("session", "two words", "session: 'two words' given"),
        ("line", {"host": "s1.example.org"}, "line.port: missing"),
        (
            "link",
            {"s1": "10.8.0.1", "s2": "10.8.0.2", "port": 1},
            "cluster.yaml: link (line 8): of an older version",
        ),
        ("turns", ["ds", "s1"], "turns: ['ds', 's1'] given, expected names of data owners"),
        ("turns", [], "turns: "),
        ("turns", ["../x"], "turns: ['../x'] given, expected names of data owners"),
        ("look_ahead", 0, "look_ahead: 0 given, expected at least 1"),
        ("timeouts", {"silence_s": 0.5}, "timeouts.silence_s: 0.5 given, expected at least 2"),
        ("turns", ["ds", "clinic"], "expected no integrity with other owners than ds"),
        ("integrity", {"check": 0}, "integrity.check: 0 given, expected more than 0"),
        ("colour", "red", "colour: unknown field, expected one of session, servers"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, field, value, message):
    fields = yaml.safe_load(_guides_example()) | {field: value}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_cluster(file)


def test_turns_are_counted(tmp_path):
    file = local_cluster(tmp_path, "state", turns=["ds", "a", "a", "b"])
    cluster = load_cluster(file)
    assert cluster.owners == ["ds", "a", "b"]
    seen = {"ds": 0, "a": 0, "b": 0}
    for step in range(30):
        owner = cluster.owner_of(step)
        for name, count in seen.items():
            assert cluster.turn_of(name, step) == count
        seen[owner] += 1
    assert {p.name for p in (tmp_path / "certificates").glob("*.key")} == {
        f"{role}.key" for role in cluster.roles
    }


def test_addresses_of_both_kinds():
    assert Address(host="fd00::1", port=7).target == "[fd00::1]:7"
    assert Address(host="s1.example.org", port=7, listen="10.0.0.1").place == "10.0.0.1:7"


def test_what_others_may_know_and_what_may_change():
    private = tiny(seed=5).model_copy(
        update={"data": config.load("mnist-small").data.model_copy(update={"image_size": 8})}
    )
    public = private.public()
    assert (public.seed, public.data.path, public.data.dataset) == (0, None, "private")
    assert public.data.image_size == 8
    assert changed_field(public, public.model_copy(update={"steps": 99})) is None
    for field, value in (("batch_size", 5), ("results", ("generator", "discriminator"))):
        assert changed_field(public, public.model_copy(update={field: value})) == field


def test_certificates_are_not_written_over(tmp_path):
    make_certificates(tmp_path / "c", ["ds"])
    assert (tmp_path / "c" / "ds.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError, match="expected a new directory"):
        make_certificates(tmp_path / "c", ["ds"])


# Bytes --------------------------------------------------------------------------------------------


def test_arrays_survive_being_bytes():
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 2**32, (3, 5), np.uint32),
        rng.integers(0, 2**64, (2, 7), np.uint64),
        np.uint64(2**64 - 1),
        np.zeros((0, 3), np.uint64),
        rng.integers(0, 2**64, 300_000, np.uint64),
    ]
    layout = Layout.of(arrays)
    frames = list(chunks(buffers(arrays)))
    assert max(map(len, frames)) <= 2**20
    payload = receive(iter(frames), layout.size)
    for array, again in zip(arrays, layout.split(payload), strict=True):
        np.testing.assert_array_equal(array, again)
    with pytest.raises(Malformed, match="payload: a chunk of 0 bytes"):
        receive(iter(frames), layout.size + 1)
    with pytest.raises(Malformed, match="payload: a chunk"):
        receive(iter(frames), layout.size - 1)


class _Fake:
    """A server's end, for SP: results that are there already."""

    def __init__(self, server, heads):
        self.server, self._heads = server, heads

    def results(self, after, size_of):
        for attempt, serial in self._heads:
            head = Result(attempt=attempt, serial=serial, kind="told", step=1, seconds=0, size=2)
            yield head, bytearray([attempt, serial])


def test_sp_pairs_shares_of_one_result_only():
    """A result that only one server has was lost in a crash, and computed again."""
    clients = [_Fake("s1", [(1, 0), (1, 1), (3, 0)]), _Fake("s2", [(1, 0), (2, 5), (3, 0)])]
    results = type("", (), {"size_of": staticmethod({}.get)})()
    pairs = _Pairs(clients, results, None)
    for expected in ((1, 0), (3, 0)):
        heads, payloads = pairs.next()
        assert [(head.attempt, head.serial) for head in heads] == [expected] * 2
        assert payloads == [bytearray(expected)] * 2
    assert pairs.next() is None  # and SP begins again


class _Trained:
    """A server's end, for SP: losses of all steps, and what was learnt, which is `value`.

    The results end there, because a new attempt begins.
    """

    def __init__(self, server, steps, value):
        self.server, self._steps, self._value = server, steps, value

    def results(self, after, size_of):
        for step in range(1, self._steps + 1):
            yield self._result("told", step, size_of, 0)
        yield self._result("learnt", self._steps, size_of, self._value)

    def _result(self, kind, step, size_of, value):
        size = size_of(kind)
        head = Result(attempt=1, serial=step, kind=kind, step=step, seconds=1.0, size=size)
        if kind == "learnt":
            head = head.model_copy(update={"serial": step + 1})
        return head, bytearray(np.full(size // 8, value, "<u8").tobytes())

    def received(self, received):
        assert received.step <= self._steps

    def close(self):
        pass


@pytest.mark.parametrize(
    ("known", "steps"),
    [
        (3, 5),  # `up` goes on with a finished training, and DS is not there yet
        (5, None),  # DS is, but a server still has the results of before
    ],
)
def test_sp_takes_no_parameters_of_fewer_steps(tmp_path, monkeypatch, known, steps):
    ends = iter([(known, 3, 1), (5, 5, 2)])

    def connect(*_):
        known, done, value = next(ends)
        clients = [_Trained(server, done, value << 17) for server in ("s1", "s2")]
        settings = tiny(steps=known).public()
        return clients, settings, training_of(settings)

    monkeypatch.setattr(provider, "connect", connect)
    extra = {} if steps is None else {"steps": steps}
    cluster = load_cluster(local_cluster(tmp_path / "cluster", "state"))
    provider.collect(cluster, tmp_path / "run", Deaf("sp"), **extra)
    run = RunDirectory.open(tmp_path / "run")
    assert (run.summary()["steps"], run.config().steps) == (5, 5)
    assert [line.split(",")[0] for line in run.metrics_file.read_text().splitlines()[1:]] == [
        *"12345"
    ]
    variables = serialization.msgpack_restore(run.parameters_file.read_bytes())
    assert variables.keys() == {"g"}
    assert set(variables["g"]["params"]["fc"]["kernel"].ravel()) == {2.0}  # 2^18 + 2^18 words


# Supervision --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script(Job):
    """A worker that is a few lines of Python: `say(...)` reports."""

    lines: str = ""

    def command(self):
        prelude = (
            "import json, os, sys, time, signal\n"
            "def say(step=None, number=0, limit=None, on='s2', **event):\n"
            "    phase = {'name': 'step with', 'number': number, 'on': on, 'limit_s': limit}\n"
            "    report = {'kind': 'status', 'role': 's1', 'phase': phase, 'step': step}\n"
            "    if event: report = {'kind': 'event', 'role': 's1', 'step': step, 'on': on}\n"
            "    report |= event\n"
            "    os.write(int(os.environ['LPGAN_REPORTS']), json.dumps(report).encode() + b'\\n')\n"
        )
        return [sys.executable, "-c", prelude + self.lines]


def _supervised(tmp_path, lines, restarts=0, **timeouts):
    file = local_cluster(
        tmp_path, "state", timeouts={"silence_s": 5.0, **timeouts}, restarts=restarts
    )
    cluster = load_cluster(file)
    shown = []
    supervisor = Supervisor(Script("serve", "s1", str(file), lines=lines), cluster, shown.append)
    return supervisor, tmp_path / "state", shown


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            "say(7); os.kill(os.getpid(), signal.SIGKILL)",
            "s1: step with s2 at step 7: ended by SIGKILL",
        ),
        ("say(7); os.abort()", "s1: step with s2 at step 7: ended by SIGABRT"),
        ("say(7); sys.exit(5)", "s1: step with s2 at step 7: ended with status 5"),
        ("say(7); time.sleep(60)", "s1: step with s2 at step 7: it was silent for 5 s"),
        ("time.sleep(60)", "s1: starting: it was silent for 5 s"),
        (
            "say(4, on=None, event='failed', reason='lost ds: why', phase='saving'); sys.exit(3)",
            "s1: saving at step 4: lost ds: why",
        ),
        (
            "for _ in range(99): say(7, 1, 0.5); time.sleep(0.1)",
            "s1: step with s2 at step 7: it took more than 0.5 s",
        ),
    ],
)
def test_a_supervisor_says_what_happened_where(tmp_path, lines, reason):
    supervisor, state, _ = _supervised(tmp_path, lines)
    started = time.monotonic()
    assert supervisor.run() == 1
    assert time.monotonic() - started < 20
    (gave_up,) = events(state, "s1", "gave up")
    assert gave_up["reason"].startswith(reason)


def test_a_supervisor_restarts_while_there_is_progress(tmp_path):
    """Four attempts get a step further each; then three come to nothing."""
    counter = tmp_path / "count"
    lines = (
        f"path = {str(counter)!r}\n"
        "n = int(open(path).read()) if os.path.exists(path) else 0\n"
        "open(path, 'w').write(str(n + 1))\n"
        "say(min(n, 4)); sys.exit(3)\n"
    )
    supervisor, state, _ = _supervised(tmp_path, lines, restarts=2)
    assert supervisor.run() == 1
    assert int(counter.read_text()) == 5 + 3
    assert [e["failures"] for e in events(state, "s1", "restarting")][-2:] == [1, 2]


def test_bad_input_is_not_tried_again(tmp_path):
    lines = "say(event='failed', reason='steps: wrong', phase='x'); sys.exit(2)"
    supervisor, state, shown = _supervised(tmp_path, lines, restarts=5)
    assert supervisor.run() == 1
    assert len(events(state, "s1", "started")) == 1
    assert shown[-1]["event"] == "ended"
    assert "steps: wrong" in shown[-1]["reason"]


def test_a_phase_that_ends_in_time_is_not_cut_short(tmp_path):
    lines = "for n in range(24): say(n, n, 3); time.sleep(0.15)\n"
    assert _supervised(tmp_path, lines)[0].run() == 0


def test_a_stopped_supervisor_takes_its_worker_with_it(tmp_path):
    supervisor, _, _ = _supervised(tmp_path, "say(1); time.sleep(60)", silence_s=50.0)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    while supervisor.process is None:
        time.sleep(0.01)
    supervisor.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert supervisor.process.poll() == -signal.SIGKILL


def test_a_worker_ends_with_its_supervisor(tmp_path):
    """The supervisor is killed, and can tell nobody."""
    file = local_cluster(tmp_path, "state")
    lines = (
        "import sys; from lpgan_jax.cluster.roles import play\n"
        "from lpgan_jax.cluster.worker import Job\n"
        f"sys.exit(play(Job('serve', 's1', {str(file)!r})))\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", lines], stderr=subprocess.DEVNULL)
    log = tmp_path / "state" / "logs" / "s1.jsonl"
    end = time.monotonic() + 60
    while not (log.exists() and "listening" in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)
    worker = json.loads(log.read_text().splitlines()[0])["pid"]
    supervisor.kill()
    supervisor.wait()
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < end
        time.sleep(0.1)


# The command line ---------------------------------------------------------------------------------


def test_the_commands_name_what_is_wrong(tmp_path, capsys):
    assert cli.main(["certificates", "--out", str(tmp_path / "c")]) == 0
    assert "certificates of ds, s1, s2, sp" in capsys.readouterr().out
    assert cli.main(["serve", "s1", "--config", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: no such file" in capsys.readouterr().err
    file = str(local_cluster(tmp_path / "l", "state"))
    for command, message in (
        (["ds", "--config", file, "--train", "nothing"], "nothing: no such configuration"),
        (
            ["ds", "--config", file, "--train", "digits", "--seed", "1"],
            "--seed: for `lpgan up` and `lpgan train` only",
        ),
        (
            ["ds", "--config", file, "--train", "digits", "--owner", "x"],
            "role 'x': expected one of",
        ),
        (["sp", "--config", file, "--out", "x", "--sample", "0"], "--sample: expected at least 1"),
        (
            ["sp", "--config", file, "--out", "x", "--sample", "4", "--seed", "1"],
            "--seed: expected at least 0, with --sample and --own-noise",
        ),
        (["up", "--out", str(tmp_path / "u")], "expected --config, of a GAN, or --program"),
        (["up", "--config", "mnist", "--out", str(tmp_path / "u")], "no such"),
    ):
        assert cli.main(command) == 1
        assert message in capsys.readouterr().err


def test_up_writes_over_nothing(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="batch_size: 5000 given"):
        up(tiny(batch_size=5000), run)
    assert not run.exists()
    RunDirectory.create(run, tiny())
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        up(tiny(), run)
    with pytest.raises(FileNotFoundError, match="expected a run of `lpgan up`"):
        up(tiny(), run, resume=True)
    assert provider._run_directory(run, tiny(steps=99).public()).config().steps == 99
    with pytest.raises(BadInput, match=r"has another run in it \(batch_size\)"):
        provider._run_directory(run, tiny(batch_size=8).public())
    assert os.listdir(run)
