"""A small classifier of the real images, whose features measure generated ones.

It is trained in the clear, on data that need no protection: a tool for experiments. Trained ones
are kept in the user's cache directory, by what they were trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from lpgan_jax.common.files import atomic_write, cache_directory
from lpgan_jax.programs.batches import Batches
from lpgan_jax.study.quality import Judge, chosen
from lpgan_jax.training.config import DataConfig, TrainConfig
from lpgan_jax.training.data import each_class, fingerprint, load_held_out, load_labels

FEATURES = 64
_BATCH, _LEAST_STEPS, _EPOCHS = 128, 600, 3
_HELD_OUT = 10  # every tenth image
_AT_ONCE = 512


class _Network(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(features [N, FEATURES], logits [N, num_classes])."""
        x = images
        for width in (16, 32, 64):
            x = nn.relu(nn.Conv(width, (3, 3), strides=(2, 2))(x))
        # Not rectified: a normal distribution is what the Fréchet distance assumes.
        features = nn.Dense(FEATURES)(x.reshape(len(x), -1))
        return features, nn.Dense(self.num_classes)(nn.relu(features))


@dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
        accuracy: on the images that were held out.
        num_classes: classes count from 0.
    """

    accuracy: float
    num_classes: int
    _variables: Any

    def features(self, images: np.ndarray) -> np.ndarray:
        """float32[N, 64] of images float[N, H, W, C]."""
        return self._apply(images)[0]

    def classes(self, images: np.ndarray) -> np.ndarray:
        """The most likely class of each image, int64[N]."""
        return self._apply(images)[1].argmax(1)

    def _apply(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        network = _Network(self.num_classes)
        starts = range(0, len(images), _AT_ONCE)
        parts = [
            _apply(network, self._variables, np.asarray(images[i : i + _AT_ONCE], np.float32))
            for i in starts
        ]
        features, logits = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(logits)


@jax.jit(static_argnums=0)
def _apply(network: _Network, variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    result: Any = network.apply(variables, images)
    return result


def classifier(
    images: np.ndarray,
    labels: np.ndarray,
    report: Callable[[str], None] = lambda text: None,
    kept: bool = True,
) -> Classifier:
    """The classifier of a data set: from the cache, or trained with a fixed seed.

    Args:
        images: float32[N, H, W, C] in [-1, 1]; every tenth is held out.
        labels: int[N], from 0.
        report: receives a line of text.
        kept: whether there is a cache.

    Raises:
        ValueError: the labels do not fit the images.
    """
    if len(labels) != len(images) or len(images) < 2 * _HELD_OUT:
        raise ValueError(
            f"labels: {len(labels)} given for {len(images)} images, expected one each, "
            f"and at least {2 * _HELD_OUT}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels: {labels.min()} given, expected classes from 0")
    num_classes = int(labels.max()) + 1
    template = _Network(num_classes).init(jax.random.key(0), jnp.zeros((1, *images.shape[1:])))
    folder = cache_directory("classifiers", "the classifier is not kept") if kept else None
    file = None if folder is None else folder / f"{_name(images, labels)}.msgpack"
    if file is not None and file.is_file():
        saved = _read(file, template)
        if saved is not None:
            return Classifier(saved[1], num_classes, saved[0])
    report(f"training a classifier on {len(images)} images")
    held_out = np.arange(len(images)) % _HELD_OUT == 0
    variables = _train(num_classes, template, images[~held_out], labels[~held_out])
    trained = Classifier(0.0, num_classes, variables)
    accuracy = float(np.mean(trained.classes(images[held_out]) == labels[held_out]))
    header = json.dumps({"accuracy": accuracy, "images": len(images)}).encode()
    if file is not None:
        atomic_write(file, header + b"\n" + serialization.to_bytes(variables))
    report(f"classifier: {100 * accuracy:.1f} % of {held_out.sum()} images held out are right")
    return Classifier(accuracy, num_classes, variables)


def _name(images: np.ndarray, labels: np.ndarray) -> str:
    """What decides the result: the data and this file."""
    return fingerprint(images, labels, start=Path(__file__).read_bytes())[:16]


def _read(file: Path, template: Any) -> tuple[Any, float] | None:
    """(variables, accuracy) of a cached file; None if it is damaged: it can be made again."""
    try:
        header, payload = file.read_bytes().split(b"\n", 1)
        return serialization.from_bytes(template, payload), float(json.loads(header)["accuracy"])
    except (ValueError, KeyError):
        return None


def _train(num_classes: int, variables: Any, images: np.ndarray, labels: np.ndarray) -> Any:
    network = _Network(num_classes)
    order = Batches(len(images), min(_BATCH, len(images)), seed=0)
    steps = max(_LEAST_STEPS, _EPOCHS * order.per_epoch)
    tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)

    @jax.jit
    def step(variables: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(variables: Any) -> jax.Array:
            logits = network.apply(variables, images)[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = tx.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for number in range(steps):
        chosen = order.indices(number)
        variables, state = step(variables, state, images[chosen], labels[chosen])
    return variables


def classifier_judge(
    of: DataConfig,
    images: np.ndarray,
    num_images: int,
    report: Callable[[str], None] = lambda text: None,
) -> Judge:
    """Measures of quality by the classifier of a data set.

    Args:
        of: the data.
        images: all of them.
        num_images: how many real ones generated ones are compared with (`quality.chosen`).
        report: receives lines of text.

    Raises:
        ValueError: the data have no labels to train a classifier with.
    """
    labels = load_labels(of)
    if labels is None:
        raise ValueError(
            "data.dataset: a folder has no classes to train a classifier with, unless it has a "
            "folder for each; "
            "measure with Inception's features instead (--inception)"
        )
    network = classifier(images, labels, report)
    some = chosen(len(images), num_images)
    return Judge(images[some], network.features, labels[some], network.classes, network.num_classes)


def accuracy_of(
    settings: TrainConfig,
    generated: np.ndarray,
    report: Callable[[str], None] = lambda text: None,
) -> float | None:
    """How well a classifier knows real images that has seen generated ones alone.

    It is trained as the one of the real images is, and nothing about it is chosen by these.

    Args:
        settings: of the training.
        generated: [N, H, W, C], as many of each class, class after class (`building.asked`).
        report: receives lines of text.

    Returns:
        The share of images that were not trained on of which it knows the class; None without
        classes, or such images.
    """
    held_out = load_held_out(settings.data) if settings.data.labels else None
    if held_out is None or held_out[1] is None:
        return None
    classes = each_class(len(generated), settings.data.classes)
    order = np.random.default_rng(1).permutation(len(generated))
    images = generated[order].astype(np.float32)
    network = classifier(images, classes[order], report=report, kept=False)
    return float(np.mean(network.classes(held_out[0]) == held_out[1]))
