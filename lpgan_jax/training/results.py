"""What is asked of a simulated run, and what SP gets of it: answers, images, parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lpgan_jax.common.files import atomic_write
from lpgan_jax.gan import GENERATE, LPGAN, State
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.share_trees import reveal_tree
from lpgan_jax.programs import Training, secured, shapes
from lpgan_jax.programs.batches import Stream, random_stream
from lpgan_jax.programs.simulation import Simulation, restore_state
from lpgan_jax.training import checkpoint
from lpgan_jax.training.building import asked, build_gan, columns_of, training_of
from lpgan_jax.training.images import save_png
from lpgan_jax.training.loop import learnt_of
from lpgan_jax.training.parameters import load_parameters
from lpgan_jax.training.run_directory import RunDirectory

_AT_ONCE = 500  # rows in one call


def ask(
    run: str | os.PathLike[str], name: str | None, question: Any, *, seed: int | None = None
) -> Any:
    """What a simulated run answers: on its shares, opened by whoever asks.

    Args:
        run: a run directory.
        name: of one of its program's answers; None of the only one.
        question: arrays of the shapes that this answer says, of any number of rows.
        seed: fixes the dealer, which comes from the operating system without it.

    Returns:
        The answer, float64.

    Raises:
        ValueError, FileNotFoundError: bad input.
    """
    training, state = _open_run(run)
    name, _ = training.program.answer_named(name)
    simulation = Simulation(secured(training.program), state, DealerKeys(make_key(seed)))
    count = shapes.rows_of(question)
    parts = [
        simulation.answer(name, jax.tree.map(lambda x: x[i : i + _AT_ONCE], question))  # noqa: B023
        for i in range(0, count, _AT_ONCE)
    ]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def _open_run(path: str | os.PathLike[str]) -> tuple[Training, Any]:
    """A run's training and the shares of its last checkpoint."""
    run = RunDirectory.open(path)
    training = training_of(run.config())
    if run.parameters_file.exists() and not run.checkpoints.exists():
        raise ValueError(
            f"{path}: a run without shares, expected one of secure training (where the servers are "
            "elsewhere, `lpgan ask` asks them)"
        )
    _, tree = checkpoint.load(run.path)
    return training, restore_state(secured(training.program), tree)


def networks(run: str | os.PathLike[str]) -> tuple[LPGAN, dict[str, Any]]:
    """A GAN, and what a run learnt, in the clear: put together from its shares if it has some.

    Returns:
        (the GAN, {network: variables} of both networks).

    Raises:
        ValueError, FileNotFoundError: bad input, or a network is not there.
    """
    directory = RunDirectory.open(run)
    gan = build_gan(directory.gan_config())
    if directory.checkpoints.exists():
        _, state = _open_run(run)
        assert isinstance(state, State)
        return gan, {name: own for name, own in reveal_tree(state.learnt()).items()}
    return gan, load_parameters(directory.parameters_file, gan.init(np.random.default_rng(0)))


def generate(
    run: str | os.PathLike[str], num: int, *, seed: int | None = None, label: int | None = None
) -> np.ndarray:
    """Generate images with a run's shares: SG-FP on shared noise, opened by SP.

    Of a run that was in the clear, they are generated in the clear.

    Args:
        run: a run directory.
        num: how many images.
        seed: fixes the noise and the dealer; both come from the operating system without it.
        label: a class that all are of; None: of classes as many of each, one after the other.

    Returns:
        float64 [num, H, W, C], about -1 to 1.

    Raises:
        ValueError, FileNotFoundError: bad input.
    """
    if num < 1:
        raise ValueError(f"num: expected at least 1, got {num}")
    settings = RunDirectory.open(run).gan_config()
    rng = np.random.default_rng() if seed is None else random_stream(seed, Stream.GENERATION)
    question = asked(settings, rng, num, label)
    if RunDirectory.open(run).checkpoints.exists():
        images: np.ndarray = ask(run, GENERATE, question, seed=seed)
        return images
    gan, learnt = networks(run)
    generated = jax.jit(gan.generate)
    parts = [
        generated(learnt["generator"], jax.tree.map(lambda x: x[i : i + _AT_ONCE], question))  # noqa: B023
        for i in range(0, num, _AT_ONCE)
    ]
    return np.concatenate(parts).astype(np.float64)


def sample(
    run: str | os.PathLike[str],
    num: int,
    out: str | os.PathLike[str],
    *,
    seed: int | None = None,
    label: int | None = None,
) -> None:
    """`generate` images, and write them as a PNG grid.

    Args:
        run: a run directory.
        num: how many images.
        out: the PNG file.
        seed: as for `generate`.
        label: likewise.

    Raises:
        ValueError, FileNotFoundError: bad input; nothing is written.
    """
    images = generate(run, num, seed=seed, label=label)
    columns = None if label is not None else columns_of(RunDirectory.open(run).gan_config(), num)
    save_png(Path(out), images, columns, private=False)


def export(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """SP's reconstruction of what a run learnt, as a Flax msgpack file.

    Of a GAN it holds {"g": variables, "d": variables} in float32, for `gan.networks` or any Flax
    code; of a program, what it says that SP gets.

    Raises:
        ValueError, FileNotFoundError: bad input; nothing is written.
    """
    training, state = _open_run(run)
    learnt = reveal_tree(learnt_of(secured(training.program), state))
    atomic_write(out, training.save(learnt), private=False)
