"""The ways to train one GAN: under sharing, in shadow mode, and in the clear.

All start from the same float arrays and take the same batches, so that what they do can be
compared step by step.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.gan import LPGAN, Batch, Losses, SecureLPGAN, State
from lpgan_jax.mpc import emulated
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.share_trees import decoded, encoded, reveal_tree, same_scale
from lpgan_jax.training import checkpoint
from lpgan_jax.training.data import Stream, random_stream
from lpgan_jax.training.parameters import Learnt, save_parameters
from lpgan_jax.training.run_directory import RunDirectory
from lpgan_jax.training.simulation import Simulation

Mode = Literal["secure", "shadow", "plaintext"]
"""`secure`: on shares; `shadow`: on integers, rounded alike; `plaintext`: in floats."""

MeanLosses = tuple[float, float]  # (discriminator's, generator's), means over the batch


class Trainer(Protocol):
    """A training run in progress."""

    def step(self, step: int, batch: Batch) -> MeanLosses | None:
        """Do a step, counted from 0; its losses, if they may be opened."""

    def generate(self, noise: np.ndarray) -> np.ndarray:
        """Images [n, H, W, C] from noise [n, noise_size], with running statistics."""

    def learnt(self) -> Learnt:
        """{network: variables} as float arrays."""

    def save(self, run: RunDirectory, step: int, keep: int) -> None:
        """Write what is needed to go on, or to export."""


def mean_losses(losses: Losses | None, size: int) -> MeanLosses | None:
    """Of float sums over a batch of a size, as SP reconstructs them."""
    if losses is None:
        return None
    return float(losses.discriminator) / size, float(losses.generator) / size


class SecureTrainer:
    """DS, both servers and SP in one process."""

    def __init__(self, simulation: Simulation) -> None:
        """`simulation`: it is changed."""
        self._simulation = simulation

    def step(self, step: int, batch: Batch) -> MeanLosses | None:
        """See `Trainer`; SP opens the losses, which are for it."""
        losses = self._simulation.train_step(step, batch)
        return mean_losses(None if losses is None else reveal_tree(losses), len(batch.images))

    def generate(self, noise: np.ndarray) -> np.ndarray:
        """See `Trainer`; SP opens the images."""
        return self._simulation.generate(noise)

    def learnt(self) -> Learnt:
        """See `Trainer`: SP's reconstruction."""
        return reveal_tree(self._simulation.state.learnt())

    def save(self, run: RunDirectory, step: int, keep: int) -> None:
        """A checkpoint of shares."""
        checkpoint.save(run.path, step, self._simulation.shares(), keep)


class ShadowTrainer:
    """The secure program on plaintext integers."""

    def __init__(
        self,
        gan: SecureLPGAN,
        initial: State,
        master: jax.Array,
        rounding: emulated.Rounding = "stochastic",
    ) -> None:
        """`initial`: float arrays; `master`: decides the rounding; `rounding`: see `emulated`."""
        self._gan = gan
        self._keys = DealerKeys(master)
        self._state = encoded(gan.secret(initial), gan.scales)
        f = gan.frac_bits

        def step(
            key: jax.Array, state: State, batch: Batch, public: Any
        ) -> tuple[State, Losses | None]:
            values = state, encoded(batch, same_scale(batch, f))
            return emulated.run(gan.train_step, key, values, public, rounding)

        def generate(key: jax.Array, state: State, noise: jax.Array) -> Secret:
            return emulated.run(gan.generate, key, (state, encoded(noise, f)), None, rounding)

        options = options_to_run_often()
        self._step = jax.jit(step, donate_argnums=1, compiler_options=options)
        self._generate = jax.jit(generate, compiler_options=options)

    def step(self, step: int, batch: Batch) -> MeanLosses | None:
        """See `Trainer`."""
        public = self._gan.schedule(step)
        self._state, losses = self._step(self._keys.take(), self._state, batch, public)
        return mean_losses(None if losses is None else decoded(losses), len(batch.images))

    def generate(self, noise: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        return decoded(self._generate(self._keys.take(), self._state, noise))

    def learnt(self) -> Learnt:
        """See `Trainer`."""
        return decoded(self._state.learnt())

    def state(self) -> State:
        """Everything secret that training changes, as float64 arrays."""
        state: State = decoded(self._state)
        return state

    def save(self, run: RunDirectory, step: int, keep: int) -> None:
        """The parameters, as `export` writes them."""
        save_parameters(run.parameters_file, self.learnt())


@functools.lru_cache(8)
def _in_the_clear(gan: LPGAN) -> tuple[Any, Any]:
    """(step, generation), jitted: traced and compiled once for all runs of one GAN."""
    return jax.jit(gan.train_step), jax.jit(gan.generate)


class PlaintextTrainer:
    """The model itself: Flax and optax."""

    def __init__(
        self,
        gan: LPGAN,
        initial: State,
        perturbation: float = 0.0,
        seed: int = 0,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        """`initial`: a whole state; `dtype`: of everything, float32 or float64.

        `perturbation`: after each step every parameter moves at random, evenly up to this.
        """
        self._dtype, self._perturbation, self._seed = dtype, perturbation, seed
        self._state = self._floats(initial)
        self._step, self._generate = _in_the_clear(gan)

    def _floats(self, tree: Any) -> Any:
        def leaf(value: Any) -> jax.Array:
            array = jnp.asarray(value)
            return array.astype(self._dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

        return jax.tree.map(leaf, tree)

    def step(self, step: int, batch: Batch) -> MeanLosses | None:
        """See `Trainer`."""
        self._state, losses = self._step(self._state, self._floats(batch))
        if self._perturbation:
            self._state = self._perturbed(self._state, step)
        return mean_losses(losses, len(batch.images))

    def _perturbed(self, state: State, step: int) -> State:
        rng = random_stream(self._seed, Stream.PERTURBATION, step)

        def moved(leaf: jax.Array) -> jax.Array:
            by = rng.uniform(-self._perturbation, self._perturbation, leaf.shape)
            return leaf + jnp.asarray(by, leaf.dtype)

        return dataclasses.replace(state, params=jax.tree.map(moved, state.params))

    def generate(self, noise: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        variables = self._state.learnt()["generator"]
        return np.asarray(self._generate(variables, self._floats(noise)))

    def learnt(self) -> Learnt:
        """See `Trainer`."""
        return jax.tree.map(np.asarray, self._state.learnt())

    def state(self) -> State:
        """Everything that training changes."""
        state: State = jax.tree.map(np.asarray, self._state)
        return state

    def save(self, run: RunDirectory, step: int, keep: int) -> None:
        """The parameters, as `export` writes them."""
        save_parameters(run.parameters_file, self.learnt())
