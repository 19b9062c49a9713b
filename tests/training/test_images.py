import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lpgan_jax.training.images import grid, save_png


@settings(max_examples=60)
@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1, 3]),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_every_pixel_is_where_it_belongs(count, height, width, channels, columns, scale):
    images = np.random.default_rng(count).uniform(-1.2, 1.2, (count, height, width, channels))
    picture = grid(images, columns, scale)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    rows = -(-count // columns)
    cell_height, cell_width = height * scale + 1, width * scale + 1
    assert picture.size == (columns * cell_width + 1, rows * cell_height + 1)
    for x, y in np.ndindex(picture.size):
        (row, top), (column, left) = divmod(y, cell_height), divmod(x, cell_width)
        index = row * columns + column
        if top == 0 or left == 0 or index >= count:
            wanted = np.full(channels, 128)
        else:
            one = images[index, (top - 1) // scale, (left - 1) // scale]
            wanted = np.rint(np.clip(one, -1, 1) * 127.5 + 127.5)
        np.testing.assert_array_equal(np.ravel(picture.getpixel((x, y))), wanted)


def test_small_images_become_visible():
    assert grid(np.zeros((9, 16, 16, 1))).size == (3 * 65 + 1, 3 * 65 + 1)
    assert grid(np.zeros((2, 100, 100, 3))).size == (2 * 101 + 1, 102)


def test_save_png(tmp_path):
    images = np.linspace(-1, 1, 48, dtype=np.float32).reshape(4, 2, 2, 3)
    save_png(tmp_path / "samples" / "some.png", images, columns=2, scale=3)
    with Image.open(tmp_path / "samples" / "some.png") as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(grid(images, 2, 3)))
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["some.png"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4)), r"images: shape \[2, 4, 4\] given, expected \[N, H, W, 1 or 3\]"),
        (np.zeros((2, 4, 4, 2)), r"images: shape \[2, 4, 4, 2\] given"),
        (np.zeros((0, 4, 4, 1)), "N >= 1"),
        (np.full((1, 1, 1, 1), np.nan), "without NaN"),
        (np.zeros((1, 1, 1, 1), np.uint8), "uint8 given, expected floating point"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        grid(images)


@pytest.mark.parametrize("name", ["columns", "scale"])
def test_bad_numbers(name):
    with pytest.raises(ValueError, match=f"{name}: 0 given, expected at least 1"):
        grid(np.zeros((1, 2, 2, 1)), **{name: 0})
