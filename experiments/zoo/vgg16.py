"""VGG-16 for 32x32, with average pools, as Piranha has it."""

import flax.linen as nn
import jax
from classification import classification

import lpgan_jax as lp

MAPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """13 convolutions, three layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 32, 32, 3]."""
        for block in MAPS:
            for features in block:
                x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


def training(batch_size: int = 128) -> lp.Training:
    """The training."""
    return classification(VGG16(), (32, 32, 3), batch_size)
