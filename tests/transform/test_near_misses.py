"""Functions that look like an idiom which has a cheaper form, and are none; and others that are
easily taken for something else: in the clear, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secured import LSB, as_float64, close

import lpgan_jax as lp
from lpgan_jax.mpc import exact
from lpgan_jax.transform.graph import NotSecure

RNG = np.random.default_rng(8)
X, Y = RNG.normal(size=(2, 3, 3))
V = np.abs(Y) + 1.5
ROWS = np.array([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]])
MASK = jnp.tril(jnp.ones((3, 3), bool))
N = np.array([5, -7, 12])


def close_eagerly(function, *args, lsb=8.0, **options):
    """As `secured.close_in_the_clear`, without a compilation; in proportion to what is above 1."""
    step = lp.secure(function, **options)
    program = step.program(*args)
    secret, public = step._parted(args)
    public = program.public(public)
    secrets = [exact.scaled(v, s) for v, s in zip(secret, program.scales, strict=True)]
    party = exact.ExactSeat()
    outputs = [party.real(v) for v in program.run(party, secrets, public)]
    got, want = program.outputs(outputs, public), function(*as_float64(args))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.shape(a) == np.shape(b)
        a, b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_array_less(np.abs(a - b) / np.maximum(1, np.abs(b)) / LSB, lsb)


def shifted(x, largest):
    e = jnp.exp(x - largest)
    return e / e.sum(1, keepdims=True), jnp.log(e.sum(1))


NEAR_MISSES = {
    "a part of 1 - y^2, with gaps": (lambda x: (1 - jnp.square(x))[::2, 1:], X),
    "a part of 2 - y^2": (lambda x: (2 - jnp.square(x))[1:], X),
    "a part of 1 - y^2, and all of it": (
        lambda x: ((1 - jnp.square(x))[1], (1 - jnp.square(x)).sum()),
        X,
    ),
    "a root of less than v": (lambda x, v: x / jnp.sqrt(v + (-1.0)), X, V),
    "a root of -2 v": (lambda x, v: x / jnp.sqrt(-2.0 * v), X, -V),
    "the largest of all, not of a row": (lambda x: shifted(x, x.max()), 4 * X),
    "the largest of a column, not of a row": (lambda x: shifted(x, x.max(0)), 4 * X),
    "the largest of columns, for rows": (lambda x: (x == x.max(0)[:, None]) + x, np.round(X)),
    "means of columns, for rows": (lambda x, s: (s * (x - x.mean(0)[:, None])).sum(0), X, Y[0]),
    "max of one and the same": (
        jax.grad(lambda x: jnp.maximum(jnp.tanh(x), jnp.tanh(x)).sum()),
        X,
    ),
    "rows of zeros": (lambda x: jnp.where((x**2).mean(1) == 0, 1.0, (x**2).mean(1) > 0), ROWS),
    "whole powers of negative numbers": (
        lambda x: (x**2.0, x**-2.0, jax.grad(lambda x: (x**3.0).sum())(x)),
        X,
    ),
    "powers by a constant array": (
        lambda x: (x[:, :1] ** jnp.arange(5), x[:, :1] ** jnp.array([-2, 0, 3])),
        X,
    ),
    "no power": (lambda n, x: (n**0, x**0.5), N, np.array([0.0, 1.0, 4.0])),
    "infinite limits": (lambda x: (jnp.where(x < jnp.inf, x, 0), -jnp.inf >= x), X),
    "what cancels, with a margin": (lambda x: jnp.pad(x - x, 1) + 1, X),
    "elements outside": (
        lambda x: x.at[jnp.array([0, 7])].get(mode="fill", fill_value=-1.5),
        X,
    ),
    "large and small factors": (lambda x: x * jnp.array([1e6, 1e-3, 1.0]), X),
    "small matrices": (lambda x: (x @ (jnp.eye(3) * 1e-5 + 1e-6)) * 1e5, X),
    "the largest of what a mask leaves": (
        lambda x: (
            jnp.argmax(jnp.where(MASK, x, -1e9), 1),
            jax.grad(lambda x: (jnp.max(x, 1, where=MASK, initial=-jnp.inf) ** 2).sum())(x),
        ),
        X,
    ),
    "tiles": (lambda x: jnp.tile(x, (2, 1, 3)), X),
    "unstacked": (lambda x: jnp.stack(jnp.unstack(x, axis=1)[::-1]), X),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name):
    close_eagerly(*NEAR_MISSES[name])


def test_a_loop_over_what_is_public():
    def function(x, q):
        return x * jax.lax.scan(lambda c, row: (c + row, c * row), q[0], q)[1]

    close_eagerly(function, X, Y, public=("q",))


def test_small_factors_of_products():
    def function(q):
        v = 0.1 * (q @ q.T) @ q
        w = (v * v).sum(1, keepdims=True) * v
        return (w * v).sum(1, keepdims=True) * w * 100

    close_eagerly(function, X / 2)


def test_limits_and_masks_on_shares():
    """What lies beyond all values, at the scale of a product too."""

    def function(x):
        limited = jnp.minimum(x, 1e16), jnp.maximum(x, -1e30), jnp.where(x * x < 1e9, x, 0)
        return limited, jnp.max(jnp.where(MASK[1], x, -1e9)), x * 1e-12

    close(function, X[0], lsb=2)


def test_a_mask_that_is_added():
    bias = np.where(MASK, 0, -1e9)
    close_eagerly(lambda x, bias: jax.nn.softmax(x + bias), X, bias, public=("bias",))


def test_public_factors_of_any_sign():
    def function(x, v, p, n):
        return x / jnp.sqrt(p * v + 1.0), x**n

    for p in (0.0, -0.1, 2.0):
        close_eagerly(function, X, V, p, np.array([0, 2, 3]), public=("p", "n"))


@pytest.mark.parametrize("gate", [jnp.bitwise_and, jnp.bitwise_or, jnp.bitwise_xor])
def test_the_bits_of_numbers_are_refused(gate):
    with pytest.raises(NotSecure, match="bits"):
        lp.secure(lambda n: gate(n, 3)).program(N)
    with pytest.raises(NotSecure, match="not: "):
        lp.secure(lambda n: ~n).program(N)


UNARY = {
    "tanh": jnp.tanh,
    "leaky": jax.nn.leaky_relu,
    "clip": lambda x: jnp.clip(x, -0.6, 0.8),
    "softmax": jax.nn.softmax,
    "other axis": lambda x: jnp.exp(x - x.max()) / jnp.exp(x - x.max()).sum(1, keepdims=True),
    "centred": lambda x: x - x.mean(0),
    "normal": lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 0.1),
    "cube": lambda x: 0.1 * x**3.0,
    "sums": lambda x: 0.5 * jnp.cumsum(x, 0),
    "turned": lambda x: x.T[::-1],
    "mask": lambda x: jnp.where((x > 0) & MASK, x - 1, 0.3),
    "gram": lambda x: 0.1 * x @ x.T,
    "tiles": lambda x: jnp.tile(x[:, :1], (1, 3)) - x,
}
BINARY = {
    "mul": lambda x, y: x * y,
    "max": jnp.maximum,
    "root": lambda x, y: x / jnp.sqrt(y * y + 0.5),
    "average": lambda x, y: 0.99 * x + 0.01 * y,
    "choice": lambda x, y: jnp.where(x > y, 0.5 * x, y),
}
STEP = st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 2), st.integers(0, 2))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.lists(STEP, min_size=2, max_size=4), st.booleans())
def test_compositions(steps, public):
    """Random programs and their gradients; what is summed counts 36 times."""

    def function(x, y):
        def composed(x):
            known = [x, y]
            for name, i, j in steps:
                one, other = known[-1 - i % len(known)], known[-1 - j % len(known)]
                known.append(UNARY[name](one) if name in UNARY else BINARY[name](one, other))
            return (known[-1] * jnp.arange(9.0).reshape(3, 3)).sum()

        return jax.value_and_grad(composed)(x)

    close_eagerly(function, X, Y, lsb=128.0, public=("y",) if public else ())


@pytest.mark.parametrize(("frac_bits", "decay"), [(8, 0.9999), (10, 0.99999), (18, 0.9999999)])
def test_averages_slower_than_an_lsb(frac_bits, decay):
    step = lp.secure(lambda a, b: decay * a + (1 - decay) * b, frac_bits=frac_bits)
    a, b = np.full(100, 1.5), np.full(100, -40.0)
    k1, k2 = jax.random.split(lp.key())
    average = lp.reveal(step(k2, *step.share(k1, a, b)))
    # An LSB for each of the rate's digits, of which 6 bits have at most 4.
    np.testing.assert_allclose(average, decay * a + (1 - decay) * b, atol=4 * 2.0**-frac_bits)


def test_a_mask_lies_below_the_least_logits_that_are_compared():
    mask = np.array([[True, True, False], [True, False, False]])
    logits = np.array([[-230.0, -231.0, 5.0], [-240.0, 3.0, 1.0]])

    def masked(x):
        x = jnp.where(mask, x, -1e9)
        return jax.nn.softmax(x, -1), jnp.max(x, -1)

    step = lp.secure(masked)
    k1, k2 = jax.random.split(lp.key())
    weights, largest = lp.reveal(step(k2, *step.share(k1, logits)))
    first = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(weights[0], [first, 1 - first, 0], atol=4 * 2**-18)
    np.testing.assert_allclose(largest, [-230, -240], atol=2 * 2**-18)


def test_a_part_of_a_derivative_costs_no_more_than_that_part():
    def sent(function):
        cost = lp.cost(lp.secure(function), X)
        return cost.rounds, cost.online_bytes

    part = sent(lambda x: (1 - jnp.square(x))[1:])
    assert part == sent(lambda x: 1 - jnp.square(x[1:]))
    assert part[1] < sent(lambda x: 1 - jnp.square(x))[1]
