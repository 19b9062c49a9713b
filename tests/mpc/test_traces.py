"""A key from outside of a body that is executed several times is refused; all others work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pair, whole
from jax import lax

import lpgan_jax as lp
from lpgan_jax import protocols as P
from lpgan_jax.mpc import arithmetic, party, traces
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.traces import StaleKey, depth

FXP = lp.FixedPoint(18)
KEY = lp.key(1)
X = pair(np.linspace(-2, 2, 5))
XS = jnp.stack([X, 3 * X, -X])


def masked(seat, share, _=None):
    """What is opened of a value."""
    return seat.open(share - seat.mask(share.shape).share, "mask")


USES = {
    "sec_relu": P.sec_relu,
    "sec_mul": lambda key, x: P.sec_mul(key, X, x, FXP),
    "simulate": lambda key, x: party.simulate(masked, key, x),
    "simulate, public": lambda key, x: party.simulate(
        lambda seat, share, public: masked(seat, share * public), key, X, x[0]
    ),
    "deal, public": lambda key, x: party.deal(
        lambda seat, share, public: (
            arithmetic.mul(seat, Secret(share, 0), Secret(share, 0)).settled(seat).share
        ),
        key,
        X,
        x[0],
    ),
    "share": lambda key, x: lp.share(key, x[0].astype(np.float64), FXP),
}

OUTSIDE = {
    "scan": lambda use: lax.scan(lambda c, x: (c, use(KEY, x)), 0, XS),
    "scan, the key given to jit": lambda use: jax.jit(
        lambda key: lax.scan(lambda c, x: (c, use(key, x)), 0, XS)
    )(KEY),
    "map": lambda use: lax.map(lambda x: use(KEY, x), XS),
    "fori_loop": lambda use: lax.fori_loop(
        0, 3, lambda i, x: (use(KEY, x), x + jnp.uint64(1))[1], X
    ),
    "while_loop": lambda use: lax.while_loop(
        lambda x: x[0, 0] != 0, lambda x: (use(KEY, x), x)[1], X
    ),
    "jit": lambda use: jax.jit(lambda x: use(KEY, x))(X),
    "a partial": lambda use: jax.jit(functools.partial(use, KEY))(X),
    "checkpoint": lambda use: jax.checkpoint(lambda x: use(KEY, x))(X),
    "cond in a scan": lambda use: lax.scan(
        lambda c, x: (c, lax.cond(c == 0, lambda: use(KEY, x), lambda: use(KEY, x))), 0, XS
    ),
    "vmap over keys in a scan over data": lambda use: jax.jit(
        lambda keys: lax.scan(lambda c, x: (c, jax.vmap(lambda key: use(key, x))(keys)), 0, XS)
    )(jax.random.split(KEY, 2)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("body", OUTSIDE)
def test_a_key_from_outside_of_the_body_is_refused(body, use):
    with pytest.raises(StaleKey, match="make the key an argument"):
        OUTSIDE[body](USES[use])


@pytest.mark.parametrize("use", USES)
def test_vmap_over_data_with_one_key_is_refused(use):
    """Also in a body to which both belong."""
    batched = jax.vmap(lambda x: USES[use](KEY, x))
    with pytest.raises(ValueError, match="batch of keys"):
        batched(XS)
    scan = jax.jit(
        lambda keys: lax.scan(lambda c, k: (c, jax.vmap(lambda x: USES[use](k, x))(XS)), 0, keys)
    )
    with pytest.raises(ValueError, match="batch of keys"):
        scan(jax.random.split(KEY, 2))


KEYS = jax.random.split(KEY, len(XS))

INSIDE = {
    "eager": lambda keys, xs: jnp.stack([P.sec_relu(k, x) for k, x in zip(keys, xs, strict=True)]),
    "jit": jax.jit(
        lambda keys, xs: jnp.stack([P.sec_relu(keys[i], xs[i]) for i in range(len(XS))])
    ),
    "scan": lambda keys, xs: lax.scan(lambda c, kx: (c, P.sec_relu(*kx)), 0, (keys, xs))[1],
    "map in jit": jax.jit(lambda keys, xs: lax.map(lambda kx: P.sec_relu(*kx), (keys, xs))),
    "vmap": jax.vmap(P.sec_relu),
    "vmap in scan": lambda keys, xs: lax.scan(
        lambda c, kx: (c, jax.vmap(P.sec_relu)(*kx)), 0, (keys[None], xs[None])
    )[1][0],
    "scan in vmap": lambda keys, xs: jax.vmap(
        lambda ks, vs: lax.scan(lambda c, kx: (c, P.sec_relu(*kx)), 0, (ks, vs))[1]
    )(keys[None], xs[None])[0],
    "fold_in": lambda keys, xs: lax.scan(
        lambda i, x: (i + 1, P.sec_relu(jax.random.fold_in(keys[0], i), x)), 0, xs
    )[1],
    "cond": lambda keys, xs: jnp.stack(
        [
            lax.cond(True, lambda k=k, x=x: P.sec_relu(k, x), lambda x=x: x)
            for k, x in zip(keys, xs, strict=True)
        ]
    ),
    "checkpoint": lambda keys, xs: jnp.stack(
        [jax.checkpoint(P.sec_relu)(k, x) for k, x in zip(keys, xs, strict=True)]
    ),
    "by keyword": lambda keys, xs: jnp.stack(
        [P.sec_relu(key=k, x=x) for k, x in zip(keys, xs, strict=True)]
    ),
}


@pytest.mark.parametrize("way", INSIDE)
def test_keys_that_belong_where_the_data_do_work(way):
    results = INSIDE[way](KEYS, XS)
    for result, x in zip(results, XS, strict=True):
        np.testing.assert_array_equal(whole(result), np.maximum(whole(x), 0))


def test_data_from_outside_with_keys_of_the_body_work():
    """One value under many masks tells nothing."""
    results = lax.scan(lambda c, key: (c, P.sec_relu(key, X)), 0, KEYS)[1]
    for result in results:
        np.testing.assert_array_equal(whole(result), np.maximum(whole(X), 0))


@pytest.mark.parametrize("seed", [None, 7])
def test_no_key_is_made_inside_of_a_trace(seed):
    """It would be a constant of the program."""
    with pytest.raises(StaleKey, match="make it outside"):
        jax.jit(lambda x: P.sec_relu(lp.key(seed), x))(X)
    with pytest.raises(StaleKey, match="make it outside"):
        lax.map(lambda x: P.sec_relu(lp.key(seed), x), XS)
    with pytest.raises(ValueError, match="batch of keys"):  # one key for all
        jax.vmap(lambda x: P.sec_relu(lp.key(seed), x))(XS)


def test_the_depth_of_a_value():
    """The one thing that needs more than JAX's public interface, on every version of it."""
    seen = {}

    def body(carry, x):
        seen["scan"] = depth(x), depth(carry)
        jax.vmap(lambda row: seen.setdefault("vmap in scan", (depth(row), depth(x))))(x)
        jax.vmap(lambda _: seen.setdefault("closed over by vmap", (depth(x), depth(X))))(x)

        @jax.jit
        def inner(y):
            seen["jit in scan"] = depth(y), depth(x)
            return y

        return carry, inner(x)

    jax.vmap(lambda row: seen.setdefault("vmap", (depth(row), depth(X))))(X)
    jax.grad(lambda row: (seen.setdefault("grad", (depth(row), 0)), row)[1])(1.0)
    lax.scan(body, 0, XS)
    assert seen["vmap"] == seen["grad"] == (0, 0)
    (scanned, carried), (inner, outer) = seen["scan"], seen["jit in scan"]
    assert scanned == carried == outer > 0
    assert inner > outer
    assert seen["vmap in scan"] == (scanned, scanned)
    assert seen["closed over by vmap"] == (scanned, 0)
    assert depth(np.zeros(2)) == depth(3) == depth(X) == 0


def test_whether_something_is_traced():
    seen = []
    jax.jit(lambda x: (seen.append(traces.is_tracing()), x)[1])(1)
    jax.vmap(lambda x: (seen.append(traces.is_tracing()), x)[1])(X)
    jax.eval_shape(lambda: seen.append(traces.is_tracing()))
    assert seen == [True, False, True]
    assert not traces.is_tracing()


def test_sharing_draws_words_of_its_own():
    """They are no words of `jax.random.bits`, of the key or of its children."""
    shares = np.asarray(lp.share(KEY, np.zeros(1024), FXP))
    others = [jax.random.bits(k, 4096, np.uint64) for k in (KEY, *jax.random.split(KEY, 8))]
    others += [jax.random.key_data(jax.random.split(KEY, 4096)).view(np.uint64).reshape(-1)]
    assert not set(shares[0].tolist()) & set(np.concatenate(others).tolist())
    assert len(np.unique(shares[0])) == 1024


def test_no_key_that_its_owner_derives_is_a_servers_seed():
    """A key that was used and is then split gives no server the next protocol's masks."""
    seeds = jax.random.key_data(party.server_seeds(KEY))
    derived = [*jax.random.split(KEY, 64), *(jax.random.fold_in(KEY, i) for i in range(8)), KEY]
    words = np.concatenate([seeds, [jax.random.key_data(k) for k in derived]])
    assert len(np.unique(words, axis=0)) == 2 + 64 + 8 + 1
