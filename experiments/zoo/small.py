"""The three small networks of the LP-GAN line, for MNIST."""

import math

import flax.linen as nn
import jax

import lpgan_jax as lp

RATES = {"fc": 0.005, "conv-square": 0.01, "conv-relu": 0.05}


def dense(features: int, inputs: int, gain: float) -> nn.Dense:
    """A layer whose outputs are `gain` times as large as its inputs, at the start."""
    return nn.Dense(features, kernel_init=nn.initializers.normal(gain / math.sqrt(inputs)))


def conv(padding: tuple[int, int], gain: float) -> nn.Conv:
    """5x5, stride 2, five maps."""
    normal = nn.initializers.normal(gain / 5)
    return nn.Conv(5, (5, 5), (2, 2), (padding, padding), kernel_init=normal)


class Fc(nn.Module):
    """784-128-128-10, with squares."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 28, 28, 1]."""
        x = dense(128, 784, 1.0)(x.reshape(len(x), -1)) ** 2
        x = dense(128, 128, 1.0)(x) ** 2
        return dense(10, 128, 1.0)(x)


class ConvSquare(nn.Module):
    """A convolution to 13x13x5 = 845, and 845-100-10, with squares."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """As `Fc`."""
        x = conv((1, 1), 1.0)(x).reshape(len(x), -1) ** 2
        x = dense(100, 845, 1.0)(x) ** 2
        return dense(10, 100, 1.0)(x)


class ConvRelu(nn.Module):
    """A convolution to 14x14x5 = 980, and 980-100-10, with ReLUs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """As `Fc`."""
        gain = math.sqrt(2)  # keeps the second moment of activations (He et al. 2015)
        x = nn.relu(conv((1, 2), gain)(x).reshape(len(x), -1))
        x = nn.relu(dense(100, 980, gain)(x))
        return dense(10, 100, gain)(x)


NETWORKS: dict[str, nn.Module] = {
    "fc": Fc(),
    "conv-square": ConvSquare(),
    "conv-relu": ConvRelu(),
}


def training(network: str = "fc", batch_size: int = 64) -> lp.Training:
    """The training of one of them."""
    # Beside this file, where programs are loaded from.
    from classification import classification, one_against_all

    module, rate = NETWORKS[network], RATES[network]
    return classification(module, (28, 28, 1), batch_size, rate=rate, loss=one_against_all)
