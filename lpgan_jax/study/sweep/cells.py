"""A cell of a sweep: one training run of one kind, and what is measured of it."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.tables import Row
from lpgan_jax.gan import GENERATE, State, mean_losses
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.programs import SecureProgram, initial_state
from lpgan_jax.programs.batches import Stream, random_stream
from lpgan_jax.programs.simulation import Simulation
from lpgan_jax.study.features import accuracy_of, classifier_judge
from lpgan_jax.study.quality import Judge
from lpgan_jax.study.sweep.errors import gradient_errors, layer_errors, protocol_errors
from lpgan_jax.study.sweep.plan import Cell, settings_of
from lpgan_jax.training import data
from lpgan_jax.training.building import asked, build, build_gan, training_of
from lpgan_jax.training.config import DataConfig, SweepConfig, TrainConfig
from lpgan_jax.training.images import save_png
from lpgan_jax.training.source import DataSource
from lpgan_jax.training.trainers import (
    PlaintextTrainer,
    SecureTrainer,
    ShadowTrainer,
    Trainer,
)

SAMPLES = 16  # images in a cell's picture


def run_cell(sweep: SweepConfig, cell: Cell, folder: Path, errors: bool) -> None:
    """Run a cell, and write a JSON file of its tables and a picture of its images.

    Args:
        sweep: the study.
        cell: one run of it.
        folder: where the files go.
        errors: measure the errors of protocols, layers and gradients too.
    """
    started = time.time()
    settings = settings_of(sweep, cell.variant)
    images = _images(settings.data)
    measure = cached_judge(settings.data, sweep.num_images)
    tables = _run(sweep, settings, cell, images, measure, folder, errors)
    tables["times"][0]["cell_seconds"] = time.time() - started
    atomic_write(folder / f"{cell.name}.json", json.dumps(tables).encode(), private=False)


@functools.cache
def _images(of: DataConfig) -> np.ndarray:
    return data.load_images(of)


@functools.cache
def cached_judge(of: DataConfig, num_images: int) -> Judge:
    """What measures a sweep's images; the first call may train a classifier."""
    return classifier_judge(of, _images(of), num_images)


def _run(
    sweep: SweepConfig,
    settings: TrainConfig,
    cell: Cell,
    images: np.ndarray,
    measure: Judge,
    folder: Path,
    errors: bool,
) -> dict[str, list[Row]]:
    variant = cell.variant
    identity: Row = asdict(variant) | {"seed": cell.seed}
    training_of_cell, gan = training_of(settings), build(settings)
    labels = data.load_labels(settings.data) if settings.data.labels else None
    draw = training_of_cell.noised(DataSource(settings, cell.seed, images, labels).batch, cell.seed)
    initial = initial_state(gan.program, cell.seed)
    trainer = _trainer(settings, gan, initial, cell)
    reference = PlaintextTrainer(gan.program, initial, dtype=np.float64)
    rng = random_stream(cell.seed, Stream.EVALUATION)
    question = asked(settings, rng, sweep.num_images)

    training: list[Row] = []
    losses: list[tuple[float, float]] = []
    seconds: list[float] = []
    for step in range(settings.steps):
        batch = draw(step)
        reference.step(step, batch)
        before = time.time()
        loss = mean_losses(trainer.step(step, batch), settings.batch_size)
        seconds.append(time.time() - before)
        losses += [loss] if loss is not None else []
        if (step + 1) % sweep.measure_every and step + 1 != settings.steps:
            continue
        # What diverged or left the ring's range is no image, but it is what this run generates.
        made = np.clip(np.nan_to_num(trainer.answer(GENERATE, question), nan=-1.0), -1, 1)
        quality = measure(made)
        if step + 1 == settings.steps:
            quality = replace(quality, accuracy=accuracy_of(settings, made))
        mean = np.mean(losses, axis=0).tolist() if losses else [None, None]
        distance, moved = _distance(trainer, reference, initial.params)
        training.append(
            identity
            | {"step": step + 1, "loss_d": mean[0], "loss_g": mean[1]}
            | asdict(quality)
            | {"distance": distance / moved, "distance_lsb": distance * 2.0**variant.frac_bits}
        )
        losses = []
    save_png(folder / f"{cell.name}.png", made[:SAMPLES], columns=4, private=False)

    tables: dict[str, list[Row]] = {"training": training}
    tables["times"] = [identity | {"seconds_per_step": float(np.median(seconds[1:] or seconds))}]
    if errors and settings.privacy is None:
        arguments = (
            build_gan(settings),
            reference.state(),
            draw(settings.steps),
            variant,
            cell.seed,
        )
        tables |= {
            "gradients": [identity | row for row in gradient_errors(*arguments)],
            "layers": [identity | row for row in layer_errors(*arguments)],
            "protocols": [identity | row for row in protocol_errors(variant, cell.seed)],
        }
    return tables


def _trainer(settings: TrainConfig, gan: SecureProgram, initial: State, cell: Cell) -> Trainer:
    variant = cell.variant
    master = make_key(cell.seed)  # `errors` folds numbers into it
    if variant.mode == "secure":
        return SecureTrainer(Simulation.begin(gan, initial, master))
    if variant.mode == "shadow":
        return ShadowTrainer(gan, initial, master, variant.rounding)
    by = variant.perturbation * 2.0**-variant.frac_bits
    moved = functools.partial(_moved, by, cell.seed) if by else None
    return PlaintextTrainer(gan.program, initial, after=moved)


def _moved(most: float, seed: int, state: State, step: int) -> State:
    """A state whose parameters have moved at random, evenly up to so much."""
    rng = random_stream(seed, Stream.PERTURBATION, step)

    def moved(leaf: jax.Array) -> jax.Array:
        return leaf + jnp.asarray(rng.uniform(-most, most, leaf.shape), leaf.dtype)

    return replace(state, params=jax.tree.map(moved, state.params))


def _distance(trainer: Trainer, reference: Trainer, initial: Any) -> tuple[float, float]:
    """Root mean square over all parameters: from the reference, and of its own way so far."""
    exact = _params(reference)

    def rms(difference: Callable[[Any, Any], Any], other: Any) -> float:
        parts = jax.tree.leaves(jax.tree.map(lambda a, b: np.ravel(difference(a, b)), exact, other))
        return float(np.sqrt(np.mean(np.concatenate(parts) ** 2)))

    return rms(np.subtract, _params(trainer)), rms(np.subtract, initial)


def _params(trainer: Trainer) -> Any:
    return trainer.state().params
