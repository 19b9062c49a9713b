"""SGD and Adam on shares against optax in float64, on gradients that are sums over the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import integers, real, secret
from lpgan_jax.optim import adam, apply_updates, sgd

from lpgan_jax import key
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret

BATCH, STEPS = 64, 6
REDUCTION = 2.0 ** (6 + 8 - 11)  # Adam: of summed gradients
SHAPES = {"dense": {"kernel": (6, 4), "bias": (4,)}, "scale": (5,)}

is_secret = functools.partial(lambda kind, v: isinstance(v, kind), Secret)


def is_shape(v):
    return isinstance(v, tuple)


def gradients(step, f, bound):
    """A tree of summed gradients on the grid of 2f bits, among them 0 and almost `bound`."""
    rng = np.random.default_rng([1, step])
    sizes = [0.0, 2.0 ** -(2 * f), 2.0**-f, 1e-3, 1.0, bound - 1]
    kernel = np.array(sizes)[:, None] * np.array([1, -1, (-1) ** step, rng.uniform(-1, 1)])
    tree = {
        "dense": {"kernel": kernel, "bias": rng.normal(0, 0.02, 4)},
        "scale": rng.normal(0, 10, 5) * [1, 1, 1, 0, step % 2],
    }
    return jax.tree.map(lambda g: integers(g, 2 * f) * 2.0 ** (-2 * f), tree)


def steps_of(optimizer, f, grads):
    """The decoded updates of successive steps, and the last state."""
    params = jax.tree.map(np.zeros, SHAPES, is_leaf=is_shape)
    scales = optimizer.scales(params)
    initial = optimizer.init(params)
    assert set(scales) == set(initial)
    state = {name: secret(initial[name], scales[name], 1) for name in initial}

    @jax.jit
    def step(ds_key, secrets, public):
        return simulate(lambda party, s, p: optimizer.update(party, *s, p), ds_key, secrets, public)

    updates = []
    for i, gradient in enumerate(grads):
        shared = jax.tree.map(lambda g: secret(g, 2 * f, 2), gradient)
        update, state = step(key(i), (shared, state), optimizer.schedule(i))
        for name in state:
            assert (state[name].frac_bits, state[name].mask) == (scales[name], None)
        updates.append(jax.tree.map(real, update, is_leaf=is_secret))
    assert step._cache_size() == 1  # what changes with the step is an argument
    return updates, {name: real(value) for name, value in state.items()}


def expected(optimizer, grads):
    params = jax.tree.map(jnp.zeros, SHAPES, is_leaf=is_shape)
    state, updates = optimizer.init(params), []
    for gradient in grads:
        update, state = optimizer.update(jax.tree.map(lambda g: g / BATCH, gradient), state)
        updates.append(update)
    return updates


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(("f", "rate"), [(18, 0.03), (18, 2.0**-3), (12, 0.7), (24, 0.03)])
def test_sgd_follows_optax(f, rate):
    """Within 1 LSB and the rate's rounding to 16 bits (powers of two are exact).

    Gradients at more than 62 - 10 - 16 fraction bits are truncated to that first.
    """
    grads = [gradients(i, f, 2**10) for i in range(3)]
    updates, state = steps_of(sgd(rate, BATCH, f), f, grads)
    assert state == {}
    relative = 0.0 if rate == 0.125 else 2.0**-16
    absolute = 2.0**-f + (2.0**-36 * rate / BATCH if 2 * f > 36 else 0.0)
    for update, exact in zip(updates, expected(optax.sgd(rate), grads), strict=True):
        assert jax.tree.structure(update) == jax.tree.structure(exact)
        error = np.abs(flat(update) - flat(exact))
        assert np.all(error < absolute + relative * np.abs(flat(exact)))
        assert np.all(flat(update)[flat(exact) == 0] == 0)


@pytest.mark.parametrize(("f", "momentum"), [(18, 0.9), (12, 0.5), (26, 0.99)])
def test_sgd_with_momentum_follows_optax(f, momentum):
    """The trace errs by 2 LSB a step (gradient and old trace truncated) and its factor's 2^-16.

    The update adds 1 LSB of its own, and the rate's 2^-16.
    """
    rate = 0.03
    grads = [gradients(i, f, 2**6) for i in range(STEPS)]
    updates, state = steps_of(sgd(rate, BATCH, f, momentum), f, grads)
    assert set(state) == {"trace"}
    trace, bound = 0.0, 0.0
    exact_updates = expected(optax.sgd(rate, momentum), grads)
    for gradient, update, exact in zip(grads, updates, exact_updates, strict=True):
        bound = momentum * bound + 2 * 2.0**-f + 2.0**-16 * momentum * np.abs(trace)
        trace = momentum * trace + flat(gradient)
        error = np.abs(flat(update) - flat(exact))
        assert np.all(error < 2.0**-f + rate / BATCH * bound + 2.0**-16 * np.abs(flat(exact)))
    assert np.all(np.abs(state["trace"] - trace) < bound + 1e-12)
    # The bound means something: without momentum the last update would be another.
    plain = rate / BATCH * np.abs(trace - flat(grads[-1])).max()
    assert plain > 10 * (2.0**-f + rate / BATCH * bound.max())


def test_sgd_keeps_updates_below_one_lsb_on_average():
    """10^5 updates of -1/4 LSB, as 0 or -1 LSB; 4 standard errors: one false alarm in 16,000."""
    optimizer, count = sgd(2.0**-4, 1, 18), 10**5
    gradient = {"w": secret(np.full(count, 2.0**-16), 36, 3)}
    program = jax.jit(
        lambda k, g: simulate(lambda party, s, _: optimizer.update(party, s, {}, {})[0], k, g)
    )
    lsb = real(program(key(1), gradient)["w"]) * 2**18
    assert set(np.unique(lsb)) == {-1.0, 0.0}
    assert abs(lsb.mean() + 0.25) < 4 * np.sqrt(3 / 16 / count)


def adam_tolerance(grads, f, rate, b1, b2, eps_root):
    """A bound on each update's error, by intervals.

    Each truncation errs by an LSB of its scale: g (f bits), m (m_bits), g^2 and v (v_bits). 1 - b2
    has 8 bits, in v and in the bias correction. The inverse root errs by 2^-24; its product with m
    is formed at m_bits, both factors rounded; the public rate and eps are rounded to their scales.
    Gradients are first divided by the power of two that takes BATCH mean gradients of 2^8 to 2^11.
    """
    m_bits, v_bits = max(f, min(f + 8, 26)), min(2 * f, 32)
    e, e_m, e_v = 2.0**-f, 2.0**-m_bits, 2.0**-v_bits
    e_rate = 2.0 ** -(19 - np.ceil(np.log2(rate / (1 - b1)))) / 2
    m = v = d_m = d_v = 0.0
    for step, g in enumerate(grads, 1):
        g = g / REDUCTION
        d_m = b1 * d_m + (1 - b1) * e + e_m + 2.0**-20 * (1 - b1) * np.abs(g - m)
        d_v = b2 * d_v + (1 - b2) * (2 * np.abs(g) * e + e**2 + e_v)
        d_v = d_v + e_v + 2.0**-9 * (1 - b2) * np.abs(g**2 - v)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        bias1, bias2 = 1 - b1**step, 1 - b2**step
        eps = eps_root * (BATCH / REDUCTION) ** 2 * bias2
        u, least = v + eps, np.maximum(v + eps - d_v - e_v, eps - e_v)  # v is never negative
        ratio = np.abs(m) / np.sqrt(u)
        largest = (
            (np.abs(m) + d_m + 2 * e_m) / np.sqrt(least) * (1 + 2.0**-10 + 2.0**-24 + 2.0**-23)
        )
        smallest = (
            (np.abs(m) - d_m - 2 * e_m)
            / np.sqrt(u + d_v + e_v)
            * (1 - 2.0**-10 - 2.0**-24 - 2.0**-23)
        )
        d_ratio = np.maximum(largest - ratio, ratio - smallest)
        yield e + rate * np.sqrt(bias2) / bias1 * d_ratio + e_rate * largest


@pytest.mark.parametrize(
    ("f", "rate", "b1", "b2", "eps_root"),
    [(18, 2e-4, 0.5, 0.999, 1e-8), (18, 1e-2, 0.9, 0.99, 1e-6), (24, 2e-4, 0.5, 0.999, 1e-8)],
)
def test_adam_follows_optax(f, rate, b1, b2, eps_root):
    """With zero, tiny and large gradients, and gradients that change their sign at each step."""
    grads = [gradients(i, f, 2**10) for i in range(STEPS)]
    updates, state = steps_of(adam(rate, BATCH, f, b1, b2, eps_root), f, grads)
    exact = expected(optax.adam(rate, b1, b2, eps=0.0, eps_root=eps_root), grads)
    bounds = adam_tolerance([flat(g) for g in grads], f, rate, b1, b2, eps_root)
    for update, right, bound in zip(updates, exact, bounds, strict=True):
        assert jax.tree.structure(update) == jax.tree.structure(right)
        assert np.all(np.abs(flat(update) - flat(right)) < bound)
        # The bound means something: 1 % of the rate where gradients are of size 1.
        assert np.all(bound[np.abs(flat(grads[0])) == 1] < 0.01 * rate + 2 * 2.0**-f)
    assert np.all(state["v"] >= 0)
    zero = np.all([flat(g) == 0 for g in grads], axis=0)
    assert zero.any()
    for value in (*(flat(u) for u in updates), state["m"], state["v"]):
        assert np.all(value[zero] == 0)


def test_apply_updates_adds_and_keeps_the_structure():
    params = {"a": secret(np.ones(3), seed=1), "b": [secret(2.0, seed=2)]}
    updates = {"a": secret(np.arange(3.0), seed=3), "b": [secret(-0.5, seed=4)]}
    result = apply_updates(params, updates)
    np.testing.assert_array_equal(real(result["a"]), [1, 2, 3])
    assert real(result["b"][0]) == 1.5


def test_schedule_is_optaxs_bias_correction():
    rate, b1, b2 = 2e-4, 0.5, 0.999
    optimizer = adam(rate, BATCH, 18, b1, b2, 1e-8)
    scale = 19 - np.ceil(np.log2(rate / (1 - b1)))
    for step in (0, 1, 100, 10**6):
        public = optimizer.schedule(step)
        assert {name: v.dtype for name, v in public.items()} == {"rate": "uint64", "eps": "uint64"}
        bias2 = 1 - (1 - 131 / 2**17) ** (step + 1)  # 1 - b2 to 8 significant bits
        exact = rate * np.sqrt(bias2) / (1 - b1 ** (step + 1))
        assert abs(-public["rate"].astype(np.int64) * 2.0**-scale - exact) <= 2.0 ** -(scale + 1)
        eps = 1e-8 * (BATCH / REDUCTION) ** 2 * bias2 * 2.0**32
        assert abs(float(public["eps"]) - eps) <= 0.5
