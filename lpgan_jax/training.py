"""Training runs: a configuration in, a run directory out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lpgan_jax import checkpoint, config, data, optim
from lpgan_jax.config import OptimizerConfig, TrainConfig
from lpgan_jax.data import Stream, random_stream
from lpgan_jax.features import classifier_judge
from lpgan_jax.files import atomic_write
from lpgan_jax.gan import LPGAN, Batch, State
from lpgan_jax.headroom import headroom, worst
from lpgan_jax.images import save_png
from lpgan_jax.inception import inception_features, load_inception
from lpgan_jax.models.dcgan import DCGAN
from lpgan_jax.parameters import load_parameters, save_parameters
from lpgan_jax.prng import key as make_key
from lpgan_jax.progress import Progress
from lpgan_jax.quality import Judge, Quality, chosen
from lpgan_jax.run_directory import Metrics, RunDirectory, Servers
from lpgan_jax.simulation import Simulation, restore_state, reveal_tree, share_state
from lpgan_jax.trainers import (
    Mode,
    PlaintextTrainer,
    SecureTrainer,
    ShadowTrainer,
    Trainer,
    plaintext_twin,
)

_AT_ONCE = 500  # images generated in one call


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


def build(settings: TrainConfig) -> LPGAN:
    """The secure GAN of a configuration: the same object for runs of the same program."""
    model = DCGAN(
        channels=settings.data.channels,
        noise_size=settings.model.noise_size,
        features=settings.model.features,
        base_size=settings.model.base_size,
        depth=settings.depth,
        kernel_size=settings.model.kernel_size,
        leaky_slope=settings.model.leaky_slope,
        norm_eps=settings.model.norm_eps,
        norm_momentum=settings.model.norm_momentum,
        init_std=settings.model.init_std,
        frac_bits=settings.frac_bits,
    )
    optimizers = settings.generator_optimizer, settings.discriminator_optimizer
    return _build(model, *optimizers, settings.batch_size, settings.open_losses)


@lru_cache(8)
def _build(
    model: DCGAN,
    generator: OptimizerConfig,
    discriminator: OptimizerConfig,
    batch_size: int,
    losses: bool,
) -> LPGAN:
    def optimizer(of: OptimizerConfig) -> optim.SecureOptimizer:
        common = (of.learning_rate, batch_size, model.frac_bits)
        return (
            optim.sgd(*common, of.momentum)
            if of.name == "sgd"
            else optim.adam(*common, of.b1, of.b2, of.eps_root)
        )

    optimizers = {"generator": optimizer(generator), "discriminator": optimizer(discriminator)}
    return LPGAN(model, optimizers, losses)


class DataSource:
    """DS's images and noise: everything that a run's seed decides, step by step."""

    def __init__(self, settings: TrainConfig, seed: int, images: np.ndarray) -> None:
        """`images`: float32 [N, H, W, C] in [-1, 1]."""
        expected = (settings.data.image_size, settings.data.image_size, settings.data.channels)
        if images.shape[1:] != expected:
            raise ValueError(
                f"images: expected [N, {', '.join(map(str, expected))}], got {images.shape}"
            )
        self._settings, self._seed, self._images = settings, seed, images
        self._order = data.Batches(len(images), settings.batch_size, seed)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; the same after a resumption."""
        rng = random_stream(self._seed, Stream.NOISE, step)
        shape = (self._settings.batch_size, self._settings.model.noise_size)
        return Batch(
            self._images[self._order.indices(step)], rng.normal(size=shape), rng.normal(size=shape)
        )

    def initial_state(self, gan: LPGAN) -> State:
        """The initial parameters and statistics."""
        return gan.init(random_stream(self._seed, Stream.INIT))

    def sample_noise(self) -> np.ndarray:
        """The noise of every sample grid."""
        rng = random_stream(self._seed, Stream.SAMPLES)
        return rng.normal(size=(self._settings.num_samples, self._settings.model.noise_size))


def train(
    settings: TrainConfig | str,
    out: str | os.PathLike[str],
    *,
    seed: int | None = None,
    resume: bool = False,
    mode: Mode = "secure",
    init: str | os.PathLike[str] | None = None,
    images: np.ndarray | None = None,
    report: Callable[[str], None] = print,
) -> Result:
    """Train LP-GAN's DCGAN on secret-shared images, both servers simulated.

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
            the protocols do, and "plaintext", the twin: the same network in Flax and optax.
        init: parameters to start from: a file as `export` writes.
        images: the training images as an array instead of the configured data set: [N, H, W] or
            [N, H, W, C], floats in [-1, 1] or uint8.
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
    gan = build(settings)
    initial = source.initial_state(gan)
    if init is not None:
        initial = State(*load_parameters(init, gan.model), initial.optimizer)

    if resume:
        run = RunDirectory.resume(out)
        done, tree = checkpoint.load(run.path)
        state = restore_state(gan, initial, tree)
        _require_same(run, settings, loaded, initial.optimizer)
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
        trainer = PlaintextTrainer(plaintext_twin(settings, gan), initial)
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
        keys = jax.random.split(master, 2)
        if not resume:
            state = share_state(gan, keys[0], initial)
        trainer = SecureTrainer(Simulation(gan, state, keys[1]))
    return _loop(settings, run, trainer, source, done, mode, report)


_KNOWN_BY = 1000  # images at most, spread over the data: as many as take no time


def _images_line(images: np.ndarray) -> bytes:
    """By which images are known again: how many, and some of them."""
    some = images[:: -(-len(images) // _KNOWN_BY)]
    return f"{len(images)} {data.fingerprint(some)}\n".encode()


def _require_same(
    run: RunDirectory, settings: TrainConfig, images: np.ndarray, optimizer: Any
) -> None:
    """Check that a run goes on with what its shares were made with.

    `optimizer`: the optimizers' states.

    Raises:
        ValueError: it would not; names the field.
    """
    before = run.config()
    reasons = {
        "frac_bits": "the shares of a run have its own scales",
        "model": "the shares of a run are of its own network",
    }
    if jax.tree.leaves(optimizer):
        reasons["batch_size"] = "the optimizers' states are sums over the batch"
    for name, reason in reasons.items():
        given, wanted = getattr(settings, name), getattr(before, name)
        if given != wanted:
            raise ValueError(f"{name}: {given!r} given, expected {wanted!r} as before: {reason}")
    if run.images_file.exists() and run.images_file.read_bytes() != _images_line(images):
        raise ValueError(
            f"data: other images than those that {run.path} began with (as an array, hand them "
            "over again)"
        )


def headroom_line(gan: LPGAN, initial: State, source: DataSource) -> str:
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
    show_samples = mode != "secure" or settings.open_samples

    def sample(step: int) -> None:
        if show_samples:
            save_png(run.sample_file(step), trainer.generate(noise))

    started, durations, losses = time.time(), [], None
    with Progress(done, settings.steps, opened_by_sp=mode == "secure") as progress:
        if done == 0:
            progress.note("compiling, and sampling before the first step")
            sample(0)
        progress.note("compiling the step")
        for step in range(done, settings.steps):
            before = time.time()
            losses = trainer.step(step, source.batch(step))
            seconds = time.time() - before
            durations.append(seconds)
            number = step + 1
            if settings.logs_after(number) or step == done:
                loss_d, loss_g = losses or (None, None)
                metrics.append(number, loss_d, loss_g, seconds, settings.batch_size / seconds)
            progress.step(number, seconds, losses)
            if settings.samples_after(number):
                sample(number)
            if settings.saves_after(number):
                trainer.save(run, number, settings.keep_checkpoints)
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


def _past_result(run: RunDirectory) -> Result:
    """The result of a run that is finished, from its summary."""
    summary = run.summary()
    losses = summary["loss_discriminator"], summary["loss_generator"]
    opened = None if None in losses else losses
    return Result(run.path, summary["steps"], summary["seconds_per_step"] or 0.0, opened)


# What SP gets -----------------------------------------------------------------------------------


def _open_run(path: str | os.PathLike[str]) -> tuple[TrainConfig, LPGAN, State]:
    """A run's configuration and the shares of its last checkpoint."""
    run = RunDirectory.open(path)
    settings = run.config()
    gan = build(settings)
    if run.parameters_file.exists() and not run.checkpoints.exists():
        raise ValueError(
            f"{path}: a run without shares, expected one of secure training (where the servers are "
            "elsewhere, `lpgan sp --sample` has images generated)"
        )
    _, tree = checkpoint.load(run.path)
    return settings, gan, restore_state(gan, gan.init(np.random.default_rng(0)), tree)


def generate(run: str | os.PathLike[str], num: int, *, seed: int | None = None) -> np.ndarray:
    """Generate images with a run's shares: SG-FP on shared noise, opened by SP.

    Args:
        run: a run directory.
        num: how many images.
        seed: fixes the noise and the dealer; both come from the operating system without it.

    Returns:
        float64 [num, H, W, C], about -1 to 1.

    Raises:
        ValueError, FileNotFoundError: bad input.
    """
    if num < 1:
        raise ValueError(f"num: expected at least 1, got {num}")
    settings, gan, state = _open_run(run)
    rng = np.random.default_rng() if seed is None else random_stream(seed, Stream.GENERATION)
    noise = rng.normal(size=(num, settings.model.noise_size))
    simulation = Simulation(gan, state, make_key(seed))
    parts = [noise[start : start + _AT_ONCE] for start in range(0, num, _AT_ONCE)]
    return np.concatenate([simulation.generate(part) for part in parts])


def sample(
    run: str | os.PathLike[str], num: int, out: str | os.PathLike[str], *, seed: int | None = None
) -> None:
    """`generate` images, and write them as a PNG grid.

    Args:
        run: a run directory.
        num: how many images.
        out: the PNG file.
        seed: as for `generate`.

    Raises:
        ValueError, FileNotFoundError: bad input; nothing is written.
    """
    save_png(Path(out), generate(run, num, seed=seed), private=False)


def quality(
    run: str | os.PathLike[str],
    num: int,
    *,
    seed: int | None = None,
    inception: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Quality:
    """How good are a run's images? They are generated from its shares and opened by SP.

    Args:
        run: a run directory; its configuration says where the real images are.
        num: how many images are generated, and how many real ones they are compared with.
        seed: as for `generate`.
        inception: a file of Inception's weights (`inception.load_inception`), whose features then
            take the place of those of a small classifier trained on the real images.
        report: receives lines of text.

    Raises:
        ValueError, FileNotFoundError: bad input.
    """
    of = RunDirectory.open(run).config().data
    images = data.load_images(of)
    if num > len(images):
        report(f"there are {len(images)} real images: as many are generated, not {num}")
        num = len(images)
    if inception is None:
        judge = classifier_judge(of, images, num, report)
    else:
        weights = load_inception(inception)
        judge = Judge(images[chosen(len(images), num)], partial(inception_features, weights))
    return judge(np.clip(generate(run, num, seed=seed), -1, 1))


def export(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """SP's reconstruction of a run's parameters, as a Flax msgpack file.

    The file holds {"g": variables, "d": variables} in float32, for `models.twin` or any Flax code.

    Raises:
        ValueError, FileNotFoundError: bad input; nothing is written.
    """
    _, _, state = _open_run(run)
    save_parameters(out, *reveal_tree(state.learnt()), private=False)
