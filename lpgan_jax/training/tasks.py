"""What a training run does, in order: the same in one process as in a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lpgan_jax.programs import Training

TaskKind = Literal["state", "train", "answer", "checkpoint", "finish"]


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
        kind: share the initial state, train for a step, answer the question of the sample, save,
            or hand over what was learnt.
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
        if sampled and training.samples_after(number):
            yield Task("answer", number)
        if training.saves_after(number):
            yield Task("checkpoint", number)
    yield Task("finish", training.steps)
