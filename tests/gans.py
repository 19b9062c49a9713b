"""Small GANs, and batches for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from helpers import same_scale

import lpgan_jax as lp
from lpgan_jax.gan import (
    LOSSES,
    LPGAN,
    NETWORKS,
    Batch,
    Discriminator,
    Generator,
    PrivateUpdates,
    Updates,
    gan_program,
)
from lpgan_jax.gan.losses import LossName
from lpgan_jax.mpc.share_trees import share_tree
from lpgan_jax.programs import SecureProgram
from lpgan_jax.training.building import optimizer
from lpgan_jax.training.config import OptimizerConfig

SGD = optimizer(OptimizerConfig(name="sgd", learning_rate=0.1), 1)


def adam(rate: float = 1e-2, **fields: float) -> optax.GradientTransformation:
    """As a configuration has it."""
    return optimizer(OptimizerConfig(name="adam", learning_rate=rate, **fields), 1)


def small_lpgan(
    optimizers: Mapping[str, Any] | optax.GradientTransformation = SGD,
    *,
    noise_size: int = 4,
    channels: int = 1,
    base_size: int = 2,
    loss: LossName = "logistic",
    opens_losses: bool = True,
    updates: Updates = "alternating",
    of_sd: Mapping[str, Any] | None = None,
    num_classes: int = 0,
    private: PrivateUpdates | None = None,
    average: float = 0.0,
    **networks: Any,
) -> LPGAN:
    """A DCGAN; by default of 8x8 images, and one that compiles fast.

    `networks`: fields of both, `of_sd`: of SD alone.
    """
    networks = {"features": 2, "depth": 2, "init_std": 0.1} | networks
    if not isinstance(optimizers, Mapping):
        optimizers = dict.fromkeys(NETWORKS, optimizers)
    size = base_size * 2 ** networks["depth"]
    return LPGAN(
        Generator(channels=channels, base_size=base_size, **networks),
        Discriminator(**networks, **(of_sd or {})),
        optimizers,
        LOSSES[loss],
        noise_size,
        (size, size, channels),
        opens_losses,
        updates=updates,
        num_classes=num_classes,
        private=private,
        average=average,
    )


def small_gan(
    optimizers: Mapping[str, Any] | optax.GradientTransformation = SGD,
    *,
    batch_size: int = 2,
    frac_bits: int = 18,
    **fields: Any,
) -> SecureProgram:
    """`small_lpgan` as a program."""
    return SecureProgram(gan_program(small_lpgan(optimizers, **fields), batch_size, frac_bits))


def random_batch(gan: SecureProgram, rng: np.random.Generator) -> Batch:
    """Images from -1 to 1 and normal noise, on the grid of the batch's scale."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.rint(values * 2.0**gan.frac_bits) * 2.0**-gan.frac_bits

    shapes = gan.batch
    return Batch(
        rounded(rng.uniform(-1, 1, shapes.images.shape)),
        rounded(rng.normal(size=shapes.noise_d.shape)),
        None if shapes.noise_g is None else rounded(rng.normal(size=shapes.noise_g.shape)),
        None if shapes.mix is None else rounded(rng.uniform(size=shapes.mix.shape)),
    )


def shared_batch(gan: SecureProgram, batch: Batch, seed: int = 2) -> Batch:
    """As shares."""
    shared: Batch = share_tree(lp.key(seed), batch, same_scale(batch, gan.frac_bits))
    return shared


def flat(tree: Any) -> np.ndarray:
    """All values of a tree, one after the other."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
