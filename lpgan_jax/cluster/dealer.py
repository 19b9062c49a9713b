"""DS: it shares images, noise and initial parameters, and deals every step's randomness ahead.

It takes its keys in the same order as the simulation does, so that a run with the same seed gives
the same words. Each attempt has a master key of its own, which is written nowhere: without a seed
it comes from the operating system, and with one (for experiments) from the seed and the attempt's
number, which no attempt of the session has after it. So a seed is for one session.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.reporting import reading_input
from lpgan_jax.cluster.settings import DEALER, SERVERS, ClusterConfig
from lpgan_jax.cluster.wire import ParcelKind, buffers
from lpgan_jax.config import TrainConfig
from lpgan_jax.fixed_point import FixedPoint
from lpgan_jax.fixed_point import encode as to_words
from lpgan_jax.gan import Batch
from lpgan_jax.party import deal, server_seeds
from lpgan_jax.prng import key as make_key
from lpgan_jax.programs import sampling_program, training_program
from lpgan_jax.shares import share_words
from lpgan_jax.simulation import StepKeys, compiler_options, share_batch, share_state
from lpgan_jax.training import DataSource, build


def master_key(seed: int | None, attempt: int) -> jax.Array:
    """DS's key of an attempt, counted from 1; with a seed, the first one is the simulation's."""
    if seed is None:
        return make_key()
    return make_key(seed) if attempt == 1 else jax.random.fold_in(make_key(seed), attempt)


@dataclass(frozen=True)
class Planned:
    """A task that DS has in mind.

    Attributes:
        kind: as of a parcel.
        step: steps done before it.
    """

    kind: ParcelKind
    step: int


def schedule(settings: TrainConfig, done: int) -> Iterator[Planned]:
    """The tasks of an attempt in the order of `training.train`, after so many steps."""
    if done == 0:
        yield Planned("state", 0)
        if settings.open_samples:
            yield Planned("generate", 0)
    for step in range(done, settings.steps):
        yield Planned("train", step)
        number = step + 1
        if settings.open_samples and settings.samples_after(number):
            yield Planned("generate", number)
        if settings.saves_after(number):
            yield Planned("checkpoint", number)
    yield Planned("finish", settings.steps)


class Dealer:
    """DS's keys and programs in one attempt: payloads for both servers, task by task."""

    def __init__(
        self, settings: TrainConfig, source: DataSource, cluster: ClusterConfig, key: jax.Array
    ) -> None:
        """`key`: the attempt's master key."""
        self._source, self._cluster = source, cluster
        self._gan = build(settings)
        self._fxp = FixedPoint(settings.frac_bits)
        self._state_key, steps = jax.random.split(key, 2)
        self._keys = StepKeys(steps)
        options = compiler_options(settings.model.features)
        f = settings.frac_bits

        def dealt(program: Any) -> Any:
            function, secrets, public = program

            def run(key: jax.Array, public: Any) -> Any:
                seeds = jax.random.key_data(server_seeds(key))
                return seeds, deal(function, key, secrets, public)

            lowered = jax.jit(run, compiler_options=options).lower(make_key(0), public)
            return lowered.compile()

        self._train = dealt(training_program(settings))
        self._generate = dealt(sampling_program(settings))
        self._share_batch = jax.jit(lambda key, batch: share_batch(key, batch, f))
        self._share_noise = jax.jit(lambda key, noise: share_words(key, to_words(noise, f)))

    def payloads(self, task: Planned, *, noise: np.ndarray | None) -> list[list[np.ndarray]]:
        """What S1 and what S2 get; `noise`: of a sample, unless SP shared some."""
        if task.kind == "state":
            initial = self._source.initial_state(self._gan)
            return halves(share_state(self._gan, self._state_key, initial))
        if task.kind == "train":
            return self._for_training(task.step)
        if task.kind == "generate":
            return self._for_images(noise)
        return [[], []]

    def _for_training(self, step: int) -> list[list[np.ndarray]]:
        keys = self._keys.take_two()
        inputs: list[list[np.ndarray]] = [[], []]
        if self._cluster.owner_of(step) == DEALER:
            turn = self._cluster.turn_of(DEALER, step)
            batch = checked_batch(self._source, self._fxp, turn)
            inputs = halves(self._share_batch(keys[0], batch))
        return _with(inputs, *self._train(keys[1], self._gan.schedule(step)))

    def _for_images(self, noise: np.ndarray | None) -> list[list[np.ndarray]]:
        keys = self._keys.take_two()
        inputs: list[list[np.ndarray]] = [[], []]
        if noise is not None:
            self._fxp.check(noise)
            inputs = halves(self._share_noise(keys[0], noise))
        return _with(inputs, *self._generate(keys[1], None))


def checked_batch(source: DataSource, fxp: FixedPoint, turn: int) -> Batch:
    """The batch of an owner's turn. BadInput if a value is out of range."""
    batch = source.batch(turn)
    with reading_input():
        for values in jax.tree.leaves(batch):
            fxp.check(values)
    return batch


def halves(paired: Any) -> list[list[np.ndarray]]:
    """S1's and S2's shares as bytes."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(paired)]
    return [buffers([array[place] for array in arrays]) for place in range(len(SERVERS))]


def _with(
    inputs: list[list[np.ndarray]], seeds: jax.Array, corrections: list[jax.Array]
) -> list[list[np.ndarray]]:
    """Inputs, then each server's own seed, then for S2 the corrections."""
    words = np.asarray(seeds)
    for_s1 = [*inputs[0], *buffers([words[0]])]
    return [for_s1, [*inputs[1], *buffers([words[1], *map(np.asarray, corrections)])]]
