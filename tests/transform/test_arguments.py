"""What is public, secret and static; types; and what is refused, with what to write instead."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from secured import FAST, LSB

import lpgan_jax as lp
from lpgan_jax.transform.graph import NotSecure

X = np.random.default_rng(1).normal(size=(3, 4))


class Batch(NamedTuple):
    images: np.ndarray
    rate: float


class Optimizer(NamedTuple):
    schedule: optax.ScaleByScheduleState
    decay: np.ndarray
    count: np.ndarray  # of something else than steps: secret


STATE = {
    "w": X,
    "b": np.zeros(2),
    "opt_state": [
        Optimizer(optax.ScaleByScheduleState(np.int32(3)), np.float64(0.5), np.arange(3)),
        X[0],
    ],
    "count": np.int32(7),
    "opt_state.secret": X[0],
}


def update(state, batch, *others):
    rate = batch.rate * state["opt_state"][0].decay
    return state["w"] - rate * batch.images + sum(others)


@pytest.mark.parametrize(
    ("public", "found"),
    [
        ((), []),
        (("batch.rate",), ["batch.rate"]),
        (("state['w']",), ["state['w']"]),
        (("state.w",), ["state['w']"]),
        (("state.opt_state[0].decay",), ["state['opt_state'][0].decay"]),
        (
            ("state['opt_state'][0]",),
            ["state['opt_state'][0].decay", "state['opt_state'][0].count"],
        ),
        (("state['count']",), ["state['count']"]),
        (
            ("state.opt_state",),
            [
                "state['opt_state'][0].decay",
                "state['opt_state'][0].count",
                "state['opt_state'][1]",
            ],
        ),
        (("state['opt_state.secret']",), ["state['opt_state.secret']"]),
        ((1,), ["batch.images", "batch.rate"]),
        (("others[1]",), ["others[1]"]),
        (("others", "batch.rate"), ["batch.rate", "others[0]", "others[1]"]),
    ],
)
def test_what_is_public(public, found):
    step = lp.secure(update, public=public)
    leaves = step.program(STATE, Batch(X, 0.1), X, X).leaves
    steps = "state['opt_state'][0].schedule.count"  # of an optax state
    assert {leaf.name for leaf in leaves if leaf.public} == {*found, steps}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"public": ("ratee",)}, r"public: there is no 'ratee' among the arguments: batch.images,"),
        ({"public": ("batch.rat",)}, "public: there is no 'batch.rat'.*batch.images, batch.rate$"),
        ({"public": (1,)}, "public: there is no 1 among"),
        (
            {"static": ("batch.rate",)},
            "static: there is no 'batch.rate' among the arguments: batch$",
        ),
    ],
)
def test_what_is_declared_must_be_there(options, message):
    with pytest.raises(ValueError, match=message):
        lp.secure(lambda batch: batch.images * batch.rate, **options).program(Batch(X, 0.1))


def test_a_name_alone_is_no_sequence():
    with pytest.raises(TypeError, match=r"public: expected a sequence of names, such as \('x',\)"):
        lp.secure(lambda x: x, public="x")


def test_static_arguments():
    calls = []

    def function(x, power, how="sum"):
        calls.append((power, how))
        return getattr(jnp, how)(x**power)

    step = lp.secure(function, static=("power", 2))
    shared = step.share(lp.key(1), X, 2, "mean")
    assert shared[1:] == (2, "mean")
    out = FAST(step, static_argnums=(2, 3))(lp.key(2), *shared)
    assert abs(lp.reveal(out) - (X**2).mean()) < 2 * LSB
    step.program(X, 3, "mean")
    step.program(X, 2, "mean")
    assert step.program(X, 1.0, "mean") is not step.program(X, True, "mean")  # though 1.0 == True
    assert calls[:2] == [(2, "mean"), (3, "mean")]  # one program each
    with pytest.raises(TypeError, match="power: a static argument must have a hash; list has none"):
        step.program(X, [2], "mean")
    with pytest.raises(TypeError, match="power: a static argument is being traced"):
        jax.jit(step, static_argnums=3)(lp.key(2), *shared)


def test_integers_and_booleans_keep_their_type():
    def function(x, flag, label):
        one_hot = jax.nn.one_hot(label, 4)
        return jnp.where(flag, x, -x), one_hot, label + 1, flag & (x[0] > 0), x > label

    step = lp.secure(function)
    args = X[0], np.array([True, False, True, False]), np.array([3, 0, 1, 3], np.int64)
    shared = step.share(lp.key(1), *args)
    assert [s.dtype for s in shared] == [np.float32, bool, np.int32]
    assert step.program(*shared) is step.program(*args)
    got = lp.reveal(FAST(step)(lp.key(2), *shared))
    for value, want in zip(got, function(*map(jnp.asarray, args)), strict=True):
        assert value.dtype == want.dtype
        assert np.abs(np.asarray(value, float) - np.asarray(want, float)).max() < LSB


def test_large_types_are_traced_in_32_bits():
    step = lp.secure(lambda x, n, m: (x, n, m), public=("m",))
    args = X, np.arange(3, dtype=np.int64), np.arange(3, dtype=np.uint64)
    leaves = step.program(*args).leaves
    assert [str(leaf.dtype) for leaf in leaves] == ["float32", "int32", "uint32"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X + 1j, r"x\[0\]: complex128 given: hand in the real and the imaginary part"),
        ("text", r"x\[0\]: str given, expected an array of numbers"),
        (jax.random.key(0), r"x\[0\]: a key cannot be secret"),
    ],
)
def test_what_is_no_array_of_numbers(value, message):
    with pytest.raises(TypeError, match=message):
        lp.secure(lambda x: x).program([value])


def test_plain_values_where_shares_belong():
    step = lp.secure(lambda x: x + 1)
    with pytest.raises(TypeError, match="x: secret, but not shared: hand in what share gives"):
        step(lp.key(1), X)


def test_empty_arrays():
    step = lp.secure(lambda x, w: (x.sum(0), x @ w, x * x, jnp.concatenate([x, w.T])))
    args = np.zeros((0, 4)), np.ones((4, 3))
    want = np.zeros(4), np.zeros((0, 3)), np.zeros((0, 4)), np.ones((3, 4))
    got = lp.reveal(FAST(step)(lp.key(2), *step.share(lp.key(1), *args)))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_what_a_public_key_generates_is_public():
    """Dropout: all know which units rest, and JAX's own are the same ones."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(x)

    def function(x, key):
        return Net().apply({}, x, rngs={"dropout": key}) + jax.random.normal(key, x.shape)

    step = lp.secure(function, public=("key",))
    key = jax.random.key(3)
    got = lp.reveal(FAST(step)(lp.key(2), *step.share(lp.key(1), X, key)))
    with jax.enable_x64(False):
        want = function(jnp.asarray(X, jnp.float32), key)
    assert np.abs(got - want).max() < 4 * LSB


def test_what_is_closed_over_is_listed():
    weights = np.arange(8.0).reshape(4, 2)
    step = lp.secure(lambda x, rate: (x @ weights) * rate, public=("rate",))
    table = step.explain(X, 0.5)
    assert table.public == ("rate", "a constant float32[4, 2] of the program")
    assert "Public: rate, a constant float32[4, 2] of the program. All" in str(table)


def test_a_public_key_is_none_that_makes_masks():
    step = lp.secure(lambda x, key: x + jax.random.normal(key, x.shape), public=("key",))
    with pytest.raises(TypeError, match="key: a public ChaCha20 key: who knows DS's keys knows"):
        step.share(lp.key(1), X, lp.key(1))


def test_a_state_that_becomes_public_stays_shared():
    """A flag of `apply_if_finite`, which is known to be true."""
    optimizer = optax.apply_if_finite(optax.sgd(0.1), 3)

    def function(state, grad):
        return optimizer.update(grad, state)[::-1]

    state = optimizer.init(jnp.asarray(X))
    step = lp.secure(function, carry={0: 0})
    shared, grad = step.share(lp.key(1), state, X)
    state, updates = step(lp.key(2), shared, grad)
    assert jax.tree.structure(state) == jax.tree.structure(shared)
    assert np.abs(lp.reveal(updates) + 0.1 * X).max() < 2 * LSB
    assert bool(lp.reveal(state).last_finite)


def test_a_carry_cannot_become_secret():
    step = lp.secure(lambda n, x: n + x.sum(), public=("n",), carry={0: 0})
    with pytest.raises(ValueError, match="carry: n is public, but what follows it is secret"):
        step.program(0.0, X)


# What is refused ----------------------------------------------------------------------------------


def branches(x):
    if x[0, 0] > 0:
        return x
    return -x


def loops(x):
    for _ in range(x[0, 0].astype(int)):
        x = x + 1
    return x


def noise(x):
    return x + jax.random.normal(jax.random.key(0), x.shape)


def printed(x):
    jax.debug.print("x {x}", x=x)
    return x


KEY = jax.random.key(4)
SMALL, LARGE = jnp.eye(4), np.ones((4, 2000))


class Triangular(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.linalg.cholesky(x.T @ x)


REFUSED = [
    (branches, r"a secret decides what is done \(if.*: select with jnp.where.*\(branches\)"),
    (lambda x: x if x[0, 0] > 0 and x[0, 1] > 0 else -x, "a secret decides what is done"),
    (lambda x: x[bool(x[0, 0])], "a secret decides what is done.*jax.lax.cond"),
    (loops, r"taken as a Python integer.*static argument \(static=\).*\(loops\)"),
    (lambda x: x * int(x[0, 0]), "a secret is taken as a number that must be known"),
    (lambda x: x * float(x[0, 0]), "a secret is taken as a number that must be known"),
    (lambda x: jnp.zeros(x[0, 0].astype(int)), "a secret as a size of an array"),
    (lambda x: jnp.arange(x[0, 0]), "a secret is taken as a number that must be known"),
    (lambda x: [1, 2, 3][x[0, 0].astype(int)], "taken as a Python integer.*one_hot"),
    (lambda x: np.tanh(x), r"taken as a NumPy array: use jax.numpy .*<lambda>"),
    (lambda x: x[x > 0], "a secret mask as an index.*multiply with the mask"),
    (noise, r"random_seed: a key that is made inside: draw outside.*\(noise\)"),
    (lambda x: x + jax.random.normal(KEY, x.shape), "closes over a key: make it a public argument"),
    (printed, r"debug_print: there is no host inside: return the value.*\(printed\)"),
    (lambda x: jax.pure_callback(np.sin, x, x), "pure_callback: there is no host inside"),
    (lambda x: Triangular().apply({}, x), r"cholesky: there is no such operation.*: use products"
     r".*\(Triangular at .*test_arguments.py:\d+ \(Triangular.__call__\)\)"),
    (lambda x: jnp.abs(jnp.fft.fft(x)), r"fft: .* real and the imaginary part of jnp.fft.fft\("),
    (lambda x: jnp.abs(x + 1j * x), "complex: secrets are real numbers: keep real and"),
    (lambda x: x.astype(int) >> 1, "shift_right_arithmetic: .* a secret's bits are not at hand"),
    (lambda x: jax.lax.lgamma(x), "lgamma: .*write it with the operations of docs"),
    (
        lambda x: x[x[:, 0].astype(int), x[:, 1].astype(int)],
        "gather: a secret index: one may name whole rows .*one_hot",
    ),
    (lambda x: jax.lax.dynamic_slice(x, (x[0, 0].astype(int), 0), (1, 4)), "a secret index"),
    (
        lambda x: jax.lax.while_loop(lambda v: v.sum() < 9, lambda v: v * 2, x),
        "while_loop: whether it goes on is not known",
    ),
    (lambda x: x @ jnp.asarray(LARGE), "closes over an array of shape .*make it an argument"),
    (lambda x: jax.lax.fori_loop(0, x[0, 0].astype(int), lambda i, v: v * 2, x), "while_loop"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "message"), REFUSED)
def test_refusals(function, message):
    step = lp.secure(function)
    with pytest.raises(NotSecure, match=message):
        lp.cost(step, X)


def test_what_is_public_may_decide_if_it_is_static():
    def function(x, training):
        return x * 2 if training else x

    with pytest.raises(NotSecure, match=r"a secret decides.*static argument \(static=\)"):
        lp.secure(function, public=("training",)).program(X, True)
    lp.secure(function, static=("training",)).program(X, True)
