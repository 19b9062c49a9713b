"""The documents say what the code does: the tutorial runs, the reference is up to date."""

import re
from pathlib import Path

import numpy as np
from helpers import script

from lpgan_jax import protocols as P
from lpgan_jax.nn.activation import LOG_RANGE
from lpgan_jax.tables import read_csv

DOCS = Path(__file__).parent.parent / "docs"


def test_the_tutorial_runs():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    scope = {}
    for block in blocks:
        exec(compile(block, "tutorial.md", "exec"), scope)


def test_the_protocol_reference_is_what_the_code_says():
    """Docstrings, signatures, messages; and every docstring's cost is that of its trace."""
    assert script("protocol_reference").document() == (DOCS / "protocols.md").read_text()


def test_documents_say_what_activations_take():
    architecture = (DOCS / "architecture.md").read_text()
    for sentence in (r"activations \|x\| < 2\^(\d+);", r"values have \(2\^(\d+), `nn/activation`"):
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
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    images = np.asarray(scope["images"])
    assert images.shape == (64, 16, 16, 1)
    assert np.abs(images).max() <= 1
    # Digits are white strokes on black: the corners are dark, the middle is not.
    assert images[:, :2, :2].mean() < -0.7 < images[:, 6:10, 6:10].mean() - 0.2


def test_links_between_documents_lead_somewhere():
    for document in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
