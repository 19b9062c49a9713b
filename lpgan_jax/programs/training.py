"""A training of a program: on whose data, for how long, and what is shown of it on the way."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import serialization

from lpgan_jax.privacy.accounting import Privacy
from lpgan_jax.privacy.mechanism import noise_keys
from lpgan_jax.programs.batches import Stream, random_stream
from lpgan_jax.programs.program import Program

Draw = Callable[[int], Any]
"""An owner's batches: the turn, counted from 0, to a batch."""

Row = Mapping[str, float | None]
"""What a table of metrics says of a step, by column; None where it is not opened."""


def initial_state(program: Program, seed: int) -> Any:
    """DS's initial state, under a run's seed."""
    return program.init(random_stream(seed, Stream.INIT))


def scalars(told: Any) -> Row:
    """What SP is told of a step, as columns: each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(told)
    if any(np.ndim(value) for _, value in leaves):
        raise ValueError("row: expected what SP is told to be scalars, or a function of it")
    return {
        jax.tree_util.keystr(p, simple=True, separator=".") or "told": float(v) for p, v in leaves
    }


def msgpack(tree: Any) -> bytes:
    """A pytree as Flax's msgpack, floats in float32."""

    def leaf(value: Any) -> np.ndarray:
        array = np.asarray(value)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    data: bytes = serialization.to_bytes(jax.tree.map(leaf, tree))
    return data


def npy(answer: Any) -> bytes:
    """An array as a .npy file; several as .npz, by their paths."""
    buffer = io.BytesIO()
    if isinstance(answer, np.ndarray):
        np.save(buffer, answer)
    else:
        leaves = jax.tree_util.tree_leaves_with_path(answer)
        named = {jax.tree_util.keystr(p, simple=True, separator="."): v for p, v in leaves}
        np.savez(buffer, **named)
    return buffer.getvalue()


@dataclass(frozen=True, eq=False)
class Sample:
    """What SP is shown while training: the answer to a question of DS's, the same each time.

    Attributes:
        answer: the name of one of the program's answers.
        question: a random generator to the question, of the shapes that the answer says.
        every: steps from one to the next; the first is before all steps.
        opened: whether it is; if not, SP may still ask for it when training is over.
        file: the answer as the bytes of a file.
        suffix: of its name.
    """

    answer: str
    question: Callable[[np.random.Generator], Any]
    every: int
    opened: bool = True
    file: Callable[[Any], bytes] = npy
    suffix: str = ".npy"

    def __post_init__(self) -> None:
        if not callable(self.question):
            raise TypeError(
                "sample.question: expected a function of a NumPy generator, got "
                f"{type(self.question).__name__}"
            )


@dataclass(frozen=True, eq=False)
class Training:
    """What all roles must know to train a program.

    Attributes:
        program: what is trained.
        feed: (seed, where the data is or None) to an owner's batches. Only owners call it, so only
            they need the data.
        steps: how many.
        log_every: steps from one row of metrics to the next.
        checkpoint_every: steps from one save of shares to the next.
        keep_checkpoints: the newest so many are kept.
        guard_every: steps from one look at whether values are in range to the next (`mpc.guard`);
            there is one before each save too. 0: none, though steps hand out what it would take.
        row: what SP is told of a step, to the columns of a row.
        sample: what is asked on the way.
        save: what was learnt, as the bytes of a file.
        examples: what the rows of a batch are, in a table's head.
        privacy: what the program's noise promises of each example; None without noise.
    """

    program: Program
    feed: Callable[[int, str | None], Draw]
    steps: int
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    guard_every: int = 25
    row: Callable[[Any], Row] = scalars
    sample: Sample | None = None
    save: Callable[[Any], bytes] = msgpack
    examples: str = "examples"
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        self._check_privacy()
        counts = {
            name: getattr(self, name)
            for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints")
        }
        if self.sample is not None:
            if self.sample.answer not in self.program.answers:
                raise ValueError(
                    f"sample.answer: {self.sample.answer!r} is none of the program's, expected one "
                    f"of {', '.join(map(repr, self.program.answers)) or 'none'}"
                )
            counts["sample.every"] = self.sample.every
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if self.guard_every < 0:
            raise ValueError(f"guard_every: expected at least 0, got {self.guard_every}")

    def _check_privacy(self) -> None:
        noise, promised = self.program.noise, self.privacy
        if (noise is None) != (promised is None):
            raise ValueError(
                "privacy: expected with a program that has noise, and only with such a one"
            )
        if noise is None or promised is None:
            return
        given = promised.mechanism.noise_multiplier, promised.updates
        if given != (noise.multiplier, noise.sums):
            raise ValueError(
                f"privacy: of {given[1]} sums with a noise multiplier of {given[0]:g}, expected "
                f"{noise.sums} and {noise.multiplier:g}, as the program's noise"
            )

    def noised(self, draw: Draw, seed: int | None) -> Draw:
        """All that steps take: an owner's batches, and where there is noise, that of all parties.

        Args:
            draw: an owner's batches.
            seed: for reproducible simulations only: without it, noise is from the operating system.
        """
        noise = self.program.noise
        if noise is None:
            return draw
        keys, bits = noise_keys(noise, seed), self.program.frac_bits

        def inputs(step: int) -> Any:
            total = sum(noise.draw(key, step, bits) for key in keys)
            return draw(step), total * 2.0**-bits

        return inputs

    def spent(self, steps: int) -> Row:
        """The column of epsilon, after so many steps were begun; nothing without privacy."""
        return {} if self.privacy is None else {"epsilon": self.privacy.epsilon(steps)}

    def promised(self, steps: int) -> dict[str, Any]:
        """What was promised of each example after so many steps, for a summary."""
        if self.privacy is None or self.program.noise is None:
            return {}
        return {
            **self.privacy.stated(steps),
            "noise": self.program.noise.source,
            "clip": self.program.noise.clip,
            "noised_updates": self.privacy.updates * steps,
        }

    def logs_after(self, step: int) -> bool:
        """Whether the step (counted from 1) has a row of metrics."""
        return step % self.log_every == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Whether there is a checkpoint of the step, counted from 1."""
        return step % self.checkpoint_every == 0 or step == self.steps

    def guards_after(self, step: int) -> bool:
        """Whether the guard looks at the step, counted from 1; at each that is saved."""
        every = self.guard_every
        return every > 0 and (step % every == 0 or self.saves_after(step))

    def samples_after(self, step: int) -> bool:
        """Whether the sample is asked after the step, counted from 1; 0 is before all."""
        return self.sample is not None and (step % self.sample.every == 0 or step == self.steps)

    def sample_question(self, seed: int) -> Any:
        """The question of every sample of a run."""
        assert self.sample is not None
        return self.sample.question(random_stream(seed, Stream.SAMPLES))

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """What `row` has."""
        state = self.program.init(np.random.default_rng(0))
        _, told = jax.eval_shape(self.program.run, state, self.program.inputs)
        row = self.row(jax.tree.map(lambda leaf: np.zeros(leaf.shape), told))
        return (*row, *self.spent(0))

    @property
    def batch_size(self) -> int:
        """Examples in a step's batch: the length of its first array, or the rows of all sums."""
        if self.privacy is not None:
            return self.privacy.updates * self.privacy.mechanism.batch_size
        return int(jax.tree.leaves(self.program.batch)[0].shape[0])
