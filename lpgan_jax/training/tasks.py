"""What a training run does, in order: the same in one process as in a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lpgan_jax.training.config import TrainConfig

TaskKind = Literal["state", "train", "generate", "checkpoint", "finish"]


@dataclass(frozen=True)
class Task:
    """One thing to do.

    Attributes:
        kind: share the initial state, train for a step, generate a sample, save, or hand over what
            was learnt.
        step: steps done before it.
    """

    kind: TaskKind
    step: int


def tasks(settings: TrainConfig, done: int, samples: bool) -> Iterator[Task]:
    """The tasks of a run, after so many steps; `samples`: whether images are generated."""
    if done == 0:
        yield Task("state", 0)
        if samples:
            yield Task("generate", 0)
    for step in range(done, settings.steps):
        yield Task("train", step)
        number = step + 1
        if samples and settings.samples_after(number):
            yield Task("generate", number)
        if settings.saves_after(number):
            yield Task("checkpoint", number)
    yield Task("finish", settings.steps)
