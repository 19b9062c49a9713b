"""From a configuration to the GAN that it names."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import flax.linen as nn
import optax

from lpgan_jax.gan import (
    LOSSES,
    LPGAN,
    NETWORKS,
    Discriminator,
    Generator,
    LossName,
    gan_program,
)
from lpgan_jax.programs import SecureProgram
from lpgan_jax.training.config import ConfigError, OptimizerConfig, TrainConfig


def build(
    settings: TrainConfig,
    generator: nn.Module | None = None,
    discriminator: nn.Module | None = None,
) -> SecureProgram:
    """LP-GAN of a configuration: the same object for runs of the same program.

    Args:
        settings: the configuration.
        generator: instead of the configured one.
        discriminator: likewise.

    Raises:
        ConfigError: `model.module` cannot be imported, or gives no networks.
        ValueError: a network gives another shape than it should.
    """
    gan = build_gan(settings, generator, discriminator)
    return _secured(gan, settings.batch_size, settings.frac_bits, settings.results)


def build_gan(
    settings: TrainConfig,
    generator: nn.Module | None = None,
    discriminator: nn.Module | None = None,
) -> LPGAN:
    """The GAN itself; as `build`."""
    if generator is None or discriminator is None:
        networks = _networks(settings)
        generator, discriminator = generator or networks[0], discriminator or networks[1]
    return _gan(
        generator,
        discriminator,
        (settings.generator_optimizer, settings.discriminator_optimizer),
        settings.model.loss,
        settings.model.penalty,
        settings.model.noise_size,
        (settings.data.image_size, settings.data.image_size, settings.data.channels),
        settings.open_losses,
    )


@lru_cache(8)
def _secured(
    gan: LPGAN, batch_size: int, frac_bits: int, results: tuple[str, ...]
) -> SecureProgram:
    return SecureProgram(gan_program(gan, batch_size, frac_bits, results))


def _networks(settings: TrainConfig) -> tuple[nn.Module, nn.Module]:
    model = settings.model
    if model.module is not None:
        return imported(model.module)
    common: dict[str, Any] = {
        "features": model.features,
        "depth": settings.depth,
        "kernel_size": model.kernel_size,
        "init_std": model.init_std,
        "norm_eps": model.norm_eps,
        "norm_momentum": model.norm_momentum,
    }
    return (
        Generator(channels=settings.data.channels, base_size=model.base_size, **common),
        Discriminator(leaky_slope=model.leaky_slope, norm=model.norm, **common),
    )


def imported(name: str) -> tuple[nn.Module, nn.Module]:
    """(SG, SD) of what a name such as "my_nets:Networks" stands for, called if it can be.

    Raises:
        ConfigError: there is no such thing, or it has no Flax modules of these names.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.module: {name!r} given, expected a module that Python finds (PYTHONPATH) and "
            f"what it has, as in my_nets:Networks: {error}"
        ) from None
    networks = found() if callable(found) else found
    pair = getattr(networks, "generator", None), getattr(networks, "discriminator", None)
    for which, network in zip(NETWORKS, pair, strict=True):
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"model.module: {name}: expected a Flax module as its {which}, got "
                f"{type(network).__name__}"
            )
    return pair  # type: ignore[return-value]


@lru_cache(8)
def _gan(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizers: tuple[OptimizerConfig, OptimizerConfig],
    loss: LossName,
    penalty: float,
    noise_size: int,
    image_shape: tuple[int, int, int],
    open_losses: bool,
) -> LPGAN:
    both = dict(zip(NETWORKS, map(optimizer, optimizers), strict=True))
    return LPGAN(
        generator,
        discriminator,
        both,
        LOSSES[loss],
        noise_size,
        image_shape,
        open_losses,
        penalty,
    )


def optimizer(of: OptimizerConfig) -> optax.GradientTransformation:
    """The optax optimizer that a configuration names, of all parameters as one vector."""
    if of.name == "sgd":
        return optax.flatten(optax.sgd(of.learning_rate, of.momentum or None))
    # An epsilon outside of the root would be below an LSB.
    return optax.flatten(optax.adam(of.learning_rate, of.b1, of.b2, eps=0.0, eps_root=of.eps_root))
