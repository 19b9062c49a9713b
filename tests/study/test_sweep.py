"""Sweeps: cells in processes of their own, tables that depend on seeds alone, plots and a page."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpgan_jax.cli import main
from lpgan_jax.common.tables import read_csv, write_csv
from lpgan_jax.programs import initial_state
from lpgan_jax.study.sweep import Cell, Variant, run_sweep, write_report
from lpgan_jax.study.sweep import run as running
from lpgan_jax.study.sweep.errors import PROTOCOLS, gradient_errors, layer_errors, protocol_errors
from lpgan_jax.study.sweep.plan import variants
from lpgan_jax.study.sweep.report import final_rows, good_bits, paired_rows
from lpgan_jax.training import config, data
from lpgan_jax.training.building import build, build_gan
from lpgan_jax.training.config import ConfigError, SweepConfig
from lpgan_jax.training.source import DataSource

BASE = """\
data: {{dataset: npz, path: {path}, image_size: 8, channels: 1}}
model: {{noise_size: 4, features: 2, base_size: 4, norm_eps: 1e-4}}
generator_optimizer: {{name: sgd, learning_rate: 0.1}}
discriminator_optimizer: {{name: sgd, learning_rate: 0.1}}
batch_size: 4
steps: 3
log_every: 1
sample_every: 10
num_samples: 4
checkpoint_every: 10
"""

BEFORE = running._work  # the real one, which a test replaces


def crashing_work(sweep, cells, *rest):
    """A worker that dies at a cell of seed 1, without a word."""
    (cell,) = cells  # of so few, each has a process of its own
    if cell.seed == 1:
        os._exit(9)
    BEFORE(sweep, cells, *rest)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration of a network as small as can be, and images of two classes."""
    folder = tmp_path_factory.mktemp("base")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    images = (rng.integers(0, 60, (60, 8, 8)) + 150 * labels[:, None, None]).astype(np.uint8)
    np.savez(folder / "images.npz", train_images=images, train_labels=labels)
    (folder / "base.yaml").write_text(BASE.format(path=folder / "images.npz"))
    return folder / "base.yaml"


def study(base: Path, **changes) -> SweepConfig:
    fields = {
        "base": str(base),
        "runs": [{"mode": "shadow", "frac_bits": [12]}, {"mode": "plaintext"}],
        "seeds": [0, 1],
        "measure_every": 2,
        "num_images": 20,
    }
    return SweepConfig.model_validate(fields | changes)


# The configuration --------------------------------------------------------------------------------


def test_runs_are_every_combination_once(base):
    sweep = study(
        base,
        runs=[
            {"mode": "shadow", "frac_bits": [8, 10], "rounding": ["stochastic", "local"]},
            {"mode": "shadow", "frac_bits": [10]},
            {"mode": "plaintext", "perturbation": 1.5},
            {"mode": "plaintext", "frac_bits": [12, 14]},  # which a float32 has not
            {"mode": "secure"},
        ],
    )
    found = variants(sweep)
    assert [v.name for v in found] == [
        "shadow-stochastic-f08",
        "shadow-stochastic-f10",
        "shadow-local-f08",
        "shadow-local-f10",
        "float32-moved-1.5-lsb-f18",
        "float32",
        "secure-f18",
    ]
    assert Cell(found[0], 3).name == "shadow-stochastic-f08-seed3"


def test_shipped_sweeps_load():
    for name in ("precision", "coarse", "fidelity"):
        sweep = config.load_sweep(name)
        assert sweep == config.load_sweep(f"configs/sweeps/{name}.yaml")
        for variant in variants(sweep):
            assert config.load(sweep.base, [*sweep.set, f"frac_bits={variant.frac_bits}"])
    assert len(config.load_sweep("fidelity").seeds) >= 8
    precise = {v.frac_bits for v in variants(config.load_sweep("precision")) if v.mode == "shadow"}
    assert (min(precise), max(precise)) == (8, 26)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: []", "runs: \\[\\] given, expected a list that is not empty"),
        ("runs: [{mode: fast}]", "runs.0.mode: 'fast' given, expected 'secure', 'shadow' or"),
        ("runs: [{mode: secure, rounding: [local]}]", "a rounding for shadow runs only"),
        ("runs: [{mode: shadow, perturbation: 1.0}]", "a perturbation for plaintext runs only"),
        ("runs: [{mode: shadow, bits: [1]}]", "runs.0.bits: unknown field, expected one of mode"),
        ("seeds: [1, 1]", "seeds: .* expected different numbers of at least 0"),
        ("seeds: 3", "seeds: 3 given, expected a list"),
        ("num_images: 5", "num_images: 5 given, expected at least 10"),
    ],
)
def test_bad_sweeps(tmp_path, text, message):
    fields = {
        "base": "digits",
        "runs": "[{mode: shadow}]",
        "seeds": "[0]",
        "measure_every": 1,
        "num_images": 10,
    }
    name, value = text.split(": ", 1)
    lines = [f"{key}: {of}" for key, of in (fields | {name: value}).items()]
    (tmp_path / "bad.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"bad.yaml: .*{message}"):
        config.load_sweep(str(tmp_path / "bad.yaml"))


# Running ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(base, tmp_path_factory):
    """A sweep in which one process after another died, and what was said; then gone on with."""
    out, lines = tmp_path_factory.mktemp("sweeps") / "first", []
    sweep = study(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_work", crashing_work)
        failures = run_sweep(sweep, out, workers=2, report=lines.append)
    partial = read_csv(out / "training.csv")
    again = run_sweep(sweep, out, workers=2, report=lines.append)
    return out, sweep, failures, partial, again, lines


def test_a_crash_loses_one_cell_and_the_next_call_runs_it(swept):
    out, sweep, failures, partial, again, lines = swept
    names = [f"{variant.name}-seed1" for variant in variants(sweep)]
    expected = [f"{name}: its process ended with exit code 9" for name in names]
    assert sorted(failures) == sorted(expected)
    assert {row["seed"] for row in partial} == {0}
    assert {row["mode"] for row in partial} == {"shadow", "plaintext"}
    assert again == []
    assert "2 of 4 cells are there already" in lines
    rows = read_csv(out / "training.csv")
    assert len(rows) == 2 * 2 * 2  # measured after steps 2 and 3
    assert [row for row in rows if row["seed"] == 0] == partial


def test_tables_depend_on_the_seeds_alone(swept, tmp_path):
    """The same runs in another order and another process: the same rows, to the last digit."""
    out, sweep, *_ = swept
    again = tmp_path / "again"
    other = sweep.model_copy(update={"runs": sweep.runs[:1]})
    assert run_sweep(other, again, workers=1, report=lambda text: None) == []
    for table in ("training", "gradients", "layers", "protocols"):
        first, second = (read_csv(d / f"{table}.csv") for d in (out, again))
        assert [row for row in first if row["mode"] == "shadow"] == second
        assert len(second) >= 4


def test_what_the_tables_say(swept):
    out, *_ = swept
    training = read_csv(out / "training.csv")
    assert all(row["frechet"] > 0 and 0 <= row["recall"] <= 1 for row in training)
    coarse, plain = (
        np.mean([row["distance"] for row in training if row["mode"] == mode])
        for mode in ("shadow", "plaintext")
    )
    assert coarse > 16 * plain > 0  # 12 bits are farther from float64 than float32
    for table in ("gradients", "protocols", "layers"):
        rows = [r for r in read_csv(out / f"{table}.csv") if r["mode"] == "shadow"]
        assert {(row["frac_bits"], row["seed"]) for row in rows} == {(12, 0)}
    assert all(row["cell_seconds"] > 0 for row in read_csv(out / "times.csv"))


def test_errors_of_a_step_fall_with_the_fraction_bits(base):
    errors = {}
    for bits in (12, 18):
        settings = config.load(str(base), [f"frac_bits={bits}"])
        gan, source = build_gan(settings), DataSource(settings, 0, data.load_images(settings.data))
        variant = Variant("shadow", "stochastic", bits, 0.0)
        initial = initial_state(build(settings).program, 0)
        arguments = gan, initial, source.batch(0), variant, 0
        errors[bits] = {
            row["network"]: row["relative_error"]
            for row in gradient_errors(*arguments)
            if row["parameter"] == "all"
        }
    # A bit more halves an error; of the square of 32 elements or more, chance has a factor of 2.
    for network in ("generator", "discriminator"):
        assert 2**4 < errors[12][network] / errors[18][network] < 2**8
    layers = layer_errors(*arguments)
    assert {18, 20} & {row["scale"] for row in layers}
    assert all(row["lost_rms"] >= 0 for row in layers)
    protocols = protocol_errors(variant, 0)
    assert {row["protocol"] for row in protocols} == PROTOCOLS.keys()
    assert all(0.2 < row["error_rms"] < 0.7 for row in protocols)  # LSB, at any precision


def test_a_directory_is_of_one_sweep(swept, base, tmp_path):
    out, sweep, *_ = swept
    with pytest.raises(FileExistsError, match="holds another sweep"):
        run_sweep(study(base, seeds=[7]), out)
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(FileExistsError, match="expected a new directory"):
        run_sweep(sweep, tmp_path)


def test_a_configuration_that_no_run_can_use_is_refused_at_once(base, tmp_path):
    with pytest.raises(ConfigError, match="frac_bits: 40 given"):
        run_sweep(study(base, runs=[{"mode": "shadow", "frac_bits": [40]}]), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# The report ---------------------------------------------------------------------------------------


def test_the_report_shows_what_the_tables_hold(swept, capsys):
    pytest.importorskip("matplotlib")
    out, sweep, *_ = swept
    file = out / "again.yaml"
    file.write_text(config.dump(sweep))
    assert main(["sweep", "--config", str(file), "--out", str(out)]) == 0  # all is there
    assert "4 of 4 cells are there already" in capsys.readouterr().out
    for name in ("curves.png", "samples.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    page = (out / "summary.md").read_text()
    final = read_csv(out / "final.csv")
    assert len(final) == 2
    for row in final:
        assert f"| {row['variant']} | 2 | {row['frechet_mean']:.3g} ± " in page
    assert "lpgan sweep --config" in page
    assert "shadow-stochastic-f12 | float32 | 2 |" in page


def rows_of(bits, seeds, frechet):
    mode = "plaintext" if bits is None else "shadow"
    common = {"mode": mode, "rounding": "stochastic", "frac_bits": bits or 18, "perturbation": 0}
    variant = Variant(**common).name
    others = dict.fromkeys(("precision", "recall", "coverage", "distance", "loss_d", "loss_g"), 1.0)
    return [
        common | others | {"variant": variant, "seed": s, "step": 9, "frechet": float(f)}
        for s, f in zip(seeds, frechet, strict=True)
    ]


def test_figures_over_seeds():
    plain = rows_of(None, [0, 1, 2], [10, 20, 30])
    shadow = rows_of(18, [2, 1, 5], [33, 21, 99])
    (first, second) = final_rows([*plain, *shadow, plain[0] | {"step": 3, "frechet": 1e9}])
    assert (first["frechet_mean"], first["frechet_sd"], first["seeds"]) == (20.0, 10.0, 3)
    assert second["frechet_mean"] == 51.0
    (row,) = [r for r in paired_rows([*plain, *shadow]) if r["measure"] == "frechet"]
    # Seeds 1 and 2 are in both: 21 - 20 and 33 - 30.
    assert (row["pairs"], row["mean_difference"]) == (2, 2.0)
    assert row["sd_of_differences"] == pytest.approx(np.sqrt(2))
    assert row["standard_error"] == pytest.approx(1.0)


def test_good_precisions_are_the_longest_row():
    plain = rows_of(None, [0, 1, 2], [9, 10, 11])
    table = {8: [9, 10, 11], 10: [50, 51, 52], 12: [9, 10, 11], 14: [11, 12, 13], 16: [20, 30, 40]}
    rows = [row for bits, values in table.items() for row in rows_of(bits, [0, 1, 2], values)]
    assert good_bits(final_rows([*plain, *rows])) == [12, 14]
    assert good_bits(final_rows(rows)) == []
    bad = rows_of(18, [0, 1, 2], [50, 51, 52])
    assert good_bits(final_rows([*plain, *bad])) == []


def test_losses_that_nobody_opened_leave_gaps():
    rows = [
        row | {"loss_d": None, "loss_g": None}
        for row in (*rows_of(None, [0, 1], [10, 20]), *rows_of(18, [0, 1], [11, 22]))
    ]
    assert "loss_d_mean" not in final_rows(rows)[0]
    assert {row["measure"] for row in paired_rows(rows)}.isdisjoint({"loss_d", "loss_g"})


def test_data_that_are_missing_are_said_at_once(base, tmp_path):
    sweep = study(base, set=["data.path=nowhere.npz"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz: no such file"):
        run_sweep(sweep, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_directory_is_of_one_base_configuration(swept, base):
    out, sweep, *_ = swept
    before = base.read_text()
    base.write_text(before.replace("learning_rate: 0.1", "learning_rate: 0.2"))
    try:
        with pytest.raises(FileExistsError, match="whose base configuration was another"):
            run_sweep(sweep, out)
    finally:
        base.write_text(before)


@pytest.mark.parametrize(("cells", "workers", "sizes"), [(40, 2, 5), (3, 8, 1), (90, 2, 12)])
def test_work_is_handed_out_in_turns(cells, workers, sizes):
    variant = Variant("plaintext", "stochastic", 18, 0.0)
    groups = running._turns([Cell(variant, seed) for seed in range(cells)], workers)
    assert [cell.seed for group in groups for cell in group] == list(range(cells))
    assert max(map(len, groups)) == sizes


def test_nothing_to_report(tmp_path, base):
    (tmp_path / "sweep.yaml").write_text(config.dump(study(base)))
    write_csv(tmp_path / "training.csv", [], ("mode",))
    with pytest.raises(ValueError, match="no cell of the sweep has finished"):
        write_report(tmp_path, "")


def test_tables_keep_numbers_text_and_gaps(tmp_path):
    rows = [{"a": 1, "b": 0.123456789, "c": "x", "d": None}, {"a": -2, "b": 1e-9, "c": "y, z"}]
    write_csv(tmp_path / "t.csv", rows, "abcd")
    assert (tmp_path / "t.csv").read_text().splitlines()[0] == "a,b,c,d"
    assert read_csv(tmp_path / "t.csv") == [
        {"a": 1, "b": 0.123457, "c": "x", "d": None},
        {"a": -2, "b": 1e-9, "c": "y, z", "d": None},
    ]
