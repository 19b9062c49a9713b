"""Matrix products modulo 2^bits against Python integers, on each scheme, batched and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpgan_jax.ring import matmul
from lpgan_jax.ring.matmul import (
    _balanced_digits,
    matmul_digits,
    matmul_portable,
    matmul_rank_updates,
    matmul_sum,
)

PORTABLE = (matmul_sum, matmul_rank_updates, matmul_digits, matmul_portable)
SCHEMES = [matmul, *map(jax.jit, PORTABLE)]
# Enough to meet one tile and several, one step and several, remainders, thin and tiny products.
SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (1, 100, 400),
    (400, 100, 1),
    (33, 70, 65),
    (600, 20, 300),
    (0, 3, 2),
    (2, 0, 3),
    (2, 3, 0),
]


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def words(seed, shape, dtype=np.uint64, kind="uniform"):
    """Uniform words, or words within 2 of 0, half the ring or its end."""
    rng, bits = np.random.default_rng(seed), 8 * np.dtype(dtype).itemsize
    if kind == "uniform":
        return rng.integers(0, 2**bits, shape, dtype)
    edges = [0, 1, 2, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 2, 2**bits - 1]
    return rng.choice(np.array(edges, dtype), shape)


def exact(a, b):
    """The product in Python integers."""
    bits = 8 * a.dtype.itemsize
    return (
        (a.astype(object) @ b.astype(object) % 2**bits)
        .astype(a.dtype)
        .reshape(a.shape[0], b.shape[1])
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_scheme_is_exact(scheme, shape):
    m, k, n = shape
    for kind in ("uniform", "edges"):
        a, b = words(1, (m, k), kind=kind), words(2, (k, n), kind=kind)
        np.testing.assert_array_equal(scheme(a, b), exact(a, b))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_smaller_rings(scheme, dtype):
    for kind in ("uniform", "edges"):
        a, b = words(3, (40, 50), dtype, kind), words(4, (50, 30), dtype, kind)
        product = scheme(a, b)
        assert product.dtype == dtype
        np.testing.assert_array_equal(product, exact(a, b))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.sampled_from([1, 2, 17, 40])] * 3),
    kinds=st.tuples(*[st.sampled_from(["uniform", "edges"])] * 2),
    seed=st.integers(0, 2**32),
)
def test_random_shapes_and_values(shape, kinds, seed):
    m, k, n = shape
    a, b = words(seed, (m, k), kind=kinds[0]), words(seed + 1, (k, n), kind=kinds[1])
    np.testing.assert_array_equal(matmul(a, b), exact(a, b))


@pytest.mark.parametrize("scheme", [matmul, jax.jit(matmul_digits)])
def test_many_terms_of_extreme_digits(scheme):
    """Digits of -128 everywhere give the largest sums; K = 20,000 needs splitting."""
    k = 20_000
    a = np.full((3, k), 0x7F7F7F7F7F7F7F80, np.uint64)  # all digits -128
    assert (_balanced_digits(jnp.array(a)) == -128).all()
    b = words(5, (k, 4), kind="edges")
    b[:, 0] = a[0]
    np.testing.assert_array_equal(scheme(a, b), exact(a, b))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_balanced_digits_add_up(dtype):
    x = np.concatenate([words(6, (200,), dtype), words(7, (200,), dtype, "edges")])
    digits = np.asarray(_balanced_digits(jnp.array(x)))
    assert digits.dtype == np.int8
    assert digits.shape == (*x.shape, x.dtype.itemsize)
    total = sum(digits[:, i].astype(object) * 256**i for i in range(x.dtype.itemsize))
    np.testing.assert_array_equal((total % 2 ** (8 * x.dtype.itemsize)).astype(dtype), x)


class TestBatching:
    A, B = words(8, (3, 40, 50)), words(9, (3, 50, 30))

    def check(self, f, expected, *operands):
        np.testing.assert_array_equal(f(*operands), expected)
        np.testing.assert_array_equal(jax.jit(f)(*operands), expected)

    @pytest.mark.parametrize("size", [1, 3])
    def test_one_operand_or_both(self, size):
        a, b = self.A[:size], self.B[:size]
        both = np.stack([exact(x, y) for x, y in zip(a, b, strict=True)])
        left = np.stack([exact(x, b[0]) for x in a])
        right = np.stack([exact(a[0], y) for y in b])
        self.check(jax.vmap(matmul), both, a, b)
        self.check(jax.vmap(matmul, (0, None)), left, a, b[0])
        self.check(jax.vmap(matmul, (None, 0)), right, a[0], b)
        self.check(jax.vmap(matmul, (2, None), 1), left.swapaxes(0, 1), np.moveaxis(a, 0, 2), b[0])

    def test_nested(self):
        outer = np.stack([[exact(x, y) for y in self.B] for x in self.A])
        self.check(jax.vmap(jax.vmap(matmul, (None, 0)), (0, None)), outer, self.A, self.B)
        twice = np.stack([self.A, self.A + np.uint64(1)])
        both = np.stack([[exact(x, y) for x, y in zip(a, self.B, strict=True)] for a in twice])
        self.check(jax.vmap(jax.vmap(matmul), (0, None)), both, twice, self.B)
        self.check(jax.vmap(jax.vmap(matmul), (0, 0)), both, twice, np.stack([self.B] * 2))

    @pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
    @pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 2, 3), (2, 3, 0), (1, 1, 1)])
    def test_empty_and_single(self, axes, sizes):
        m, k, n = sizes
        a, b = words(1, (2, m, k)), words(2, (2, k, n))
        operands = [x if axis == 0 else x[0] for x, axis in zip((a, b), axes, strict=True)]
        pairs = [(a[i if axes[0] == 0 else 0], b[i if axes[1] == 0 else 0]) for i in range(2)]
        self.check(jax.vmap(matmul, axes), np.stack([exact(x, y) for x, y in pairs]), *operands)

    def test_inside_scan_and_eval_shape(self):
        def chain(x, y):
            return matmul(x, y), None

        squares = words(10, (4, 40, 40))
        product, _ = jax.jit(lambda x, ys: jax.lax.scan(chain, x, ys))(squares[0], squares[1:])
        expected = squares[0]
        for square in squares[1:]:
            expected = exact(expected, square)
        np.testing.assert_array_equal(product, expected)
        batched = jax.eval_shape(jax.vmap(matmul, (0, None)), self.A, self.B[0])
        assert (batched.shape, batched.dtype) == ((3, 40, 30), np.uint64)

    def test_with_a_collective(self):
        def opened(a, b):
            return matmul(jax.lax.psum(a, "party"), b)

        a, b = self.A[:2], self.B[:2]
        expected = np.stack([exact(a[0] + a[1], y) for y in b])
        self.check(jax.vmap(opened, axis_name="party"), expected, a, b)


@pytest.mark.parametrize("shape", [(5, 7, 3), (40, 50, 30), (600, 20, 300)])
def test_inside_shard_map(shape):
    m, k, n = shape
    mesh = jax.make_mesh((1,), ("party",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, replicated = jax.sharding.PartitionSpec("party"), jax.sharding.PartitionSpec()
    a, b = words(11, (m, k)), words(12, (k, n))

    def f(a, b):
        return matmul(a[0], b)[None], matmul(b.T, a[0].T)[None], matmul(a[0], a[0].T)[None]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=(sharded, replicated), out_specs=sharded)
    left, right, square = jax.jit(mapped)(a[None], b)
    np.testing.assert_array_equal(left[0], exact(a, b))
    np.testing.assert_array_equal(right[0], exact(b.T, a.T))
    np.testing.assert_array_equal(square[0], exact(a, a.T))


def dot_types(jaxpr):
    """The operand types of every dot in a jaxpr and in the jaxprs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from (v.aval.dtype for v in equation.invars)
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from dot_types(inner)


@pytest.mark.parametrize("shape", [(2, 3, 4), (64, 64, 64), (600, 600, 600)])
def test_no_dot_on_wide_integers(shape):
    m, k, n = shape
    a, b = (jax.ShapeDtypeStruct(s, jnp.uint64) for s in ((m, k), (k, n)))
    types = set(dot_types(jax.make_jaxpr(matmul_portable)(a, b).jaxpr))
    assert types <= {np.dtype(np.int8)}
    assert bool(types) == (m * k * n > 2**15)  # the digits' dots are found, so the search works
    # What runs on CPU has no dot at all.
    assert "dot" not in jax.jit(matmul).lower(a, b).as_text("hlo").replace("dot_", "")


def test_refused_operands():
    a = jnp.zeros((2, 3), jnp.uint64)
    with pytest.raises(TypeError, match="unsigned"):
        matmul(a, jnp.zeros((3, 2), jnp.uint32))
    with pytest.raises(TypeError, match="unsigned"):
        matmul(a.astype(jnp.int64), jnp.zeros((3, 2), jnp.int64))
    with pytest.raises(ValueError, match="matrix product"):
        matmul(a, a)
    with pytest.raises(ValueError, match="matrix product"):
        matmul(a[0], a.T)
