"""What the zoo's classifiers share: images, a cross entropy, SGD."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpgan_jax as lp
from lpgan_jax.training.config import DataConfig
from lpgan_jax.training.data import load_images, load_labels

CLASSES = 10
Shape = tuple[int, int, int]


def load(shape: Shape, path: str | None, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Images [N, *shape] in [-1, 1] and classes [N].

    Of CIFAR-10 if the path has its batches, of IDX files (MNIST) otherwise; without a path
    scikit-learn's digits, enlarged, and the same in every channel.
    """
    height, _, channels = shape
    if path is not None and (Path(path) / "data_batch_1").exists():
        config = DataConfig(
            dataset="cifar10", path=path, split=split, image_size=height, channels=channels
        )
        images = load_images(config)
    else:
        of: Any = "digits" if path is None else "idx"
        config = DataConfig(dataset=of, path=path, split=split, image_size=height, channels=1)
        images = load_images(config).repeat(channels, -1)
    labels = load_labels(config)
    assert labels is not None
    return images, labels


def one_against_all(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """A binary cross entropy of each class, summed."""
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)


def classification(
    module: nn.Module,
    shape: Shape,
    batch_size: int,
    *,
    rate: float = 0.05,
    momentum: float = 0.9,
    loss: Callable[..., Any] = optax.softmax_cross_entropy,
    frac_bits: int = 18,
) -> lp.Training:
    """The training of a module, images [N, *shape] to logits [N, 10].

    If it has batch statistics, its arguments are (x, train).
    """
    optimizer = optax.sgd(rate, momentum or None)
    sample = jnp.zeros((1, *shape), jnp.float32)
    normalised = "batch_stats" in jax.eval_shape(lambda: module.init(jax.random.key(0), sample))

    def init(rng: np.random.Generator) -> Any:
        variables = module.init(jax.random.key(int(rng.integers(2**31))), sample)
        return variables, optimizer.init(variables["params"])

    def forward(variables: Any, images: jax.Array) -> tuple[Any, Any]:
        if normalised:
            return module.apply(variables, images, True, mutable=["batch_stats"])
        return module.apply(variables, images), {}

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        (variables, moments), (images, targets) = state, batch

        def mean_loss(params: Any) -> tuple[jax.Array, Any]:
            logits, stats = forward({**variables, "params": params}, images)
            return loss(logits, targets).mean(), stats

        gradient = jax.value_and_grad(mean_loss, has_aux=True)
        (value, stats), gradients = gradient(variables["params"])
        updates, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **stats, "params": params}, moments), {"loss": value}

    def feed(seed: int, path: str | None) -> Callable[[int], Any]:
        images, labels = load(shape, path)
        one_hot = np.eye(CLASSES, dtype=np.float32)[labels]
        return lp.shuffled((images, one_hot), batch_size, seed)

    def classify(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(module.apply(variables, images), -1)

    def rows(number: int, *of: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, *of), np.float32)

    program = lp.Program(
        init=init,
        step=step,
        batch=(rows(batch_size, *shape), rows(batch_size, CLASSES)),
        learnt=lambda state: state[0],
        answers={"classify": lp.Answer(classify, rows(32, *shape), lambda state: state[0])},
        frac_bits=frac_bits,
    )
    return lp.Training(program, feed, steps=1000)
