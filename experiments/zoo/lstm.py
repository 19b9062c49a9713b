"""An LSTM that reads an image row by row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from classification import classification

import lpgan_jax as lp


class LSTM(nn.Module):
    """28 steps of 64 features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        cell = nn.OptimizedLSTMCell(64, carry_init=lambda _, shape, __: jnp.zeros(shape, x.dtype))
        states = nn.RNN(cell)(x[..., 0])
        return nn.Dense(10)(states[:, -1])


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(LSTM(), (28, 28, 1), batch_size)
