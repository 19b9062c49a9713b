"""A training of a program: on whose data, for how long, and what is shown of it on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lpgan_jax.programs.program import Program

Draw = Callable[[int], Any]
"""An owner's batches: the turn, counted from 0, to a batch."""

Row = Mapping[str, float]
"""What a table of metrics says of a step, by column."""


def scalars(told: Any) -> dict[str, float]:
    """What SP is told of a step, as columns: each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(told)
    return {jax.tree_util.keystr(p, simple=True, separator="."): float(v) for p, v in leaves}


@dataclass(frozen=True, eq=False)
class Sample:
    """What SP is shown while training: the answer to a question that DS shares, the same each time.

    Attributes:
        question: a random generator to the question.
        every: steps from one to the next; the first is before all steps.
        file: the answer as the bytes of a file.
        suffix: of its name, such as ".png".
    """

    question: Callable[[np.random.Generator], Any]
    every: int
    file: Callable[[Any], bytes]
    suffix: str


@dataclass(frozen=True, eq=False)
class Training:
    """What all roles must know to train a program.

    Attributes:
        program: what is trained.
        feed: a seed to an owner's batches. Only owners call it, so only they need the data.
        steps: how many.
        log_every: steps from one row of metrics to the next.
        checkpoint_every: steps from one save of shares to the next.
        keep_checkpoints: the newest so many are kept.
        row: what SP is told of a step, to the columns of a row.
        samples: what is asked on the way, by the names of the program's answers.
    """

    program: Program
    feed: Callable[[int], Draw]
    steps: int
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    row: Callable[[Any], Row] = scalars
    samples: Mapping[str, Sample] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints")
        }
        for name, sample in self.samples.items():
            if name not in self.program.answers:
                raise ValueError(
                    f"samples: {name!r} is none of the program's answers, expected one of "
                    f"{', '.join(map(repr, self.program.answers)) or 'none'}"
                )
            counts[f"samples[{name!r}].every"] = sample.every
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")

    def logs_after(self, step: int) -> bool:
        """Whether the step (counted from 1) has a row of metrics."""
        return step % self.log_every == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Whether there is a checkpoint of the step, counted from 1."""
        return step % self.checkpoint_every == 0 or step == self.steps

    def samples_after(self, step: int) -> list[str]:
        """What is asked after the step, counted from 1; 0 is before all."""
        return [
            name
            for name, sample in self.samples.items()
            if step % sample.every == 0 or step == self.steps
        ]

    @property
    def columns(self) -> tuple[str, ...]:
        """What `row` has."""
        state = jax.eval_shape(lambda: self.program.init(np.random.default_rng(0)))
        _, told = jax.eval_shape(self.program.step, state, self.program.batch)
        return tuple(self.row(jax.tree.map(lambda leaf: np.zeros(leaf.shape), told)))
