"""Training runs: a configuration in, a run directory out."""

from __future__ import annotations

import json
import os
import secrets
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
from lpgan_jax.gan import State
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.programs import Draw, Row, SecureProgram, Training, initial_state, secured
from lpgan_jax.programs.simulation import Simulation, restore_state
from lpgan_jax.training import checkpoint, config, data
from lpgan_jax.training.building import batches_of, build_gan, gan_training, training_of
from lpgan_jax.training.config import Settings, TrainConfig
from lpgan_jax.training.ledger import Ledger
from lpgan_jax.training.parameters import load_parameters
from lpgan_jax.training.private import resolved
from lpgan_jax.training.run_directory import Metrics, RunDirectory, Servers
from lpgan_jax.training.tasks import require_in_range, tasks
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
        last: what SP was told of the last step, by column, as loss_d and loss_g; None where it is
            not opened.
    """

    path: Path
    steps: int
    seconds_per_step: float
    last: Row


def train(
    settings: Settings | str,
    out: str | os.PathLike[str],
    *,
    seed: int | None = None,
    resume: bool = False,
    mode: Mode = "secure",
    init: str | os.PathLike[str] | None = None,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    generator: nn.Module | None = None,
    discriminator: nn.Module | None = None,
    report: Callable[[str], None] = print,
) -> Result:
    """Train LP-GAN's DCGAN, your own networks, or a program of your own; servers are simulated.

    Nothing is opened on the way but masked values; what SP opens are losses and sample grids, which
    `open_losses` and `open_samples` turn off, or what the program says.

    Args:
        settings: a configuration, or the name or path of one; or the path of a program, as
            my_model.py.
        out: the run directory; new or empty, unless resuming.
        seed: for reproducible simulations only: fixes initial parameters, order, noise *and the
            dealer*, so that two runs are bit-identical. Without it the configuration's seed fixes
            all but the dealer, whose keys come from the operating system; with differential
            privacy its noise and the choice of images come from there as well.
        resume: go on from the last checkpoint in `out`, with new dealer keys. If all steps are
            done already, it says so, and nothing is written.
        mode: "secure"; or without sharing "shadow", the same program on integers that round as
            the protocols do, and "plaintext", the same step as the plain JAX that it is.
        init: parameters of a GAN to start from: a file as `export` writes.
        images: the training images as an array instead of the configured data set: [N, H, W] or
            [N, H, W, C], floats in [-1, 1] or uint8.
        labels: their classes, integers [N], if the configuration has `data.labels`.
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
        is_program = settings.endswith(".py")
        settings = config.program_config(settings) if is_program else config.load(settings)
    if resume and (mode != "secure" or init is not None):
        raise ValueError(
            "resume: goes on with a secure run as it is; drop --plaintext, --shadow and --init"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    if init is not None and getattr(settings, "privacy", None) is not None:
        raise ValueError(
            "init: parameters that somebody learnt, expected none with privacy: nobody accounts "
            "for what they tell of these images"
        )
    if seed is not None:  # a resumed run finds it in the directory
        settings = settings.model_copy(update={"seed": seed})
    if isinstance(settings, TrainConfig):
        loaded = None if images is None else data.from_arrays(images)
        settings = resolved(settings, None if loaded is None else len(loaded))
        gan = build_gan(settings, generator, discriminator)
        training = gan_training(settings, gan, loaded, labels)
    elif not all(given is None for given in (init, images, labels, generator, discriminator)):
        raise ValueError(
            "init, images, labels, generator, discriminator: of a GAN, not of a program"
        )
    else:
        training = training_of(settings)
    by_seed = training.noised(batches_of(settings, training, settings.seed), settings.seed)
    initial = initial_state(training.program, settings.seed)
    if init is not None:
        initial = _starting_from(load_parameters(init, initial), initial)

    program, first = secured(training.program), by_seed(0)
    # Or a clear error, before anything is written.
    program.check_batch(program.batch_of(first))
    if training.sample is not None:
        try:
            program.check_rows(training.sample.answer, training.sample_question(settings.seed))
        except ValueError as error:
            raise ValueError(f"sample.{error}") from error
    _, digest = training.columns, _digest(first)
    draw = by_seed
    if training.privacy is not None and seed is None:  # nobody may know who is in which batch
        secret = secrets.randbits(128)
        draw = training.noised(batches_of(settings, training, secret), None)
    if resume:
        run = RunDirectory.resume(out)
        done, tree = checkpoint.load(run.path)
        state = restore_state(program, tree)
        _require_same(run, settings, digest)
        if line := run.finished(training.steps):
            report(line)
            return _past_result(run, training)
        atomic_write(run.config_file, config.dump(settings).encode())
        report(f"resuming {run.path} after step {done}, with new dealer keys")
        master = make_key()
    else:
        servers: Servers = "simulated" if mode == "secure" else "none"
        run, done = RunDirectory.create(out, settings, servers=servers), 0
        # Only such a run can be resumed; with privacy on, a digest would tell of images.
        if mode == "secure" and training.privacy is None:
            atomic_write(run.data_file, digest)
        master = make_key(seed)
        if seed is not None and mode == "secure":
            report("--seed fixes the dealer too: for reproducible simulations, not for secrets")
    trainer: Trainer
    if mode == "plaintext":
        trainer = PlaintextTrainer(training.program, initial)
    elif mode == "shadow":
        report("shadow: the secure program on plaintext integers, which hides nothing")
        if training.privacy is None:  # else it would tell of images what no noise hides
            report(headroom_line(program, initial, first))
        trainer = ShadowTrainer(program, initial, master)
    else:
        report(
            "simulated: this process plays DS, both servers and SP, and the run directory holds "
            "both servers' shares"
        )
        if training.privacy is None:
            report(headroom_line(program, initial, first))
        if resume:
            simulation = Simulation(program, state, DealerKeys(master))
        else:
            simulation = Simulation.begin(program, initial, master)
        trainer = SecureTrainer(simulation)
    seeded = seed is not None
    return _loop(training, settings.seed, run, trainer, draw, done, mode, report, seeded)


def _starting_from(learnt: Any, initial: State) -> State:
    """An initial state with other parameters and statistics."""
    params = {name: variables["params"] for name, variables in learnt.items()}
    return replace(
        initial,
        params=params,
        average={name: params[name] for name in initial.average},
        stats={name: variables["batch_stats"] for name, variables in learnt.items()},
    )


def _digest(batch: Any) -> bytes:
    """By which data are known again: their first batch."""
    return f"{data.fingerprint(*map(np.asarray, jax.tree.leaves(batch)))}\n".encode()


def _require_same(run: RunDirectory, settings: Settings, digest: bytes) -> None:
    """Check that a run goes on with what its shares were made with.

    Raises:
        ValueError: it would not; names the field.
    """
    before = run.config()
    reasons = {
        "privacy": "what was spent is accounted for with this noise and sampling rate",
        "program": "the run is of another",
        "options": "the shares of a run are of its own program",
        "frac_bits": "the shares of a run have its own scales",
        "model": "the shares of a run are of its own network",
    }
    for name, reason in reasons.items():
        given, wanted = getattr(settings, name, None), getattr(before, name, None)
        if given != wanted:
            raise ValueError(f"{name}: {given!r} given, expected {wanted!r} as before: {reason}")
    if getattr(settings, "privacy", None) is not None:
        _require_batch_size(settings, before)
    same_order = settings.seed == before.seed and getattr(settings, "batch_size", 0) == getattr(
        before, "batch_size", 0
    )
    if same_order and run.data_file.exists() and run.data_file.read_bytes() != digest:
        raise ValueError(
            f"data: other examples than those that {run.path} began with (images that were given "
            "as an array, hand over again)"
        )


def _require_batch_size(settings: Any, before: Any) -> None:
    given, wanted = settings.batch_size, before.batch_size
    if given != wanted:
        raise ValueError(
            f"batch_size: {given} given, expected {wanted} as before: what was spent is accounted "
            "for with it"
        )


def headroom_line(program: SecureProgram, initial: Any, batch: Any) -> str:
    """What DS is told of how much room the first step has, or a warning."""
    place, bits = worst(headroom(program, initial, [batch]))
    line = f"headroom: {bits:.1f} bits at {place} (first step, in the clear at DS)"
    if bits < 1:
        line = f"WARNING: values are about to overflow, lower frac_bits: {line}"
    return line


_NOTHING: Row = {}


def _loop(
    training: Training,
    seed: int,
    run: RunDirectory,
    trainer: Trainer,
    draw: Draw,
    done: int,
    mode: Mode,
    report: Callable[[str], None],
    seeded: bool,
) -> Result:
    metrics = Metrics(run.metrics_file, done, training)
    started, durations, row = time.time(), [], dict.fromkeys(training.columns)
    sample = training.sample
    sampled = sample is not None and (mode != "secure" or sample.opened)
    question = training.sample_question(seed) if sampled else None
    ledger, spent = Ledger(run.ledger_file), _NOTHING
    if training.privacy is not None:
        ledger.require(done)
    with Progress(done, training.steps, opened_by_sp=mode == "secure") as progress:
        progress.note("compiling" + ", and sampling before the first step" * sampled)
        for task in tasks(training, done, sampled):
            if task.kind == "guard":
                require_in_range(trainer.guard(), task.step)
            elif task.kind == "answer":
                assert sample is not None
                file = sample.file(trainer.answer(sample.answer, question))
                atomic_write(run.sample_file(task.step, sample.suffix), file)
            elif task.kind == "checkpoint":
                _save(training, trainer, run, task.step)
            elif task.kind == "train":
                if task.step == done:
                    progress.note("compiling the step")
                before, number = time.time(), task.step + 1
                if training.privacy is not None:
                    ledger.begin()
                told = trainer.step(task.step, draw(task.step))
                if mode == "shadow" and training.guard_every:  # there it takes no messages
                    require_in_range(trainer.guard(), number)
                seconds = time.time() - before
                durations.append(seconds)
                logs = training.logs_after(number) or task.step == done
                spent = training.spent(ledger.steps) if logs else spent
                row = {**training.row(told), **spent}
                if logs:
                    metrics.append(number, row, seconds)
                progress.step(number, seconds, row)
    per_step = float(np.median(durations[1:] or durations or [0.0]))
    result = Result(run.path, training.steps, per_step, row)
    summary = {
        **row,
        **training.promised(ledger.steps),
        **({"noise_of_seed": seed} if training.privacy is not None and seeded else {}),
        "mode": "simulated servers" if mode == "secure" else mode,
        "steps": result.steps,
        "seconds": round(time.time() - started, 3),
        "first_step_seconds": round(durations[0], 3) if durations else None,
        "seconds_per_step": round(per_step, 4) if durations else None,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    atomic_write(run.summary_file, (json.dumps(summary, indent=2) + "\n").encode())
    report(f"{result.steps} steps, {per_step:.3g} s a step; everything is in {run.path}")
    return result


def _save(training: Training, trainer: Trainer, run: RunDirectory, step: int) -> None:
    """What is needed to go on, or of a run without shares to export."""
    if isinstance(trainer, SecureTrainer):
        checkpoint.save(run.path, step, trainer.simulation.shares(), training.keep_checkpoints)
    else:
        learnt = learnt_of(secured(training.program), trainer.state())
        atomic_write(run.parameters_file, training.save(learnt))


def learnt_of(program: SecureProgram, state: Any) -> Any:
    """What may be exported where one machine has all: of a GAN both networks, to start from."""
    return state.learnt() if isinstance(state, State) else program.learnt(program.secret(state))


def _past_result(run: RunDirectory, training: Training) -> Result:
    """The result of a run that is finished, from its summary."""
    summary = run.summary()
    last = {column: summary.get(column) for column in training.columns}
    return Result(run.path, summary["steps"], summary["seconds_per_step"] or 0.0, last)
