"""Training runs: a configuration in, a run directory out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lpgan_jax.analysis.headroom import headroom, worst
from lpgan_jax.common.files import atomic_write
from lpgan_jax.common.progress import Progress
from lpgan_jax.gan import GENERATE, State, mean_losses
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.programs import SecureProgram
from lpgan_jax.programs.simulation import Simulation, restore_state
from lpgan_jax.training import checkpoint, config, data
from lpgan_jax.training.building import build
from lpgan_jax.training.config import TrainConfig
from lpgan_jax.training.images import save_png
from lpgan_jax.training.parameters import load_parameters, save_parameters
from lpgan_jax.training.run_directory import Metrics, RunDirectory, Servers
from lpgan_jax.training.source import DataSource
from lpgan_jax.training.tasks import tasks
from lpgan_jax.training.trainers import (
    Mode,
    PlaintextTrainer,
    SecureTrainer,
    ShadowTrainer,
    Trainer,
)


@dataclass(frozen=True)
class Result:
    """What `train` returns.

    Attributes:
        path: the run directory.
        steps: steps done in all.
        seconds_per_step: median over this call's steps, without the first; of a run that was
            finished before, what its summary says.
        losses: (discriminator, generator) at the last step; None where losses are not opened.
    """

    path: Path
    steps: int
    seconds_per_step: float
    losses: tuple[float, float] | None


def train(
    settings: TrainConfig | str,
    out: str | os.PathLike[str],
    *,
    seed: int | None = None,
    resume: bool = False,
    mode: Mode = "secure",
    init: str | os.PathLike[str] | None = None,
    images: np.ndarray | None = None,
    generator: nn.Module | None = None,
    discriminator: nn.Module | None = None,
    report: Callable[[str], None] = print,
) -> Result:
    """Train LP-GAN's DCGAN, or your own networks, on secret-shared images; servers are simulated.

    Nothing is opened on the way but masked values; losses and sample grids are what SP opens, and
    `open_losses` and `open_samples` turn each off.

    Args:
        settings: a configuration, or the name or path of one.
        out: the run directory; new or empty, unless resuming.
        seed: for reproducible simulations only: fixes initial parameters, order, noise *and the
            dealer*, so that two runs are bit-identical. Without it the configuration's seed fixes
            all but the dealer, whose keys come from the operating system.
        resume: go on from the last checkpoint in `out`, with new dealer keys. If all steps are
            done already, it says so, and nothing is written.
        mode: "secure"; or without sharing "shadow", the same program on integers that round as
            the protocols do, and "plaintext", the same step as the plain JAX that it is.
        init: parameters to start from: a file as `export` writes.
        images: the training images as an array instead of the configured data set: [N, H, W] or
            [N, H, W, C], floats in [-1, 1] or uint8.
        generator: a Flax module instead of the configured one, noise [N, noise_size] to images
            [N, H, W, C] in [-1, 1]. If it has an argument `train`, it is told whether it is.
        discriminator: the same, images to logits [N, 1].
        report: receives lines of text.

    Returns:
        A summary; everything else is in the directory.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: bad input; nothing is written over.
    """
    if isinstance(settings, str):
        settings = config.load(settings)
    if resume and (mode != "secure" or init is not None):
        raise ValueError(
            "resume: goes on with a secure run as it is; drop --plaintext, --shadow and --init"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    if seed is not None:  # a resumed run finds it in the directory
        settings = settings.model_copy(update={"seed": seed})
    loaded = data.load_images(settings.data) if images is None else data.from_arrays(images)
    source = DataSource(settings, settings.seed, loaded)
    gan = build(settings, generator, discriminator)
    initial = source.initial_state(gan.program)
    if init is not None:
        initial = _starting_from(load_parameters(init, initial), initial)

    if resume:
        run = RunDirectory.resume(out)
        done, tree = checkpoint.load(run.path)
        state = restore_state(gan, tree)
        _require_same(run, settings, loaded)
        if line := run.finished(settings.steps):
            report(line)
            return _past_result(run)
        atomic_write(run.config_file, config.dump(settings).encode())
        report(f"resuming {run.path} after step {done}, with new dealer keys")
        master = make_key()
    else:
        servers: Servers = "simulated" if mode == "secure" else "none"
        run, done = RunDirectory.create(out, settings, servers=servers), 0
        if mode == "secure":  # only such a run can be resumed
            atomic_write(run.images_file, _images_line(loaded))
        master = make_key(seed)
        if seed is not None and mode == "secure":
            report("--seed fixes the dealer too: for reproducible simulations, not for secrets")
    trainer: Trainer
    if mode == "plaintext":
        trainer = PlaintextTrainer(gan.program, initial)
    elif mode == "shadow":
        report("shadow: the secure program on plaintext integers, which hides nothing")
        report(headroom_line(gan, initial, source))
        trainer = ShadowTrainer(gan, initial, master)
    else:
        report(
            "simulated: this process plays DS, both servers and SP, and the run directory holds "
            "both servers' shares"
        )
        report(headroom_line(gan, initial, source))
        if resume:
            simulation = Simulation(gan, state, DealerKeys(master))
        else:
            simulation = Simulation.begin(gan, initial, master)
        trainer = SecureTrainer(simulation)
    return _loop(settings, run, trainer, source, done, mode, report)


def _starting_from(learnt: Any, initial: State) -> State:
    """An initial state with other parameters and statistics."""
    return replace(
        initial,
        params={name: variables["params"] for name, variables in learnt.items()},
        stats={name: variables["batch_stats"] for name, variables in learnt.items()},
    )


_KNOWN_BY = 1000  # images at most, spread over the data: as many as take no time


def _images_line(images: np.ndarray) -> bytes:
    """By which images are known again: how many, and some of them."""
    some = images[:: -(-len(images) // _KNOWN_BY)]
    return f"{len(images)} {data.fingerprint(some)}\n".encode()


def _require_same(run: RunDirectory, settings: TrainConfig, images: np.ndarray) -> None:
    """Check that a run goes on with what its shares were made with.

    Raises:
        ValueError: it would not; names the field.
    """
    before = run.config()
    reasons = {
        "frac_bits": "the shares of a run have its own scales",
        "model": "the shares of a run are of its own network",
    }
    for name, reason in reasons.items():
        given, wanted = getattr(settings, name), getattr(before, name)
        if given != wanted:
            raise ValueError(f"{name}: {given!r} given, expected {wanted!r} as before: {reason}")
    if run.images_file.exists() and run.images_file.read_bytes() != _images_line(images):
        raise ValueError(
            f"data: other images than those that {run.path} began with (as an array, hand them "
            "over again)"
        )


def headroom_line(gan: SecureProgram, initial: State, source: DataSource) -> str:
    """What DS is told of how much room the first step has, or a warning."""
    place, bits = worst(headroom(gan, initial, [source.batch(0)]))
    line = f"headroom: {bits:.1f} bits at {place} (first step, in the clear at DS)"
    if bits < 1:
        line = f"WARNING: values are about to overflow, lower frac_bits: {line}"
    return line


def _loop(
    settings: TrainConfig,
    run: RunDirectory,
    trainer: Trainer,
    source: DataSource,
    done: int,
    mode: Mode,
    report: Callable[[str], None],
) -> Result:
    noise = source.sample_noise()
    metrics = Metrics(run.metrics_file, done)
    started, durations, losses = time.time(), [], None
    with Progress(done, settings.steps, opened_by_sp=mode == "secure") as progress:
        progress.note("compiling, and sampling before the first step")
        for task in tasks(settings, done, samples=mode != "secure" or settings.open_samples):
            if task.kind == "generate":
                save_png(run.sample_file(task.step), trainer.answer(GENERATE, noise))
            elif task.kind == "checkpoint":
                _save(trainer, run, task.step, settings.keep_checkpoints)
            elif task.kind == "train":
                if task.step == done:
                    progress.note("compiling the step")
                before, number = time.time(), task.step + 1
                told = trainer.step(task.step, source.batch(task.step))
                losses = mean_losses(told, settings.batch_size)
                seconds = time.time() - before
                durations.append(seconds)
                if settings.logs_after(number) or task.step == done:
                    loss_d, loss_g = losses or (None, None)
                    metrics.append(number, loss_d, loss_g, seconds, settings.batch_size / seconds)
                progress.step(number, seconds, losses)
    per_step = float(np.median(durations[1:] or durations or [0.0]))
    result = Result(run.path, settings.steps, per_step, losses)
    summary = {
        "mode": "simulated servers" if mode == "secure" else mode,
        "steps": result.steps,
        "seconds": round(time.time() - started, 3),
        "first_step_seconds": round(durations[0], 3) if durations else None,
        "seconds_per_step": round(per_step, 4) if durations else None,
        "loss_discriminator": losses[0] if losses else None,
        "loss_generator": losses[1] if losses else None,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    atomic_write(run.summary_file, (json.dumps(summary, indent=2) + "\n").encode())
    report(f"{result.steps} steps, {per_step:.3g} s a step; everything is in {run.path}")
    return result


def _save(trainer: Trainer, run: RunDirectory, step: int, keep: int) -> None:
    """What is needed to go on, or of a run without shares to export."""
    if isinstance(trainer, SecureTrainer):
        checkpoint.save(run.path, step, trainer.simulation.shares(), keep)
    else:
        save_parameters(run.parameters_file, trainer.state().learnt())


def _past_result(run: RunDirectory) -> Result:
    """The result of a run that is finished, from its summary."""
    summary = run.summary()
    losses = summary["loss_discriminator"], summary["loss_generator"]
    opened = None if None in losses else losses
    return Result(run.path, summary["steps"], summary["seconds_per_step"] or 0.0, opened)
