"""Runs, end to end: the command line and the same from Python, on a network that compiles fast."""

import csv
import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_program
from flax import serialization
from helpers import distance
from modes import watched
from PIL import Image

import lpgan_jax as lp
from lpgan_jax import cli
from lpgan_jax.mpc.share_trees import reveal_tree
from lpgan_jax.programs.batches import Stream, random_stream
from lpgan_jax.programs.simulation import restore_state
from lpgan_jax.study import features
from lpgan_jax.study.runs import quality
from lpgan_jax.training import checkpoint, config, results
from lpgan_jax.training.building import build, build_gan
from lpgan_jax.training.loop import train
from lpgan_jax.training.parameters import load_parameters, parameters_file
from lpgan_jax.training.results import generate
from lpgan_jax.training.run_directory import RunDirectory

YAML = """
data: {dataset: digits, image_size: 8, channels: 1}
model: {noise_size: 4, features: 2, base_size: 4}
generator_optimizer: {name: sgd, learning_rate: 0.01}
discriminator_optimizer: {name: sgd, learning_rate: 0.01}
batch_size: 4
steps: 4
log_every: 1
sample_every: 2
num_samples: 4
checkpoint_every: 2
"""


@pytest.fixture(scope="module")
def settings_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(YAML)
    return file


@pytest.fixture(scope="module")
def exposed():
    """What others could have read of `run`, at any moment."""
    return set()


@pytest.fixture(scope="module")
def run(settings_file, tmp_path_factory, exposed):
    """A seeded run of four steps, in a directory that was there, and that others could enter."""
    out = tmp_path_factory.mktemp("runs") / "first"
    out.mkdir()
    out.chmod(0o755)
    arguments = ["train", "--config", str(settings_file), "--out", str(out), "--seed", "7"]
    with watched(out) as found:
        assert cli.main(arguments) == 0
    exposed |= found
    return out


def shares(run, step=None):
    return checkpoint.load(run, step)[1]


def rows(run):
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def as_new_files_are(file):
    """Whether the umask alone decides who may read a file: it was asked for, to be given away."""
    plain = file.with_name("plain")
    plain.touch()
    return file.stat().st_mode == plain.stat().st_mode


def test_a_run_leaves_everything_a_reader_looks_for(run):
    assert RunDirectory.open(run).config() == config.load(str(run / "config.yaml"))
    assert [row["step"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert all(float(row["loss_d"]) > 0 and float(row["images_per_s"]) > 0 for row in rows(run))
    for step in (0, 2, 4):
        with Image.open(run / f"samples/step_{step:06d}.png") as grid:
            assert grid.size[0] > 16
    assert checkpoint.latest_step(run) == 4
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert "both servers' shares" in " ".join((run / "README.txt").read_text().split())


def test_nobody_else_could_read_any_of_it_at_any_moment(run, exposed):
    assert len(list(run.rglob("*.msgpack"))) == 4
    assert not exposed


def test_the_parameters_moved(run):
    assert distance(shares(run, 2), shares(run, 4)) > 10


def test_a_seeded_run_repeats_to_the_bit_and_an_unseeded_one_to_the_rounding(
    run, settings_file, tmp_path
):
    settings = config.load(str(settings_file), ["seed=7"])
    train(settings, tmp_path / "seeded", seed=7)
    jax.tree.map(np.testing.assert_array_equal, shares(run), shares(tmp_path / "seeded"))
    train(settings, tmp_path / "unseeded")
    other = shares(tmp_path / "unseeded")
    first, second = jax.tree.leaves(shares(run)), jax.tree.leaves(other)
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    # Four steps whose gradients and updates are rounded at random: some LSB.
    assert distance(shares(run), other) < 32


def test_a_resumed_run_goes_on_with_the_same_data_and_new_keys(run, settings_file, tmp_path):
    out = str(tmp_path / "resumed")
    common = ["train", "--config", str(settings_file), "--out", out]
    assert cli.main([*common, "--seed", "7", "--steps", "2"]) == 0
    jax.tree.map(np.testing.assert_array_equal, shares(run, 2), shares(out, 2))
    assert cli.main([*common, "--seed", "7", "--resume"]) == 0
    assert [row["step"] for row in rows(tmp_path / "resumed")] == ["1", "2", "3", "4"]
    assert not np.array_equal(*(jax.tree.leaves(shares(path))[0] for path in (run, out)))
    assert distance(shares(run), shares(out)) < 32


def test_a_finished_run_has_nothing_to_do(run, settings_file, tmp_path, capsys):
    """Resumed for the steps that it has, it stays as it is; for fewer, that is an error."""
    out = tmp_path / "finished"
    shutil.copytree(run, out)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in out.rglob("*")}
    command = ["train", "--out", str(out), "--resume"]
    for arguments in ([], ["--steps", "4"], ["--config", str(settings_file)]):
        assert cli.main([*command, *arguments]) == 0
        assert "nothing to do: all 4 steps are done" in capsys.readouterr().out
    assert cli.main([*command, "--steps", "3"]) == 1
    assert "steps: 3 given, and 4 are done: expected more" in capsys.readouterr().err
    after = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in out.rglob("*")}
    assert after == before
    summary = json.loads((out / "summary.json").read_text())
    result = train(RunDirectory.open(out).config(), out, resume=True)
    assert (result.steps, result.seconds_per_step) == (4, summary["seconds_per_step"])
    assert result.last == {name: summary[name] for name in ("loss_d", "loss_g")}
    # Killed between its last checkpoint and its summary, it has still to be ended.
    (out / "summary.json").unlink()
    assert cli.main(command) == 0
    assert json.loads((out / "summary.json").read_text())["seconds_per_step"] is None
    (out / "summary.json").write_text("[")
    assert cli.main(command) == 1
    assert "summary.json: damaged, expected a JSON object" in capsys.readouterr().err


def test_parameters_of_the_generator_alone_start_no_run(run, settings_file, tmp_path, capsys):
    state = restore_state(build(config.load(str(settings_file))), shares(run))
    file = tmp_path / "parameters.msgpack"
    file.write_bytes(parameters_file(reveal_tree(state.learnt(["generator"]))))
    assert serialization.msgpack_restore(file.read_bytes()).keys() == {"g"}
    out = tmp_path / "continued"
    arguments = ["--config", str(settings_file), "--out", str(out), "--init", str(file)]
    assert cli.main(["train", *arguments]) == 1
    message = 'parameters.msgpack: has no "d" (the discriminator), expected parameters of both'
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_exported_parameters_are_the_revealed_shares_and_start_another_run(
    run, settings_file, tmp_path
):
    file = tmp_path / "parameters.msgpack"
    assert cli.main(["export", "--run", str(run), "--out", str(file)]) == 0
    assert as_new_files_are(file)
    variables = serialization.msgpack_restore(file.read_bytes())
    assert variables.keys() == {"g", "d"}
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    gan = build(config.load(str(settings_file)))
    revealed = reveal_tree(restore_state(gan, shares(run)).learnt())
    loaded = load_parameters(file, gan.program.init(np.random.default_rng(0)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float32(b)), loaded, revealed)
    # Ordinary Flax makes images of it, those that SG-FP on shares makes.
    noise = random_stream(1, Stream.GENERATION).normal(size=(3, 4))
    images = build_gan(config.load(str(settings_file))).generator.apply(
        variables["g"], noise, train=False
    )
    np.testing.assert_allclose(generate(run, 3, seed=1), images, rtol=0, atol=64 * 2.0**-18)

    out = tmp_path / "continued"
    arguments = ["--config", str(settings_file), "--out", str(out), "--init", str(file)]
    assert cli.main(["train", *arguments, "--steps", "1", "--set", "checkpoint_every=1"]) == 0
    # One step away from where it started.
    assert 0 < distance(shares(run), shares(out)) < 2**18 * 0.05


def test_sample_writes_a_grid_that_a_seed_repeats(run, tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, seed in zip(files, (["--seed", "1"], ["--seed", "1"], []), strict=True):
        assert cli.main(["sample", "--run", str(run), "--num", "6", "--out", str(file), *seed]) == 0
    first, second, third = (file.read_bytes() for file in files)
    assert first == second != third
    assert as_new_files_are(files[0])


def test_losses_and_samples_can_stay_closed(settings_file, tmp_path):
    out = tmp_path / "closed"
    changes = ["--set", "open_losses=false", "--set", "open_samples=false", "--steps", "1"]
    assert cli.main(["train", "--config", str(settings_file), "--out", str(out), *changes]) == 0
    assert [row["loss_d"] for row in rows(out)] == [""]
    assert not (out / "samples").exists()


def test_plain_jax_trains_by_the_same_command(run, settings_file, tmp_path):
    out = tmp_path / "plain"
    arguments = ["--config", str(settings_file), "--out", str(out), "--seed", "7", "--plaintext"]
    assert cli.main(["train", *arguments]) == 0
    for secure, plain in zip(rows(run), rows(out), strict=True):
        assert float(secure["loss_d"]) == pytest.approx(float(plain["loss_d"]), abs=1e-3)


def test_a_shadow_run_stays_close_to_the_secure_one(run, settings_file, tmp_path, capsys):
    out = tmp_path / "shadow"
    arguments = ["--config", str(settings_file), "--out", str(out), "--seed", "7", "--shadow"]
    assert cli.main(["train", *arguments]) == 0
    assert "hides nothing" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["mode"] == "shadow"
    assert not (out / "checkpoints").exists()  # it has no shares
    assert "nothing was shared" in (out / "README.txt").read_text()
    asked = ["sample", "--run", str(out), "--num", "1", "--seed", "2", "--out"]
    assert cli.main([*asked, str(tmp_path / "x")]) == 0  # in the clear, as the run was
    assert cli.main(["export", "--run", str(out), "--out", str(tmp_path / "y")]) == 1
    assert "a run without shares, expected one of secure training" in capsys.readouterr().err
    gan = build(config.load(str(settings_file)))
    loaded = load_parameters(out / "parameters.msgpack", gan.program.init(np.random.default_rng(0)))
    secure = reveal_tree(restore_state(gan, shares(run)).params)
    # Like another run with other dealer keys: four steps of random rounding, some LSB.
    far = [
        np.abs(a - b).max()
        for name, params in secure.items()
        for a, b in zip(*map(jax.tree.leaves, (loaded[name]["params"], params)), strict=True)
    ]
    assert 0 < max(far) * 2**18 < 32
    with pytest.raises(SystemExit):
        cli.main(["train", *arguments, "--plaintext"])
    assert cli.main(["train", *arguments, "--resume"]) == 1
    assert "drop --plaintext, --shadow" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["secure", "shadow"])
def test_values_out_of_range_end_a_run_before_it_saves_them(mode, tmp_path, capsys):
    """In shadow mode all values are looked at, here so many under sharing: they say the same."""
    out = tmp_path / "run"
    command = ["train", "--program", tiny_program.__file__, "--set", "rate=1.0e+8"]
    command += ["--set", "checkpoint_every=1", "--seed", "3", "--out", str(out)]
    assert cli.main([*command, *(["--shadow"] if mode == "shadow" else [])]) == 1
    error = capsys.readouterr().err
    assert re.search(r"step 3: values of tiny_program.py:\d+ 5 \(truncate, 62 bits\)", error)
    assert "smaller learning_rate or fewer frac_bits" in error
    assert not (out / "summary.json").exists()
    if mode == "secure":
        assert checkpoint.load(out)[0] == 2


def test_a_guard_may_be_left_out(tmp_path):
    options = ["rate=1.0e+8"]
    settings = config.program_config(tiny_program.__file__, options, guard_every=0)
    assert train(settings, tmp_path / "run", seed=3).steps == 6


def test_quality_of_a_run_is_measured_and_repeats(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "_LEAST_STEPS", 20)
    monkeypatch.setattr(features, "_EPOCHS", 1)
    command = ["quality", "--run", str(run), "--num", "50", "--seed", "1"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "training a classifier on 1797 images" in printed
    assert "50 images, opened by SP" in printed
    measured = quality(run, 50, seed=1)
    assert f"Fréchet distance   {measured.frechet:.4g}" in printed
    # Four steps: nothing that a digit would be taken for.
    assert measured.precision < 0.2
    assert cli.main([*command[:3], "--num", "0"]) == 1
    assert cli.main([*command, "--inception", str(tmp_path / "none.npz")]) == 1
    assert "none.npz" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_seed_and_its_images(settings_file, tmp_path, capsys):
    out = tmp_path / "momentum"
    settings = config.load(str(settings_file), ["steps=1", "generator_optimizer.momentum=0.5"])
    train(settings, out, seed=5)
    assert RunDirectory.open(out).config().seed == 5
    again = RunDirectory.open(out).config().model_copy(update={"steps": 2})
    with pytest.raises(ValueError, match="frac_bits: 22 given, expected 18 as before"):
        train(again.model_copy(update={"frac_bits": 22}), out, resume=True)
    other = np.zeros((8, again.data.image_size, again.data.image_size, 1))
    with pytest.raises(ValueError, match="other examples than those that"):
        train(again, out, resume=True, images=other)
    assert RunDirectory.open(out).config().steps == 1  # nothing was written
    assert train(again, out, resume=True).steps == 2


def test_images_are_generated_in_parts_of_any_number(run, monkeypatch):
    monkeypatch.setattr(results, "_AT_ONCE", 3)
    images = generate(run, 7, seed=1)
    assert images.shape == (7, 8, 8, 1)
    assert len({image.tobytes() for image in images}) == 7
    with pytest.raises(ValueError, match="num: expected at least 1, got 0"):
        generate(run, 0)


def test_images_come_from_python_too(settings_file, tmp_path):
    settings = config.load(str(settings_file), ["steps=1", "checkpoint_every=1"])
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    result = lp.train(settings, tmp_path / "array", images=images)
    assert result.steps == 1
    assert all(loss > 0 for loss in result.last.values())


BAD = {
    "unknown field": (["--set", "colour=1"], "colour"),
    "wrong type": (["--set", "batch_size=many"], "batch_size"),
    "fraction bits": (["--set", "frac_bits=40"], "frac_bits"),
    "batch larger than the data": (["--batch-size", "100000"], "batch"),
    "missing data": (
        ["--set", "data.dataset=npz", "--set", "data.path=nowhere.npz"],
        "nowhere.npz",
    ),
    "missing parameters": (["--init", "nowhere.msgpack"], "nowhere.msgpack"),
    "resume nothing": (["--resume"], "run directory"),
    "image size": (["--set", "data.image_size=10"], "image_size"),
    "negative seed": (["--seed", "-1"], "seed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_is_written(name, settings_file, tmp_path, capsys):
    arguments, named = BAD[name]
    out = tmp_path / "run"
    status = cli.main(["train", "--config", str(settings_file), "--out", str(out), *arguments])
    assert status == 1
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_a_run_directory_that_exists_is_left_alone(run, settings_file, capsys):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert cli.main(["train", "--config", str(settings_file), "--out", str(run)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_parameters_of_another_network_are_refused(run, settings_file, tmp_path, capsys):
    file = tmp_path / "parameters.msgpack"
    assert cli.main(["export", "--run", str(run), "--out", str(file)]) == 0
    out = tmp_path / "other"
    arguments = ["--config", str(settings_file), "--out", str(out), "--init", str(file)]
    assert cli.main(["train", *arguments, "--set", "model.features=3"]) == 1
    assert "expected shape (3,), got (2,)" in capsys.readouterr().err
    assert not out.exists()


def test_a_checkpoint_of_another_network_is_refused(run, settings_file, tmp_path, capsys):
    arguments = ["--config", str(settings_file), "--out", str(run), "--resume"]
    assert cli.main(["train", *arguments, "--set", "model.features=3"]) == 1
    assert "expected shape" in capsys.readouterr().err
