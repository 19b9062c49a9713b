"""`lp.audit` of functions as users write them: what is sound passes, planted leaks are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lpgan_jax as lp
from lpgan_jax import protocols as P
from lpgan_jax.mpc import arithmetic, party
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.shares import share_words

FXP = lp.FixedPoint(18)
SHAPE = (2, 3)


def split(key, count):
    return jax.random.split(key, count)


def _a_layer(key, x, w):
    first, second = split(key, 2)
    return P.sec_relu(second, P.sec_matmul(first, x, w, FXP))


def _glue(key, x, w):
    y = 3 * x[:, ::-1] - jnp.swapaxes(w, 1, 2).sum(2, keepdims=True)
    y = jnp.concatenate([y, x], axis=1) * jnp.arange(3, dtype=np.uint64) + jnp.cumsum(y, 2)[:, :1]
    return P.sec_relu(key, y), y, x @ jnp.ones((3, 2), np.uint64)


def _scan(key, x, w):
    def body(carry, row):
        one, two = split(row[0], 2)
        return P.sec_relu(one, carry + row[1]), P.sec_mul(two, carry, row[1], FXP)

    rows = split(key, 2), jnp.swapaxes(x, 0, 1)
    return lax.scan(body, w[:, :, 0], rows, reverse=True)


def _scan_that_carries_a_key(key, x, w):
    def body(carry, row):
        key, total = carry
        key, one = split(key, 2)
        return (key, P.sec_relu(one, total + row)), None

    return lax.scan(body, (key, x[:, 0]), jnp.swapaxes(x, 0, 1))[0][1]


def _loop_that_folds(key, x, w):
    return lax.fori_loop(0, 3, lambda i, v: P.sec_relu(jax.random.fold_in(key, i), v - 1), x)


def _vmap(key, x, w):
    return jax.vmap(lambda k, v: P.sec_mul(k, v, v, FXP), (0, 1), 1)(split(key, 2), x)


def _jit_and_checkpoint(key, x, w):
    first, second = split(key, 2)
    return jax.checkpoint(P.sec_relu)(second, jax.jit(P.sec_relu)(first, x))


def _shared_constant(key, x, w):
    first, second = split(key, 2)
    return P.sec_mul(first, x, lp.share(second, np.ones(3), FXP), FXP)


def _own_program(key, x, w):
    def seat(party, share, public):
        with party.at("mine"):
            x = arithmetic.masked(party, Secret(share, 18))
            return arithmetic.truncate(party, arithmetic.mul(party, x, x), 18), public

    return party.simulate(seat, key, x, jnp.ones((2, 3)))[0].share


def _public_choice(key, x, w):
    return lax.cond(True, lambda: P.sec_relu(key, x), lambda: x)


def _a_choice_that_is_not_known(key, x, w):
    return P.sec_relu(key, lax.cond(jnp.float32(1) > 0, lambda: x + 1, lambda: -x))


def _a_key_that_is_used_and_split(key, x, w):
    """Its children are no server's seed."""
    for _ in range(2):
        x = P.sec_relu(key, x)
        key, _ = split(key, 2)
    return x


def _of_bits(key, x, w):
    first, second = split(key, 2)
    one_hot, found = P.sec_msb(second, P.bit_decompose(first, x))
    return P.sec_xor(one_hot[..., 0], found)


SOUND = [
    _a_layer,
    _glue,
    _scan,
    _scan_that_carries_a_key,
    _loop_that_folds,
    _vmap,
    _jit_and_checkpoint,
    _shared_constant,
    _own_program,
    _public_choice,
    _a_choice_that_is_not_known,
    _a_key_that_is_used_and_split,
    _of_bits,
]


@pytest.mark.parametrize("function", SOUND, ids=lambda f: f.__name__)
def test_sound_functions_pass(function):
    report = lp.audit(function, SHAPE, (3, 2))
    assert report.ok, report.problems
    assert report.openings


JOINS = "joins a share of S1 with one of S2 outside of an exchange"
PAIR = "is no pair of shares"
REUSED = "have a mask that an earlier message depends on"

LEAKS = {
    "the sum of both": (lambda key, x: x[0] + x[1], JOINS),
    "a sum that becomes a share": (lambda key, x: P.sec_relu(key, x.sum(0)[None] + x), JOINS),
    "reveal": (lambda key, x: P.sec_relu(key, (lp.reveal(x, FXP) * x).astype(np.uint64)), JOINS),
    "reveal that is returned": (lambda key, x: lp.reveal(x, FXP), JOINS),
    "a product of both": (lambda key, x: x * x[::-1], JOINS),
    "a contraction of both": (lambda key, x: jnp.einsum("pij,qij->ij", x, x), JOINS),
    "halves that change places": (lambda key, x: P.sec_relu(key, x[::-1]), "only the other, or DS"),
    "the same, returned": (lambda key, x: x[::-1], PAIR),
    "one half": (lambda key, x: x[0], PAIR),
    "one half twice": (lambda key, x: jnp.stack([x[0], x[0]]), PAIR),
    "one half for both": (lambda key, x: P.sec_relu(key, x.at[1].set(x[0])), JOINS),
    "a sum in a branch": (
        lambda key, x: P.sec_relu(
            key,
            lax.cond(jnp.float32(1) > 0, lambda: jnp.stack([x[0] + x[1], x[1]]), lambda: x),
        ),
        JOINS,
    ),
    "places that change in a loop": (
        lambda key, x: lax.while_loop(lambda v: jnp.float32(1) > 0, lambda v: v[::-1], x),
        JOINS,
    ),
    "local truncation of floats": (
        lambda key, x: (x.astype(np.float64) * 0.125).astype(np.uint64),
        "no sum of fresh shares",
    ),
    "lower halves": (
        lambda key, x: x.astype(np.uint32).astype(np.uint64),
        "no sum of fresh shares",
    ),
    "local truncation": (lambda key, x: x >> np.uint64(3), "no sum of fresh shares"),
    "one key, two values": (lambda key, x: (P.sec_relu(key, x), P.sec_relu(key, x + 1)), REUSED),
    "one key in a scan": (
        lambda key, x: lax.scan(
            lambda c, v: (c, P.sec_relu(split(key, 2)[0], v)), 0, jnp.swapaxes(x, 0, 1)
        )[1],
        REUSED,
    ),
    "one key carried": (
        lambda key, x: lax.fori_loop(0, 2, lambda i, c: (c[0], P.sec_relu(*c)), (key, x))[1],
        REUSED,
    ),
    "one key repeated": (
        lambda key, x: jax.vmap(P.sec_relu)(jnp.stack([key, key]), jnp.stack([x, 2 * x])),
        "repeat the mask",
    ),
    "a public key": (
        lambda key, x: P.sec_relu(jax.random.fold_in(PUBLIC_KEY, 0), x),
        "not masked by a word",
    ),
    "sharing twice with one key": (
        lambda key, x: x + lp.share(key, np.ones(3), FXP) + lp.share(key, np.zeros(3), FXP),
        "one key shares two values",
    ),
    "sharing what DS does not know": (
        lambda key, x: share_words(key, x[0]),
        "DS cannot share what it does not know",
    ),
    "a branch": (lambda key, x: lax.cond(x[0, 0, 0] > 3, lambda: x, lambda: -x), "is steered"),
    "a look at the host": (
        lambda key, x: (jax.debug.print("{}", x), x)[1],
        "reaches out to the host",
    ),
    "DS's word for a share": (
        lambda key, x: x + jax.random.bits(key, x.shape, np.uint64),
        PAIR,
    ),
}
PUBLIC_KEY = lp.key(3)


@pytest.mark.parametrize("name", LEAKS)
def test_planted_leaks_are_found(name):
    function, text = LEAKS[name]
    report = lp.audit(function, SHAPE)
    assert [p for p in report.problems if text in p], report.problems


PLANTED = {
    "nothing hides it": (lambda party, x: party.open(x, "leak"), "not masked by a word"),
    "one-sided": (
        lambda party, x: party.open(x - party.public_share(party.mask(x.shape).share), "leak"),
        "not masked by a word",
    ),
    "a row for all": (
        lambda party, x: party.open(x - party.mask(x.shape[1:]).share, "leak"),
        "repeat the mask",
    ),
    "the plain mask": (
        lambda party, x: party.open(x - party.mask(x.shape).plain, "leak"),
        "only the other, or DS, knows",
    ),
    "a share of a dealt value": (
        lambda party, x: party.open(
            x - party.correlate(lambda v: v, party.mask(x.shape)).share, "leak"
        ),
        "nothing but a share of a dealt value",
    ),
    "scaled": (
        lambda party, x: party.open(x - 2 * party.mask(x.shape).share, "leak"),
        "not masked",
    ),
    "a collective": (lambda party, x: lax.psum(x, "party"), JOINS),
    "a permutation": (lambda party, x: lax.ppermute(x, "party", [(0, 1), (1, 0)]), PAIR),
    "what servers open, dealt": (
        lambda party, x: (
            party.correlate(
                lambda v: v,
                party.mask(x.shape).map(
                    lambda v: v * party.open(x - party.mask(x.shape).share, "m")
                ),
            ).share
        ),
        "depends on what the servers open",
    ),
    "what is masked": (
        lambda party, x: party.open(x - party.mask(x.shape).share, "m"),
        "no sum of fresh shares",
    ),
    "the mask": (
        lambda party, x: (m := party.mask(x.shape).share, party.open(x - m, "m"))[0],
        "tells what they hide",
    ),
    "a loop": (
        lambda party, x: lax.while_loop(lambda v: v[0, 0] != 0, lambda v: v >> np.uint64(1), x),
        "the trip count of a while loop depends on a private value",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_leaks_in_a_simulated_program_are_found(name):
    function, text = PLANTED[name]
    report = lp.audit(
        lambda key, x: party.simulate(lambda seat, share, _: function(seat, share), key, x), SHAPE
    )
    assert [p for p in report.problems if text in p], report.problems


def test_a_function_that_is_traced_otherwise_the_second_time_is_found():
    calls = []

    def function(key, x):
        calls.append(1)
        return P.sec_relu(key, x * len(calls))

    (problem,) = lp.audit(function, SHAPE).problems
    assert "traced otherwise the second time" in problem


def test_a_secure_function_is_traced_anew():
    step = lp.secure(lambda x: x + np.random.default_rng().normal())
    (problem,) = lp.audit(step, jax.ShapeDtypeStruct((2,), np.float32)).problems
    assert "the function is traced otherwise the second time" in problem


def test_a_bit_that_is_repeated_is_a_sum_of_fresh_shares():
    step = lp.secure(lambda x: lax.cond(x[0] > 0, lambda v: 2 * v, lambda v: v - 1, x))
    assert lp.audit(step, jax.ShapeDtypeStruct((3,), np.float32)).problems == []


def test_what_is_written_into_shares_is_a_share():
    """But not a function of one server's."""

    def function(x):
        return x.at[0].add(x[1]), x.at[0].set(x[1]), lax.dynamic_update_slice(x, x[1:], (0,))

    step = lp.secure(function)
    assert lp.audit(step, jax.ShapeDtypeStruct((3,), np.float32)).problems == []

    def applied(key, x):
        return party.simulate(lambda seat, v, _: v.at[0].apply(lambda u: u * u), key, x)

    problems = lp.audit(applied, (3,)).problems
    assert "the function: result is no sum of fresh shares" in problems


def test_public_arguments_are_public():
    public = jax.ShapeDtypeStruct((3,), np.float64)
    report = lp.audit(lambda key, x, p: (P.sec_relu(key, x), 2 * p, x * (p > 0)), SHAPE, public)
    assert report.ok, report.problems


PLACES = jax.ShapeDtypeStruct((2,), np.int32)


@pytest.mark.parametrize(
    "moved", [lambda x, i: x[i], lambda x, i: x.at[i].add(x)], ids=["gather", "scatter"]
)
def test_shares_that_are_taken_from_a_place_that_is_not_known_are_found(moved):
    report = lp.audit(lambda key, x, i: P.sec_relu(key, moved(x, i)), (3,), PLACES)
    assert [p for p in report.problems if JOINS in p], report.problems


def test_bad_input():
    with pytest.raises(TypeError, match="expected to be called with a key and 1 paired arrays"):
        lp.audit(P.sec_mul, SHAPE)
    with pytest.raises(ValueError, match="sizes of at least 0"):
        lp.audit(P.sec_relu, (-1,))
