"""A classifier that nobody has: trained on shares, kept as shares, asked by clients.

    lpgan train --program experiments/classifier.py --out runs/classifier --seed 0
    lpgan ask --run runs/classifier --in digit.png

SP is told the loss, and gets no parameters. Who asks gets the class of each image; the servers see
neither image nor class. Other data:

    --set dataset=idx --data data/mnist
    --set dataset=npz --set classes=2 --data data/pneumoniamnist.npz
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

import lpgan_jax as lp
from lpgan_jax.training.config import DataConfig
from lpgan_jax.training.data import load_images, load_labels

SIZES = {"digits": 8, "idx": 28, "npz": 28}
"""Height and width of the images, by data set."""


class Network(nn.Module):
    """A convolution and two layers."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, classes] of images [N, H, W, 1] in [-1, 1]."""
        x = nn.relu(nn.Conv(8, (5, 5), (2, 2))(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(x)


def load(dataset: str, path: str | None, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, 1] in [-1, 1], and classes [N]."""
    config = DataConfig(
        dataset=dataset, path=path, split=split, image_size=SIZES[dataset], channels=1
    )
    labels = load_labels(config)
    assert labels is not None
    return load_images(config), labels


def training(
    dataset: str = "digits",
    classes: int = 10,
    batch_size: int = 64,
    learning_rate: float = 0.05,
    held_out: int = 297,
) -> lp.Training:
    """The training; `held_out`: of the digits, the last so many are left for a test."""
    network, optimizer = Network(classes), optax.sgd(learning_rate, momentum=0.9)
    size = SIZES[dataset]

    def init(rng: np.random.Generator) -> Any:
        key = jax.random.key(int(rng.integers(2**31)))
        params = network.init(key, jnp.zeros((1, size, size, 1), jnp.float32))
        return params, optimizer.init(params)

    def loss(params: Any, batch: Any) -> jax.Array:
        images, targets = batch
        return optax.softmax_cross_entropy(network.apply(params, images), targets).mean()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), {"loss": value}

    def feed(seed: int, path: str | None) -> Callable[[int], Any]:
        images, labels = load(dataset, path)
        if dataset == "digits":
            images, labels = images[:-held_out], labels[:-held_out]
        # One-hot: which row is looked up, a server would see.
        return lp.shuffled((images, np.eye(classes, dtype=np.float32)[labels]), batch_size, seed)

    def classify(params: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(network.apply(params, images), axis=-1)

    def read(path: str) -> np.ndarray:
        if path.endswith(".npy"):
            return np.load(path)
        image = Image.open(path).convert("L").resize((size, size))
        return np.asarray(image, np.float32).reshape(1, size, size, 1) / 127.5 - 1

    def images_of(number: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((number, size, size, 1), np.float32)

    program = lp.Program(
        init=init,
        step=step,
        batch=(images_of(batch_size), jax.ShapeDtypeStruct((batch_size, classes), np.float32)),
        learnt=lambda state: {},  # nothing: the model stays with the servers, in halves
        answers={
            "classify": lp.Answer(
                classify,
                images_of(32),
                part=lambda state: state[0],
                read=read,
                show=lambda classes: " ".join(str(int(c)) for c in classes),
            )
        },
    )
    return lp.Training(program, feed, steps=300, log_every=20, checkpoint_every=100)
