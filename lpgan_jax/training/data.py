"""Training images and their labels, read from disk, and the order in which batches take them.

This is the data owner's side: the images are still in the clear here.
"""

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lpgan_jax.common.bounded import Npz, Readable, read_at_most, require_size
from lpgan_jax.training.config import DataConfig
from lpgan_jax.training.unpickle import Bytes, unpickle

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
        return _fit(_limited(_read_digits(config), config), config, "digits")
    path = _path(config)
    if config.dataset == "idx":
        path = _find_idx(path, config.split, "images")
        pixels = _read_idx(path, dimensions=3)
    elif config.dataset == "npz":
        pixels = _read_npz(path, f"{config.split}_images")
    elif config.dataset == "cifar10":
        pixels = _read_cifar10(path, config.split)[0]
    else:
        pixels = _read_folder(path, config)
    try:
        images = from_arrays(_limited(pixels, config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _fit(images, config, str(path))


def load_labels(config: DataConfig) -> np.ndarray | None:
    """Read the classes of the images that `load_images` reads, in the same order.

    Returns:
        int64[N], counted from 0. A folder has a class for each folder in it, in the order of their
        names; None if pictures lie beside these.

    Raises:
        FileNotFoundError: the file of labels is not there.
        ValueError: it is damaged, or of another kind.
    """
    if config.dataset == "digits":
        from sklearn.datasets import load_digits

        return _limited(np.asarray(load_digits().target, np.int64), config)
    path = _path(config)
    if config.dataset == "folder":
        return _folders(path, _pictures(path, config))
    if config.dataset == "idx":
        labels = _read_idx(_find_idx(path, config.split, "labels"), dimensions=1)
    elif config.dataset == "npz":
        labels = _read_npz(path, f"{config.split}_labels", np.integer).reshape(-1)
    else:
        labels = _read_cifar10(path, config.split)[1]
    return _limited(labels.astype(np.int64), config)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """int32[..., classes] of classes int[...], which are below their number."""
    return np.eye(classes, dtype=np.int32)[labels]


def each_class(num: int, classes: int) -> np.ndarray:
    """int[num]: as many of each class, class after class."""
    return np.arange(num) * classes // num


def load_held_out(config: DataConfig) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Images that are like those of a configuration, and not among them, with their classes.

    They are the test split; where there is none, those beyond `data.limit`.

    Returns:
        As `load_images` and `load_labels`; None if there are none.

    Raises:
        FileNotFoundError, ValueError: as these.
    """
    if config.dataset in ("idx", "npz", "cifar10") and config.split == "train":
        test = config.model_copy(update={"split": "test", "limit": None})
        return load_images(test), load_labels(test)
    if config.limit is None or config.dataset == "private":
        return None
    whole = config.model_copy(update={"limit": None})
    labels = load_labels(whole)
    images = load_images(whole)[config.limit :]
    if not len(images):
        return None
    return images, None if labels is None else labels[config.limit :]


def _path(config: DataConfig) -> Path:
    if config.path is None:  # DataConfig sees to it that others have one
        raise ValueError("data.dataset: private: somebody else has these images")
    return Path(config.path).expanduser()


def _limited(values: np.ndarray, config: DataConfig) -> np.ndarray:
    return values[: config.limit]


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


def fingerprint(*arrays: np.ndarray, start: bytes = b"") -> str:
    """SHA-256 of some bytes, and of arrays with their shapes, by which they are known again."""
    digest = hashlib.sha256(start)
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)  # its own bytes, no copy of them
    return digest.hexdigest()


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


_IDX_PREFIX = {"train": "train", "test": "t10k"}
_IDX_SUFFIX = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}


def _find_idx(path: Path, split: str, content: str) -> Path:
    """Return the file of images or labels.

    In the directory `path` it is the split's; else it is `path` itself, or lies beside it.
    """
    if not path.is_dir():
        return path.with_name(path.name.replace(_IDX_SUFFIX["images"], _IDX_SUFFIX[content]))
    if split not in _IDX_PREFIX:
        raise ValueError(f"data.split: {split!r} given, expected one of {', '.join(_IDX_PREFIX)}")
    name = f"{_IDX_PREFIX[split]}-{_IDX_SUFFIX[content]}"
    for file in (path / name, path / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{path}: expected {name} or {name}.gz in this directory")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the bytes of an IDX file, plain or compressed: uint8 of so many dimensions."""
    with _existing(path).open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            return _idx_bytes(gzip.open(file) if compressed else file, dimensions)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: expected a whole gzip file: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _idx_bytes(stream: Readable, dimensions: int) -> np.ndarray:
    header = 4 + 4 * dimensions
    head = read_at_most(stream, header)
    if len(head) < header:
        raise ValueError(f"{len(head)} bytes, expected an IDX header of {header}")
    magic, *shape = np.frombuffer(head, ">u4").tolist()
    expected = 0x800 + dimensions  # unsigned bytes
    kind, unit = ("images", "pixels") if dimensions == 3 else ("labels", "labels")
    if magic != expected:
        raise ValueError(f"magic number {magic:#x}, expected {expected:#x}, IDX {kind} in bytes")
    size = math.prod(shape)
    announced = f"{' x '.join(map(str, shape))} {unit} that its header announces"
    require_size(size, announced)
    content = read_at_most(stream, size + 1)
    if len(content) != size:
        found = f"more than {header + size}" if len(content) > size else header + len(content)
        raise ValueError(f"{found} bytes, expected {header + size} for the {announced}")
    return np.frombuffer(content, np.uint8).reshape(shape)


_CIFAR10_FILES = {
    "train": [f"data_batch_{i}" for i in range(1, 6)],
    "test": ["test_batch"],
}
_CIFAR10_PIXELS = 3 * 32 * 32
_LARGEST_CIFAR10 = 2**26  # bytes of a file; 31 MB are usual


def _read_cifar10(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a split of CIFAR-10's Python version: uint8[N, 32, 32, 3], and classes [N]."""
    if split not in _CIFAR10_FILES:
        raise ValueError(
            f"data.split: {split!r} given, expected one of {', '.join(_CIFAR10_FILES)}"
        )
    images, labels = [], []
    for name in _CIFAR10_FILES[split]:
        file = path / name
        with _existing(file).open("rb") as stream:
            data = stream.read(_LARGEST_CIFAR10 + 1)
        try:
            if len(data) > _LARGEST_CIFAR10:
                raise ValueError(f"more than {_LARGEST_CIFAR10} bytes")
            pixels, classes = _cifar10_batch(unpickle(data))
        except ValueError as error:
            reason = f"expected a batch of CIFAR-10's Python version: {error}"
            raise ValueError(f"{file}: {reason}") from None
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(classes)
    return np.concatenate(images), np.concatenate(labels)


def _cifar10_batch(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """The pixels uint8[N, 3072] and the classes int64[N] of what a file holds."""
    match batch:
        case {b"data": Bytes(values=np.ndarray() as pixels), b"labels": list() as classes}:
            pass
        case _:
            raise ValueError("expected a dict with an array 'data' and a list 'labels'")
    if pixels.shape != (len(classes), _CIFAR10_PIXELS):
        raise ValueError(f"data of uint8{list(pixels.shape)} with {len(classes)} labels")
    if any(type(label) is not int or not 0 <= label <= 9 for label in classes):
        raise ValueError("labels: expected integers from 0 to 9")
    return pixels, np.array(classes, np.int64)


_PICTURES = {".png", ".jpg", ".jpeg"}
_FORMATS = ("PNG", "JPEG")  # whatever the name says: some others start programs
_MOST_PIXELS = 2**26  # of a picture, which takes some ten bytes for each


def _read_folder(path: Path, config: DataConfig) -> np.ndarray:
    """Return the pictures below a folder, in the order of their names: uint8[N, size, size, C].

    Each is cropped to its central square and resized.
    """
    mode, size = "L" if config.channels == 1 else "RGB", (config.image_size, config.image_size)
    files = _pictures(path, config)
    pixels = np.empty((len(files), *size, config.channels), np.uint8)
    for index, file in enumerate(files):
        try:
            with Image.open(file, formats=_FORMATS) as picture:
                if picture.width * picture.height > _MOST_PIXELS:
                    found = f"{picture.width}x{picture.height} pixels"
                    raise ValueError(f"{found}, expected at most {_MOST_PIXELS} in all")
                if picture.mode.startswith(("I", "F")):  # `convert` would clip them to white
                    raise ValueError(f"pixels of more than 8 bits (mode {picture.mode})")
                square = ImageOps.fit(picture.convert(mode), size, Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file}: expected a whole picture: {error}") from None
        pixels[index] = np.asarray(square).reshape(*size, config.channels)
    return pixels


def _pictures(path: Path, config: DataConfig) -> list[Path]:
    """The files of pictures below a folder, in order."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder, expected one of pictures (data.path)")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _PICTURES and f.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no pictures, expected {', '.join(sorted(_PICTURES))}")
    return files[: config.limit]


def _folders(path: Path, files: list[Path]) -> np.ndarray | None:
    """The number of the folder that each file is in; None if one is in none."""
    inside = [file.relative_to(path).parts for file in files]
    if any(len(parts) < 2 for parts in inside):
        return None
    names = sorted({parts[0] for parts in inside})
    return np.array([names.index(parts[0]) for parts in inside], np.int64)


def _read_npz(path: Path, key: str, kind: Any = np.uint8) -> np.ndarray:
    """Return the array `key` of an npz file; its dtype must be of the kind."""
    with _existing(path).open("rb") as file:
        try:
            arrays = Npz(file)
            found = ", ".join(arrays) or "none"
            pixels = arrays.get(key)
        except Exception as error:  # damage shows in many ways, from EOFError to MemoryError
            reason = f"expected a whole npz file of plain arrays: {error}"
            raise ValueError(f"{path}: {reason}") from None
    if pixels is None:
        raise ValueError(f"{path}: expected an array {key!r} (data.split), found {found}")
    if not np.issubdtype(pixels.dtype, kind):
        wanted = "uint8" if kind is np.uint8 else "integers"
        raise ValueError(f"{path}: {key} is {pixels.dtype}, expected {wanted}")
    return pixels


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected the data (data.path)")
    return path
