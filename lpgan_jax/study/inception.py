"""Features of the Inception-v3 by which the Fréchet Inception distance compares images.

FID (Heusel et al. 2017, arXiv:1706.08500) is defined by the weights of one Inception-v3 (Szegedy et
al. 2016, arXiv:1512.00567), trained on ImageNet and published for TensorFlow on 2015-12-05. The
weights do not come with this package: the user supplies them, as the PyTorch port of the package
pytorch-fid, `pt_inception-2015-12-05-6726825d.pth`. Layers have that file's names.

That network differs from later ones: averages near an edge do not count the padding, and the last
block pools by maximum. So other weights of an Inception-v3 give other distances.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lpgan_jax.common.bounded import Npz, require_size
from lpgan_jax.training.images import require_images

Weights = dict[str, Any]

FEATURES = 2048
_SIDE = 299  # of the images that the network was trained on


def average_pool(x: jax.Array) -> jax.Array:
    """Means of 3x3 neighbourhoods, fewer at the edges: [N, H, W, C], of x's shape."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), padding="SAME")


def _halve(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def resize(images: jax.Array) -> jax.Array:
    """Images [N, H, W, C] at 299x299, bilinearly between the centres of pixels, without a filter.

    As PyTorch's `interpolate(mode="bilinear", align_corners=False)`, by which pytorch-fid resizes.
    """
    shape = (images.shape[0], _SIDE, _SIDE, images.shape[-1])
    return jax.image.resize(images, shape, "bilinear", antialias=False)


@dataclass(frozen=True)
class _Conv:
    """A convolution without bias, its normalisation, and ReLU."""

    name: str
    features: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padding: str = "SAME"


# A list's steps follow each other; a tuple's lie side by side, and their channels are joined.
_Step: TypeAlias = "_Conv | Callable[[jax.Array], jax.Array] | list[_Step] | tuple[_Step, ...]"


def _block_a(pool_features: int) -> _Step:
    return (
        _Conv("branch1x1", 64),
        [_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, 5, 5)],
        [
            _Conv("branch3x3dbl_1", 64),
            _Conv("branch3x3dbl_2", 96, 3, 3),
            _Conv("branch3x3dbl_3", 96, 3, 3),
        ],
        [average_pool, _Conv("branch_pool", pool_features)],
    )


def _block_b() -> _Step:
    return (
        _Conv("branch3x3", 384, 3, 3, 2, "VALID"),
        [
            _Conv("branch3x3dbl_1", 64),
            _Conv("branch3x3dbl_2", 96, 3, 3),
            _Conv("branch3x3dbl_3", 96, 3, 3, 2, "VALID"),
        ],
        _halve,
    )


def _block_c(inner: int) -> _Step:
    return (
        _Conv("branch1x1", 192),
        [
            _Conv("branch7x7_1", inner),
            _Conv("branch7x7_2", inner, 1, 7),
            _Conv("branch7x7_3", 192, 7, 1),
        ],
        [
            _Conv("branch7x7dbl_1", inner),
            _Conv("branch7x7dbl_2", inner, 7, 1),
            _Conv("branch7x7dbl_3", inner, 1, 7),
            _Conv("branch7x7dbl_4", inner, 7, 1),
            _Conv("branch7x7dbl_5", 192, 1, 7),
        ],
        [average_pool, _Conv("branch_pool", 192)],
    )


def _block_d() -> _Step:
    return (
        [_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, 3, 3, 2, "VALID")],
        [
            _Conv("branch7x7x3_1", 192),
            _Conv("branch7x7x3_2", 192, 1, 7),
            _Conv("branch7x7x3_3", 192, 7, 1),
            _Conv("branch7x7x3_4", 192, 3, 3, 2, "VALID"),
        ],
        _halve,
    )


def _block_e(pool: Callable[[jax.Array], jax.Array]) -> _Step:
    return (
        _Conv("branch1x1", 320),
        [
            _Conv("branch3x3_1", 384),
            (_Conv("branch3x3_2a", 384, 1, 3), _Conv("branch3x3_2b", 384, 3, 1)),
        ],
        [
            _Conv("branch3x3dbl_1", 448),
            _Conv("branch3x3dbl_2", 384, 3, 3),
            (_Conv("branch3x3dbl_3a", 384, 1, 3), _Conv("branch3x3dbl_3b", 384, 3, 1)),
        ],
        [pool, _Conv("branch_pool", 192)],
    )


_STEM: _Step = [
    _Conv("Conv2d_1a_3x3", 32, 3, 3, 2, "VALID"),
    _Conv("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID"),
    _Conv("Conv2d_2b_3x3", 64, 3, 3),
    _halve,
    _Conv("Conv2d_3b_1x1", 80),
    _Conv("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"),
    _halve,
]
_BLOCKS: dict[str, _Step] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e(average_pool),
    "Mixed_7c": _block_e(_max_pool),
}


class Inception(nn.Module):
    """FID's Inception-v3 without its classifiers, in float32, with running statistics."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Features float32[N, 2048] of images float32[N, 299, 299, 3] in [-1, 1]."""
        x = _run(_STEM, images)
        for name, block in _BLOCKS.items():
            x = _run(block, x, f"{name}.")
        return x.mean((1, 2))


class _ConvNorm(nn.Module):
    conv: _Conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = self.conv
        x = nn.Conv(
            conv.features,
            (conv.height, conv.width),
            strides=conv.stride,
            padding=conv.padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,  # GPUs round to 10 bits otherwise
            name="conv",
        )(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


def _run(step: _Step, x: jax.Array, block: str = "") -> jax.Array:
    match step:
        case _Conv():
            return _ConvNorm(step, name=block + step.name)(x)
        case list():
            for one in step:
                x = _run(one, x, block)
            return x
        case tuple():
            return jnp.concatenate([_run(one, x, block) for one in step], axis=-1)
        case _:
            return step(x)


# What PyTorch calls Flax's arrays.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load_inception(path: str | os.PathLike[str]) -> Weights:
    """Read the weights of FID's Inception-v3, running no code from the file.

    Reading PyTorch's file needs the package torch, 2.10 or newer: a file can make older ones run
    code, even those that promise not to (CVE-2025-32434, CVE-2026-24747). Where it is
    not installed, convert the file once where it is::

        python -c "import numpy, torch; numpy.savez('inception.npz',
        **torch.load('inception.pth', map_location='cpu', weights_only=True))"

    Args:
        path: a state dict that PyTorch wrote (.pth or .pt), or the same arrays in an .npz file:
            floating point, names and layouts as in pytorch-fid, for instance
            `Mixed_5b.branch1x1.conv.weight` [out, in, height, width] and
            `Mixed_5b.branch1x1.bn.running_var` [out]. The classifier `fc` and counters of batches
            are ignored.

    Returns:
        Flax variables {"params", "batch_stats"} of `Inception`, float32.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is PyTorch's, and torch is not installed or too old.
        ValueError: it is no such file, its arrays have more than `bounded.LARGEST` bytes, or one is
            missing, unknown, misshapen or not floating point; names the file and the array.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected weights of FID's Inception-v3")
    arrays = _read(path)
    known = {"fc.weight", "fc.bias"}  # of the classifier

    def take(keys: tuple[Any, ...], wanted: jax.ShapeDtypeStruct) -> jax.Array:
        _, layer, part, leaf = (key.key for key in keys)
        name = f"{layer}.{part}.{_LEAVES[leaf]}"
        known.add(name)
        if name not in arrays:
            raise ValueError(f"{path}: {name}: missing")
        array, shape = arrays[name], wanted.shape
        if leaf == "kernel":
            shape = (*shape[:1:-1], *shape[:2])
        if array.shape != shape or not np.issubdtype(array.dtype, np.floating):
            given = f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"{path}: {name}: {given}, expected floating-point {list(shape)}")
        return jnp.asarray(array.transpose(2, 3, 1, 0) if leaf == "kernel" else array, jnp.float32)

    weights = jax.tree.map_with_path(take, _variables())
    for name in arrays:
        if name not in known and not name.endswith(".num_batches_tracked"):
            raise ValueError(f"{path}: {name}: unknown, expected FID's Inception-v3")
    return weights


@lru_cache(maxsize=1)
def _variables() -> Weights:
    """Shapes of `Inception`'s variables."""
    images = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), images)


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        kind, read = "a whole npz file of plain arrays", _read_npz
    elif path.suffix in (".pth", ".pt"):
        kind, read = "a whole state dict that PyTorch wrote, without code", _read_torch
    else:
        raise ValueError(f"{path}: expected the suffix .npz, .pth or .pt")
    try:
        return read(path)
    except ImportError as error:
        raise ImportError(
            f"{path}: reading PyTorch's file needs the package torch, 2.10 or newer ({error}): "
            "install it, or convert the file to .npz (see lpgan_jax.study.inception)"
        ) from error
    except Exception as error:  # damage shows in many ways
        raise ValueError(f"{path}: expected {kind}: {error}") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        return dict(Npz(file))


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    import torch

    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < (2, 10):
        raise ImportError(f"found {torch.__version__}, which a file can make run code")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as members:
            require_size(sum(info.file_size for info in members.infolist()), "in all")
    state = torch.load(path, map_location="cpu", weights_only=True)  # others may run code
    if not isinstance(state, Mapping):
        raise ValueError(f"found {type(state).__name__}, expected names and tensors")
    return {name: np.asarray(value) for name, value in state.items()}


def inception_features(weights: Weights, images: ArrayLike, batch_size: int = 32) -> np.ndarray:
    """What FID compares: the averages of the network's last maps.

    Args:
        weights: as `load_inception` returns.
        images: floating-point [N, H, W, C] with C = 1 or 3 and N >= 1, where -1 is black and 1 is
            white; values beyond are clipped. Grey images are taken as RGB with equal channels. All
            are resized to 299x299.
        batch_size: images a pass.

    Returns:
        float32[N, 2048].

    Raises:
        ValueError: the shape is not as above, a value is NaN, or `batch_size` is below 1.
    """
    images = require_images(images)
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} given, expected at least 1")
    count = len(images)
    batch_size = min(batch_size, count)
    features = np.empty((count, FEATURES), np.float32)
    for start in range(0, count, batch_size):
        start = min(start, count - batch_size)  # the last batch may overlap: one shape to compile
        batch = slice(start, start + batch_size)
        features[batch] = _features(weights, images[batch].astype(np.float32))
    return features


@jax.jit
def _features(weights: Weights, images: jax.Array) -> jax.Array:
    images = jnp.broadcast_to(jnp.clip(images, -1, 1), (*images.shape[:-1], 3))
    features = Inception().apply(weights, resize(images))
    assert isinstance(features, jax.Array)  # and not with updated variables
    return features
