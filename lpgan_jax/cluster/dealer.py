"""DS: it shares images, noise and initial parameters, and deals every step's randomness ahead.

It takes its keys in the same order as the simulation does, so that a run with the same seed gives
the same words. Each attempt has a master key of its own, which is written nowhere: without a seed
it comes from the operating system, and with one (for experiments) from the seed and the attempt's
number, which no attempt of the session has after it. So a seed is for one session.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.parcels import Payloads, halves, with_material
from lpgan_jax.cluster.reporting import reading_input
from lpgan_jax.cluster.settings import DEALER, ClusterConfig
from lpgan_jax.gan import Batch
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.fixed_point import FixedPoint
from lpgan_jax.mpc.party import deal, server_seeds
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.share_trees import same_scale, share_tree
from lpgan_jax.programs.simulation import share_state
from lpgan_jax.training.building import build
from lpgan_jax.training.config import TrainConfig
from lpgan_jax.training.programs import sampling_program, training_program
from lpgan_jax.training.source import DataSource
from lpgan_jax.training.tasks import Task


def master_key(seed: int | None, attempt: int) -> jax.Array:
    """DS's key of an attempt, counted from 1; with a seed, the first one is the simulation's."""
    if seed is None:
        return make_key()
    return make_key(seed) if attempt == 1 else jax.random.fold_in(make_key(seed), attempt)


class Dealer:
    """DS's keys and programs in one attempt: payloads for both servers, task by task."""

    def __init__(
        self, settings: TrainConfig, source: DataSource, cluster: ClusterConfig, key: jax.Array
    ) -> None:
        """`key`: the attempt's master key."""
        self._source, self._cluster = source, cluster
        self._gan = build(settings)
        self._fxp = FixedPoint(settings.frac_bits)
        self._keys = DealerKeys(key)
        options = options_to_run_often()
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
        self._share = jax.jit(lambda key, values: share_tree(key, values, same_scale(values, f)))

    def payloads(self, task: Task, *, noise: np.ndarray | None) -> Payloads:
        """What S1 and what S2 get; `noise`: of a sample, unless SP shared some."""
        if task.kind == "state":
            initial = self._source.initial_state(self._gan.program)
            return halves(share_state(self._gan, self._keys, initial))
        if task.kind == "train":
            return self._for_training(task.step)
        if task.kind == "generate":
            return self._for_images(noise)
        return [[], []]

    def _for_training(self, step: int) -> Payloads:
        keys = self._keys.take_two()
        inputs: Payloads = [[], []]
        if self._cluster.owner_of(step) == DEALER:
            turn = self._cluster.turn_of(DEALER, step)
            batch = checked_batch(self._source, self._fxp, turn)
            inputs = halves(self._share(keys[0], batch))
        return with_material(inputs, *self._train(keys[1], self._gan.schedule(step)))

    def _for_images(self, noise: np.ndarray | None) -> Payloads:
        keys = self._keys.take_two()
        inputs: Payloads = [[], []]
        if noise is not None:
            self._fxp.check(noise)
            inputs = halves(self._share(keys[0], noise))
        return with_material(inputs, *self._generate(keys[1], None))


def checked_batch(source: DataSource, fxp: FixedPoint, turn: int) -> Batch:
    """The batch of an owner's turn. BadInput if a value is out of range."""
    batch = source.batch(turn)
    with reading_input():
        for values in jax.tree.leaves(batch):
            fxp.check(values)
    return batch
