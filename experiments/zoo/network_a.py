"""Network A, of SecureML: 784-128-128-10."""

import flax.linen as nn
import jax
from classification import classification

import lpgan_jax as lp


class NetworkA(nn.Module):
    """Three layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(NetworkA(), (28, 28, 1), batch_size)
