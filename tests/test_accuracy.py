"""The checked-in tables of accuracy and of the patent's comparison say what the code does now."""

from pathlib import Path

import numpy as np
import pytest
from helpers import script

DOCS = Path(__file__).parent.parent / "docs"
accuracy, compare_patent = script("accuracy"), script("compare_patent")
ROWS = accuracy.from_csv((DOCS / "accuracy.csv").read_text())
AT = {(row["protocol"], row["frac_bits"]): row for row in ROWS}


# Accuracy ---------------------------------------------------------------------------------------


def test_every_protocol_is_there_at_all_precisions():
    assert list(AT) == [(name, f) for name in accuracy.CASES for f in accuracy.FRAC_BITS]
    for (name, f), row in AT.items():
        assert row["domain"] == accuracy.CASES[name].domain_at(f)
        assert row["inputs"] >= accuracy.INPUTS


def test_page_and_file_have_the_same_figures():
    assert accuracy.to_csv(ROWS) == (DOCS / "accuracy.csv").read_text()
    assert accuracy.to_markdown(ROWS) == (DOCS / "accuracy.md").read_text()


@pytest.mark.parametrize("name", accuracy.CASES)
def test_goal_at_18_bits(name):
    row = AT[name, 18]
    assert row["wrong"] == 0 if row["of_goal"] is None else row["of_goal"] <= 1


@pytest.mark.parametrize("name", accuracy.CASES)
def test_errors_are_what_the_docstring_says(name):
    documented = " ".join(getattr(accuracy.P, name).__doc__.split())
    assert accuracy.CASES[name].stated_text in documented.replace("Exact", "exact")
    for f in accuracy.FRAC_BITS:
        row = AT[name, f]
        assert row["wrong"] == 0 if row["of_stated"] is None else row["of_stated"] <= 1, f


QUICK = ["sec_mul", "truncate"]


@pytest.mark.parametrize(
    ("name", "f"), [(name, 18) for name in accuracy.CASES] + [(name, 26) for name in QUICK]
)
def test_errors_are_those_of_the_table(name, f):
    """The same inputs and keys. On another machine the series' coefficients may differ in their
    last bits, and then all that is rounded after them: a result by one LSB, and by what the series
    is exact to, 2^-26 relative (of the result; for functions up to 1, less than an LSB).
    """
    measured, row = accuracy.measure(name, f), AT[name, f]
    new = accuracy.summarise(name, measured)
    assert (new["inputs"], new["wrong"]) == (row["inputs"], row["wrong"])
    if row["wrong"] is not None:
        return
    small = measured.exact < accuracy.SMALL
    largest = measured.exact.max()
    assert new["max_lsb_small"] <= row["max_lsb_small"] + 1 + 2.0**-26 * accuracy.SMALL
    assert new["max_lsb"] <= row["max_lsb"] + 1 + 2.0**-26 * largest
    if row["relative"] is not None:
        # Of errors above the fixed part, one LSB more counts as much as it is of the result.
        above = measured.errors > accuracy.CASES[name].fixed
        of_result = 1 / max(1, measured.exact[above].min(initial=np.inf))
        assert new["relative"] <= row["relative"] + 2.0**-26 + of_result
    # The mean of n squares has the standard error s / sqrt(n), in either of two runs; 5 of them.
    for field, errors in (("rms_lsb", measured.errors), ("rms_lsb_small", measured.errors[small])):
        margin = 5 * np.sqrt(2 / len(errors)) * np.std(errors**2)
        assert new[field] ** 2 <= row[field] ** 2 * (1 + 1e-5) + margin


# The patent's comparison ------------------------------------------------------------------------

PATENT = compare_patent.from_csv((DOCS / "patent.csv").read_text())


def test_costs_of_the_comparisons():
    assert [row for row in PATENT if row["table"] == "cost"] == compare_patent.costs()


def test_page_of_the_comparisons_has_the_figures_of_the_file():
    assert compare_patent.to_csv(PATENT) == (DOCS / "patent.csv").read_text()
    assert compare_patent.to_markdown(PATENT) == (DOCS / "patent.md").read_text()


def test_failures_of_the_comparison_as_printed():
    """Counts are binomial: within 5 standard deviations; ours never fails."""
    rows = [row for row in PATENT if row["table"] == "failures"]
    assert [row["log2_difference"] for row in rows] == list(compare_patent.DIFFERENCES)
    for row in rows:
        expected = row["pairs"] * 2.0 ** (row["log2_difference"] - 64)
        assert row["patent_expected"] == expected
        assert abs(row["patent_wrong"] - expected) <= 5 * np.sqrt(expected) + 1
        assert row["ring_wrong"] == 0
