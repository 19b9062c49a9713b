"""Training images, read from disk, and the order in which batches take them.

This is the data owner's side: the images are still in the clear here.
"""

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lpgan_jax.config import DataConfig

_BLACK = -1.0


def load_images(config: DataConfig) -> np.ndarray:
    """Read the images that `config` names.

    Args:
        config: the dataset, where it is, and the size and channels to train at.

    Returns:
        float32[N, image_size, image_size, channels] in [-1, 1], where -1 is black.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: the file is damaged or of another kind, or its images do not fit the
            configuration; the message names the file.
    """
    if config.dataset == "digits":
        images, source = _read_digits(config), "digits"
    else:
        assert config.path is not None  # DataConfig sees to it
        path = Path(config.path).expanduser()
        if config.dataset == "idx":
            path = _find_idx(path, config.split)
            pixels = _read_idx(path)
        else:
            pixels = _read_npz(path, f"{config.split}_images")
        try:
            images, source = from_arrays(pixels), str(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return _fit(images, config, source)


def from_arrays(images: np.ndarray) -> np.ndarray:
    """Turn a user's own images into what training takes.

    Args:
        images: [N, H, W] or [N, H, W, C] with C = 1 or 3: uint8, or floating point in [-1, 1].

    Returns:
        float32[N, H, W, C] in [-1, 1], where uint8 0 became -1 and 255 became 1.

    Raises:
        ValueError: the shape, the dtype or a value is not as above.
    """
    images = np.asarray(images)
    given = f"{images.dtype}{list(images.shape)}"
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images: {given} given, expected [N, H, W] or [N, H, W, 1 or 3], N >= 1")
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images: {given} given, expected uint8 or floating-point values")
    if not np.all(np.abs(images) <= 1):  # false for NaN too
        raise ValueError("images: some values are NaN or outside the expected range [-1, 1]")
    return images.astype(np.float32)


@dataclass(frozen=True)
class Batches:
    """The order of the training images: each epoch takes every image once, in an order of its own.

    The images that do not fill the last batch of an epoch are left out of that epoch. The order
    depends on nothing but the fields, so a resumed run goes on with the images it would have had.

    Attributes:
        num_examples: how many images there are.
        batch_size: how many a step takes.
        seed: decides the order.

    Raises:
        ValueError: a batch is empty or larger than the data, or the seed is negative.
    """

    num_examples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.num_examples:
            raise ValueError(
                f"batch_size: {self.batch_size} given, "
                f"expected 1 to {self.num_examples}, the number of images"
            )
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} given, expected at least 0")

    @property
    def per_epoch(self) -> int:
        """The number of whole batches in an epoch."""
        return self.num_examples // self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """Return the images of one step.

        Args:
            step: the number of the step, from 0; any order of calls gives the same answers.

        Returns:
            int64[batch_size], all different, each in [0, num_examples).

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step: {step} given, expected at least 0")
        epoch, batch = divmod(step, self.per_epoch)
        start = batch * self.batch_size
        return _order(self.num_examples, self.seed, epoch)[start : start + self.batch_size].copy()


@lru_cache(maxsize=2)
def _order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw words, because NumPy keeps those, but not its `permutation`, from version to
    # version: a run may be resumed under a newer one.
    random = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return np.argsort(random.random_raw(num_examples), kind="stable")


def _fit(images: np.ndarray, config: DataConfig, source: str) -> np.ndarray:
    """Centre the images [N, H, W, C] on black squares of `image_size`."""
    size, (height, width, channels) = config.image_size, images.shape[1:]
    if channels != config.channels:
        raise ValueError(f"{source}: images of {channels} channels, expected {config.channels}")
    if max(height, width) > size:
        raise ValueError(
            f"{source}: images of {height}x{width}, expected at most {size}x{size} "
            f"(data.image_size): they are never shrunk or cropped, as either loses detail unasked"
        )
    border = [((size - side) // 2, (size - side + 1) // 2) for side in (height, width)]
    return np.pad(images, [(0, 0), *border, (0, 0)], constant_values=_BLACK)


def _read_digits(config: DataConfig) -> np.ndarray:
    """Return scikit-learn's 1,797 digits of 8x8, enlarged: float32[1797, size, size, 1]."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    size = config.image_size
    if config.split != "train":
        raise ValueError(f"data.split: {config.split!r} given, expected 'train' for the digits")
    pixels = load_digits().images.astype(np.float32)  # 0 to 16
    if size > pixels.shape[1]:
        pixels = np.stack([_enlarged(one, size) for one in pixels])
    return (pixels / 8 - 1)[..., np.newaxis]


def _enlarged(pixels: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


_IDX_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_IDX_MAGIC = 0x803  # unsigned bytes, three dimensions


def _find_idx(path: Path, split: str) -> Path:
    """Return the file of images: `path` itself, or the split's file in the directory `path`."""
    if not path.is_dir():
        return path
    if split not in _IDX_FILES:
        raise ValueError(f"data.split: {split!r} given, expected one of {', '.join(_IDX_FILES)}")
    name = _IDX_FILES[split]
    for file in (path / name, path / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path}: expected {name} or {name}.gz in this directory")


def _read_idx(path: Path) -> np.ndarray:
    """Return the images of an IDX file, plain or compressed: uint8[N, H, W]."""
    data = _existing(path).read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file: {error}") from None
    if len(data) < 16:
        raise ValueError(f"{path}: {len(data)} bytes, expected an IDX header of 16")
    magic, *shape = np.frombuffer(data, ">u4", count=4).tolist()
    if magic != _IDX_MAGIC:
        raise ValueError(
            f"{path}: magic number {magic:#x}, expected {_IDX_MAGIC:#x}, IDX images in bytes"
        )
    if len(data) != 16 + math.prod(shape):
        raise ValueError(
            f"{path}: {len(data)} bytes, expected {16 + math.prod(shape)} "
            f"for the {' x '.join(map(str, shape))} pixels that its header announces"
        )
    return np.frombuffer(data, np.uint8, offset=16).reshape(shape)


def _read_npz(path: Path, key: str) -> np.ndarray:
    """Return the array `key` of an npz file: uint8[N, H, W] or uint8[N, H, W, C]."""
    with _existing(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:  # a pickle would run code
                found = ", ".join(arrays) or "none"
                pixels = arrays.get(key)
        except Exception as error:  # damage shows in many ways, from EOFError to MemoryError
            reason = f"expected a whole npz file of plain arrays: {error}"
            raise ValueError(f"{path}: {reason}") from None
    if pixels is None:
        raise ValueError(f"{path}: expected an array {key!r} (data.split), found {found}")
    if pixels.dtype != np.uint8:
        raise ValueError(f"{path}: {key} is {pixels.dtype}, expected uint8")
    return pixels


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the images (data.path)")
    return path
