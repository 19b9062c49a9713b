"""ResNet-18 for 32x32, with batch normalisation."""

import functools

import flax.linen as nn
import jax
from classification import classification

import lpgan_jax as lp


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, C] to [N, H/stride, W/stride, features]."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), self.stride)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """A convolution, eight blocks, a layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits [N, 10] of images [N, 32, 32, 3]."""
        x = nn.Conv(64, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for stage in range(4):
            x = Block(64 * 2**stage, 1 if stage == 0 else 2)(x, train)
            x = Block(64 * 2**stage, 1)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


def training(batch_size: int = 128, frac_bits: int = 20) -> lp.Training:
    """The training.

    Gradients are small, of a mean over examples and one over positions: more bits make them finer.
    Squares are summed over a batch's positions at 2 frac_bits, below 2^62: 24 fit at batch 8 only.
    """
    return classification(ResNet18(), (32, 32, 3), batch_size, frac_bits=frac_bits)
