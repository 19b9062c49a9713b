import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpgan_jax.training import checkpoint
from lpgan_jax.training.building import training_of
from lpgan_jax.training.config import ConfigError, load
from lpgan_jax.training.run_directory import Metrics, RunDirectory

GAN = training_of(load("digits", ["batch_size=64"]))
HEADER = "step,loss_d,loss_g,seconds,images_per_s\n"


def row(loss_d, loss_g):
    return {"loss_d": loss_d, "loss_g": loss_g}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def steps(path):
    return [int(row["step"]) for row in rows(path)]


# The directory


def test_create_and_open(tmp_path):
    config = load("digits", ["steps=3"])
    run = RunDirectory.create(tmp_path / "runs" / "first", config)
    assert RunDirectory.open(str(tmp_path / "runs" / "first")) == run
    assert run.config() == config
    readme = (run.path / "README.txt").read_text()
    assert "both servers' shares" in readme
    assert "reconstruct" in readme
    assert run.metrics_file == run.path / "metrics.csv"
    assert run.summary_file == run.path / "summary.json"
    assert run.sample_file(40, ".png") == run.path / "samples" / "step_000040.png"
    assert run.checkpoints == run.path / checkpoint.DIRECTORY


def test_an_empty_directory_will_do(tmp_path):
    assert RunDirectory.create(tmp_path, load("digits")).path == tmp_path


@pytest.mark.parametrize("what", ["directory", "file"])
def test_nothing_is_overwritten(tmp_path, what):
    path = tmp_path / "taken"
    if what == "file":
        path.write_text("precious")
    else:
        path.mkdir()
        (path / "precious").touch()
    with pytest.raises(FileExistsError, match=r"taken: exists.*--resume.*--out"):
        RunDirectory.create(path, load("digits"))
    assert path.read_text() == "precious" if what == "file" else len(list(path.iterdir())) == 1


def test_not_a_run_directory(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{path.name}: not a run directory"):
            RunDirectory.open(path)


def test_a_config_that_was_spoilt(tmp_path):
    run = RunDirectory.create(tmp_path / "run", load("digits"))
    run.config_file.write_text(run.config_file.read_text() + "colour: 1\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: colour: unknown field"):
        run.config()


# Metrics


def test_rows_are_there_at_once(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path, 0, GAN)
    assert path.read_text() == HEADER
    metrics.append(10, row(0.5, 1.25), 3.0)
    metrics.append(20, row(None, None), 6.0)
    assert path.read_text() == HEADER + f"10,0.5,1.25,3.0,{64 / 3}\n20,,,6.0,{64 / 6}\n"
    assert rows(path)[1]["loss_d"] == ""


def test_a_resumed_run_repeats_no_step(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path, 0, GAN)
    for step in (10, 20, 30, 40):
        metrics.append(step, row(0.0, 0.0), 1.0)
    Metrics(path, 25, GAN).append(30, row(9.0, 0.0), 1.0)
    assert steps(path) == [10, 20, 30]
    assert rows(path)[-1]["loss_d"] == "9.0"


@settings(max_examples=50)
@given(st.lists(st.floats() | st.none(), min_size=1, max_size=5), st.data())
def test_a_line_cut_short_is_dropped(tmp_path_factory, losses, data):
    path = tmp_path_factory.getbasetemp() / "cut.csv"
    path.unlink(missing_ok=True)
    metrics = Metrics(path, 0, GAN)
    for step, loss in enumerate(losses, start=1):
        metrics.append(step, row(loss, loss), 1.0)
    whole = path.read_text()
    cut = data.draw(st.integers(len(HEADER), len(whole)))
    path.write_text(whole[:cut])
    Metrics(path, len(losses), GAN).append(99, row(0.0, 0.0), 1.0)
    kept = whole[:cut].count("\n") - 1
    assert path.read_text() == "".join(whole.splitlines(True)[: kept + 1]) + "99,0.0,0.0,1.0,64.0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 1: expected the columns step,loss_d,"),
        ("precious", "line 1: expected the columns"),
        (HEADER + "1,2\n3,,,1,1\n", "line 2: expected a step and its metrics"),
        (HEADER + "1,,,1,1\nx,,,1,1\n", "line 3: expected a step"),
        (HEADER + "\x00\n", "line 2: expected a step"),
    ],
)
def test_another_file_is_not_overwritten(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"metrics\.csv: {message}"):
        Metrics(path, 0, GAN)
    assert path.read_text() == text


def test_an_empty_file_is_a_new_one(tmp_path):
    (tmp_path / "metrics.csv").touch()
    Metrics(tmp_path / "metrics.csv", 0, GAN)
    assert (tmp_path / "metrics.csv").read_text() == HEADER
