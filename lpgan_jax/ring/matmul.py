"""Exact matrix products modulo 2^64, fast on each backend.

XLA's own integer dot is a scalar loop on CPU (0.26 G multiply-adds/s) and missing on GPU. So:

- on CPU, a native kernel where one could be built (`native`); else tiles of the product are sums of
  outer products, which compile to vector code;
- on GPU and TPU, words are cut into signed 8-bit digits, whose products run on the matrix units.

Unsigned words of 8, 16 and 32 bits work alike, modulo 2^bits: protocols are checked exhaustively in
tiny rings.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from lpgan_jax.ring.contraction import Axis, Contraction, contract

# Words of a CPU tile (1 MiB of uint64: half of a core's second-level cache), and its widest row.
_TILE_WORDS = 2**17
_TILE_COLUMNS = 256
# Outer products added in one pass over a tile. 16 is also the least number for which XLA:CPU copies
# the slices of a step into buffers of their own, without which LLVM does not vectorise the pass.
_RANK = 16
# Below this many words a tile is small change: longer passes, to have fewer of them.
_SMALL_TILE, _SMALL_TILE_RANK = 2**14, 32
# Below this many multiply-adds a product is one small fused sum: it compiles fastest.
_TINY = 2**15


Index = jax.Array | int


@custom_vmap
def matmul_portable(a: jax.Array, b: jax.Array) -> jax.Array:
    """`matmul` in JAX alone."""
    if a.shape[0] * a.shape[1] * b.shape[1] <= _TINY:
        return matmul_sum(a, b)
    return lax.platform_dependent(a, b, cpu=matmul_rank_updates, default=matmul_digits)


@matmul_portable.def_vmap
def _batched(size: int, batched: list[bool], a: jax.Array, b: jax.Array) -> tuple[jax.Array, bool]:
    """A batch of products is one product with longer sides where one operand is shared."""
    if all(batched):
        return lax.map(lambda operands: matmul_portable(*operands), (a, b)), True
    if batched[0]:
        _, rows, inner = a.shape
        return matmul_portable(a.reshape(size * rows, inner), b).reshape(
            size, rows, b.shape[1]
        ), True
    _, inner, columns = b.shape
    folded = matmul_portable(a, b.swapaxes(0, 1).reshape(inner, size * columns))
    return folded.reshape(a.shape[0], size, columns).swapaxes(0, 1), True


@jax.jit
def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` modulo 2^bits of their unsigned integer type.

    Under `jax.vmap`, a batch over one operand folds into one larger product.

    Args:
        a: uint[M, K].
        b: uint[K, N], of the same type.

    Returns:
        uint[M, N], of the same type. Sizes of 0 are allowed.

    Floating-point operands, of programs that are run in the clear, take the ordinary product.

    Raises:
        TypeError: the operands are not numbers of one unsigned or floating type.
        ValueError: the operands are not matrices, or their inner sizes differ.
    """
    floating = jnp.issubdtype(a.dtype, jnp.floating)
    if a.dtype != b.dtype or not (floating or jnp.issubdtype(a.dtype, jnp.unsignedinteger)):
        raise TypeError(f"operands must be of one unsigned type, not {a.dtype} and {b.dtype}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"shapes {a.shape} and {b.shape} are not those of a matrix product")
    if floating:
        return jnp.matmul(a, b)
    (rows, inner), columns = a.shape, b.shape[1]
    views = Contraction(
        rows=(Axis(rows, (inner, columns)),),
        inner=(Axis(inner, (1, columns)),),
        columns=(Axis(columns, (1, 1)),),
        shape=(rows, columns),
    )
    return contract(a, b, views, matmul_portable)


def matmul_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """`matmul` as one fused sum over K: slow, but the least code. For tiny products."""
    return jnp.sum(a[:, :, None] * b[None, :, :], axis=1, dtype=a.dtype)


def matmul_rank_updates(a: jax.Array, b: jax.Array) -> jax.Array:
    """`matmul` by tiles of the product, each a running sum of outer products a[:, k] b[k, :].

    Sizes that tiles and steps do not divide need no padding: the last tile of a row or column moves
    back to end at the border (its overlap is computed twice, to the same words), and the first step
    of a tile takes what is left of K.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    if 0 in (rows, inner, columns):
        return matmul_sum(a, b)
    tile_columns = min(columns, _TILE_COLUMNS)
    tile_rows = min(rows, _TILE_WORDS // tile_columns)
    rank = min(inner, _RANK if tile_rows * tile_columns > _SMALL_TILE else _SMALL_TILE_RANK)
    steps = (inner - 1) // rank
    first_rank = inner - steps * rank

    def outer_products(i: Index, j: Index, k: Index, count: int) -> list[jax.Array]:
        left = lax.dynamic_slice(a, (i, k), (tile_rows, count))
        right = lax.dynamic_slice(b, (k, j), (count, tile_columns))
        return [left[:, n, None] * right[n, None, :] for n in range(count)]

    def tile(i: Index, j: Index) -> jax.Array:
        def step(n: jax.Array, total: jax.Array) -> jax.Array:
            return sum(outer_products(i, j, first_rank + n * rank, rank), start=total)

        first, *others = outer_products(i, j, 0, first_rank)
        return lax.fori_loop(0, steps, step, sum(others, start=first))

    across, down = -(-columns // tile_columns), -(-rows // tile_rows)
    if across * down == 1:
        return tile(0, 0)

    def place(n: jax.Array, product: jax.Array) -> jax.Array:
        i = jnp.minimum(n // across * tile_rows, rows - tile_rows)
        j = jnp.minimum(n % across * tile_columns, columns - tile_columns)
        return lax.dynamic_update_slice(product, tile(i, j), (i, j))

    # Zeros "like" both operands: under shard_map they vary over the mesh axes that these vary over.
    zeros = jnp.zeros_like(a, shape=(rows, columns)) + jnp.zeros_like(b, shape=())
    return lax.fori_loop(0, across * down, place, zeros)


def matmul_digits(a: jax.Array, b: jax.Array) -> jax.Array:
    """`matmul` by products of balanced 8-bit digits, s8 x s8 -> s32.

    With a = sum_i a_i 2^(8i) and b likewise, the product is sum_s 2^(8s) sum_{i+j=s} a_i b_j, where
    terms with 8s >= bits vanish. The digits of `a` lie side by side, lowest first, and those of `b`
    on top of one another, highest first: the sum of a diagonal is then one dot of two slices. K is
    split so that no sum leaves 32 bits.
    """
    digits = a.dtype.itemsize
    longest = (2**31 - 1) // (digits * 2**14)
    inner = a.shape[1]
    if inner > longest:
        starts = range(0, inner, longest)
        parts = [matmul_digits(a[:, k : k + longest], b[k : k + longest]) for k in starts]
        return sum(parts[1:], start=parts[0])
    side_by_side = jnp.moveaxis(_balanced_digits(a), -1, 1).reshape(a.shape[0], digits * inner)
    stacked = jnp.moveaxis(_balanced_digits(b)[..., ::-1], -1, 0).reshape(
        digits * inner, b.shape[1]
    )

    def diagonal(s: int) -> jax.Array:
        left, right = side_by_side[:, : (s + 1) * inner], stacked[(digits - 1 - s) * inner :]
        total = jnp.matmul(left, right, preferred_element_type=jnp.int32)
        return total.astype(a.dtype) << np.array(8 * s, a.dtype)

    return sum((diagonal(s) for s in range(1, digits)), start=diagonal(0))


def _balanced_digits(x: jax.Array) -> jax.Array:
    """Signed digits d[..., i], lowest first, with x = sum_i d_i 2^(8i) modulo 2^bits.

    Adding 128 to each digit makes it an unsigned byte (with carries, which the addition does), and
    flipping the top bit of that byte takes the 128 away again.
    """
    halves = int.from_bytes(b"\x80" * x.dtype.itemsize, "little")
    shifted = lax.bitcast_convert_type(x + np.array(halves, x.dtype), jnp.uint8)
    if x.dtype.itemsize == 1:  # a bitcast between types of one size adds no axis
        shifted = shifted[..., None]
    return lax.bitcast_convert_type(shifted ^ np.uint8(0x80), jnp.int8)
