"""Tables of figures: CSV files, and aligned text."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lpgan_jax.common.files import atomic_write

Row = dict[str, Any]
"""Figures by name: numbers, text, or None for none."""


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows of cells as lines of equal columns; those numbered `left` begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def si(value: float, unit: str) -> str:
    """Three significant digits and an SI prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} P{unit}".rstrip()


def to_csv(rows: Iterable[Row], fields: Sequence[str]) -> str:
    """Rows as CSV, in full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str, types: Mapping[str, Callable[[str], Any]]) -> list[Row]:
    """The rows of `to_csv`; a field that is not named in `types` is a float, an empty one None."""
    return [
        {name: types.get(name, float)(value) if value else None for name, value in row.items()}
        for row in csv.DictReader(io.StringIO(text))
    ]


def write_csv(path: str | os.PathLike[str], rows: Iterable[Row], fields: Sequence[str]) -> None:
    """Write these fields of the rows, whole or not at all, for everybody the umask lets read.

    Floats have six significant digits.
    """
    shown = ({name: _text(row.get(name)) for name in fields} for row in rows)
    atomic_write(path, to_csv(shown, fields).encode(), private=False)


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a file: numbers where they are numbers, None where a field is empty."""
    rows = csv.DictReader(io.StringIO(Path(path).read_text()))
    return [{name: _value(text) for name, text in row.items()} for row in rows]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
