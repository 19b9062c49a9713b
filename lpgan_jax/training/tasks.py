"""What a training run does, in order: the same in one process as in a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lpgan_jax.programs import Training

TaskKind = Literal["state", "train", "guard", "answer", "checkpoint", "finish"]


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
        kind: share the initial state, train for a step, see whether its values were in range,
            answer the question of the sample, save, or hand over what was learnt.
        step: steps done before it.
    """

    kind: TaskKind
    step: int


def tasks(training: Training, done: int, sampled: bool) -> Iterator[Task]:
    """The tasks of a run, after so many steps; `sampled`: whether the sample is opened."""
    if done == 0:
        yield Task("state", 0)
        if sampled and training.samples_after(0):
            yield Task("answer", 0)
    for step in range(done, training.steps):
        yield Task("train", step)
        number = step + 1
        if training.guards_after(number):
            yield Task("guard", number)
        if sampled and training.samples_after(number):
            yield Task("answer", number)
        if training.saves_after(number):
            yield Task("checkpoint", number)
    yield Task("finish", training.steps)


class OutOfRange(ValueError):
    """Values left the range in which the protocols are right: a training must not go on."""


def require_in_range(outside: Sequence[str], step: int) -> None:
    """Check what a guard said.

    Args:
        outside: the tensors with a value out of range.
        step: steps done.

    Raises:
        OutOfRange: there are some; names them, and says what to do.
    """
    if not outside:
        return
    more = f", and of {len(outside) - 1} others" if len(outside) > 1 else ""
    raise OutOfRange(
        f"step {step}: values of {outside[0]}{more} are out of range, and whatever follows from "
        "them is wrong: train with a smaller learning_rate or fewer frac_bits (checkpoints are of "
        "steps before it; `lpgan ranges` shows where values first leave the range)"
    )
