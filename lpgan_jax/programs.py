"""The programs of a configuration, as shapes: what a run would execute, to be traced and not run.

A program is (function, secrets, public), as `party.simulate` takes them, where the secrets are
`jax.ShapeDtypeStruct`s. `cost_model.program_cost` and `audit.audit` take its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lpgan_jax.config import TrainConfig
from lpgan_jax.gan import LPGAN, Batch, State
from lpgan_jax.party import Party
from lpgan_jax.secret import Secret
from lpgan_jax.training import build
from lpgan_jax.transform.shared import shapes_of

Program = tuple[Callable[[Party, Any, Any], Any], Any, Any]


def training_program(settings: TrainConfig) -> Program:
    """What the servers run in a training step."""
    gan = build(settings)
    noise = np.empty((settings.batch_size, settings.model.noise_size))
    images = np.empty((settings.batch_size, *gan.model.image_shape))
    batch = Batch(*(shared(values, settings.frac_bits) for values in (images, noise, noise)))
    return gan.train_step, (shared_state(gan), batch), gan.schedule(0)


def sampling_program(settings: TrainConfig, num: int | None = None) -> Program:
    """What the servers run to generate `num` images (default: as many as a sample of a run)."""
    gan = build(settings)
    noise = np.empty((num or settings.num_samples, settings.model.noise_size))
    return gan.generate, (shared_state(gan), shared(noise, settings.frac_bits)), None


def shared_state(gan: LPGAN) -> State:
    """The shapes of a training state."""
    state = gan.init(np.random.default_rng(0))
    return jax.tree.map(shared, state, gan.scales(state))


def shared(values: np.ndarray, frac_bits: int) -> Secret:
    """The shapes of a shared array."""
    return shapes_of(np.shape(values), frac_bits)
