"""From a configuration to what is trained."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from lpgan_jax.gan import (
    GENERATE,
    LOSSES,
    LPGAN,
    NETWORKS,
    Discriminator,
    Generator,
    Losses,
    PrivateUpdates,
    gan_program,
    mean_losses,
)
from lpgan_jax.privacy.mechanism import Noise
from lpgan_jax.programs import Draw, Row, Sample, SecureProgram, Training, secured
from lpgan_jax.training import program_file
from lpgan_jax.training.config import (
    ConfigError,
    OptimizerConfig,
    ProgramConfig,
    Settings,
    TrainConfig,
)
from lpgan_jax.training.data import each_class, one_hot
from lpgan_jax.training.images import png
from lpgan_jax.training.parameters import parameters_file
from lpgan_jax.training.private import expected_batch, generated_batch, privacy_of, resolved
from lpgan_jax.training.source import DataSource


def training_of(settings: Settings) -> Training:
    """The training of a configuration. Its program is the same object for equal configurations.

    Raises:
        ConfigError: `model.module` cannot be imported, or the program's file; names what is wrong.
        ValueError: a network gives another shape than it should.
    """
    if isinstance(settings, TrainConfig):
        settings = resolved(settings)
        return gan_training(settings, build_gan(settings))
    training = program_file.load(settings.program, settings.options)
    every = settings.guard_every
    return replace(
        training,
        steps=training.steps if settings.steps is None else settings.steps,
        guard_every=training.guard_every if every is None else every,
    )


def batches_of(settings: Settings, training: Training, seed: int) -> Draw:
    """An owner's batches.

    Raises:
        FileNotFoundError, ValueError: the data is not there, or does not fit.
    """
    return training.feed(seed, settings.data if isinstance(settings, ProgramConfig) else None)


def build(settings: Settings) -> SecureProgram:
    """What the servers run of a configuration; as `training_of`."""
    return secured(training_of(settings).program)


def gan_training(
    settings: TrainConfig,
    gan: LPGAN,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Training:
    """LP-GAN's training.

    Args:
        settings: the configuration, `resolved` if there is privacy.
        gan: what is trained.
        images: float32 [N, H, W, C], instead of the configured ones.
        labels: int [N], of these.
    """

    def feed(seed: int, _: str | None) -> Draw:
        if images is None:
            return DataSource.load(settings, seed).batch
        return DataSource(settings, seed, images, labels).batch

    def row(told: Losses | None) -> Row:
        losses = mean_losses(told, settings.batch_size) or (None, None)
        return dict(zip(("loss_d", "loss_g"), losses, strict=True))

    def question(rng: np.random.Generator) -> Any:
        return asked(settings, rng, settings.num_samples)

    def grid(images: np.ndarray) -> bytes:
        return png(images, columns_of(settings, len(images)))

    return Training(
        program=_program(
            gan,
            settings.batch_size,
            settings.frac_bits,
            settings.results,
            settings.num_samples,
            _noise(settings, gan),
        ),
        feed=feed,
        steps=settings.steps,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
        keep_checkpoints=settings.keep_checkpoints,
        guard_every=settings.guard_every,
        row=row,
        sample=Sample(
            GENERATE, question, settings.sample_every, settings.open_samples, grid, ".png"
        ),
        save=parameters_file,
        examples="images",
        privacy=None if settings.privacy is None else privacy_of(settings),
    )


def asked(
    settings: TrainConfig, rng: np.random.Generator, num: int, label: int | None = None
) -> Any:
    """The question of so many images: noise, and where there are classes, these.

    Args:
        settings: the configuration.
        rng: of the noise.
        num: how many images.
        label: a class that all are of; None: as many of each, class after class.

    Raises:
        ValueError: there is no such class.
    """
    question: Any = rng.normal(size=(num, settings.model.noise_size))
    if settings.data.labels:
        classes = settings.data.classes
        question = {"noise": question, "labels": one_hot(each_class(num, classes), classes)}
    return question if label is None else of_class(question, label)


def of_class(question: Any, label: int) -> Any:
    """The same question, of images that are all of one class.

    Raises:
        ValueError: there is no such class.
    """
    if not isinstance(question, dict) or "labels" not in question:
        raise ValueError("label: the images have no classes (data.labels)")
    num, classes = question["labels"].shape
    if not 0 <= label < classes:
        raise ValueError(f"label: {label} given, expected 0 to {classes - 1}")
    return {**question, "labels": one_hot(np.full(num, label), classes)}


def columns_of(settings: TrainConfig, num: int) -> int | None:
    """Images in a row of a grid: a row for each class, if there are as many of each."""
    classes = settings.data.classes
    return num // classes if settings.data.labels and num % classes == 0 else None


def _noise(settings: TrainConfig, gan: LPGAN) -> Noise | None:
    of = settings.privacy
    if of is None:
        return None
    params = gan.init(np.random.default_rng(0)).params["discriminator"]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    multiplier = privacy_of(settings).mechanism.noise_multiplier
    return Noise(multiplier, of.clip, size, of.discriminator_steps, of.noise)


def build_gan(
    settings: TrainConfig,
    generator: nn.Module | None = None,
    discriminator: nn.Module | None = None,
) -> LPGAN:
    """The GAN itself; as `build`."""
    settings = resolved(settings)
    if generator is None or discriminator is None:
        networks = _networks(settings)
        generator, discriminator = generator or networks[0], discriminator or networks[1]
    return _gan(
        generator,
        discriminator,
        (
            optimizer(settings.generator_optimizer, settings.steps),
            optimizer(settings.discriminator_optimizer, settings.discriminator_updates),
        ),
        loss=LOSSES[settings.model.loss],
        noise_size=settings.model.noise_size,
        image_shape=(settings.data.image_size, settings.data.image_size, settings.data.channels),
        opens_losses=settings.open_losses,
        penalty=settings.model.penalty,
        updates=settings.updates,
        num_classes=settings.data.classes if settings.data.labels else 0,
        private=_private_updates(settings),
        average=settings.generator_average,
    )


def _private_updates(settings: TrainConfig) -> PrivateUpdates | None:
    of = settings.privacy
    if of is None:
        return None
    return PrivateUpdates(
        of.clip,
        of.discriminator_steps,
        expected_batch(settings),
        generated_batch(settings),
        of.diversity,
        of.distance,
        of.mismatched,
    )


_program = lru_cache(8)(gan_program)


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
        Discriminator(
            leaky_slope=model.leaky_slope,
            background=model.background,
            norm=model.norm,
            **common,
        ),
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
    optimizers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    **fields: Any,
) -> LPGAN:
    """A GAN, the same object for equal arguments; `fields`: its others."""
    both = dict(zip(NETWORKS, optimizers, strict=True))
    return LPGAN(generator, discriminator, both, **fields)


def optimizer(of: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """The optax optimizer that a configuration names, of all parameters as one vector.

    Args:
        of: what it names.
        updates: how many there are in all, where the rate falls.
    """
    return _optimizer(of, updates if of.final_rate < 1 else 0)


@lru_cache(32)  # a GAN is the same object for equal configurations
def _optimizer(of: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    rate: optax.ScalarOrSchedule = of.learning_rate
    if updates:
        rate = optax.linear_schedule(rate, rate * of.final_rate, updates)
    if of.name == "sgd":
        return optax.flatten(optax.sgd(rate, of.momentum or None))
    # An epsilon outside of the root would be below an LSB.
    return optax.flatten(optax.adam(rate, of.b1, of.b2, eps=0.0, eps_root=of.eps_root))
