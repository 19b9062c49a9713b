"""Tables of measured figures as CSV files, which the pages are made from."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, str | int | float | None]


def to_csv(rows: list[Row], fields: Sequence[str]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str, types: dict[str, Callable[[str], Any]]) -> list[Row]:
    """The rows of `to_csv`; a field that is not named in `types` is a float, an empty one None."""
    return [
        {name: types.get(name, float)(value) if value else None for name, value in row.items()}
        for row in csv.DictReader(io.StringIO(text))
    ]
