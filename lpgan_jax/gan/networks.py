"""SG and SD: the DCGAN of the LP-GAN paper, as ordinary Flax modules.

Under sharing, with `lp.secure`, a transposed convolution is the patent's SecDeconv, a convolution
its SecConv, a dense layer its fully connected one, `nn.BatchNorm` its SecBN, and the activations
its SR and SLR.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Literal["batch", "group", "none"]


class Generator(nn.Module):
    """SG: from a fully connected layer, `depth` layers that double the size and halve the maps.

    Attributes:
        channels: of an image, 1 or 3.
        features: maps of the layer nearest the image.
        base_size: height and width at the fully connected layer; an image has base_size * 2^depth.
        depth: transposed convolutions.
        kernel_size: of these, at stride 2.
        init_std: standard deviation of the initial kernels; None: by their number of inputs.
        norm_eps: epsilon of the normalisations.
        norm_momentum: what a step keeps of their running statistics.
    """

    channels: int = 1
    features: int = 64
    base_size: int = 4
    depth: int = 3
    kernel_size: int = 4
    init_std: float | None = 0.02
    norm_eps: float = 1e-5
    norm_momentum: float = 0.9

    @nn.compact
    def __call__(
        self, noise: jax.Array, labels: jax.Array | None = None, train: bool = True
    ) -> jax.Array:
        """Images [N, H, W, C] in (-1, 1).

        Args:
            noise: [N, noise_size].
            labels: [N, classes], one-hot: what is to be seen; None if there are no classes.
            train: normalise with the statistics of the batch, not with running ones.
        """
        normal = _initializer(self.init_std)
        maps = self.features * 2 ** (self.depth - 1)
        base = (self.base_size, self.base_size, maps)
        x = nn.Dense(math.prod(base), use_bias=False, kernel_init=normal, name="fc")(noise)
        if labels is not None:
            shown = nn.Dense(math.prod(base), use_bias=False, kernel_init=normal, name="labels")
            x = x + shown(labels.astype(x.dtype))
        x = x.reshape(-1, *base)
        # Sliding over all that the kernel touches takes size - 1 zeros a side; padding is cut off.
        before, after = _padding(self.kernel_size)
        margin = self.kernel_size - 1 - before, self.kernel_size - 1 - after
        for i in range(self.depth):
            x = _batch_norm(self, train, f"bn{i}")(x)
            x = jnp.where(x > 0, x, 0)
            x = nn.ConvTranspose(
                self.channels if i == self.depth - 1 else maps // 2 ** (i + 1),
                (self.kernel_size, self.kernel_size),
                strides=(2, 2),
                padding=(margin, margin),
                use_bias=False,
                kernel_init=normal,
                name=f"deconv{i}",
            )(x)
        return jnp.tanh(x)


class Discriminator(nn.Module):
    """SD: `depth` convolutions that halve the size and double the maps, then a dense layer.

    Attributes:
        features: maps of the layer nearest the image.
        depth: convolutions.
        kernel_size: of these, at stride 2.
        leaky_slope: of the activations.
        background: the value of images that counts as 0: what most pixels are, so that they add
            nothing to gradients.
        norm: how all layers but the first are normalised: over the batch, or each example over
            groups of its maps (as a gradient penalty needs it), or not at all.
        init_std: standard deviation of the initial kernels; None: by their number of inputs.
        norm_eps: epsilon of the normalisations.
        norm_momentum: what a step keeps of their running statistics.
    """

    features: int = 64
    depth: int = 3
    kernel_size: int = 4
    leaky_slope: float = 0.2
    background: float = 0.0
    norm: Norm = "batch"
    init_std: float | None = 0.02
    norm_eps: float = 1e-5
    norm_momentum: float = 0.9

    @nn.compact
    def __call__(
        self, images: jax.Array, labels: jax.Array | None = None, train: bool = True
    ) -> jax.Array:
        """Logits [N, 1] from images [N, H, W, C]; `labels` and `train` as of `Generator`.

        A class adds a bias of its own to each feature map of each layer, and has weights of its own
        at the end (a projection: Miyato, Koyama, 2018).
        """
        normal = _initializer(self.init_std)
        padding = _padding(self.kernel_size)
        x = images - self.background if self.background else images
        for i in range(self.depth):
            x = nn.Conv(
                self.features * 2**i,
                (self.kernel_size, self.kernel_size),
                strides=(2, 2),
                padding=(padding, padding),
                use_bias=False,
                kernel_init=normal,
                name=f"conv{i}",
            )(x)
            if labels is not None:
                shown = nn.Dense(x.shape[-1], use_bias=False, kernel_init=normal, name=f"labels{i}")
                x = x + shown(labels.astype(x.dtype))[:, None, None]
            if i and self.norm == "batch":
                x = _batch_norm(self, train, f"bn{i}")(x)
            elif i and self.norm == "group":
                groups = math.gcd(_GROUPS, x.shape[-1])
                x = nn.GroupNorm(groups, epsilon=self.norm_eps, name=f"gn{i}")(x)
            # Not jax.nn.leaky_relu: at 0 its derivative is 1, the secure one's the slope.
            x = jnp.where(x > 0, x, self.leaky_slope * x)
        x = x.reshape(x.shape[0], -1)
        logits = nn.Dense(1, kernel_init=normal, name="fc")(x)
        if labels is not None:
            own = nn.Dense(x.shape[-1], use_bias=False, kernel_init=normal, name="labels")
            logits = logits + (own(labels.astype(x.dtype)) * x).sum(-1, keepdims=True)
        return logits


def _initializer(std: float | None) -> Any:
    return nn.initializers.lecun_normal() if std is None else nn.initializers.normal(std)


_GROUPS = 8


def _padding(kernel_size: int) -> tuple[int, int]:
    """Zeros before and after an axis, so that a convolution of stride 2 halves every even size."""
    return (kernel_size - 2) // 2, (kernel_size - 1) // 2


def _batch_norm(of: Any, train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=of.norm_momentum,
        epsilon=of.norm_eps,
        use_fast_variance=False,  # E[x^2] - mean^2 cancels
        name=name,
    )
