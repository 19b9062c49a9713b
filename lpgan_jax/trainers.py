"""The ways to train one GAN: under sharing, in shadow mode, and as its plaintext twin.

All start from the same float arrays and take the same batches, so that what they do can be
compared step by step.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax import checkpoint, shadow
from lpgan_jax.config import TrainConfig
from lpgan_jax.data import Stream, random_stream
from lpgan_jax.gan import LPGAN, NETWORKS, Batch, Losses, State
from lpgan_jax.models.twin import from_flax
from lpgan_jax.nn.layer import Params
from lpgan_jax.parameters import save_parameters
from lpgan_jax.plaintext import PlaintextLosses, PlaintextLPGAN, PlaintextState, optax_optimizer
from lpgan_jax.run_directory import RunDirectory
from lpgan_jax.secret import Secret
from lpgan_jax.simulation import Simulation, StepKeys, compiler_options, reveal_tree, whole_tree

Mode = Literal["secure", "shadow", "plaintext"]
"""`secure`: on shares; `shadow`: on integers, rounded alike; `plaintext`: the twin, in floats."""

MeanLosses = tuple[float, float]  # (discriminator's, generator's), means over the batch


class Trainer(Protocol):
    """A training run in progress."""

    def step(self, step: int, batch: Batch) -> MeanLosses | None:
        """Do a step, counted from 0; its losses, if they may be opened."""

    def generate(self, noise: np.ndarray) -> np.ndarray:
        """Images [n, H, W, C] from noise [n, noise_size], with running statistics."""

    def networks(self) -> tuple[Params, Params]:
        """(params, running statistics) as float arrays in the secure networks' layout."""

    def save(self, run: RunDirectory, step: int, keep: int) -> None:
        """Write what is needed to go on, or to export."""


def mean_losses(losses: Losses | PlaintextLosses | None, size: int) -> MeanLosses | None:
    """Of float sums over a batch of a size, as SP reconstructs them."""
    if losses is None:
        return None
    sums: Any = losses
    return float(sums.real + sums.fake) / size, float(sums.generator) / size


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

    def networks(self) -> tuple[Params, Params]:
        """See `Trainer`: SP's reconstruction."""
        return reveal_tree(self._simulation.state.learnt())

    def save(self, run: RunDirectory, step: int, keep: int) -> None:
        """A checkpoint of shares."""
        checkpoint.save(run.path, step, self._simulation.shares(), keep)


class ShadowTrainer:
    """The secure program on plaintext integers."""

    def __init__(
        self,
        gan: LPGAN,
        initial: State,
        key: jax.Array,
        rounding: shadow.Rounding = "stochastic",
    ) -> None:
        """`initial`: float arrays; `key`: decides the rounding; `rounding`: see `shadow`."""
        f = gan.model.frac_bits
        self._gan = gan
        self._keys = StepKeys(key)
        self._state = shadow.whole_words(initial, gan.scales(initial))

        def step(
            key: jax.Array, state: State, batch: Batch, public: Any
        ) -> tuple[State, Losses | None]:
            encoded = shadow.whole_words(batch, f)
            return shadow.run(gan.train_step, key, (state, encoded), public, rounding)

        def generate(key: jax.Array, state: State, noise: jax.Array) -> Secret:
            return shadow.run(
                gan.generate, key, (state, shadow.whole_words(noise, f)), None, rounding
            )

        options = compiler_options(gan.model.features)
        self._step = jax.jit(step, donate_argnums=1, compiler_options=options)
        self._generate = jax.jit(generate, compiler_options=options)

    def step(self, step: int, batch: Batch) -> MeanLosses | None:
        """See `Trainer`."""
        public = self._gan.schedule(step)
        self._state, losses = self._step(self._keys.take(), self._state, batch, public)
        return mean_losses(None if losses is None else whole_tree(losses), len(batch.images))

    def generate(self, noise: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        return whole_tree(self._generate(self._keys.take(), self._state, noise))

    def networks(self) -> tuple[Params, Params]:
        """See `Trainer`."""
        return whole_tree(self._state.learnt())

    def state(self) -> State:
        """Everything that training changes, as float64 arrays."""
        state: State = whole_tree(self._state)
        return state

    def save(self, run: RunDirectory, step: int, keep: int) -> None:
        """The parameters, as `export` writes them."""
        save_parameters(run.parameters_file, *self.networks())


class PlaintextTrainer:
    """The twin: Flax and optax."""

    def __init__(
        self,
        gan: PlaintextLPGAN,
        initial: State,
        perturbation: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`initial`: float arrays of the secure networks.

        `perturbation`: after each step every parameter moves at random, evenly up to this.
        """
        self._gan, self._perturbation, self._seed = gan, perturbation, seed
        self._state = gan.init(initial.params, initial.stats)

    def step(self, step: int, batch: Batch) -> MeanLosses | None:
        """See `Trainer`."""
        self._state, losses = self._gan.train_step(
            self._state, batch.images, batch.noise_d, batch.noise_g
        )
        if self._perturbation:
            self._state = self._perturbed(self._state, step)
        return mean_losses(losses, len(batch.images))

    def _perturbed(self, state: PlaintextState, step: int) -> PlaintextState:
        rng = random_stream(self._seed, Stream.PERTURBATION, step)

        def moved(leaf: jax.Array) -> jax.Array:
            by = rng.uniform(-self._perturbation, self._perturbation, leaf.shape)
            return leaf + jnp.asarray(by, leaf.dtype)

        variables = {
            name: {**of, "params": jax.tree.map(moved, of["params"])}
            for name, of in state.variables.items()
        }
        return state._replace(variables=variables)

    def generate(self, noise: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        return np.asarray(self._gan.generate(self._state, noise))

    def networks(self) -> tuple[Params, Params]:
        """See `Trainer`."""
        pairs = {
            name: from_flax(self._gan.model, name, self._state.variables[name]) for name in NETWORKS
        }
        return {n: pair[0] for n, pair in pairs.items()}, {n: pair[1] for n, pair in pairs.items()}

    def save(self, run: RunDirectory, step: int, keep: int) -> None:
        """The parameters, as `export` writes them."""
        save_parameters(run.parameters_file, *self.networks())


def plaintext_twin(
    settings: TrainConfig, gan: LPGAN, dtype: jax.typing.DTypeLike = jnp.float32
) -> PlaintextLPGAN:
    """The twin of a configuration's secure GAN."""
    return PlaintextLPGAN(
        gan.model,
        optax_optimizer(settings.generator_optimizer),
        optax_optimizer(settings.discriminator_optimizer),
        dtype,
    )
