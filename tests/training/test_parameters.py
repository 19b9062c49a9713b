import msgpack
import numpy as np
import pytest
from flax import serialization

from lpgan_jax.training import config
from lpgan_jax.training.loop import build
from lpgan_jax.training.parameters import load_parameters, save_parameters


@pytest.fixture(scope="module")
def model():
    return build(config.load("digits", ["model.features=4"])).model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    rng = np.random.default_rng(0)
    trees = {
        "generator": model.generator().init(rng),
        "discriminator": model.discriminator().init(rng),
    }
    params, stats = ({name: tree[i] for name, tree in trees.items()} for i in range(2))
    file = tmp_path_factory.mktemp("parameters") / "saved.msgpack"
    save_parameters(file, params, stats)
    return file.read_bytes(), params


def changed(saved, value):
    """The file with another value for one of the parameters."""
    variables = serialization.msgpack_restore(saved[0])
    layer = variables["g"]["params"]["deconv0"]
    layer["kernel"] = value(layer["kernel"])
    return serialization.msgpack_serialize(variables)


def array(shape, dtype, content):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda v: v * np.nan, "generator: deconv0.kernel: expected finite"),
        (lambda v: v + np.inf, "generator: deconv0.kernel: expected finite"),
        (lambda v: v.astype(np.complex64), "generator: deconv0.kernel: expected finite floating"),
        (lambda v: v.astype(np.int32), "generator: deconv0.kernel: expected finite floating"),
        (lambda v: v.tolist(), "deconv0.kernel: expected shape .* got list"),
        (lambda v: "a text", "deconv0.kernel: expected shape .* got str"),
        (lambda v: v[:-1], "deconv0.kernel: expected shape"),
    ],
)
def test_values_that_are_none(model, saved, tmp_path, value, message):
    file = tmp_path / "p.msgpack"
    file.write_bytes(changed(saved, value))
    with pytest.raises(ValueError, match=rf"p\.msgpack: .*{message}"):
        load_parameters(file, model)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\x80",
        900 * b"\x81\xa1a" + b"\x80",
        b"\xdd\xff\xff\xff\xff",
        *(
            msgpack.packb({"g": array(shape, dtype, content)})
            for shape, dtype, content in [
                ((1,), "O", bytes(8)),  # no pointers come out of a file
                ((1,), "O,u1", bytes(9)),
                ((2**40,), "u1", bytes(8)),
                ((2**20,), "V0", b""),
                ((1,), "S2000000000", bytes(8)),
            ]
        ),
    ],
)
def test_files_that_are_none(model, tmp_path, content):
    file = tmp_path / "p.msgpack"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.msgpack: expected a Flax msgpack file"):
        load_parameters(file, model)


def test_files_that_are_too_large(model, saved, tmp_path):
    """A byte of such a file may take a hundred of memory."""
    file = tmp_path / "p.msgpack"
    file.write_bytes(b"\xdd" + (10**7).to_bytes(4, "big") + 10**7 * b"\x80")
    with pytest.raises(ValueError, match=r"p\.msgpack: 10000005 bytes, expected at most"):
        load_parameters(file, model)
    file.write_bytes(changed(saved, lambda v: v.astype(np.float64)))
    loaded, _ = load_parameters(file, model)
    kernel = saved[1]["generator"]["deconv0"]["kernel"]
    np.testing.assert_array_equal(
        loaded["generator"]["deconv0"]["kernel"], kernel.astype(np.float32)
    )
