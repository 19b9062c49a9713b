"""Four processes on loopback train as the simulation does, bit by bit, and then make images."""

import dataclasses
import io
import json
import os
import re
import signal
import time
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
from clusters import SEED, Running, Simulated, events, jobs, local, statuses, tiny
from flax import serialization
from helpers import distance, same_scale
from modes import open_to_others
from PIL import Image

from lpgan_jax import cli
from lpgan_jax.analysis.cost import program_cost
from lpgan_jax.cluster import dealer, roles
from lpgan_jax.cluster.line import HEAD
from lpgan_jax.cluster.roles import local_cluster
from lpgan_jax.cluster.settings import load_cluster
from lpgan_jax.cluster.supervisor import Supervisor
from lpgan_jax.cluster.watch import look
from lpgan_jax.cluster.wire import Result, decode
from lpgan_jax.cluster.worker import Job
from lpgan_jax.gan import GENERATE
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.fixed_point import encode
from lpgan_jax.mpc.party import server_seeds
from lpgan_jax.mpc.share_trees import reveal_tree, share_tree
from lpgan_jax.programs import initial_state, shapes
from lpgan_jax.programs.simulation import share_state
from lpgan_jax.training import checkpoint, config
from lpgan_jax.training.building import build
from lpgan_jax.training.parameters import parameters_file
from lpgan_jax.training.results import export
from lpgan_jax.training.run_directory import RunDirectory
from lpgan_jax.training.tasks import Task, tasks


@pytest.fixture
def settings():
    return tiny()


@pytest.fixture
def simulated(settings):
    simulated = Simulated(settings)
    simulated.attempt(1, 0, settings.steps)
    return simulated


@pytest.fixture
def trained(settings, tmp_path_factory):
    """(directory, file, cluster, what is still running) after a training; S1's and S2's memory.

    All lies in one directory, as `up` has it.
    """
    directory = tmp_path_factory.mktemp("cluster") / "run"
    RunDirectory.create(directory, settings, servers="together")
    file = local_cluster(directory / "cluster", "..")
    cluster = load_cluster(file)
    running = Running(jobs(file, settings, directory, SEED), cluster)
    try:
        assert running.wait("sp", 240) == 0
        yield directory, file, cluster, running
    finally:
        running.stop()
    assert set(running.statuses.values()) == {0}


def test_a_trained_cluster(trained, settings, simulated, tmp_path, subtests, capsys):
    """One training, and all that should be so after it (one test, so that it trains once)."""
    with subtests.test("shares are bit-identical to the simulation's"):
        shares_are_bit_identical_to_the_simulation(trained, simulated)
    with subtests.test("SP gets what a simulated run leaves"):
        sp_gets_what_a_simulated_run_leaves(trained, settings, simulated, tmp_path)
    with subtests.test("others can read nothing"):
        others_can_read_nothing(trained)
    with subtests.test("SP gets no word of SD's parameters"):
        sp_gets_no_word_of_the_discriminator(trained, simulated)
    with subtests.test("nobody but DS learns the seed, or where the images are"):
        nobody_but_ds_learns_the_seed_or_where_the_images_are(trained, settings)
    with subtests.test("byte counts agree with the cost model"):
        byte_counts_agree_with_the_cost_model(trained, settings)
    with subtests.test("logs have known fields only"):
        logs_have_known_fields_only(trained)
    with subtests.test("a server holds nothing but its own"):
        a_server_holds_nothing_but_its_own(trained, settings, simulated)
    for own_noise in (False, True):
        with subtests.test("images are generated on demand", own_noise=own_noise):
            images_are_generated_on_demand(trained, simulated, settings, tmp_path, own_noise)
    trained[3].stop()
    with subtests.test("a page shows what SP has"):
        a_page_shows_what_sp_has(trained, simulated)
    with subtests.test("a finished training has nothing to do"):
        a_finished_training_has_nothing_to_do(trained, settings, capsys)


def shares_are_bit_identical_to_the_simulation(trained, simulated):
    directory = trained[0]
    step, shares = checkpoint.load(directory)
    assert step == 12
    jax.tree.map(np.testing.assert_array_equal, shares, simulated.shares[12])
    for step in (4, 8):
        shares = checkpoint.load(directory, step)[1]
        jax.tree.map(np.testing.assert_array_equal, shares, simulated.shares[step])


def sp_gets_what_a_simulated_run_leaves(trained, settings, simulated, tmp_path):
    run = trained[0]
    rows = (run / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(step) for step in range(1, 13)]
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"step_{step:06d}.png" for step in (0, 6, 12)
    ]
    from lpgan_jax.training.images import save_png

    for step, images in simulated.images.items():
        save_png(tmp_path / "grid.png", images)
        ours = np.asarray(Image.open(run / "samples" / f"step_{step:06d}.png"))
        np.testing.assert_array_equal(ours, np.asarray(Image.open(tmp_path / "grid.png")))
    # `export`, on the two servers' shares together, reconstructs the same generator, and SD.
    export(run, tmp_path / "exported")
    exported, got = (
        serialization.msgpack_restore(file.read_bytes())
        for file in (tmp_path / "exported", run / "parameters.msgpack")
    )
    assert (exported.keys(), got.keys()) == ({"g", "d"}, {"g"})
    jax.tree.map(np.testing.assert_array_equal, got["g"], exported["g"])


def sp_gets_no_word_of_the_discriminator(trained, simulated):
    """Of all that the servers have for SP, and of what they say that it weighs."""
    final = simulated.shares[12]
    for place, server in enumerate(("s1", "s2")):
        journal = (trained[0] / "results" / server / "00000000.msgpack").read_bytes()

        def there(network, place=place, journal=journal):
            parts = f"params.{network}.", f"stats.{network}."
            leaves = [leaf for name, leaf in final.items() if name.startswith(parts)]
            words = [word.tobytes() for leaf in leaves for word in leaf[place].reshape(-1)]
            return [word in journal for word in words]

        assert all(there("generator"))
        assert not any(there("discriminator"))
        heads = msgpack.Unpacker(io.BytesIO(journal), max_buffer_size=0)
        sizes = {decode(Result, head).kind: len(payload) for head, payload in heads}
        assert sizes["learnt"] == 8 * len(there("generator"))


def others_can_read_nothing(trained):
    directory = trained[0]
    names = {path.name for path in directory.rglob("*") if path.is_file()}
    assert {
        "s1.lock",
        "00000000.msgpack",
        "session-s1.json",
        "s1.out",
        "metrics.csv",
        "s1.key",
    } < names
    for part in ("state", "run", "cluster"):
        assert not open_to_others(directory / part)


def nobody_but_ds_learns_the_seed_or_where_the_images_are(trained, settings):
    state = trained[0]
    for file in ("session-s1.json", "session-s2.json"):
        known = config.from_json(json.loads((state / file).read_text())["config"], file)
        assert known.seed == 0
        assert known.data.path is None
    private = settings.model_copy(
        update={"seed": 77, "data": settings.data.model_copy(update={"limit": 5})}
    )
    assert "77" not in config.to_json(private.public())


def byte_counts_agree_with_the_cost_model(trained, settings):
    function, secrets, public = shapes.step_program(build(settings))
    cost = program_cost(function, secrets, public, inputs=secrets[1])
    guard, guards = program_cost(*shapes.guard_program(build(settings))), 3  # before checkpoints
    state = trained[0]
    last = {role: statuses(state, role)[-1] for role in ("s1", "s2", "ds")}
    # One message's head and the frames of gRPC's are not counted by the model: under 400 bytes.
    tasks = 3 + 12 + 2 * 3 + 1  # state and finish with the samples; steps; checkpoints; guards
    noise = 8 * settings.num_samples * settings.model.noise_size
    for server, name in (("s1", "dealer_bytes_s1"), ("s2", "dealer_bytes_s2")):
        bytes_dealt = getattr(cost, name) + cost.input_bytes
        least = settings.steps * bytes_dealt + guards * getattr(guard, name) + 3 * noise
        sent = last["ds"]["sent"][server]
        assert last[server]["received"]["ds"] == sent
        state_and_samples = 2**17 if server == "s1" else 2**20
        assert least < sent < least + state_and_samples + 400 * tasks
    # On the servers' line every byte is known: a head for each round, the two notes before, and
    # the alarm's.
    sample = program_cost(*shapes.answer_program(build(settings), GENERATE))
    line = sum(
        times * (of.online_bytes + of.rounds * HEAD.size)
        for times, of in ((settings.steps, cost), (guards, guard), (3, sample))
    )
    for server, other in (("s1", "s2"), ("s2", "s1")):
        notes = last[server]["sent"][other] - line
        assert 0 < notes < 2**12
        assert last[server]["received"][other] == last[other]["sent"][server]


def logs_have_known_fields_only(trained):
    known = {
        *(
            "time",
            "kind",
            "role",
            "event",
            "pid",
            "port",
            "attempt",
            "start",
            "step",
            "out",
            "line",
        ),
        *("reason", "blames", "phase", "on", "failures", "sender", "peer", "so_far", "rows"),
        *("steps", "s_per_step", "ahead", "sent", "received", "waited_s", "questions_of"),
    }
    for file in (trained[0] / "logs").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            report = json.loads(line)
            assert report.keys() <= known
            assert not re.search(r"[0-9a-f]{32}|\d{17}", line), "a key or a share, perhaps"


def _memory(pid):
    """All that a process has in its memory."""
    parts = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            bounds, access = line.split()[:2]
            if "r" not in access or "[v" in line:
                continue
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            try:
                memory.seek(start)
                parts.append(memory.read(end - start))
            except (OSError, ValueError):
                continue
    return b"\0".join(parts)


def _readable(pid):
    try:
        with open(f"/proc/{pid}/mem", "rb") as memory:
            return memory.readable()
    except OSError:
        return False


def a_server_holds_nothing_but_its_own(trained, settings, simulated):
    """Search the memory of both workers, after training, for what they may and may not hold."""
    running = trained[3]
    if not _readable(running.pid("s1")):
        pytest.skip("this user may not read another process's memory")
    gan = simulated.gan
    keys = DealerKeys(dealer.master_key(SEED, 1))
    initial = initial_state(gan.program, SEED)
    shared = share_state(gan, keys, initial)
    for task in tasks(simulated.training, 0, True):
        if task.kind in ("train", "answer"):
            pair = keys.take_two()
        if task == Task("train", settings.steps - 1):
            break
    batch = simulated.draw(settings.steps - 1)
    batch_shares = share_tree(pair[0], batch, same_scale(batch, 18))
    seeds = np.asarray(jax.random.key_data(server_seeds(pair[1])))

    def kernel(state):
        return state.params["discriminator"]["conv0"]["kernel"]

    def pattern(array, size=64):
        return np.ascontiguousarray(array).reshape(-1).tobytes()[:size]

    last_state = simulated.shares[12]["params.discriminator.conv0.kernel"]
    patterns = {
        "DS's master key": [np.asarray(jax.random.key_data(dealer.master_key(SEED, 1))).tobytes()],
        "DS's key of a step": [np.asarray(jax.random.key_data(pair[1])).tobytes()],
        "an initial parameter": [pattern(encode(kernel(initial), 18))],
        "a trained parameter": [pattern(last_state[0] + last_state[1])],
        "images of a batch": [
            pattern(encode(batch.images, 18), 512),
            pattern(np.asarray(batch.images, np.float32), 256),
        ],
        "noise of a batch": [pattern(encode(batch.noise_d, 18)), pattern(batch.noise_d)],
    }
    for place, server in enumerate(("s1", "s2")):
        memory = _memory(running.pid(server))
        own = {
            "its share of the parameters": pattern(last_state[place]),
            "its share of the last batch": pattern(batch_shares.images.share[place]),
            "its seed of the last step": seeds[place].tobytes(),
        }
        other = 1 - place
        forbidden = patterns | {
            "the other's initial share": [pattern(kernel(shared).share[other])],
            "the other's share": [pattern(last_state[other])],
            "the other's share of a batch": [pattern(batch_shares.images.share[other])],
            "the other's seed": [seeds[other].tobytes()],
        }
        found = {name for name, mine in own.items() if mine in memory}
        assert found, "the search finds what is there"
        for name, bytes_of in forbidden.items():
            for needle in bytes_of:
                assert len(set(needle)) > 5, name
                assert needle not in memory, f"{server} holds {name}"


def images_are_generated_on_demand(trained, simulated, settings, tmp_path, own_noise):
    _, file, cluster, _ = trained
    out = tmp_path / "grid.png"
    job = Job("sample", "sp", str(file), out=str(out), num=6, own=own_noise, seed=9)
    assert Supervisor(job, cluster).run() == 0
    ours = np.asarray(Image.open(out)).astype(int)
    assert ours.std() > 0
    if own_noise:  # then the images are known
        from lpgan_jax.training.images import save_png

        noise = np.random.default_rng(9).normal(size=(2, 4, settings.model.noise_size))
        images = [simulated.last.answer(GENERATE, part) for part in noise]
        save_png(tmp_path / "expected.png", np.concatenate(images)[:6])
        expected = np.asarray(Image.open(tmp_path / "expected.png")).astype(int)
        # Roundings differ by some LSB of 18 bits, which can move a pixel of 8 bits by one.
        assert np.abs(ours - expected).max() <= 1


def a_page_shows_what_sp_has(trained, simulated):
    """Also when SP has asked for images since."""
    seen = look(trained[0])
    assert (seen.finished, seen.step, seen.steps, seen.attempt) == (True, 12, 12, 1)
    for place, name in enumerate(("loss_d", "loss_g")):
        expected = {step: losses[place] for step, losses in simulated.losses.items()}
        assert dict(seen.curves[name]) == expected
    (end,) = (event["time"] for event in events(trained[0], "sp", "collected"))
    last = [status for status in statuses(trained[0], "sp") if status["time"] <= end][-1]
    assert (seen.status.time, seen.status.received) == (last["time"], last["received"])
    assert seen.sample == (12, trained[0] / "samples" / "step_000012.png")
    assert [text for _, text in seen.events] == ["collected"]
    assert seen.seconds_per_step > 0


def _files(directory):
    """What lies in a directory, and when each file was last written."""
    return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in directory.rglob("*")}


def a_finished_training_has_nothing_to_do(trained, settings, capsys):
    run, before = trained[0], _files(trained[0])
    capsys.readouterr()
    assert cli.main(["up", "--out", str(run), "--resume"]) == 0
    assert "nothing to do: all 12 steps are done" in capsys.readouterr().out
    assert cli.main(["up", "--out", str(run), "--resume", "--steps", "8"]) == 1
    assert "steps: 8 given, and 12 are done: expected more" in capsys.readouterr().err
    assert _files(run) == before


@pytest.mark.slow
def test_a_finished_training_goes_on_to_more_steps(trained, settings, simulated):
    """The servers have the parameters of the finished one for SP when DS has not yet said more."""
    run, more = trained[0], settings.model_copy(update={"steps": 16})
    trained[3].stop()
    assert roles.up(more, run, seed=SEED, resume=True) == 0
    simulated.settings = more
    simulated.attempt(2, 12, 16)
    step, shares = checkpoint.load(run)
    assert step == 16
    jax.tree.map(np.testing.assert_array_equal, shares, simulated.shares[16])
    rows = [row.split(",") for row in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert {int(row[0]): (float(row[1]), float(row[2])) for row in rows} == simulated.losses
    assert json.loads((run / "summary.json").read_text())["steps"] == 16
    assert RunDirectory.open(run).config().steps == 16
    got = serialization.msgpack_restore((run / "parameters.msgpack").read_bytes())["g"]
    expected = reveal_tree(simulated.last.state.learnt())["generator"]
    kernel = expected["params"]["fc"]["kernel"]
    np.testing.assert_array_equal(got["params"]["fc"]["kernel"], kernel.astype(np.float32))


@pytest.mark.slow  # what an owner sends, and when, is in test_session and test_roles
def test_two_owners_feed_one_training(settings, tmp_path):
    """Each owner's batches, in turn; the result is the simulation's but for roundings."""
    faster = settings.generator_optimizer.model_copy(update={"learning_rate": 0.1})
    settings = settings.model_copy(
        update={
            "steps": 5,
            "open_samples": False,
            "generator_optimizer": faster,
            "discriminator_optimizer": faster,
        }
    )
    file, cluster = local(tmp_path, turns=["ds", "clinic", "clinic"])
    work = jobs(file, settings, tmp_path / "run", SEED)
    work.append(Job("feed", "clinic", str(file), train=config.to_json(settings)))
    running = Running(work, cluster)
    try:
        assert running.wait("sp", 240) == 0
        (private,) = (tmp_path / "state").glob("private-*.json")
        clinic_seed = json.loads(private.read_text())["seed"]
    finally:
        running.stop()
    ds, clinic = Simulated(settings), Simulated(settings, clinic_seed)
    batches = [
        ds.draw(0),
        clinic.draw(0),
        clinic.draw(1),
        ds.draw(1),
        clinic.draw(2),
    ]
    ds.draw = batches.__getitem__
    ds.attempt(1, 0, 5)
    _, shares = checkpoint.load(tmp_path / "state")
    # LSB: a step rounds each gradient and each update once, and there are five; what one step
    # rounded, the next ones amplify a little.
    assert distance(shares, ds.shares[5]) <= 32
    alone = Simulated(settings)
    alone.attempt(1, 0, 5)
    assert distance(shares, alone.shares[5]) > 100, "the order of owners matters"


# What ends an attempt -----------------------------------------------------------------------------


def _wait_for_step(state, role, step, seconds=120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any((s["step"] or 0) >= step for s in statuses(state, role)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{role} did not get to step {step}")


@pytest.mark.slow
def test_a_killed_server_is_named_and_the_session_goes_on(settings, tmp_path):
    both = ("generator", "discriminator")
    settings = settings.model_copy(update={"steps": 120, "checkpoint_every": 20, "results": both})
    limits = {"silence_s": 10.0, "wait_s": 40.0}
    file, cluster = local(tmp_path, timeouts=limits, integrity={"check": 0.2})
    running = Running(jobs(file, settings, tmp_path / "run", SEED), cluster)
    state = tmp_path / "state"
    try:
        _wait_for_step(state, "s2", 25)
        os.kill(running.pid("s2"), signal.SIGKILL)
        assert running.wait("sp", 240) == 0
    finally:
        running.stop()
    (reason,) = [e["reason"] for e in events(state, "s2", "restarting")]
    assert re.match(r"s2: .* at step \d+: ended by SIGKILL", reason)
    opened = events(state, "ds", "opened")
    assert [(e["attempt"]) for e in opened] == [1, 2]
    start = opened[1]["start"]
    assert start >= 20
    simulated = Simulated(settings)
    simulated.attempt(1, 0, start)
    simulated.attempt(2, start, 120)
    step, shares = checkpoint.load(state)
    assert step == 120
    jax.tree.map(np.testing.assert_array_equal, shares, simulated.shares[120])
    # SP's table has the losses of these attempts, and of no step that came to nothing.
    rows = [r.split(",") for r in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, 121))
    found = {int(row[0]): (float(row[1]), float(row[2])) for row in rows}
    assert found == simulated.losses
    parameters = (tmp_path / "run" / "parameters.msgpack").read_bytes()
    assert parameters == parameters_file(reveal_tree(simulated.last.state.learnt(both)))


def test_bad_input_ends_at_once_with_a_reason(settings, tmp_path, capfd):
    file, cluster = local(tmp_path)
    (Path(cluster.certificates) / "s1.key").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"s1\.key: missing, expected the certificates of s1"
    ):
        roles.play(Job("serve", "s1", str(file)))
    bad = dataclasses.replace(
        jobs(file, settings, tmp_path / "run", None)[2],
        train=config.to_json(settings.model_copy(update={"batch_size": 5000})),
    )
    assert roles.play(bad) == 1
    assert "batch_size: 5000 given, expected 1 to 1797" in capfd.readouterr().err
