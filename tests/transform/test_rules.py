"""Operations under sharing, values and gradients, against plain JAX."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from secured import as_float64, close, close_in_the_clear

import lpgan_jax as lp
from lpgan_jax.transform.rules.sorting import layers

RNG = np.random.default_rng(2)
X = RNG.normal(size=(3, 4))
POSITIVE = np.abs(X) + 0.1


def with_gradient(function):
    """The values, and the gradient of a sum of them in which each counts differently."""

    def both(*args):
        def total(*args):
            values = function(*args)
            leaves = jax.tree.leaves(values)
            return sum((v * jnp.cos(jnp.arange(v.size).reshape(v.shape))).sum() for v in leaves), (
                values
            )

        return jax.grad(total, tuple(range(len(args))), has_aux=True)(*args)

    return both


# Convolutions -------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "depthwise": (nn.Conv(4, (3, 3), strides=(2, 2), feature_group_count=4), (2, 5, 4, 4)),
    "groups": (nn.Conv(4, (2, 3), feature_group_count=2), (2, 4, 4, 4)),
    "one axis, dilated": (nn.Conv(2, (3,), kernel_dilation=2, padding="CAUSAL"), (2, 6, 2)),
    "three axes": (nn.Conv(2, (2, 3, 2), strides=(1, 2, 1)), (1, 3, 4, 2, 2)),
    "transposed": (nn.ConvTranspose(2, (3, 3), strides=(2, 2)), (2, 3, 3, 2)),
    "transposed, dilated": (
        nn.ConvTranspose(2, (3,), strides=(3,), kernel_dilation=(2,)),
        (1, 4, 2),
    ),
    "stride beyond the kernel": (nn.Conv(2, (1, 2), strides=(2, 3)), (1, 4, 7, 2)),
}


def convolution(name):
    module, shape = CONVOLUTIONS[name]
    x = np.random.default_rng(shape).normal(size=shape)
    params = as_float64(module.init(jax.random.key(0), jnp.asarray(x, jnp.float32)))
    return with_gradient(module.apply), jax.tree.map(np.asarray, params), x


OFTEN = {"depthwise", "one axis, dilated", "three axes", "transposed"}


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in CONVOLUTIONS]
)
def test_convolutions_in_the_clear(name):
    close_in_the_clear(*convolution(name), lsb=4)  # public factors


@pytest.mark.parametrize(
    "name",
    [n if n == "groups" else pytest.param(n, marks=pytest.mark.slow) for n in CONVOLUTIONS],
)
def test_convolutions(name):
    """Sums of 2 to 36 rounded products of numbers up to 3, rounded to 1/2 LSB."""
    close(*convolution(name), lsb=8)


# Windows ------------------------------------------------------------------------------------------


def windows(x):
    return (
        nn.max_pool(x, (3, 2), (2, 1), "SAME"),
        nn.avg_pool(x, (2, 3), (2, 2), ((1, 0), (0, 1))),
    )


def dilated_windows(x):
    base, dilation = (1, 2, 1, 1), (1, 1, 2, 1)
    shape, strides = (1, 2, 2, 1), (1, 1, 2, 1)
    padding = ((0, 0), (1, 0), (0, -1), (0, 0))
    return (
        jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, shape, strides, "VALID", base, dilation),
        jax.lax.reduce_window(x, 0.0, jax.lax.add, shape, strides, padding, base, dilation),
        jax.lax.reduce_window(x, jnp.inf, jax.lax.min, shape, strides, "SAME"),
        nn.avg_pool(x, (2, 2), (2, 1), "SAME", count_include_pad=False),
    )


IMAGES = RNG.normal(size=(1, 4, 5, 2))


def test_windows():
    close(with_gradient(windows), IMAGES)


def test_dilated_windows_and_tangents():
    def function(x, tangent):
        return dilated_windows(x), jax.jvp(windows, (x,), (tangent,))

    close_in_the_clear(function, IMAGES, IMAGES[:, ::-1].copy(), lsb=0.1)


# Sorting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 11))
def test_the_networks_sort(count):
    """Whatever sorts all zeros and ones sorts all numbers (Knuth)."""
    for wanted in range(1, count + 1):
        rows = np.array(list(itertools.product([0, 1], repeat=count)))
        steps = layers(count, wanted)
        for i, j in steps:
            assert len({*i, *j}) == 2 * len(i)
            rows[:, i], rows[:, j] = np.minimum(rows[:, i], rows[:, j]), rows[:, i] | rows[:, j]
        np.testing.assert_array_equal(rows[:, :wanted], np.sort(rows)[:, :wanted])
    levels = (count - 1).bit_length()
    assert len(steps) == levels * (levels + 1) // 2


TIES = np.array([[0.5, -1, 0.5, 2, 0.5, -1], [3, 2, 1, 0, -1, -2], [0, 0, 0, 0, 0, 1]])


def orders(x):
    return (
        jnp.argsort(x),
        jnp.argsort(x, 0, descending=True),
        jax.lax.top_k(x, 4),
        jnp.sort(x, 0, descending=True),
        jnp.median(x),
        jnp.percentile(x, 30, axis=1),
        x[jnp.argsort(x[:, 0])],
        jnp.take_along_axis(x, jnp.argsort(-x, 1), 1),
        jax.vmap(lambda a, b: a[jnp.argsort(b)])(x, x[::-1]),
        jax.lax.sort((x, x[::-1], 2 * x), dimension=1)[1:],
    )


def test_sorting_in_the_clear():
    close_in_the_clear(orders, TIES, lsb=0.1)


def weighted(x, w):
    return (
        (jnp.sort(x) * w).sum()
        + (jax.lax.top_k(x, 2)[0] ** 2).sum()
        + (x[jnp.argsort(x[:, 0])] * w).sum()
        + jnp.median(x.ravel())
    )


def test_gradients_of_a_sort():
    x = np.random.default_rng(5).normal(size=(2, 3))
    close_in_the_clear(jax.grad(weighted), x, np.arange(6.0).reshape(2, 3) / 4, lsb=0.1)


def test_sorting():
    """Equal numbers stay in their order; the gradient goes back by the same bits."""

    def function(x, integers):
        value, gradient = jax.value_and_grad(lambda v: (jnp.sort(v) ** 2 * jnp.arange(4)).sum())(
            x[:4]
        )
        return jnp.argsort(x[:5]), value, gradient, jax.lax.top_k(integers, 2)

    close(function, TIES[0], np.array([2**30, -7, 2**30]), lsb=16)  # 2 * 3 * 2 in front of an LSB


# One element --------------------------------------------------------------------------------------


def numbers(x, p):
    return (
        jnp.sinh(x),
        jnp.cosh(x),
        jnp.arcsinh(x),
        jnp.tan(x / 2),
        jnp.cbrt(p),
        jnp.arctanh(p / 3),
        jnp.arccosh(1.1 + p),
        jnp.exp2(x),
        p**x,
        p**0.7,
        2.0**x,
        jnp.hypot(x, p),
        jnp.logaddexp(x, p),
        jax.nn.logsumexp(x, 1),
        jax.lax.cumlogsumexp(x, 1),
        jnp.cumprod(x, 1),
        jax.lax.cummax(x, 0),
        jax.lax.cummin(x, 1, reverse=True),
        jnp.prod(x),
        jax.lax.clamp(-p, x, p),
        jax.scipy.special.erfinv(x / 4),
        jnp.mod(x, 0.7),
        jax.lax.reshape(x, (12,), (1, 0)),
    )


def test_numbers_in_the_clear():
    close_in_the_clear(numbers, X, POSITIVE)


def test_gradients_of_numbers_in_the_clear():
    def function(x, p):
        return p**x, jnp.cumprod(x, 1), jax.lax.cummax(x, 0), jnp.prod(p, 1), jnp.cbrt(p)

    close_in_the_clear(with_gradient(function), X, POSITIVE, lsb=4)


def test_powers_of_many():
    close_in_the_clear(
        lambda x: x**-3, 1.0 + np.abs(np.random.default_rng(3).normal(size=(40, 40)))
    )


def test_a_positive_divisor_takes_half_of_the_comparisons():
    def positive(x, y):
        return x / (y**2 + 0.5), 1 / (y**2 + 0.25)

    def either(x, y):
        return x / (y + 9.0), 1 / (y + 9.5)

    close(positive, X, POSITIVE, lsb=8)
    costs = [lp.cost(lp.secure(f), X, POSITIVE).comparisons / X.size for f in (either, positive)]
    assert costs == [91 + 123, 45 + 61]


WHOLE = np.array([[-3.0, -2.6, -0.5, 0.0], [0.2, 1.0, 1.5, 2.4], [3.7, -1.2, 0.9, 7.0]])


def integers(x, n, which):
    return (
        (jnp.ceil(x), jnp.round(x), jnp.mod(x, 2.0), jnp.trunc(x), x.astype(bool)),
        (n % 3, n // -2, n * n + 3, n > 2),
        jax.lax.select_n(which, x, 2 * x, x + 1),
        (jnp.any(x > 2, 1), jnp.all(x > -3.5), jnp.sum(x > 1)),
    )


INTEGERS = np.array([5, -7, 9, 0, 1000, -3])


def test_whole_numbers_in_the_clear():
    """But for halves, which are rounded up, where JAX looks for an even number."""
    x = np.where(WHOLE % 1 == 0.5, WHOLE + 0.1, WHOLE)
    close_in_the_clear(integers, x, INTEGERS, np.arange(12).reshape(3, 4) % 3, lsb=0.1)


def test_whole_numbers():
    def function(x, n):
        return jnp.floor(x), x.astype(int), n // 3, jax.nn.one_hot(n[:2] - 5, 3)

    close(function, WHOLE, INTEGERS, lsb=0.1)


def test_a_choice_among_branches():
    branches = [lambda v: v, jnp.tanh, lambda v: v * v]
    close_in_the_clear(lambda i, x: jax.lax.switch(i, branches, x), 2, X)


# Programs -----------------------------------------------------------------------------------------

W = RNG.normal(size=(4, 2))


def loss(w, x):
    return (jnp.tanh(x @ w) ** 2).mean()


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, x), lambda x, g: (jnp.clip(g, -0.1, 0.1) * x,))


def recurrent(body):
    def total(w, x):
        return jax.lax.scan(body(w), jnp.zeros(4), x)[1].sum()

    return lambda w, x: jax.grad(total)(w[:, 0], x)


def cell(w):
    return lambda c, row: (jnp.tanh(c + row * w), c.sum())


PROGRAMS = {
    "remat": jax.grad(jax.checkpoint(loss)),
    "jvp": lambda w, x: jax.jvp(lambda w: loss(w, x), (w,), (w[::-1],)),
    "hessian-vector product": lambda w, x: jax.jvp(
        jax.grad(lambda w: loss(w, x)), (w,), (w[::-1],)
    ),
    "hessian": lambda w, x: jax.hessian(lambda w: loss(w[:, None], x))(w[:, 0]),
    "jacobian": lambda w, x: jax.jacfwd(lambda w: jnp.tanh(x @ w).sum(1))(w),
    "an example each": lambda w, x: jax.vmap(jax.grad(loss), (None, 0))(w, x),
    "map": lambda w, x: jax.lax.map(lambda row: jnp.tanh(row @ w), x),
    "map in batches": lambda w, x: jax.lax.map(lambda row: row @ w, x, batch_size=2),
    "associative scan": lambda w, x: jax.lax.associative_scan(
        lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (x / 2, x), axis=1
    ),
    "custom_vjp": lambda w, x: jax.grad(lambda x: (clipped(x) ** 2).sum())(x),
    "recurrent": recurrent(cell),
    "recurrent, remat": recurrent(lambda w: jax.checkpoint(cell(w))),
    "steps in a loop": lambda w, x: jax.lax.fori_loop(
        0, 3, lambda i, w: w - 0.1 * jax.grad(loss)(w, x), w
    ),
    "einsum": lambda w, x: jnp.einsum("ni,ij,kj->nk", x, w, w),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_in_the_clear(name):
    # A second derivative multiplies what a series is off by, 1/4 LSB, with slopes.
    close_in_the_clear(PROGRAMS[name], W, X, lsb=6.0 if name == "hessian" else 2.0)


OPTIMIZERS = {
    "adagrad": lambda: optax.adagrad(0.1),
    "lion": lambda: optax.lion(1e-3),
    "lamb": lambda: optax.lamb(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "adamax": lambda: optax.adamax(1e-2),
    "nadam": lambda: optax.nadam(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "lars": lambda: optax.lars(0.1),
    "yogi": lambda: optax.yogi(1e-2),
    "sm3": lambda: optax.sm3(0.1),
    "adabelief": lambda: optax.adabelief(1e-2),
    "adadelta": lambda: optax.adadelta(0.1),
    "muon": lambda: optax.contrib.muon(0.01),
    "sign": lambda: optax.sign_sgd(0.01),
    "without a schedule": lambda: optax.contrib.schedule_free_sgd(0.1),
    "every other step": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "if finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "average": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "warm-up, decay, clipped": lambda: optax.chain(
        optax.clip(0.05),
        optax.add_decayed_weights(1e-2),
        optax.adaptive_grad_clip(0.1),
        optax.sgd(optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10)),
    ),
}
QUICK = {"lion", "adafactor", "without a schedule", "every other step", "warm-up, decay, clipped"}


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS],
)
def test_optimizers_in_the_clear(name):
    optimizer = OPTIMIZERS[name]()

    def step(state, x):
        w, opt_state = state
        value, grads = jax.value_and_grad(lambda w: ((x @ w) ** 2).mean())(w)
        updates, opt_state = optimizer.update(grads, opt_state, w)
        return (optax.apply_updates(w, updates), opt_state), value

    state = as_float64((W, optimizer.init(jnp.asarray(W, jnp.float32))))
    public = ("state[1].mini_step",) if name == "every other step" else ()
    lsb = 4 if name == "adafactor" else 2  # its rates, which are traced, have 18 bits
    state = jax.tree.map(np.asarray, state)
    close_in_the_clear(step, state, X, lsb=lsb, carry={0: 0}, public=public)


def test_every_message_is_hidden():
    def function(x, n):
        return jax.grad(lambda v: (jnp.sort(v) ** 2).sum())(x), jnp.floor(x), n // 3

    assert lp.audit(lp.secure(function), X[0, :3], np.array([1, 2])).problems == []
