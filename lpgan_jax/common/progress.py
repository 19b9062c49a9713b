"""The progress of a training run, for people who look."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A bar with speed, remaining time and losses or the like; else a line now and then."""

    def __init__(self, done: int, steps: int, *, opened_by_sp: bool) -> None:
        """`opened_by_sp`: say so next to what it is told."""
        self._console = Console(file=sys.stderr)
        self._opened = " (opened by SP)" if opened_by_sp else ""
        self._steps = steps
        self._smooth: float | None = None
        self._first = True
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, speed="", told="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """What is going on between steps."""
        self._bar.update(self._task, description=text)
        self._line(f"{text} ...")

    def step(self, number: int, seconds: float, row: Mapping[str, float | None]) -> None:
        """A step was done."""
        # The first step is mostly compilation, and says nothing about the others.
        if self._first:
            self._first, speed, left = False, "", "?"
        else:
            self._smooth = 0.8 * (self._smooth or seconds) + 0.2 * seconds
            speed, left = (
                f"{self._smooth:.2f} s/step",
                f"{self._smooth * (self._steps - number):.0f}",
            )
        told = " ".join(f"{name} {v:.3f}" for name, v in row.items() if v is not None)
        shown = told + self._opened if told else ""
        self._bar.update(
            self._task, completed=number, description="training", speed=speed, told=shown
        )
        tenth = max(1, self._steps // 10)
        if number % tenth == 0 or number == self._steps:
            self._line(f"step {number}/{self._steps}  {speed}  {left} s left  {shown}")

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            print(text, file=sys.stderr, flush=True)
