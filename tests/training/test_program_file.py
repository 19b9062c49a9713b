"""A program in a file: trained by the command line, in three modes, resumed, asked."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_program
from flax import serialization

import lpgan_jax as lp
from lpgan_jax import cli
from lpgan_jax.training import config, program_file
from lpgan_jax.training.config import ConfigError
from lpgan_jax.training.results import ask
from lpgan_jax.training.run_directory import RunDirectory

FILE = tiny_program.__file__


def rows(run):
    with open(Path(run) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert cli.main(["train", "--program", FILE, "--out", str(out), "--seed", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def plaintext(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plaintext"
    lp.train(FILE, out, seed=1, mode="plaintext", report=lambda text: None)
    return out


def test_a_run_leaves_what_the_program_says(run, plaintext):
    assert list(rows(run)[0]) == ["step", "loss", "seconds", "examples_per_s"]
    assert [row["step"] for row in rows(run)] == list("123456")
    for ours, plain in zip(rows(run), rows(plaintext), strict=True):
        # The loss is rounded to an LSB, and the softplus within 2^-16.
        assert abs(float(ours["loss"]) - float(plain["loss"])) < 2**-14
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"step_{step:06d}.npy" for step in (0, 4, 6)
    ]
    sample = np.load(run / "samples" / "step_000006.npy")
    assert sample.shape == (4,)
    assert ((sample > 0) & (sample < 1)).all()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["loss"] == float(rows(run)[-1]["loss"])


def test_shadow_mode_too(run, tmp_path):
    result = lp.train(FILE, tmp_path / "shadow", seed=1, mode="shadow", report=lambda text: None)
    assert abs(result.last["loss"] - float(rows(run)[-1]["loss"])) < 2**-14


def test_export_gives_what_sp_may_have(run, plaintext, tmp_path):
    assert cli.main(["export", "--run", str(run), "--out", str(tmp_path / "w")]) == 0
    ours = serialization.msgpack_restore((tmp_path / "w").read_bytes())
    plain = serialization.msgpack_restore((plaintext / "parameters.msgpack").read_bytes())
    assert ours.keys() == plain.keys() == {"w"}
    assert np.abs(ours["w"] - plain["w"]).max() < 6 * 4 * 2**-18  # 4 LSB a step


def test_it_is_asked(run, tmp_path, capsys):
    question = np.random.default_rng(0).normal(size=(7, 3))
    np.save(tmp_path / "q.npy", question)
    command = ["ask", "--run", str(run), "--in", str(tmp_path / "q.npy")]
    assert cli.main([*command, "--out", str(tmp_path / "a.npy")]) == 0
    answer = np.load(tmp_path / "a.npy")
    assert answer.shape == (7,)
    assert np.abs(answer - ask(run, None, question)).max() < 2**-14
    capsys.readouterr()
    assert cli.main(command) == 0
    shown = np.fromstring(capsys.readouterr().out.strip("[]\n"), sep=" ")
    assert np.abs(shown - answer).max() < 2**-14
    assert cli.main([*command, "--answer", "colour"]) == 1
    assert "answer: 'colour' given, expected one of the program's" in capsys.readouterr().err
    np.save(tmp_path / "q.npy", question[:, :2])
    assert cli.main(command) == 1
    assert "question: expected shape (rows, 3), got (7, 2)" in capsys.readouterr().err


def test_a_run_goes_on(run, tmp_path, capsys):
    out = tmp_path / "resumed"
    shutil.copytree(run, out)
    command = ["train", "--out", str(out), "--resume"]
    assert cli.main(command) == 0
    assert "nothing to do: all 6 steps are done" in capsys.readouterr().out
    assert cli.main([*command, "--set", "rate=0.25", "--steps", "9"]) == 1
    assert "options: {'rate': 0.25} given, expected {} as before" in capsys.readouterr().err
    assert cli.main([*command, "--steps", "9"]) == 0
    assert [row["step"] for row in rows(out)] == list("123456789")
    assert RunDirectory.open(out).config().steps == 9


def test_its_step_is_counted_and_audited(capsys):
    assert cli.main(["cost", "--program", FILE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] > 3
    assert cli.main(["audit", "--program", FILE, "--no-compile"]) == 0
    out = capsys.readouterr().out
    assert "A training step, batch of 8" in out
    assert "Answering (probability), 4 at once" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "colour=1"], "tiny_program.py: colour: no option of its training, expected one"),
        (["--set", "rate=[1]"], "options.rate"),
        (["--set", "rate=fast"], "tiny_program.py: rate: 'fast', expected a number (default: 0.5)"),
        (["--config", "digits"], "expected --config, of a GAN, or --program, a Python file"),
        (["--batch-size", "4"], "--batch-size: of a GAN"),
        (["--data", "nowhere"], "nowhere: no such file"),
        (["--init", "x"], "init, images, labels, generator, discriminator: of a GAN"),
        (["--steps", "0"], "steps: 0 given, expected at least 1"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "--program", FILE, "--out", str(out), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("was", "mistaken", "message"),
    [
        ("lambda rng: rng.normal(size=(questions, 3))", "np.zeros((4, 3))", "sample.question: exp"),
        (
            "(questions, 3)), every",
            "(questions, 2)), every",
            "lpgan: sample.question: expected shape (rows, 3), got (4, 2)",
        ),
        ("size=(64, 3)", "size=(64, 2)", "(mine.py:31, in feed)"),
        ('{"x": points,', '{"x": points[:, :2],', "batch['x']: expected shape (8, 3), got (8, 2)"),
        ("batch_size, seed)", "batch_size - 1, seed)", "expected shape (8, 3), got (7, 3)"),
        (
            "def loss(params):",
            "def loss(params):\n            assert params['b'][0] < 9",
            "mine.py:21 (loss))",
        ),
        ("x @ params", "x.T @ params", "(mine.py:17, in logits)"),
    ],
)
def test_mistakes_are_told_in_one_line(was, mistaken, message, tmp_path, capsys):
    text = Path(FILE).read_text()
    assert was in text
    (tmp_path / "mine.py").write_text(text.replace(was, mistaken))
    command = ["train", "--program", str(tmp_path / "mine.py"), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert message in said, said
    assert said.startswith("lpgan: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected `training`, an lpgan_jax.Training or a function"),
        ("training = 3", "got int"),
        ("def training():\n    return 3", "got int"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
    ],
)
def test_a_file_that_is_no_program(text, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises((ConfigError, ImportError), match=message):
        program_file.load(str(file), {})


def test_a_file_is_run_once_until_it_changes(tmp_path):
    file = tmp_path / "mine.py"
    shutil.copy(FILE, file)
    first = program_file.load(str(file), {})
    assert program_file.load(str(file), {}) is first
    assert program_file.load(str(file), {"rate": 0.1}) is not first
    file.write_text(file.read_text() + "\n")
    assert program_file.load(str(file), {}) is not first


def test_what_others_may_know():
    settings = config.program_config(FILE, ["rate=0.25"], seed=5, data="secret/place")
    public = settings.public()
    assert public.program == "tiny_program.py"
    assert (public.seed, public.data) == (0, None)
    assert config.from_json(config.to_json(public), "here") == public
    with pytest.raises(FileNotFoundError, match="nowhere"):
        config.program_config("nowhere.py")


def test_commands_of_gans_say_so(run, capsys):
    assert cli.main(["sample", "--run", str(run), "--num", "1", "--out", "x.png"]) == 1
    assert "a run of" in capsys.readouterr().err
