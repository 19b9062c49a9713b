"""The documents say what the code does: the tutorial runs, the reference is up to date."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import script

from lpgan_jax import cli
from lpgan_jax import protocols as P
from lpgan_jax.common.tables import read_csv
from lpgan_jax.mpc.activation import LOG_RANGE
from lpgan_jax.transform import explain, plan
from lpgan_jax.transform.rules import RULES

DOCS = Path(__file__).parent.parent / "docs"


def python_blocks(document):
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)


def run(blocks, name):
    scope = {}
    for block in blocks:
        exec(compile(block, name, "exec"), scope)
    return scope


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("tutorial.md", 6), ("your_model.md", 12), ("your_gan.md", 4), ("privacy.md", 1)],
)
def test_the_tutorials_run(name, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(python_blocks(DOCS / name)) == blocks
    run(python_blocks(DOCS / name), name)


def test_the_tutorial_of_programs_runs(tmp_path, monkeypatch):
    """Its first block as the file that the others, and the commands, name."""
    monkeypatch.chdir(tmp_path)
    file, *rest = python_blocks(DOCS / "your_program.md")
    assert len(rest) == 2
    (tmp_path / "my_program.py").write_text(file)
    run([file, *rest], "your_program.md")
    np.save("points.npy", np.zeros((3, 2)))
    commands = re.findall(
        r"^lpgan ((?:train|cost|ask|export) [^#\n]*)", (DOCS / "your_program.md").read_text(), re.M
    )
    ours = [c.split() for c in commands if "cluster.yaml" not in c]
    assert len(ours) == 5
    for command in ours:
        assert cli.main(command) == 0, command


def test_the_first_example_runs():
    first, *_ = python_blocks(DOCS.parent / "README.md")
    assert "lp.secure" in first
    run([first], "README.md")


def test_the_protocol_reference_is_what_the_code_says():
    """Docstrings, signatures, messages; and every docstring's cost is that of its trace."""
    assert script("protocol_reference").document() == (DOCS / "protocols.md").read_text()


def test_every_primitive_has_a_row():
    """Where tracing is quick, with the costs of today."""
    reference = script("primitive_reference")
    errors = {row["operation"]: row["error_lsb"] for row in read_csv(reference.MEASURED)}
    reference.require_complete(errors)
    page = reference.DOCUMENT.read_text().splitlines()
    for name in RULES:
        assert any(line.startswith(f"| `{name}` |") for line in page), name
    for name in (
        "add",
        "mul",
        "square",
        "gather",
        "inner",
        "dot_general",
        "scan",
        "select_n",
        "max",
    ):
        assert reference.row(name, errors[name]) in page


@pytest.mark.slow
def test_the_primitive_reference_is_what_the_code_says():
    assert script("primitive_reference").document() == (DOCS / "primitives.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_the_errors_of_primitives_are_as_stated(name):
    """Once more, with other operands and masks."""
    reference = script("primitive_reference")
    errors = {row["operation"]: row["error_lsb"] for row in read_csv(reference.MEASURED)}
    assert reference.measured(reference.EXAMPLES[name], seed=1) <= 1.5 * errors[name] + 0.5


def test_documents_say_how_scales_are_chosen():
    text = (DOCS / "scales.md").read_text()
    said = [
        (r"activations are compared within 2\^(\d+)", LOG_RANGE),
        (r"gets (\d+) bits below that magnitude", plan.SIGNIFICANT_BITS),
        (r"room for values 2\^(\d+) times as large", plan.MARGIN_BITS),
        (r"fewer than (\d+) bits left", explain.FEW),
    ]
    for sentence, number in said:
        assert [float(n) for n in re.findall(sentence, text.replace("\n", " "))] == [number]


def test_documents_say_what_activations_take():
    architecture = (DOCS / "architecture.md").read_text()
    for sentence in (r"activations \|x\| < 2\^(\d+);", r"values have \(2\^(\d+), `mpc/activation`"):
        assert re.findall(sentence, architecture) == [str(LOG_RANGE)]
    assert re.findall(r"for \|x\| < 2\^(\d+)\.", P.sec_leaky_relu.__doc__) == [str(LOG_RANGE)]
    row = re.findall(r"\| `sec_leaky_relu` \|.*", (DOCS / "accuracy.md").read_text())[0]
    assert set(re.findall(r"x\\\| < 2\^(\d+)", row)) == {str(LOG_RANGE)}


def test_the_results_page_says_what_its_tables_say():
    """The page, and the pages of the sweeps in it, are made of the CSV files beside them."""
    assert script("results").document(DOCS / "results") == (DOCS / "results.md").read_text()
    for name in ("precision", "coarse", "fidelity"):
        page = (DOCS / "results" / name / "summary.md").read_text()
        for row in read_csv(DOCS / "results" / name / "final.csv"):
            line = f"| {row['variant']} | {row['seeds']} | {row['frechet_mean']:.3g} ± "
            assert line in page


def test_a_released_generator_is_used_as_its_card_says(monkeypatch):
    folder = DOCS / "results" / "digits"
    monkeypatch.chdir(folder)
    images = np.asarray(run(python_blocks(folder / "README.md"), "README.md")["images"])
    assert images.shape == (64, 16, 16, 1)
    assert np.abs(images).max() <= 1
    # Digits are white strokes on black: the corners are dark, the middle is not.
    assert images[:, :2, :2].mean() < -0.7 < images[:, 6:10, 6:10].mean() - 0.2


def test_links_between_documents_lead_somewhere():
    root = DOCS.parent
    for document in (*DOCS.glob("*.md"), root / "README.md", root / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
