import jax
import msgpack
import numpy as np
import pytest
from flax import serialization
from gans import small_lpgan

from lpgan_jax.training.parameters import load_parameters, parameters_file


@pytest.fixture(scope="module")
def state():
    return small_lpgan().init(np.random.default_rng(0))


@pytest.fixture(scope="module")
def saved(state):
    return parameters_file(state.learnt())


def changed(saved, value, *path):
    """The file with another value at a place; None takes it away."""
    variables = level = serialization.msgpack_restore(saved)
    *path, last = path or ("g", "params", "deconv0", "kernel")
    for name in path:
        level = level[name]
    level[last] = value(level.get(last))
    if level[last] is None:
        del level[last]
    return serialization.msgpack_serialize(variables)


def loaded(content, state, tmp_path):
    file = tmp_path / "p.msgpack"
    file.write_bytes(content)
    return load_parameters(file, state)


def test_what_is_saved_is_loaded(state, saved, tmp_path):
    jax.tree.map(np.testing.assert_array_equal, loaded(saved, state, tmp_path), state.learnt())


def test_a_network_without_statistics_needs_none(tmp_path):
    state = small_lpgan(depth=1).init(np.random.default_rng(0))
    assert state.stats["discriminator"] == {}
    content = changed(parameters_file(state.learnt()), lambda _: None, "d", "batch_stats")
    assert loaded(content, state, tmp_path)["discriminator"]["batch_stats"] == {}


def array(shape, dtype, content):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda v: v * np.nan, "generator: params.deconv0.kernel: expected finite"),
        (lambda v: v + np.inf, "generator: params.deconv0.kernel: expected finite"),
        (lambda v: v.astype(np.complex64), "params.deconv0.kernel: expected finite floating"),
        (lambda v: v.astype(np.int32), "params.deconv0.kernel: expected finite floating"),
        (lambda v: v.tolist(), "deconv0.kernel: expected shape .* got list"),
        (lambda v: "a text", "deconv0.kernel: expected shape .* got str"),
        (lambda v: v[:-1], "deconv0.kernel: expected shape"),
    ],
)
def test_values_that_are_none(state, saved, tmp_path, value, message):
    with pytest.raises(ValueError, match=rf"p\.msgpack: .*{message}"):
        loaded(changed(saved, value), state, tmp_path)


def nothing(_):
    return None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("params", "deconv0"), nothing, "params.deconv0: missing"),
        (("params", "bn1", "scale"), nothing, "params.bn1.scale: missing"),
        (("batch_stats",), nothing, "batch_stats: missing"),
        (("params",), nothing, "params: missing"),
        (("params", "deconv7"), lambda _: {}, "params.deconv7: unknown, expected bn0"),
        (("opt",), lambda _: {}, "opt: unknown, expected params, batch_stats"),
        (
            ("params", "deconv0", "kernel"),
            lambda v: np.swapaxes(v, 2, 3),
            r"params.deconv0.kernel: expected shape \(4, 4, 4, 2\), got \(4, 4, 2, 4\)",
        ),
        (("params", "fc"), lambda _: np.zeros(1), "params.fc: expected kernel, got an array"),
    ],
)
def test_layers_that_do_not_fit_are_named(state, saved, tmp_path, path, value, message):
    with pytest.raises(ValueError, match=rf"p\.msgpack: generator: {message}"):
        loaded(changed(saved, value, "g", *path), state, tmp_path)


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
def test_files_that_are_none(state, tmp_path, content):
    with pytest.raises(ValueError, match=r"p\.msgpack: expected a Flax msgpack file"):
        loaded(content, state, tmp_path)


def test_files_that_are_too_large(state, saved, tmp_path):
    """A byte of such a file may take a hundred of memory."""
    content = b"\xdd" + (10**7).to_bytes(4, "big") + 10**7 * b"\x80"
    with pytest.raises(ValueError, match=r"p\.msgpack: 10000005 bytes, expected at most"):
        loaded(content, state, tmp_path)
    wide = loaded(changed(saved, lambda v: v.astype(np.float64)), state, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, wide, state.learnt())
