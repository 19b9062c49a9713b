"""Tables of figures as CSV files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lpgan_jax.files import atomic_write

Row = dict[str, Any]


def write_csv(path: str | os.PathLike[str], rows: Iterable[Row], fields: Sequence[str]) -> None:
    """Write rows, whole or not at all; floats with six significant digits, None empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _text(row.get(name)) for name in fields})
    atomic_write(path, text.getvalue().encode())


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of `write_csv`: numbers where they are numbers, None where a field is empty."""
    with open(Path(path), newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    if not text:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
