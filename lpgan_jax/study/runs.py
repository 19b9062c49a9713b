"""How good are the images of a run?"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import numpy as np

from lpgan_jax.study.features import classifier_judge
from lpgan_jax.study.inception import inception_features, load_inception
from lpgan_jax.study.quality import Judge, Quality, chosen
from lpgan_jax.training import data
from lpgan_jax.training.results import generate
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
    of = RunDirectory.open(run).gan_config().data
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
