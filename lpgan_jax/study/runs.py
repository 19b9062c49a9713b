"""How good are the images of a run? And do its networks tell who was trained on?"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from lpgan_jax.study.features import accuracy_of, classifier_judge
from lpgan_jax.study.inception import inception_features, load_inception
from lpgan_jax.study.membership import (
    Attack,
    advantage_bound,
    area_bound,
    attack,
    least_epsilon,
    nearness,
)
from lpgan_jax.study.quality import Judge, Quality, chosen
from lpgan_jax.training import data
from lpgan_jax.training.results import generate, networks
from lpgan_jax.training.run_directory import RunDirectory


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
    settings = RunDirectory.open(run).gan_config()
    images = data.load_images(settings.data)
    compared = min(num, len(images))
    if inception is None:
        judge = classifier_judge(settings.data, images, compared, report)
    else:
        weights = load_inception(inception)
        judge = Judge(images[chosen(len(images), compared)], partial(inception_features, weights))
    if num > len(images) and not settings.data.labels:
        report(f"there are {len(images)} real images: as many are generated, not {num}")
        num = compared
    generated = np.clip(generate(run, num, seed=seed), -1, 1)
    order = np.random.default_rng(0).permutation(num)  # they come class after class
    found = judge(generated[order[:compared]])
    return replace(found, accuracy=accuracy_of(settings, generated, report))


@dataclass(frozen=True)
class Membership:
    """What attackers find out about who was trained on.

    Attributes:
        attacks: of SD, and of generated images.
        shown: the epsilon that each attack shows was spent at least, with 95 %.
        epsilon: that was promised; None without differential privacy.
        delta: likewise.
    """

    attacks: tuple[Attack, ...]
    shown: tuple[float, ...]
    epsilon: float | None
    delta: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The largest (advantage, area) that the promise allows."""
        if self.epsilon is None or self.delta is None:
            return None
        return advantage_bound(self.epsilon, self.delta), area_bound(self.epsilon, self.delta)


def membership(
    run: str | os.PathLike[str], num: int, *, seed: int | None = None, generated: int = 10_000
) -> Membership:
    """Attack a run's networks: who of these images was trained on?

    Args:
        run: a run directory; its configuration says where the images are.
        num: how many members, and how many others, are looked at, at most.
        seed: as for `generate`.
        generated: how many images an attacker has generated.

    Raises:
        ValueError, FileNotFoundError: bad input, or no images are known that were not trained on.
    """
    directory = RunDirectory.open(run)
    settings = directory.gan_config()
    held_out = data.load_held_out(settings.data)
    if held_out is None:
        raise ValueError(
            "data: no images are known that were not trained on, expected a test split, or "
            "data.limit"
        )
    gan, learnt = networks(run)
    members = data.load_images(settings.data), data.load_labels(settings.data)
    fakes = generate(run, generated, seed=seed).astype(np.float32)

    @jax.jit
    def logits(images: jax.Array, labels: jax.Array | None) -> jax.Array:
        given = (images,) if labels is None else (images, labels)
        return gan.judge(learnt["discriminator"], *given).reshape(-1)

    def score(images: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        some = chosen(len(images), num)
        of_each = None
        if settings.data.labels:
            assert labels is not None
            of_each = data.one_hot(labels[some], settings.data.classes)
        by_sd = np.asarray(logits(images[some], of_each), np.float64)
        return by_sd, nearness(images[some], fakes).astype(np.float64)

    of_members, of_others = score(*members), score(*held_out)
    summary = directory.summary()
    epsilon, delta = summary.get("epsilon"), summary.get("delta")
    names = "the discriminator", f"{generated} generated images"
    pairs = list(zip(of_members, of_others, strict=True))
    attacks = tuple(attack(name, *pair) for name, pair in zip(names, pairs, strict=True))
    shown = tuple(least_epsilon(*pair, delta or 0.0) for pair in pairs)
    return Membership(attacks, shown, epsilon, delta)
