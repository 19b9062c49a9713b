"""A program between four processes: trained, asked by clients, refused where it differs."""

import csv
import json
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deviating_worker
import jax
import numpy as np
import pytest
import tiny_private
import tiny_program
from clusters import SEED, Deaf, Running, events, local, statuses

from lpgan_jax import cli
from lpgan_jax.cluster.askers import Asker
from lpgan_jax.cluster.dealer import master_key
from lpgan_jax.cluster.supervisor import Supervisor
from lpgan_jax.cluster.worker import Job
from lpgan_jax.programs import initial_state, secured
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.training import checkpoint, config, program_file

FILE = tiny_program.__file__


def jobs(file, out, settings, **programs):
    """Of the four roles, with a program's file each."""
    of = dict.fromkeys(("s1", "s2", "sp"), FILE) | programs
    return [
        *(Job("serve", server, str(file), program=of[server]) for server in ("s1", "s2")),
        Job("deal", "ds", str(file), train=config.to_json(settings), seed=SEED),
        Job("collect", "sp", str(file), out=str(out), program=of["sp"]),
    ]


def simulated(training):
    """The same training in one process: (simulation, samples by step)."""
    initial = initial_state(training.program, SEED)
    simulation = Simulation.begin(secured(training.program), initial, master_key(SEED, 1))
    draw, question = training.feed(SEED, None), training.sample_question(SEED)
    samples = {0: simulation.answer("probability", question)}
    for step in range(training.steps):
        simulation.train_step(step, draw(step))
        if training.guards_after(step + 1):
            assert not simulation.guard()
        if training.samples_after(step + 1):
            samples[step + 1] = simulation.answer("probability", question)
    return simulation, samples


def test_a_program_is_trained_and_asked_by_two_clients_at_once(tmp_path, subtests, capfd):
    file, cluster = local(tmp_path, clients=["alice", "bob"], integrity={"check": 0.5})
    settings = config.program_config(FILE, seed=SEED)
    training = program_file.load(FILE, {})
    simulation, samples = simulated(training)
    running = Running(jobs(file, tmp_path / "run", settings), cluster)
    try:
        assert running.wait("sp", 240) == 0
        with subtests.test("bit-identical to the simulation"):
            step, shares = checkpoint.load(tmp_path / "state")
            assert step == 6
            jax.tree.map(np.testing.assert_array_equal, shares, simulation.shares())
            for step, sample in samples.items():
                got = np.load(tmp_path / "run" / "samples" / f"step_{step:06d}.npy")
                np.testing.assert_array_equal(got, sample)
        with subtests.test("clients"):
            rng = np.random.default_rng(1)
            questions = {"alice": rng.normal(size=(6, 3)), "bob": rng.normal(size=(3, 3))}

            def ask(role):
                return Asker(cluster, role, FILE, Deaf(role)).ask("probability", questions[role])

            with ThreadPoolExecutor() as threads:
                answers = dict(zip(questions, threads.map(ask, questions), strict=True))
            for role, question in questions.items():
                # Both round within some LSB of 18 bits.
                expected = simulation.answer("probability", question)
                assert np.abs(answers[role] - expected).max() < 2**-14
        with subtests.test("SP asks what DS draws, and DS vouches for the answer"):
            answer = Asker(cluster, "sp", FILE, Deaf("sp")).ask_of_dealer("probability")
            assert answer.shape == (4,)
            assert (answer > 0).all()
            assert (answer < 1).all()
        with subtests.test("the command shows what nobody else reads"):
            np.save(tmp_path / "q.npy", questions["bob"])
            command = ["ask", "--config", str(file), "--as", "bob", "--program", FILE]
            capfd.readouterr()
            assert cli.main([*command, "--in", str(tmp_path / "q.npy")]) == 0
            shown = np.fromstring(capfd.readouterr().out.strip("[]\n"), sep=" ")
            assert np.abs(shown - answers["bob"]).max() < 2**-14
            for log in (tmp_path / "state" / "logs").iterdir():
                # More digits than a time in the log has.
                assert f"{shown[0]:.8f}"[:7] not in log.read_text()
        with subtests.test("a client with another program"):
            other = tmp_path / "tiny_program.py"
            other.write_text(Path(FILE).read_text().replace("sigmoid", "tanh"))
            asking = Job(
                "ask", "bob", str(file), program=str(other), question="q", out=str(tmp_path / "a")
            )
            assert Supervisor(asking, cluster).run() == 1
            log = (tmp_path / "state" / "logs" / "bob.jsonl").read_text()
            assert "differs from that of this session: answers['probability']" in log
    finally:
        running.stop()


class Deviating(Job):
    """Of a server that deviates."""

    def command(self):
        return [sys.executable, deviating_worker.__file__, self.role]


def test_a_server_that_deviates_is_named_and_the_session_ends(tmp_path):
    state, out = tmp_path / "state", tmp_path / "run"
    file, cluster = local(tmp_path, integrity={"check": 1.0})
    settings = config.program_config(FILE, seed=SEED)
    work = jobs(file, out, settings)
    work[0] = Deviating("serve", "s1", str(file), program=FILE)
    running = Running(work, cluster)
    try:
        assert running.wait("ds", 240) == 1
        assert running.wait("s2", 60) == 1
    finally:
        running.stop()
    reason = "s1 deviated: message 3 of 7"
    (caught,) = events(state, "ds", "caught")
    assert caught["server"] == "s1"
    assert caught["reason"].startswith(reason)
    assert Path(caught["evidence"]).is_file()
    for role in ("ds", "s2"):
        assert reason in events(state, role, "ended")[0]["reason"]
        assert not events(state, role, "restarting")
    # SP has the sample of the beginning, and what was told of the step before.
    assert [p.name for p in (out / "samples").iterdir()] == ["step_000000.npy"]
    assert len((out / "metrics.csv").read_text().splitlines()) <= 2
    assert not (out / "parameters.msgpack").exists()
    # Nobody gets further with a new attempt.
    again = Supervisor(jobs(file, out, settings)[2], cluster)
    assert again.run() == 1
    assert f"this session is over: {reason}" in events(state, "ds", "ended")[-1]["reason"]


def test_values_out_of_range_end_a_session(tmp_path):
    """At all roles, once, and SP names the tensor; what was saved before stays."""
    state, out = tmp_path / "state", tmp_path / "run"
    file, cluster = local(tmp_path, integrity={"check": 0.1})
    options = ["rate=1.0e+8", "checkpoint_every=1", "every=1"]
    settings = config.program_config(FILE, options, seed=SEED, guard_every=2)
    running = Running(jobs(file, out, settings), cluster)
    try:
        assert running.wait("sp", 240) == 1
        assert [running.wait(role, 60) for role in ("ds", "s1", "s2")] == [1, 1, 1]
    finally:
        running.stop()
    (reason,) = [e["reason"] for e in events(state, "sp") if e["event"] == "ended"]
    step, tensor = re.search(
        r"step (\d): values of (.+? \d \((?:truncate|compare), \d+ bits\))", reason
    ).groups()
    for server in ("s1", "s2"):
        seen = [e["event"] for e in events(state, server)]
        assert seen.count("out of range") == seen.count("ended") == 1
        assert "restarting" not in seen
        # Nobody else is told what it was.
        assert tensor not in (state / "logs" / f"{server}.jsonl").read_text()
        # A save is looked at first.
        assert max(checkpoint.saves(state, server)) == int(step) - 1
    assert "parameters.msgpack" not in {path.name for path in out.iterdir()}


def test_an_alarm_at_the_last_step_with_sp_away_ends_the_session_too(tmp_path):
    """All parcels are sent by then, and DS ends before the servers do."""
    state = tmp_path / "state"
    file, cluster = local(tmp_path, timeouts={"wait_s": 8.0, "start_s": 120.0})
    settings = config.program_config(FILE, ["rate=1.0e+8"], seed=SEED, steps=3)
    running = Running(jobs(file, tmp_path / "run", settings)[:-1], cluster)
    try:
        assert [running.wait(role, 240) for role in ("ds", "s1", "s2")] == [1, 1, 1]
    finally:
        running.stop()
    for server in ("s1", "s2"):
        assert not checkpoint.saves(state, server)
        seen = events(state, server)
        assert "restarting" not in {e["event"] for e in seen}
        assert "sp was not there to hear it" in seen[-1]["reason"]


def test_a_role_with_a_changed_file_is_refused_by_name(tmp_path):
    """Before anything is shared, at DS and at the server, with the operation that differs."""
    state = tmp_path / "state"
    changed = tmp_path / "elsewhere" / "tiny_program.py"
    changed.parent.mkdir()
    shutil.copy(FILE, changed)
    changed.write_text(changed.read_text().replace("softplus(z)", "softplus(z) + 1e-2 * z"))
    file, cluster = local(tmp_path)
    settings = config.program_config(FILE, seed=SEED)
    running = Running(jobs(file, tmp_path / "run", settings, s2=str(changed)), cluster)
    try:
        assert running.wait("ds", 240) == 1
        # The server waits for a DS that has the same, or for its own file to be mended.
        assert "s2" not in running.statuses
        end = time.monotonic() + 30
        while not events(state, "s2", "failed"):  # it gave DS time to hear why
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        running.stop()
    for role, event in (("ds", "ended"), ("s2", "failed")):
        reason = events(state, role, event)[0]["reason"]
        assert "program differs from that of ds: step: operation" in reason, role
    assert not list(state.glob("checkpoints/*/*"))
    assert not any(status["received"].get("ds") for status in statuses(state, "s2"))


@pytest.mark.slow  # owners' turns are in test_session, privacy between servers in test_private
def test_two_owners_train_with_differential_privacy(tmp_path):
    """Each draws its own examples; each update is accounted for."""
    private, steps = tiny_private.__file__, 8
    file, cluster = local(tmp_path, turns=["ds", "clinic"])
    settings = config.program_config(private, steps=steps)
    own = dict.fromkeys(("s1", "s2", "sp"), private)
    work = jobs(file, tmp_path / "run", settings, **own)
    work.append(Job("feed", "clinic", str(file), train=config.to_json(settings)))
    running = Running(work, cluster)
    try:
        assert running.wait("sp", 240) == 0
    finally:
        running.stop()
    training = tiny_private.training(steps=steps)
    with (tmp_path / "run" / "metrics.csv").open() as table:
        epsilons = [float(row["epsilon"]) for row in csv.DictReader(table)]
    np.testing.assert_allclose(epsilons[-1], training.privacy.epsilon(steps), rtol=1e-6)
    assert epsilons == sorted(set(epsilons))
    seeds = [json.loads(f.read_text())["seed"] for f in (tmp_path / "state").glob("private-*")]
    assert len(seeds) == 1, "the clinic's; DS has one of the test"
