"""Logistic regression of MNIST, each class against all others."""

import flax.linen as nn
import jax
from classification import classification, one_against_all

import lpgan_jax as lp


class Linear(nn.Module):
    """One layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        return nn.Dense(10)(x.reshape(len(x), -1))


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(
        Linear(), (28, 28, 1), batch_size, rate=0.01, momentum=0, loss=one_against_all
    )
