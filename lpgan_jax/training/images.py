"""Grids of images, for people to look at."""

import io
import math
import os

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from lpgan_jax.common.files import atomic_write

_SEPARATOR_WIDTH = 1
_SEPARATOR_COLOUR = 128  # between the black of most backgrounds and the white of the strokes
_VISIBLE_SIZE = 64  # screen pixels that an image needs to be looked at


def require_images(images: ArrayLike) -> np.ndarray:
    """Check that an array holds images: floating-point [N, H, W, C] with C = 1 or 3, without NaN.

    Raises:
        ValueError: it does not.
    """
    checked = np.asarray(images)
    if checked.ndim != 4 or checked.shape[-1] not in (1, 3) or 0 in checked.shape:
        raise ValueError(
            f"images: shape {list(checked.shape)} given, expected [N, H, W, 1 or 3], N >= 1"
        )
    if not np.issubdtype(checked.dtype, np.floating) or np.isnan(checked).any():
        raise ValueError(f"images: {checked.dtype} given, expected floating point without NaN")
    return checked


def grid(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Arrange images in a grid, row by row, with thin grey lines around them.

    Args:
        images: floating-point [N, H, W, C] with C = 1 or 3, where -1 is black and 1 is white;
            values beyond are clipped.
        columns: images in a row; by default the grid is about square.
        scale: screen pixels a pixel; by default enough for 64 an image.

    Returns:
        A grey or RGB picture of 8 bits.

    Raises:
        ValueError: the shape is not as above, a value is NaN, or a number is below 1.
    """
    images = require_images(images)
    count, height, width, channels = images.shape
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if scale is None:
        scale = math.ceil(_VISIBLE_SIZE / max(height, width))
    for name, number in (("columns", columns), ("scale", scale)):
        if number < 1:
            raise ValueError(f"{name}: {number} given, expected at least 1")

    pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    rows, line = math.ceil(count / columns), _SEPARATOR_WIDTH
    cell_height, cell_width = scale * height + line, scale * width + line
    canvas = np.full(
        (rows * cell_height + line, columns * cell_width + line, channels),
        _SEPARATOR_COLOUR,
        np.uint8,
    )
    for index, one in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = row * cell_height + line, column * cell_width + line
        canvas[top : top + scale * height, left : left + scale * width] = one
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def save_png(
    path: str | os.PathLike[str],
    images: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    *,
    private: bool = True,
) -> None:
    """Write `grid(images, columns, scale)` to a PNG file, whole or not at all.

    `private`: see `files.atomic_write`.

    Raises:
        ValueError: as `grid`.
        OSError: the file cannot be written.
    """
    atomic_write(path, png(images, columns, scale), private=private)


def png(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> bytes:
    """`grid(images, columns, scale)` as the bytes of a PNG file.

    Raises:
        ValueError: as `grid`.
    """
    buffer = io.BytesIO()
    grid(images, columns, scale).save(buffer, format="PNG")
    return buffer.getvalue()
