"""An LSTM that reads an image row by row."""

import flax.linen as nn
import jax
from classification import classification

import lpgan_jax as lp


class LSTM(nn.Module):
    """28 steps of 64 features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        states = nn.RNN(nn.OptimizedLSTMCell(64))(x[..., 0])
        return nn.Dense(10)(states[:, -1])


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(LSTM(), (28, 28, 1), batch_size)
