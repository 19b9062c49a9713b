"""Protocols on bits: gates, decomposition, the highest set bit, comparison in both variants.

References are Python integers. Programs are compiled without LLVM's optimisations, which takes a
third of the time; every value here is an integer, so that nothing else changes.
"""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import pair_of, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from lpgan_jax import key
from lpgan_jax import protocols as P
from lpgan_jax.mpc import arithmetic, boolean
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
AND, OR, MSB, DECOMPOSE = (
    quick(p) for p in (P.sec_and, P.sec_or, P.sec_msb, P.bit_decompose)
)  # fmt: skip
RING = quick(functools.partial(P.sec_cmp, variant="ring"))
PATENT = quick(functools.partial(P.sec_cmp, variant="patent"))

N = 64  # values at a time, so that one program serves all examples
seeds = st.integers(0, 2**32 - 1)
examples = settings(max_examples=25, deadline=None, derandomize=True)


def bit_pair(bits, seed=0):
    """Random XOR shares uint8[2, ...] of 0 and 1."""
    bits = np.asarray(bits, np.uint8)
    first = np.random.default_rng([8, seed]).integers(0, 2, bits.shape, np.uint8)
    return jnp.asarray(np.stack([first, bits ^ first]))


def revealed(shares):
    """Bits from XOR shares, which are 0 and 1 themselves."""
    shares = np.asarray(shares)
    assert shares.dtype == np.uint8
    assert np.all(shares <= 1)
    return shares[0] ^ shares[1]


# Gates ------------------------------------------------------------------------------------------

GATES = {
    "xor": (lambda k, b, c: P.sec_xor(b, c), np.bitwise_xor),
    "and": (AND, np.bitwise_and),
    "or": (OR, np.bitwise_or),
}
gates = pytest.mark.parametrize("name", GATES)
KEYED = {
    "and": lambda k, x: P.sec_and(k, x, x),
    "or": lambda k, x: P.sec_or(k, x, x),
    "msb": P.sec_msb,
}


@gates
def test_gates_on_every_pair_of_bits_and_every_sharing(name):
    gate, right = GATES[name]
    shares = np.array(list(np.ndindex(2, 2, 2, 2)), np.uint8)  # b', b'', c', c''
    b, c = jnp.asarray(shares[:, :2].T), jnp.asarray(shares[:, 2:].T)
    result = revealed(gate(key(1), b, c))
    np.testing.assert_array_equal(result, right(shares[:, 0] ^ shares[:, 1], c[0] ^ c[1]))


@gates
@pytest.mark.parametrize(
    ("b_shape", "c_shape"), [((), ()), ((3, 1), (4,)), ((2, 70), ()), ((0, 3), (3,)), ((1,), (0,))]
)
def test_gates_broadcast_as_numpy_does(name, b_shape, c_shape):
    gate, right = GATES[name]
    rng = np.random.default_rng(1)
    b, c = rng.integers(0, 2, b_shape, np.uint8), rng.integers(0, 2, c_shape, np.uint8)
    shares = gate(key(2), bit_pair(b, 1), bit_pair(c, 2))
    assert shares.shape == (2, *np.broadcast_shapes(b_shape, c_shape))
    np.testing.assert_array_equal(revealed(shares), right(b, c))


@gates
def test_only_the_lowest_bit_of_a_share_counts(name):
    gate, right = GATES[name]
    b = np.random.default_rng(2).integers(0, 256, (2, 16), np.uint8)
    c = np.random.default_rng(3).integers(0, 256, (2, 16), np.uint8)
    result = revealed(gate(key(3), jnp.asarray(b), jnp.asarray(c)))
    np.testing.assert_array_equal(result, right(b[0] ^ b[1], c[0] ^ c[1]) & 1)


def test_gates_of_one_bit_with_itself():
    b = bit_pair([0, 1] * 8)
    np.testing.assert_array_equal(revealed(AND(key(4), b, b)), [0, 1] * 8)
    np.testing.assert_array_equal(revealed(OR(key(4), b, b)), [0, 1] * 8)


def test_vmap_over_keys_is_a_loop():
    keys = jax.random.split(key(5), 3)
    b = jnp.stack([bit_pair([0, 1] * 8, seed) for seed in range(3)])
    c = jnp.stack([bit_pair([0, 0, 1, 1] * 4, seed) for seed in range(3, 6)])
    loop = [AND(k, u, v) for k, u, v in zip(keys, b, c, strict=True)]
    np.testing.assert_array_equal(quick(jax.vmap(P.sec_and))(keys, b, c), jnp.stack(loop))


@pytest.mark.parametrize("name", KEYED)
def test_one_key_for_a_batch_is_refused(name):
    b = jnp.stack([bit_pair([0, 1, 1], seed) for seed in range(3)])
    with pytest.raises(ValueError, match="batch of keys"):
        jax.vmap(KEYED[name], in_axes=(None, 0))(key(6), b)


@pytest.mark.parametrize("name", KEYED)
@pytest.mark.parametrize("bad_key", [jax.random.key(0), jnp.zeros(8, jnp.uint32), None], ids=str)
def test_keys_of_other_generators_are_refused(name, bad_key):
    with pytest.raises(TypeError):
        KEYED[name](bad_key, bit_pair([0, 1, 1]))


@pytest.mark.parametrize("name", [*KEYED, "xor"])
@pytest.mark.parametrize("dtype", [bool, jnp.int8, jnp.uint64, jnp.float32])
def test_bits_of_other_types_are_refused(name, dtype):
    call = KEYED.get(name, lambda k, x: P.sec_xor(x, x))
    with pytest.raises(TypeError, match="uint8"):
        call(key(7), jnp.ones((2, 3), dtype))


@pytest.mark.parametrize("name", [*KEYED, "xor"])
@pytest.mark.parametrize("shape", [(), (3, 4), (1,)])
def test_bits_without_a_party_axis_are_refused(name, shape):
    call = KEYED.get(name, lambda k, x: P.sec_xor(x, x))
    with pytest.raises(ValueError, match="leading axis"):
        call(key(7), jnp.ones(shape, jnp.uint8))


@pytest.mark.parametrize("gate", [lambda k, b, c: P.sec_xor(b, c), P.sec_and, P.sec_or])
def test_gates_that_do_not_broadcast_are_refused(gate):
    with pytest.raises(ValueError, match="broadcast"):
        gate(key(7), bit_pair([0, 1]), bit_pair([0, 1, 1]))


# Decomposition ----------------------------------------------------------------------------------

EXTREMES = [
    0,
    1,
    -1,
    2**63 - 1,
    -(2**63),
    1 - 2**63,
    2**62,
    -(2**62),
    2**32,
    -(2**32),
    0x5555 << 47,
]


def _of_size(values, size=N):
    """The values and the extremes, filled up with zeros."""
    return np.array([*values, *EXTREMES, *[0] * size][:size], np.int64)


@examples
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=N - len(EXTREMES)), seeds)
def test_decomposition_is_twos_complement_the_highest_bit_first(values, seed):
    x = _of_size(values)
    bits = revealed(DECOMPOSE(key(seed), pair_of(x, seed)))
    assert bits.shape == (N, 64)
    right = [[int(value) >> i & 1 for i in reversed(range(64))] for value in x]
    np.testing.assert_array_equal(bits, right)


def test_decomposition_for_extreme_shares():
    """Carries through all bits, and none."""
    edges = np.array([0, 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64 - 2], np.uint64)
    first, second = (a.ravel() for a in np.meshgrid(edges, edges))
    bits = revealed(DECOMPOSE(key(8), jnp.asarray(np.stack([first, second]))))
    total = [(int(a) + int(b)) % 2**64 for a, b in zip(first, second, strict=True)]
    np.testing.assert_array_equal(bits, [[t >> i & 1 for i in reversed(range(64))] for t in total])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 1)])
def test_decomposition_keeps_shapes(shape):
    result = jax.eval_shape(P.bit_decompose, key(9), pair_of(np.zeros(shape)))
    assert (result.shape, result.dtype) == ((2, *shape, 64), jnp.uint8)


def test_decomposition_of_scalars_and_empty_arrays():
    bits = revealed(DECOMPOSE(key(10), pair_of(-2)))
    np.testing.assert_array_equal(bits, [1] * 63 + [0])
    assert revealed(DECOMPOSE(key(10), pair_of(np.zeros((3, 0))))).shape == (3, 0, 64)


# The highest set bit ----------------------------------------------------------------------------


def _highest(bits):
    """The patent's loop: t_l = 1, t_i = t_{i+1} (1 - u_i), f_i = t_{i+1} - t_i, zeta = sum f_i."""
    t = [1]
    for bit in bits:
        t.append(t[-1] * (1 - int(bit)))
    f = [before - after for before, after in pairwise(t)]
    return f, sum(f)


def test_the_patents_example_of_the_highest_set_bit():
    bits = [[0, 0, 0, 1, 1, 0, 1, 0], [0] * 8]
    one_hot, found = MSB(key(11), bit_pair(bits))
    np.testing.assert_array_equal(revealed(one_hot), [[0, 0, 0, 1, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(revealed(found), [1, 0])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 16, 17, 64, 65, 70])
def test_highest_set_bit_of_every_length(length):
    """Each position as the highest, none, all, and random bits behind random runs of zeros."""
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2, (160, length), np.uint8)
    bits[np.arange(length) < rng.integers(0, length + 1, 160)[:, None]] = 0
    bits[:length] = np.eye(length)
    bits[length : length + 2] = [[0] * length, [1] * length]
    one_hot, found = MSB(key(12), bit_pair(bits, length))
    right = [_highest(row) for row in bits]
    np.testing.assert_array_equal(revealed(one_hot), [f for f, _ in right])
    np.testing.assert_array_equal(revealed(found), [zeta for _, zeta in right])


@examples
@given(st.lists(st.integers(0, 255), max_size=24), seeds)
def test_highest_set_bit_of_any_byte(values, seed):
    numbers = [*values, *[0] * 24][:24]
    bits = [[n >> i & 1 for i in reversed(range(8))] for n in numbers]
    one_hot, found = MSB(key(seed), bit_pair(np.reshape(bits, (2, 3, 4, 8)), seed))
    powers = revealed(one_hot).reshape(24, 8) @ 2 ** np.arange(7, -1, -1)
    assert [int(p) for p in powers] == [1 << n.bit_length() >> 1 for n in numbers]
    assert revealed(found).ravel().tolist() == [int(n > 0) for n in numbers]


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 3, 1)])
def test_highest_set_bit_keeps_shapes(shape):
    one_hot, found = jax.eval_shape(P.sec_msb, key(13), bit_pair(np.zeros(shape)))
    assert (one_hot.shape, found.shape) == ((2, *shape), (2, *shape[:-1]))
    assert one_hot.dtype == found.dtype == jnp.uint8


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_highest_set_bit_needs_a_bit(shape):
    with pytest.raises(ValueError, match="l >= 1"):
        P.sec_msb(key(13), bit_pair(np.zeros(shape)))


# Sign bits --------------------------------------------------------------------------------------

OFFSETS = (0, 1, -1, 2**20, -(2**30))


@functools.partial(quick, static_argnums=(2, 3))
def sign_bits(ds_key, x, bits, radix):
    """[x + offset < 0] for each offset, with a tree of `radix` over `bits` bits."""

    def seat(party, share, _):
        masked = arithmetic.masked(party, Secret(share, 0))
        rows = boolean.sign_bit(party, masked, OFFSETS, bits, radix)
        return jnp.stack([boolean.unpack(party.ring, row, share.shape) for row in rows])

    shares = simulate(seat, ds_key, x)
    return shares[0] ^ shares[1]


@pytest.mark.parametrize(
    ("bits", "radix"), [(32, 2), (32, 3), (32, 4), (32, 8), (64, 2), (64, 3), (64, 4)]
)
def test_sign_bits_of_any_radix_and_of_fewer_bits(bits, radix):
    rng, top = np.random.default_rng(5), 2 ** (bits - 1)
    x = np.floor(2.0 ** rng.uniform(0, bits - 1, 150)).clip(0, top - 1025).astype(np.int64)
    x *= rng.choice([-1, 1], 150)
    x[:5] = [0, -1, 1, 2**30, -(2**20)]
    edges = [e + sign for o in OFFSETS for e in (-top - o, top - 1 - o, -o) for sign in (0, -1, 1)]
    x = np.array([*x.tolist(), *(e for e in edges if -(2**63) <= e < 2**63)], np.int64)
    signs = np.asarray(sign_bits(key(14), pair_of(x), bits, radix))
    sums = x.astype(object)[None] + np.array(OFFSETS, object)[:, None]
    promised = np.abs(sums) < top
    assert promised.sum() > 4 * len(x)
    np.testing.assert_array_equal(signs[promised], (sums < 0)[promised])
    if bits == 64:  # modulo 2^64 for every x
        np.testing.assert_array_equal(signs, (sums % 2**64) >> 63)


# Comparison -------------------------------------------------------------------------------------


def _compared(compare, u, v, seed=1):
    return whole(compare(key(seed), u, v))


def _literal(first, second):
    """Shares given as signed integers, filled up with zeros to N."""
    shares = np.zeros((2, N), np.int64)
    shares[:, 0] = first, second
    return jnp.asarray(shares.astype(np.uint64))


@pytest.mark.parametrize("compare", [RING, PATENT])
def test_the_patents_example_of_a_comparison(compare):
    """u = -1030 + 583 = -447, v = -929 + 551 = -378."""
    u, v = _literal(-1030, 583), _literal(-929, 551)
    assert _compared(compare, u, v).tolist() == [0] * N
    assert _compared(compare, v, u).tolist() == [1] + [0] * (N - 1)


small = st.integers(-(2**20), 2**20)


@pytest.mark.parametrize("compare", [RING, PATENT])
@examples
@given(st.lists(st.tuples(small, small, small, small), min_size=1, max_size=N), seeds)
def test_both_comparisons_are_right_for_shares_that_do_not_wrap(compare, shares, seed):
    u1, u2, v1, v2 = np.array([*shares, *[(5, -5, 0, 0)] * N][:N]).T
    u2[::7] = v1[::7] + v2[::7] - u1[::7]  # ties
    u = jnp.asarray(np.stack([u1, u2]).astype(np.uint64))
    v = jnp.asarray(np.stack([v1, v2]).astype(np.uint64))
    np.testing.assert_array_equal(_compared(compare, u, v, seed), u1 + u2 > v1 + v2)


@pytest.mark.parametrize("log_distance", [62, 61, 60])
def test_the_published_comparison_fails_as_often_as_shares_wrap(log_distance):
    """Wrong with probability d / 2^64 for |u - v| = d, exactly where u' - v' and d wrap together.

    Of 2^15 pairs; the bound is 5 standard deviations: a false alarm for one seed in 1.7 million.
    """
    count, distance = 2**15, 2**log_distance
    rng = np.random.default_rng(log_distance)
    v = rng.integers(-(2**61), 2**61 - 1, count)
    u = np.where(np.arange(count) % 2, v + distance, v)
    v = np.where(np.arange(count) % 2, v, u + distance)
    u_shares, v_shares = pair_of(u, 1), pair_of(v, 2)
    shape = (2, -1, N)
    wrong = np.concatenate(
        [
            (_compared(PATENT, a, b, seed) != 0) != right
            for seed, (a, b, right) in enumerate(
                zip(
                    np.asarray(u_shares).reshape(shape).swapaxes(0, 1),
                    np.asarray(v_shares).reshape(shape).swapaxes(0, 1),
                    (u > v).reshape(shape[1:]),
                    strict=True,
                )
            )
        ]
    )
    probability = distance / 2**64
    deviation = np.sqrt(count * probability * (1 - probability))
    assert abs(wrong.sum() - count * probability) < 5 * deviation
    first = np.asarray(u_shares[0] - v_shares[0]).astype(np.int64).astype(object)
    second = first - (u.astype(object) - v.astype(object))
    np.testing.assert_array_equal(wrong, np.abs(second * 2 + 1) > 2**64)
    np.testing.assert_array_equal(whole(P.sec_cmp(key(15), u_shares, v_shares)), u > v)


@pytest.mark.parametrize("variant", ["", "Ring", "published", None])
def test_an_unknown_variant_is_refused(variant):
    with pytest.raises(ValueError, match="variant"):
        P.sec_cmp(key(16), pair_of([1]), pair_of([2]), variant=variant)
