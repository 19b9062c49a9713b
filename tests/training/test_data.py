import gzip
import io
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lpgan_jax.training.config import DataConfig
from lpgan_jax.training.data import from_arrays, load_images, load_labels

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)


def config(dataset, path=None, size=32, channels=1, split="train", limit=None):
    return DataConfig(
        dataset=dataset,
        path=None if path is None else str(path),
        split=split,
        image_size=size,
        channels=channels,
        limit=limit,
    )


def idx_bytes(pixels, magic=0x803):
    return struct.pack(">4I", magic, *pixels.shape) + pixels.tobytes()


def expected(pixels):
    """PIXELS centred on black 32x32 squares, one pixel at a time."""
    result = np.full((len(pixels), 32, 32, 1), -1.0)
    for n, y, x in np.ndindex(pixels.shape):
        result[n, y + 2, x + 2, 0] = pixels[n, y, x] / 255 * 2 - 1
    return result


def assert_images(images, wanted):
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, wanted, atol=1e-6)


# Digits


def test_digits():
    from sklearn.datasets import load_digits

    small = load_images(config("digits", size=8))
    assert_images(small, load_digits().images[..., None] / 8 - 1)
    large = load_images(config("digits", size=16))
    assert large.shape == (1797, 16, 16, 1)
    assert large.dtype == np.float32
    assert large.min() >= -1
    assert large.max() <= 1
    # Bilinear at twice the size: each new pixel is 3/4 and 1/4 of its neighbours, along each axis.
    wide = np.pad(small[0, :, :, 0], 1, mode="edge")
    for y, x in np.ndindex(16, 16):
        cy, cx = y // 2 + 1, x // 2 + 1
        ny, nx = cy + (1 if y % 2 else -1), cx + (1 if x % 2 else -1)
        near = 9 * wide[cy, cx] + 3 * wide[ny, cx] + 3 * wide[cy, nx] + wide[ny, nx]
        assert large[0, y, x, 0] == pytest.approx(near / 16, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4}, "digits: images of 8x8, expected at most 4x4"),
        ({"channels": 3}, "digits: images of 1 channels, expected 3"),
        ({"split": "test"}, "data.split: 'test' given, expected 'train'"),
    ],
)
def test_digits_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        load_images(config("digits", **{"size": 16, **fields}))


# IDX


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("split", "name"), [("train", "train-images-idx3-ubyte"), ("test", "t10k-images-idx3-ubyte")]
)
def test_idx(tmp_path, pack, split, name):
    file = tmp_path / (name + (".gz" if pack is gzip.compress else ""))
    file.write_bytes(pack(idx_bytes(PIXELS)))
    assert_images(load_images(config("idx", tmp_path, split=split)), expected(PIXELS))
    assert_images(load_images(config("idx", file)), expected(PIXELS))


def test_odd_borders(tmp_path):
    (tmp_path / "file").write_bytes(idx_bytes(np.full((1, 5, 8), 255, np.uint8)))
    image = load_images(config("idx", tmp_path / "file", size=8))[0, :, :, 0]
    np.testing.assert_array_equal(image, np.repeat([-1, 1, -1], [1, 5, 2])[:, None] * np.ones(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected an IDX header of 16"),
        (idx_bytes(PIXELS)[:15], "15 bytes, expected an IDX header of 16"),
        (idx_bytes(PIXELS)[:-1], "3935 bytes, expected 3936 for the 5 x 28 x 28 pixels"),
        (idx_bytes(PIXELS) + b"x", "more than 3936 bytes, expected 3936"),
        (idx_bytes(PIXELS, magic=0x801), "magic number 0x801, expected 0x803"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "magic number 0x89504e47"),
        (gzip.compress(idx_bytes(PIXELS))[:-20], "expected a whole gzip file"),
        (b"\x1f\x8b" + bytes(30), "expected a whole gzip file"),
        (
            struct.pack(">4I", 0x803, *[2**32 - 1] * 3),
            "79228162458924105385300197375 bytes, expected at",
        ),
        (struct.pack(">4I", 0x803, 0, *[2**32 - 1] * 2), "array is too big"),
        (idx_bytes(PIXELS[:0]), r"uint8\[0, 28, 28\] given, expected \[N, H, W\]"),
        (idx_bytes(np.zeros((1, 33, 28), np.uint8)), "33x28, expected at most 32x32"),
    ],
)
def test_bad_idx(tmp_path, content, message):
    file = tmp_path / "some-images"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"some-images: .*{message}"):
        load_images(config("idx", file))


def deflated(data):
    """What unfolds to the data, and may be followed by more."""
    squeeze = zlib.compressobj(wbits=-15)
    return squeeze.compress(data) + squeeze.flush(zlib.Z_FULL_FLUSH)


def zeros(size):
    """What unfolds to so many zero bytes; a thousandth of them."""
    return size // 2**20 * deflated(bytes(2**20))


@contextmanager
def little_memory():
    """Fails if more than a few megabytes are taken."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


GIGABYTES = 5 * 2**30


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((GIGABYTES // 2**20, 2**10, 2**10), "5368709120 bytes, expected at most 4294967296"),
        ((5, 28, 28), "more than 3936 bytes, expected 3936 for the 5 x 28 x 28 pixels"),
        ((4000, 2**10, 2**10), "expected a whole gzip file"),  # announced, but not there
    ],
)
def test_idx_that_unfolds_to_more_than_it_may(tmp_path, shape, message):
    file = tmp_path / "images"
    head = struct.pack(">4I", 0x803, *shape)
    content = zeros(2**21 if shape[0] == 4000 else GIGABYTES)
    file.write_bytes(b"\x1f\x8b\x08" + bytes(7) + deflated(head) + content)
    with little_memory(), pytest.raises(ValueError, match=f"images: .*{message}"):
        load_images(config("idx", file))


def test_missing_idx(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        load_images(config("idx", tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"expected train-images-idx3-ubyte or .*\.gz"):
        load_images(config("idx", tmp_path))
    with pytest.raises(ValueError, match=r"data\.split: 'val' given, expected one of train, test"):
        load_images(config("idx", tmp_path, split="val"))


# npz


def test_npz(tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    file = tmp_path / "some.npz"
    np.savez_compressed(file, train_images=PIXELS, val_images=colours)
    assert_images(load_images(config("npz", file)), expected(PIXELS))
    assert_images(load_images(config("npz", file, channels=3, split="val")), colours / 127.5 - 1)
    with pytest.raises(ValueError, match=r"some\.npz: images of 1 channels, expected 3"):
        load_images(config("npz", file, channels=3))
    with pytest.raises(ValueError, match=r"expected an array 'x_images'.*train_images, val_images"):
        load_images(config("npz", file, split="x"))
    with pytest.raises(FileNotFoundError, match=r"other\.npz: no such file"):
        load_images(config("npz", tmp_path / "other.npz"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (PIXELS.astype(np.float32), "train_images is float32, expected uint8"),
        (PIXELS[0], r"uint8\[28, 28\] given, expected \[N, H, W\]"),
        (np.zeros((1, 8, 8, 2), np.uint8), r"uint8\[1, 8, 8, 2\] given"),
        (np.array([{"code": "runs"}]), "expected a whole npz file of plain arrays"),
    ],
)
def test_bad_arrays_in_npz(tmp_path, array, message):
    np.savez(tmp_path / "some.npz", train_images=array)
    with pytest.raises(ValueError, match=rf"some\.npz: .*{message}"):
        load_images(config("npz", tmp_path / "some.npz"))


def npy(shape, dtype="|u1"):
    """The head of an npy file."""
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head.encode()


def write_zip(file, name, announced, *chunks, method=8):
    """A zip file with one member, whose sizes and sums are whatever is announced."""
    content = b"".join(chunks)
    common = struct.pack("<5HI", 45, 0, method, 0, 0, 0) + struct.pack("<II", 2**32 - 1, 2**32 - 1)
    sizes = struct.pack("<HHQQ", 1, 16, announced, len(content))
    local = b"PK\3\4" + common + struct.pack("<HH", len(name), 20) + name + sizes
    central = b"PK\1\2" + struct.pack("<H", 45) + common
    central += struct.pack("<5H2I", len(name), 20, 0, 0, 0, 0, 0) + name + sizes
    start = len(local) + len(content)
    end = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 1, 1, len(central), start, 0)
    file.write_bytes(local + content + central + end)


@pytest.mark.parametrize(
    ("announced", "shape", "message"),
    [
        (GIGABYTES, (GIGABYTES // 784, 28, 28), "5368709120 bytes, expected at most 4294967296"),
        (128 + 784, (1, 28, 28), "Bad CRC"),
        (2**30, (GIGABYTES // 784, 28, 28), "1073741824 bytes, expected 128 and"),
        (2**30, (1, 28, 28), "1073741824 bytes, expected 128 and 784"),
        (2**31, "'a' * 10**9", "malformed node"),
    ],
)
def test_npz_that_unfolds_to_more_than_it_may(tmp_path, announced, shape, message):
    file = tmp_path / "some.npz"
    write_zip(file, b"train_images.npy", announced, deflated(npy(shape)), zeros(GIGABYTES))
    wanted = rf"some\.npz: expected a whole npz file of plain arrays: .*{message}"
    with little_memory(), pytest.raises(ValueError, match=wanted):
        load_images(config("npz", file))


def test_npz_that_is_compressed_as_numpy_does_not(tmp_path):
    content = io.BytesIO()
    np.save(content, np.zeros((1, 28, 28), np.uint8))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # a few bytes of which unfold to megabytes
        with zipfile.ZipFile(tmp_path / "some.npz", "w", method) as members:
            members.writestr("train_images.npy", content.getvalue())
        with pytest.raises(ValueError, match=r"some\.npz: .*compressed as NumPy does not"):
            load_images(config("npz", tmp_path / "some.npz"))


@settings(max_examples=300)
@given(st.data())
def test_damaged_npz(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "damaged.npz"
    np.savez_compressed(file, train_images=PIXELS[:1, :9, :9])
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    message = None
    try:
        images = load_images(config("npz", file, size=9))
    except ValueError as error:
        message = str(error)
    if message is None:  # a flip in a field that no reader needs, such as a date, does no harm
        assert_images(images[..., 0], PIXELS[:1, :9, :9] / 127.5 - 1)
    else:
        assert str(file) in message


def test_a_single_array_is_no_npz(tmp_path):
    np.save(tmp_path / "some.npy", PIXELS)
    with pytest.raises(ValueError, match=r"some\.npy: expected a whole npz file"):
        load_images(config("npz", tmp_path / "some.npy"))


# A user's own arrays


def test_from_arrays():
    assert_images(from_arrays(PIXELS), PIXELS[..., None] / 127.5 - 1)
    bytes_ends = from_arrays(np.array([[[0, 255]]], np.uint8))
    np.testing.assert_array_equal(bytes_ends.ravel(), [-1, 1])
    floats = np.linspace(-1, 1, 24).reshape(2, 2, 2, 3)
    assert_images(from_arrays(floats), floats)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 2)), r"float64\[2, 2\] given, expected \[N, H, W\]"),
        (np.zeros((1, 2, 2, 1, 1)), "expected"),
        (np.zeros((1, 2, 2, 4)), "expected"),
        (np.zeros((0, 2, 2)), "N >= 1"),
        (np.zeros((1, 2, 2), np.int64), r"int64\[1, 2, 2\] given, expected uint8 or floating"),
        (np.zeros((1, 2, 2), bool), "expected uint8 or floating"),
        (np.array([[[0, np.nan]]]), "NaN or outside"),
        (np.array([[[0, np.inf]]]), "NaN or outside"),
        (np.array([[[0, 1.01]]]), r"outside the expected range \[-1, 1\]"),
    ],
)
def test_from_arrays_refuses(images, message):
    with pytest.raises(ValueError, match=f"images: .*{message}"):
        from_arrays(images)


# CIFAR-10


def write_cifar10(folder, count=3):
    """Batches as the Python version has them; returns its images [N, 32, 32, 3] and classes."""
    rng = np.random.default_rng(1)
    images, classes = [], []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        image = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        label = rng.integers(0, 10, count).tolist()
        planes = [image[:, :, :, c].reshape(count, 1024) for c in range(3)]  # red, green, blue
        batch = {b"data": np.concatenate(planes, axis=1), b"labels": label, b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        images.append(image)
        classes += label
    return np.concatenate(images), np.array(classes)


def test_cifar10(tmp_path):
    images, classes = write_cifar10(tmp_path)
    for split, part in (("train", slice(15)), ("test", slice(15, 18))):
        of = config("cifar10", tmp_path, channels=3, split=split)
        assert_images(load_images(of), images[part] / 255 * 2 - 1)
        np.testing.assert_array_equal(load_labels(of), classes[part])


def labelled(labels):
    return {b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a pickle was run')",))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Evil(), r"refused to load __builtin__\.exec"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, r"data of uint8\[2, 3071\]"),
        (
            {b"data": np.zeros((2, 3072), np.int64), b"labels": [0, 1]},
            "an array that is not of uint8",
        ),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "data of uint8"),
        ({b"labels": [0]}, "expected a dict with an array 'data'"),
        ([1, 2], "expected a dict with an array 'data'"),
        ({b"data": b"1", b"labels": [0]}, "expected a dict with an array 'data'"),
        (labelled((3, 4)), "a list 'labels'"),
        (labelled(np.array([3, 4], np.uint8)), r"none of an array uint8\[rows, columns\]"),
        (labelled([3, 10]), "labels: expected integers from 0 to 9"),
        (labelled([3, -1]), "labels: expected integers from 0 to 9"),
        (labelled([3, True]), "labels: expected integers from 0 to 9"),
        (labelled([3, b"4"]), "labels: expected integers from 0 to 9"),
    ],
)
def test_bad_cifar10(tmp_path, batch, message):
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match=f"data_batch_3: expected a batch .*{message}"):
        load_images(config("cifar10", tmp_path, channels=3))


class Restored:
    """Unpickled, what a function returns for these arguments, then given the state."""

    def __init__(self, function, arguments, state):
        self.made = (function, arguments, state)

    def __reduce__(self):
        return self.made


def test_bytes_of_a_pickle_do_not_become_pointers(tmp_path):
    """A dtype that says it has no objects, but has: NumPy believes it, and follows the bytes."""
    fields = {"a": (np.dtype("O"), 0)}
    dtype = Restored(np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0))
    state = (1, (2,), dtype, False, struct.pack("<2Q", 0x4141414141, 0x4242424242))
    reconstruct, arguments, _ = np.zeros(1).__reduce__()
    batch = labelled(Restored(reconstruct, arguments, state))
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(batch, protocol=2))
    program = """if True:
        import sys
        from lpgan_jax.training.config import DataConfig
        from lpgan_jax.training.data import load_labels
        of = DataConfig(dataset="cifar10", path=sys.argv[1], image_size=32, channels=3)
        try:
            load_labels(of)
        except ValueError as error:
            print(error)
    """
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.returncode
    assert "data_batch_1: expected a batch of CIFAR-10's Python version" in run.stdout


def test_missing_and_cut_cifar10(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_batch_1: no such file"):
        load_images(config("cifar10", tmp_path, channels=3))
    write_cifar10(tmp_path)
    file = tmp_path / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="data_batch_2: expected a batch of CIFAR-10's"):
        load_images(config("cifar10", tmp_path, channels=3))
    with file.open("wb") as stream:
        stream.truncate(2**26 + 1)
    with pytest.raises(ValueError, match=r"data_batch_2: expected a batch .* more than 67108864"):
        load_images(config("cifar10", tmp_path, channels=3))
    with pytest.raises(ValueError, match=r"split: 'val' given, expected one of train, test"):
        load_images(config("cifar10", tmp_path, channels=3, split="val"))


# Folders of pictures


def test_folder_crops_to_the_central_square_and_resizes(tmp_path):
    # Left and right thirds are red; the central square is green above and blue below.
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :10] = picture[:, 50:] = [255, 0, 0]
    picture[:20, 10:50], picture[20:, 10:50] = [0, 255, 0], [0, 0, 255]
    (tmp_path / "b").mkdir()
    Image.fromarray(picture).save(tmp_path / "b" / "2.png")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("not a picture")
    images = load_images(config("folder", tmp_path, size=8, channels=3))
    assert images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(images[0], np.ones((8, 8, 3)))  # a.jpg comes first
    # The filter mixes what lies beside the square into its outermost columns.
    np.testing.assert_array_equal(images[1, :3, 1:-1], np.full((3, 6, 3), [-1, 1, -1]))
    np.testing.assert_array_equal(images[1, 5:, 1:-1], np.full((3, 6, 3), [-1, -1, 1]))
    assert np.all(images[1, :, :, 0] < -0.5)
    grey = load_images(config("folder", tmp_path, size=8, limit=1))
    np.testing.assert_array_equal(grey, np.ones((1, 8, 8, 1)))
    assert load_labels(config("folder", tmp_path)) is None


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_images(config("folder", tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no pictures, expected \.jpeg, \.jpg, \.png"):
        load_images(config("folder", tmp_path))
    deep = Image.fromarray(np.full((8, 8), 40000, np.uint16))
    deep.save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: .*pixels of more than 8 bits"):
        load_images(config("folder", tmp_path))
    (tmp_path / "deep.png").unlink()
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"x\.png: expected a whole picture"):
        load_images(config("folder", tmp_path))


def png_chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def test_pictures_that_unfold_to_more_than_they_may(tmp_path):
    head = png_chunk(b"IHDR", struct.pack(">2I5B", 9000, 8000, 8, 0, 0, 0, 0))
    body = png_chunk(b"IDAT", b"\x78\x9c" + zeros(72 * 2**20))
    signature = b"\x89PNG\r\n\x1a\n"
    (tmp_path / "a.png").write_bytes(signature + head + body)
    with (
        little_memory(),
        pytest.raises(ValueError, match=r"a\.png: .*9000x8000 pixels, expected at most 67108864"),
    ):
        load_images(config("folder", tmp_path))
    head = png_chunk(b"IHDR", struct.pack(">2I5B", 8, 8, 8, 0, 0, 0, 0))
    text = png_chunk(b"zTXt", b"a\0\0\x78\x9c" + zeros(2**30))
    (tmp_path / "a.png").write_bytes(signature + head + text)
    with little_memory(), pytest.raises(ValueError, match=r"a\.png: expected a whole picture"):
        load_images(config("folder", tmp_path))


def test_only_png_and_jpeg_are_read(tmp_path):
    """Pillow would run Ghostscript on what begins like EPS, whatever the file's name."""
    for kind in ("EPS", "TIFF", "GIF"):
        Image.new("L", (8, 8)).save(tmp_path / "a.png", format=kind)
        with pytest.raises(ValueError, match=r"a\.png: .*cannot identify image file"):
            load_images(config("folder", tmp_path))


# Labels


def test_labels(tmp_path):
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal(load_labels(config("digits")), load_digits().target)
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    packed = struct.pack(">2I", 0x801, 5) + labels.tobytes()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(packed)
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(idx_bytes(PIXELS))
    for path in (tmp_path, images):  # the directory, or the file of images
        np.testing.assert_array_equal(load_labels(config("idx", path)), labels)
    np.savez(tmp_path / "a.npz", train_images=PIXELS, train_labels=labels[:, None])
    npz = config("npz", tmp_path / "a.npz", limit=3)
    np.testing.assert_array_equal(load_labels(npz), labels[:3])
    assert load_labels(npz).dtype == np.int64
    np.savez(tmp_path / "wide.npz", train_labels=labels.astype(np.int64))
    np.testing.assert_array_equal(load_labels(config("npz", tmp_path / "wide.npz")), labels)
    np.savez(tmp_path / "real.npz", train_labels=labels / 2)
    with pytest.raises(ValueError, match=r"train_labels is float64, expected integers"):
        load_labels(config("npz", tmp_path / "real.npz"))
    assert len(load_images(npz)) == 3
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(packed[:-1])
    with pytest.raises(ValueError, match="12 bytes, expected 13 for the 5 labels"):
        load_labels(config("idx", tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(PIXELS))
    with pytest.raises(ValueError, match="magic number 0x803, expected 0x801, IDX labels"):
        load_labels(config("idx", tmp_path))
