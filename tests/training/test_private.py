"""Private runs: what they promise, what they spend, and what is refused."""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from lpgan_jax import cli
from lpgan_jax.privacy.accounting import Mechanism
from lpgan_jax.privacy.mechanism import Noise, noise_keys, seeded
from lpgan_jax.training import config
from lpgan_jax.training.building import training_of
from lpgan_jax.training.ledger import Ledger
from lpgan_jax.training.private import promises, resolved
from lpgan_jax.training.source import DataSource

YAML = """
data: {dataset: digits, image_size: 8, channels: 1, labels: true}
model: {noise_size: 4, features: 2, base_size: 4, norm: none}
generator_optimizer: {name: sgd, learning_rate: 0.01}
discriminator_optimizer: {name: sgd, learning_rate: 0.01}
batch_size: 24
steps: 3
log_every: 2
sample_every: 3
num_samples: 20
checkpoint_every: 2
privacy:
  {noise_multiplier: 1.5, delta: 1e-5, clip: 0.5, discriminator_steps: 2, sampling_rate: 0.001}
"""
MECHANISM = Mechanism(1797, 0.001, 24, 1.5)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("private") / "tiny.yaml"
    path.write_text(YAML)
    return str(path)


def rows(run):
    with open(run / "metrics.csv") as table:
        return list(csv.DictReader(table))


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """A run on shares, resumed for one more step, as if the last one had been lost."""
    out = tmp_path_factory.mktemp("runs") / "one"
    assert cli.main(["train", "--config", file, "--out", str(out), "--steps", "2"]) == 0
    Ledger(out / "spent.json").begin()  # a step that began, and of which nothing was kept
    arguments = ["train", "--resume", "--out", str(out), "--steps", "3"]
    assert cli.main(arguments) == 0
    return out


def test_what_was_spent_is_told_wherever_one_looks(run):
    """A step that was lost counts: after 3 steps 4 were begun."""
    by_step = {int(row["step"]): float(row["epsilon"]) for row in rows(run)}
    assert by_step[1] == pytest.approx(MECHANISM.epsilon(2, 1e-5))
    assert by_step[2] == pytest.approx(MECHANISM.epsilon(4, 1e-5))
    assert by_step[3] == pytest.approx(MECHANISM.epsilon(8, 1e-5))
    assert json.loads((run / "spent.json").read_text()) == {"steps": 4}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["epsilon"] == pytest.approx(MECHANISM.epsilon(8, 1e-5))
    assert summary["noised_updates"] == 8
    assert (summary["delta"], summary["clip"], summary["noise"]) == (1e-5, 0.5, "servers")
    assert summary["loss_d"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "privacy.noise_multiplier=2.5"], "privacy: .*expected .* as before: what was"),
        (["--batch-size", "30"], "batch_size: 30 given, expected 24 as before: what was spent is"),
    ],
)
def test_it_goes_on_with_the_same_mechanism_alone(arguments, message, file, run, capsys):
    own = ["train", "--config", file, "--resume", "--out", str(run), "--steps", "4"]
    assert cli.main([*own, *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (run / "data.sha256").exists()


def test_what_was_lost_is_not_forgotten(run, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "spent.json").unlink()
    assert cli.main(["train", "--resume", "--out", str(copy), "--steps", "4"]) == 1
    assert "0 steps were counted, and 3 are done" in capsys.readouterr().err


def test_parameters_of_somebody_are_refused(file, tmp_path, capsys):
    arguments = ["train", "--config", file, "--out", str(tmp_path / "x"), "--init", "some"]
    assert cli.main(arguments) == 1
    assert "init: parameters that somebody learnt" in capsys.readouterr().err


def test_images_of_a_class_can_be_asked_for(run, tmp_path):
    grid, one = tmp_path / "grid.png", tmp_path / "one.png"
    assert cli.main(["sample", "--run", str(run), "--num", "20", "--out", str(grid)]) == 0
    arguments = ["sample", "--run", str(run), "--num", "4", "--label", "7", "--out", str(one)]
    assert cli.main(arguments) == 0
    with Image.open(grid) as picture:
        width, height = picture.size
    assert height == 10 * (width - 1) // 2 + 1  # a row of two for each class
    arguments[6] = "10"
    assert cli.main(arguments) == 1


@pytest.mark.parametrize("mode", ["plaintext", "shadow"])
def test_in_the_clear_it_is_the_same_mechanism(mode, file, tmp_path):
    out = tmp_path / mode
    arguments = ["train", "--config", file, "--out", str(out), f"--{mode}", "--seed", "1"]
    assert cli.main(arguments) == 0
    assert float(rows(out)[-1]["epsilon"]) == pytest.approx(MECHANISM.epsilon(6, 1e-5))


def test_what_is_drawn_is_secret_and_repeatable_by_a_seed(file):
    settings = resolved(config.load(file))
    training = training_of(settings)
    draw = DataSource.load(settings, 3).batch
    (batch, noise), (again, same) = (training.noised(draw, 5)(1) for _ in range(2))
    np.testing.assert_array_equal(noise, same)
    np.testing.assert_array_equal(batch.images, again.images)
    assert not np.array_equal(noise, training.noised(draw, 5)(2)[1])
    assert not np.array_equal(noise, training.noised(draw, None)(1)[1])
    assert (noise * 2.0**18 == np.rint(noise * 2.0**18)).all()
    # Poisson: as many as are drawn have weight 1, and their own labels.
    weights = np.concatenate([draw(step).weights.sum(1) for step in range(400)])
    assert abs(weights.mean() - 1.797) < 5 * math.sqrt(1.797 / 800)
    source = DataSource.load(settings, 3)
    images, labels = source._images, source._labels
    for update in range(2):
        for row in range(batch.weights[update].sum()):
            (place,) = np.flatnonzero((images == batch.images[update, row]).all((1, 2, 3)))[:1]
            np.testing.assert_array_equal(labels[place], batch.labels[update, row])
    settings = settings.model_copy(
        update={"privacy": settings.privacy.model_copy(update={"mismatched": 1.0, "generated": 6})}
    )
    assert batch.labels_g.shape == (2, 10)  # as many as are drawn, on average
    batch = DataSource.load(settings, 3).batch(0)
    assert batch.labels_g.shape == (6, 10)
    assert batch.noise_d.shape == (2, 6, 4)
    assert (batch.others.sum(-1) == 1).all()
    assert (batch.others * batch.labels == 0).all()
    half = len(batch.labels_g) // 2
    np.testing.assert_array_equal(batch.labels_g[:half], batch.labels_g[half : 2 * half])


def test_neither_server_and_not_the_dealer_knows_the_noise():
    """Of `servers` each draws from a key of its own, and the sum has the variance of both."""
    noise = Noise(1.0, 1.0, 5000, 1, "servers")
    first, second = noise_keys(noise, None)
    assert first != second
    values = [noise.draw(key, 0, 18)[0] for key in (first, second)]
    sigma = noise.sigma(18)
    assert sigma == math.ceil(2**18 + math.sqrt(5000))
    # Standard errors: of a standard deviation 1 / sqrt(2 n), of a correlation 1 / sqrt(n).
    for value in values:
        assert abs(value.std() / sigma - 1) < 5 / math.sqrt(2 * 5000)
    assert abs(np.corrcoef(*values)[0, 1]) < 5 / math.sqrt(5000)
    assert abs(sum(values).std() / sigma - math.sqrt(2)) < 5 * math.sqrt(2) / math.sqrt(2 * 5000)
    assert noise_keys(noise, 1) == noise_keys(noise, 1) != noise_keys(noise, 2)
    assert len(noise_keys(Noise(1.0, 1.0, 5000), None)) == 1
    assert seeded("sampling", 1) not in noise_keys(noise, 1)


# What is promised ---------------------------------------------------------------------------------


def test_a_command_says_what_a_training_promises(file, capsys):
    assert cli.main(["privacy", "--config", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "epsilon": pytest.approx(MECHANISM.epsilon(6, 1e-5)),
        "delta": 1e-5,
        "noise_multiplier": 1.5,
        "noise": "servers",
        "clip": 0.5,
        "sampling_rate": 0.001,
        "steps": 6,
        "training_steps": 3,
        "examples": 1797,
        "batch_size": 24,
    }
    assert cli.main(["privacy", "--config", file, "--steps", "30", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert more["steps"] == 60
    assert more["epsilon"] > found["epsilon"]
    assert cli.main(["privacy", "--config", file]) == 0
    assert "noise multiplier       1.5   of each server" in capsys.readouterr().out


def test_the_noise_follows_from_epsilon(file):
    wanted = ["privacy={epsilon: 2, delta: 1e-5, clip: 0.5, examples: 50000}", "steps=100"]
    settings = config.load(file, wanted)
    found = promises(settings)
    assert 1.98 < found["epsilon"] <= 2
    again = resolved(settings)
    assert again.privacy.epsilon is None
    assert again.privacy.noise_multiplier == found["noise_multiplier"]
    assert resolved(again) == again
    assert resolved(again.public()) == again.public()  # a server needs no images
    mean = found["sampling_rate"] * 50000
    assert mean + 9 * math.sqrt(mean) == pytest.approx(24)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.norm=batch", "model.norm: batch given, expected otherwise with privacy"),
        ("open_losses=true", "open_losses: true given, expected otherwise with privacy"),
        ("updates=simultaneous", "updates: simultaneous given, expected otherwise"),
        ("privacy.sampling_rate=1.5", r"privacy.sampling_rate: 1.5 given, expected at most 1"),
        ("privacy.epsilon=3", "privacy: .* epsilon or noise_multiplier, and one of them alone"),
        ("privacy.clip=100", "privacy.clip: 100 given, expected at most 64"),
        ("privacy.delta=1", "privacy.delta: 1 given, expected less than 1"),
        ("privacy.sampling_rate=0.01", "batch_size: 24 rows, and a draw has more with prob"),
        (
            "privacy.mismatched=1 --set data.labels=false",
            "privacy.mismatched given, expected other",
        ),
        ("data.classes=9", "labels: 0 to 9, expected classes below 9"),
    ],
)
def test_what_is_wrong_is_named(override, message, file, tmp_path, capsys):
    out = str(tmp_path / "run")
    arguments = ["train", "--config", file, "--out", out, "--plaintext", "--set", *override.split()]
    assert cli.main(arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_without_classes_is_refused(file, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    data = [f"data={{dataset: folder, path: {tmp_path}, image_size: 8, channels: 1, labels: true}}"]
    assert (
        cli.main(["train", "--config", file, "--out", str(tmp_path / "run"), "--set", *data]) == 1
    )
    assert "data.labels: the data has no classes" in capsys.readouterr().err


def test_a_ledger_never_forgets(tmp_path):
    ledger = Ledger(tmp_path / "spent.json")
    assert [ledger.begin(), ledger.begin()] == [1, 2]
    assert Ledger(tmp_path / "spent.json").begin() == 3
    (tmp_path / "spent.json").write_text("{")
    with pytest.raises(ValueError, match=r"spent.json: expected the number of steps begun"):
        Ledger(tmp_path / "spent.json")
