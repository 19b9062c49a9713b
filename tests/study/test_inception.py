import sys
import tracemalloc
import zipfile
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpgan_jax.study.inception import average_pool, inception_features, load_inception, resize


def stem():
    return {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }


def block_5(size, pool):
    return {
        "branch1x1": (64, size, 1, 1),
        "branch5x5_1": (48, size, 1, 1),
        "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, size, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pool, size, 1, 1),
    }


def block_6a():
    return {
        "branch3x3": (384, 288, 3, 3),
        "branch3x3dbl_1": (64, 288, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    }


def block_6(inner):
    return {
        "branch1x1": (192, 768, 1, 1),
        "branch7x7_1": (inner, 768, 1, 1),
        "branch7x7_2": (inner, inner, 1, 7),
        "branch7x7_3": (192, inner, 7, 1),
        "branch7x7dbl_1": (inner, 768, 1, 1),
        "branch7x7dbl_2": (inner, inner, 7, 1),
        "branch7x7dbl_3": (inner, inner, 1, 7),
        "branch7x7dbl_4": (inner, inner, 7, 1),
        "branch7x7dbl_5": (192, inner, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    }


def block_7a():
    return {
        "branch3x3_1": (192, 768, 1, 1),
        "branch3x3_2": (320, 192, 3, 3),
        "branch7x7x3_1": (192, 768, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    }


def block_7(size):
    return {
        "branch1x1": (320, size, 1, 1),
        "branch3x3_1": (384, size, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, size, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, size, 1, 1),
    }


BLOCKS = {
    "Mixed_5b": block_5(192, 32),
    "Mixed_5c": block_5(256, 64),
    "Mixed_5d": block_5(288, 64),
    "Mixed_6a": block_6a(),
    "Mixed_6b": block_6(128),
    "Mixed_6c": block_6(160),
    "Mixed_6d": block_6(160),
    "Mixed_6e": block_6(192),
    "Mixed_7a": block_7a(),
    "Mixed_7b": block_7(1280),
    "Mixed_7c": block_7(2048),
}
KERNELS = stem() | {
    f"{block}.{layer}": shape for block, layers in BLOCKS.items() for layer, shape in layers.items()
}
CONV, POOL = "Conv2d_2b_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"


def uniform(stream, shape):
    """Values in [-1, 1) that do not depend on NumPy's version."""
    raw = stream.random_raw(int(np.prod(shape))) >> np.uint64(40)
    return (raw.astype(np.float32) / np.float32(2**23) - 1).reshape(shape)


@pytest.fixture(scope="module")
def state():
    """A random state dict, with the classifier and the counters that are in the true one."""
    stream, arrays = np.random.Philox(1), {}
    for layer, shape in KERNELS.items():
        gain = np.float32(np.sqrt(6 / np.prod(shape[1:])))
        arrays[f"{layer}.conv.weight"] = gain * uniform(stream, shape)
        arrays[f"{layer}.bn.weight"] = 1 + uniform(stream, shape[0]) / 2
        arrays[f"{layer}.bn.bias"] = uniform(stream, shape[0]) / 2
        arrays[f"{layer}.bn.running_mean"] = uniform(stream, shape[0]) / 2
        arrays[f"{layer}.bn.running_var"] = 1 + uniform(stream, shape[0]) / 2
        arrays[f"{layer}.bn.num_batches_tracked"] = np.asarray(0)
    return arrays | {"fc.weight": np.zeros((1008, 2048)), "fc.bias": np.zeros(1008)}


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.npz"
    np.savez(file, **state)
    return load_inception(file)


# Weights


def test_every_parameter_is_taken(weights):
    assert len(KERNELS) == 94
    leaves = jax.tree.leaves(weights)
    assert len(leaves) == 5 * 94
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    # What torchvision counts in its Inception3, less its two classifiers.
    assert sum(leaf.size for leaf in jax.tree.leaves(weights["params"])) == 21_785_568
    assert sum(leaf.size for leaf in jax.tree.leaves(weights["batch_stats"])) == 2 * sum(
        shape[0] for shape in KERNELS.values()
    )


def test_values_go_where_they_belong(state, weights):
    layer = "Mixed_6b.branch7x7_2"
    params, stats = weights["params"][layer], weights["batch_stats"][layer]["bn"]
    for value, name in [
        (params["conv"]["kernel"].transpose(3, 2, 0, 1), "conv.weight"),
        (params["bn"]["scale"], "bn.weight"),
        (params["bn"]["bias"], "bn.bias"),
        (stats["mean"], "bn.running_mean"),
        (stats["var"], "bn.running_var"),
    ]:
        np.testing.assert_array_equal(value, state[f"{layer}.{name}"])


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (CONV, None, "missing"),
        (POOL, None, "missing"),
        (CONV, np.zeros((3, 3, 32, 64), np.float32), r"expected floating-point \[64, 32, 3, 3\]"),
        (POOL, np.zeros((192, 1), np.float32), r"float32\[192, 1\], expected .* \[192\]"),
        (POOL, np.zeros(192, np.int32), r"int32\[192\], expected floating-point"),
        ("AuxLogits.fc.bias", np.zeros(1000), "unknown, expected FID's Inception-v3"),
    ],
)
def test_arrays_that_do_not_fit(state, tmp_path, name, array, message):
    file = tmp_path / "w.npz"
    changed = {key: value for key, value in state.items() if key != name}
    np.savez(file, **changed, **({} if array is None else {name: array}))
    with pytest.raises(ValueError, match=rf"w\.npz: {name}: .*{message}"):
        load_inception(file)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"w\.npz: no such file"):
        load_inception(tmp_path / "w.npz")
    np.savez(tmp_path / "pickled.npz", **{CONV: np.array([{}], object)})
    for name, data in {"cut.npz": b"PK\3\4", "empty.npz": b"", "w.h5": b""}.items():
        (tmp_path / name).write_bytes(data)
    for name, message in {
        "pickled.npz": "expected a whole npz file of plain arrays",
        "cut.npz": "expected a whole npz file of plain arrays",
        "empty.npz": "expected a whole npz file of plain arrays",
        "w.h5": r"expected the suffix \.npz, \.pth or \.pt",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            load_inception(tmp_path / name)


def test_a_pth_file_needs_torch(tmp_path, monkeypatch):
    file = tmp_path / "w.pth"
    file.touch()
    for torch, message in [
        (None, "install it, or convert"),
        (SimpleNamespace(__version__="1.13.1"), r"found 1\.13\.1.* install it, or convert"),
        (SimpleNamespace(__version__="2.9.1+cu128"), r"found 2\.9\.1\+cu128, which a file can"),
    ]:
        monkeypatch.setitem(sys.modules, "torch", torch)
        with pytest.raises(ImportError, match=rf"w\.pth: .* torch, 2\.10 or newer .*{message}"):
            load_inception(file)


def test_weights_that_unfold_to_more_than_they_may(tmp_path, monkeypatch):
    """Two of 2 GiB and a half, in five megabytes."""
    squeeze = zlib.compressobj(wbits=-15)
    chunk = squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    size = 5 * 2**29
    for name in ("w.npz", "w.pth"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_STORED) as file:
            for member in ("a.npy", "b.npy"):
                file.writestr(member, size // 2**20 * chunk)
                info = file.infolist()[-1]
                info.file_size, info.compress_type = size, zipfile.ZIP_DEFLATED
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.10.0"))  # not asked
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=r"w\.pth: .*in all: 5368709120 bytes, expected at most"
        ):
            load_inception(tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"w\.npz: expected a whole npz file"):
            load_inception(tmp_path / "w.npz")
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_torch_runs_no_code_from_the_file(tmp_path, monkeypatch, state, weights):
    file, answers = tmp_path / "w.pth", [state, {CONV: RuntimeError()}, [1, 2]]

    def load(path, map_location, weights_only):
        assert (path, map_location, weights_only) == (file, "cpu", True)
        return answers.pop(0)

    file.touch()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=load, __version__="2.10.0+cpu"))
    jax.tree.map(np.testing.assert_array_equal, load_inception(file), weights)
    while answers:
        with pytest.raises(ValueError, match=r"w\.pth: "):
            load_inception(file)


# Pooling and sizes


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (1, 1, 1, 2), (1, 2, 7, 1)])
def test_averages_do_not_count_the_padding(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    wanted = np.empty_like(x)
    for y, z in np.ndindex(shape[1:3]):
        near = x[:, max(y - 1, 0) : y + 2, max(z - 1, 0) : z + 2]
        wanted[:, y, z] = near.mean((1, 2))
    np.testing.assert_allclose(average_pool(jnp.asarray(x)), wanted, rtol=1e-5, atol=1e-6)


def interpolation(side):
    """Weights [299, side] of the old pixels in each new one."""
    weights = np.zeros((299, side))
    for new in range(299):
        old = max((new + 0.5) * side / 299 - 0.5, 0)  # centres lie half a pixel from the corners
        first = int(old)
        weights[new, first] += 1 - (old - first)
        weights[new, min(first + 1, side - 1)] += old - first
    return weights


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (8, 8), (16, 16), (32, 20), (299, 299), (450, 301)]
)
def test_resize_is_bilinear_between_centres(height, width):
    x = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    wanted = np.einsum(
        "iy,jx,nyxc->nijc", interpolation(height), interpolation(width), x, optimize=True
    )
    np.testing.assert_allclose(resize(jnp.asarray(x)), wanted, rtol=0, atol=1e-4)


# Features


def wave(channels):
    """An image [16, 16, channels] in [-1, 1] that does not depend on NumPy's version."""
    y, x, c = np.meshgrid(np.arange(16), np.arange(16), np.arange(channels), indexing="ij")
    return np.sin(0.7 * y + 0.4 * x * (c + 1) + 0.05 * x * y).astype(np.float32)


# Features 98, 354, ... of such images by pytorch-fid 0.3.0, in float64: of each branch some.
GREY = [2.8067, 3.1788, 1.8858, 1.8863, 2.1225, 14.1706, 2.4052, 10.4018]
RGB = [3.0404, 3.4035, 1.6991, 2.0647, 2.4879, 13.6155, 2.5184, 10.0501]


def test_features_are_those_of_pytorch_fid(weights):
    images = np.stack([wave(3), -wave(3), np.repeat(wave(1), 3, axis=-1)]).astype(np.float64)
    features = inception_features(weights, images, batch_size=2)  # the last batch is half full
    assert features.shape == (3, 2048)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features[::2, 98::256], [RGB, GREY], rtol=0, atol=2e-4)


def test_grey_images_and_values_beyond(weights):
    features = inception_features(weights, wave(1)[np.newaxis])
    assert features.shape == (1, 2048)
    np.testing.assert_allclose(features[0, 98::256], GREY, rtol=0, atol=2e-4)
    edges = np.sign(wave(1))[np.newaxis]
    np.testing.assert_array_equal(
        inception_features(weights, 9 * edges), inception_features(weights, edges)
    )


@pytest.mark.parametrize(
    ("images", "batch_size", "message"),
    [
        (np.zeros((2, 8, 8)), 1, r"images: shape \[2, 8, 8\] given"),
        (np.zeros((2, 8, 8, 2)), 1, r"images: shape \[2, 8, 8, 2\] given"),
        (np.zeros((0, 8, 8, 1)), 1, r"images: shape \[0, 8, 8, 1\] given"),
        (np.zeros((2, 8, 8, 1), np.uint8), 1, "images: uint8 given, expected floating point"),
        (np.full((2, 8, 8, 1), np.nan), 1, "images: float64 given, expected .* without NaN"),
        (np.zeros((2, 8, 8, 1)), 0, "batch_size: 0 given, expected at least 1"),
    ],
)
def test_images_that_do_not_fit(weights, images, batch_size, message):
    with pytest.raises(ValueError, match=message):
        inception_features(weights, images, batch_size)
