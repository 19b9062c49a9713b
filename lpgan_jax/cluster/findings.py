"""What was found when something was looked at, and the table of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table

Status = Literal["OK", "warning", "failed"]

_COLOURS: dict[Status, str] = {"OK": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True)
class Finding:
    """Of one check.

    Attributes:
        status: `failed`: a session will not work like this; `warning`: it may not, or not for long.
        check: what was looked at.
        found: what is so.
        expected: what should be, if it is not.
        mend: how to get there.
    """

    status: Status
    check: str
    found: str
    expected: str = ""
    mend: str = ""

    @property
    def text(self) -> str:
        """All but the status and what it is of."""
        wanted = f", expected {self.expected}" if self.expected else ""
        return f"{self.found}{wanted}{f': {self.mend}' if self.mend else ''}"


def table(findings: Sequence[Finding]) -> Table:
    """A line for each, in their order."""
    shown = Table(box=None, pad_edge=False, show_header=False)
    for column in ("status", "check", "text"):
        shown.add_column(column, no_wrap=column != "text")
    for finding in findings:
        colour = _COLOURS[finding.status]
        status = f"[{colour}]{finding.status}[/{colour}]"
        shown.add_row(status, escape(finding.check), escape(finding.text))
    return shown
