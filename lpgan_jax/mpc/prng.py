"""ChaCha20 (RFC 8439) as a JAX random number generator with 256-bit keys.

Every mask of the protocols comes from here. JAX's default generator, threefry, has a 64-bit key and
is not meant for cryptography. The key streams of one key are kept apart by their nonce, whose words
are `(purpose, bit width, 0)`:

| use | nonce | words of its key stream |
|---|---|---|
| `jax.random.bits` | `(BITS, width, 0)` | every word of blocks 0, 1, 2, ... |
| `jax.random.split` | `(SPLIT, 0, 0)` | child i: the first 8 words of block i |
| `jax.random.fold_in` | `(FOLD_IN, 0, 0)` | the first 8 words of block `data` (mod 2^32) |
| `sharing_words` | `(SHARE, width, 0)` | as `bits` |
| `server_seeds` | `(SERVER, 0, 0)` | as `split`: no child of `split` is a server's seed |
| a seeded key | `(SEED, 0, 0)` | the first 8 words of block 0, keyed by the seed |

Two draws of one width from one key are the same words, as with any JAX key: use a key once.
"""

import enum
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import define_prng_impl

from lpgan_jax import native
from lpgan_jax.mpc.traces import StaleKey, is_tracing
from lpgan_jax.native.primitive import primitive

KEY_WORDS = 8
_BLOCK_WORDS = 16
_MAX_BLOCKS = 2**32  # the RFC's block counter is one 32-bit word
# Blocks generated at a time: 64 KiB of state, which stays in a core's own cache (best on CPU).
_CHUNK_BLOCKS = 1024

_CONSTANTS = np.frombuffer(b"expand 32-byte k", dtype="<u4").astype(np.uint32)
# Which word goes where, so that the diagonals of the 4x4 state become its columns, and back.
_DIAGONALS = np.array([0, 1, 2, 3, 5, 6, 7, 4, 10, 11, 8, 9, 15, 12, 13, 14])
_COLUMNS = np.argsort(_DIAGONALS)


class _Purpose(enum.IntEnum):
    """Nonce word 0: keeps the key streams of one key apart."""

    BITS = 1
    SPLIT = 2
    FOLD_IN = 3
    SEED = 4
    SHARE = 5
    SERVER = 6


def _rotate_left(x: jax.Array, bits: int) -> jax.Array:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _column_round(state: jax.Array) -> jax.Array:
    """The quarter round on all four columns of uint32[16, blocks] at once."""
    a, b, c, d = state[:4], state[4:8], state[8:12], state[12:]
    a = a + b
    d = _rotate_left(d ^ a, 16)
    c = c + d
    b = _rotate_left(b ^ c, 12)
    a = a + b
    d = _rotate_left(d ^ a, 8)
    c = c + d
    b = _rotate_left(b ^ c, 7)
    return jnp.concatenate([a, b, c, d])


def _double_round(_: jax.Array, state: jax.Array) -> jax.Array:
    return _column_round(_column_round(state)[_DIAGONALS])[_COLUMNS]


def _single_round(i: jax.Array, state: jax.Array) -> jax.Array:
    return _column_round(state)[jnp.stack([_DIAGONALS, _COLUMNS])[i % 2]]


def _keystream(key: jax.Array, counters: jax.Array, nonce: jax.Array) -> jax.Array:
    """Blocks of the key stream, word by word: uint32[16, blocks] for the counters uint32[blocks].

    One row a word, not one row a block, makes a round elementwise code on long vectors.
    """
    head = jnp.concatenate([_CONSTANTS, key, jnp.zeros(1, jnp.uint32), nonce])
    state = jnp.broadcast_to(head[:, None], (_BLOCK_WORDS, *counters.shape)).at[12].set(counters)
    # The same twenty rounds either way. Two to an iteration run faster; one compiles in half the
    # time, which is what counts in a program with hundreds of small draws.
    if counters.size < _CHUNK_BLOCKS:
        return state + lax.fori_loop(0, 20, _single_round, state)
    return state + lax.fori_loop(0, 10, _double_round, state)


def chacha20_block(key: jax.Array, counter: jax.Array | int, nonce: jax.Array) -> jax.Array:
    """The ChaCha20 block function (RFC 8439, section 2.3), batched over the counter.

    Args:
        key: uint32[8], the little-endian words of a 256-bit key.
        counter: uint32[...], block counters.
        nonce: uint32[3], the little-endian words of a 96-bit nonce.

    Returns:
        uint32[..., 16]: the words of each block; their little-endian bytes are the key stream.
    """
    counter = jnp.asarray(counter, jnp.uint32)
    return _keystream(key, counter.reshape(-1), nonce).T.reshape(*counter.shape, _BLOCK_WORDS)


def _nonce(purpose: _Purpose, bit_width: int = 0) -> jax.Array:
    return jnp.array([purpose, bit_width, 0], jnp.uint32)


def _first_key(key: jax.Array, counter: jax.Array, purpose: _Purpose) -> jax.Array:
    return chacha20_block(key, counter, _nonce(purpose))[..., :KEY_WORDS]


def _seed(seed: jax.Array) -> jax.Array:
    """Behind `jax.random.key(seed, impl=CHACHA20)`: the same as `key(seed)` where the seed fits."""
    words = [seed.astype(jnp.uint32)]
    if seed.dtype.itemsize == 8:
        words.append((seed >> 32).astype(jnp.uint32))
    return _whiten(jnp.zeros(KEY_WORDS, jnp.uint32).at[: len(words)].set(jnp.stack(words)))


def _whiten(seed_words: jax.Array) -> jax.Array:
    return _first_key(seed_words, jnp.uint32(0), _Purpose.SEED)


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    count = math.prod(shape)
    _check_blocks(count)
    return _first_key(key, lax.iota(jnp.uint32, count), _Purpose.SPLIT).reshape(*shape, KEY_WORDS)


def _fold_in(key: jax.Array, data: jax.Array | int) -> jax.Array:
    return _first_key(key, jnp.asarray(data).astype(jnp.uint32), _Purpose.FOLD_IN)


def sharing_words(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Uniform words of 32 or 64 bits to split secrets with: others than `jax.random.bits` draws.

    Raises:
        TypeError: the key is not of `CHACHA20`, or the dtype has another width.
    """
    require_cryptographic(key)
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.uint32, jnp.uint64):
        raise TypeError(f"dtype: expected uint32 or uint64, got {dtype}")
    width = 8 * dtype.itemsize
    nonce = _nonce(_Purpose.SHARE, width)
    return _draw(jax.random.key_data(key), math.prod(shape), width, nonce).reshape(shape)


def server_seeds(key: jax.Array) -> jax.Array:
    """Two keys, for S1 and S2: others than `jax.random.split` gives whoever has this key.

    Raises:
        TypeError: the key is not of `CHACHA20`.
    """
    require_cryptographic(key)
    words = _first_key(jax.random.key_data(key), jnp.arange(2, dtype=jnp.uint32), _Purpose.SERVER)
    return jax.random.wrap_key_data(words, impl=CHACHA20)


def _check_blocks(blocks: int) -> None:
    if blocks > _MAX_BLOCKS:
        raise ValueError(f"one key yields at most 2^32 blocks of 64 bytes a draw, not {blocks}")


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Uniform words of 8, 16, 32 or 64 bits.

    Where a key-stream word goes in the result is ours to choose, as long as each is used once:
    results are laid out word by word (the first words of all blocks of a chunk, then the second
    words, ...), which needs no transpose. 64-bit words pair word i of a block with word i + 8;
    narrower ones are the little-endian parts of a 32-bit word.
    """
    if bit_width not in (8, 16, 32, 64):
        raise TypeError(f"bit_width must be 8, 16, 32 or 64, not {bit_width}")
    size = math.prod(shape)
    nonce = _nonce(_Purpose.BITS, bit_width)
    if bit_width >= 32:
        return _draw(key, size, bit_width, nonce).reshape(shape)
    per_word = 32 // bit_width
    words = _draw(key, -(-size // per_word), 32, nonce)
    dtype = jnp.dtype(f"uint{bit_width}")
    return lax.bitcast_convert_type(words, dtype).reshape(-1)[:size].reshape(shape)


def _draw(key: jax.Array, size: int, bit_width: int, nonce: jax.Array) -> jax.Array:
    """`size` words of 32 or 64 bits."""
    per_block = 32 * _BLOCK_WORDS // bit_width
    # The last chunk is a whole one (see `_draw_portable`).
    chunk_words = _CHUNK_BLOCKS * per_block
    chunks = -(-size // chunk_words)
    _check_blocks(-(-size // per_block) if chunks <= 1 else chunks * _CHUNK_BLOCKS)
    words: jax.Array = chacha20_words_p.bind(key, nonce, size=size, bit_width=bit_width)
    return words


def _draw_portable(key: jax.Array, nonce: jax.Array, *, size: int, bit_width: int) -> jax.Array:
    """The words in JAX alone, in chunks of blocks that stay in cache."""
    per_block = 32 * _BLOCK_WORDS // bit_width
    blocks = -(-size // per_block)

    def chunk(first: jax.Array, count: int) -> jax.Array:
        words = _keystream(key, lax.iota(jnp.uint32, count) + first.astype(jnp.uint32), nonce)
        if bit_width == 64:
            high, low = words[:8].astype(jnp.uint64), words[8:].astype(jnp.uint64)
            return ((high << np.uint64(32)) | low).reshape(-1)
        return words.reshape(-1)

    if blocks <= _CHUNK_BLOCKS:
        return chunk(jnp.uint32(0), blocks)[:size]
    chunk_words = _CHUNK_BLOCKS * per_block

    def fill(i: jax.Array, out: jax.Array) -> jax.Array:
        # The last chunk ends where the result ends, and overwrites some words of the one before:
        # no word is used twice, and nothing is copied to cut a tail off.
        start = jnp.minimum(i * chunk_words, size - chunk_words)
        return lax.dynamic_update_slice(out, chunk(i * _CHUNK_BLOCKS, _CHUNK_BLOCKS), (start,))

    out = jnp.zeros_like(key, jnp.dtype(f"uint{bit_width}"), shape=(size,))
    return lax.fori_loop(0, -(-size // chunk_words), fill, out)


@jax.named_scope("randomness")
def _draw_batch_portable(
    keys: jax.Array, nonce: jax.Array, *, size: int, bit_width: int
) -> jax.Array:
    if keys.ndim == 1:
        return _draw_portable(keys, nonce, size=size, bit_width=bit_width)
    draw = functools.partial(_draw_batch_portable, size=size, bit_width=bit_width)
    return jax.vmap(draw, (0, None))(keys, nonce)


@jax.named_scope("randomness")
def _draw_native(keys: jax.Array, nonce: jax.Array, *, size: int, bit_width: int) -> jax.Array:
    if not native.available():
        return _draw_batch_portable(keys, nonce, size=size, bit_width=bit_width)
    result = jax.ShapeDtypeStruct((*keys.shape[:-1], size), jnp.dtype(f"uint{bit_width}"))
    return jax.ffi.ffi_call(native.CHACHA20, result)(keys, nonce)


def _abstract_words(keys: Any, nonce: Any, *, size: int, bit_width: int) -> Any:
    return keys.update(shape=(*keys.shape[:-1], size), dtype=jnp.dtype(f"uint{bit_width}"))


def _batch_words(
    operands: Sequence[jax.Array], axes: Sequence[int | None], *, size: int, bit_width: int
) -> tuple[jax.Array, int]:
    (keys, nonce), (axis, nonce_axis) = operands, axes
    assert axis is not None
    assert nonce_axis is None  # it is a constant
    batch = jnp.moveaxis(keys, axis, 0)
    return chacha20_words_p.bind(batch, nonce, size=size, bit_width=bit_width), 0


# The words of a key, or of each of an array of keys, as one primitive: a program holds hundreds of
# draws, which are traced, batched and (natively) compiled as one operation each.
chacha20_words_p = primitive(
    "chacha20_words", _abstract_words, _batch_words, _draw_batch_portable, _draw_native
)


CHACHA20 = define_prng_impl(
    key_shape=(KEY_WORDS,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chacha20",
    tag="cc20",
)
"""The implementation object, as in `jax.random.wrap_key_data(words, impl=CHACHA20)`."""


def key(seed: int | None = None) -> jax.Array:
    """A typed ChaCha20 key: from the operating system, or from a seed.

    Args:
        seed: Without it, 256 bits of `os.urandom`. With it, its 256 little-endian bits, put through
            one ChaCha20 block so that small seeds do not give sparse keys. A seeded key is for
            reproducible simulation only: it has no more entropy than the seed.

    Returns:
        A scalar key array of the implementation `CHACHA20`. For 0 <= seed < 2^63 it is
        `jax.random.key(seed, impl=CHACHA20)`.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is negative or does not fit 256 bits.
        StaleKey: JAX is tracing: the key would be a constant of the traced program, the same in
            every execution.
    """
    if is_tracing():
        raise StaleKey(
            "key: made inside of a function that JAX traces, where it would be the same in every "
            "execution: make it outside, and make it an argument"
        )
    if seed is None:
        return jax.random.wrap_key_data(_words(os.urandom(4 * KEY_WORDS)), impl=CHACHA20)
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, not {type(seed).__name__}")
    if not 0 <= seed < 2**256:
        raise ValueError(f"seed must be in [0, 2^256), not {seed}")
    return jax.random.wrap_key_data(
        _whiten(_words(int(seed).to_bytes(32, "little"))), impl=CHACHA20
    )


def abstract_key() -> jax.ShapeDtypeStruct:
    """Shape and dtype of a key, for programs that are traced and not run."""
    words = jax.ShapeDtypeStruct((KEY_WORDS,), jnp.uint32)
    return jax.eval_shape(lambda words: jax.random.wrap_key_data(words, impl=CHACHA20), words)


def _words(data: bytes) -> jax.Array:
    return jnp.asarray(np.frombuffer(data, dtype="<u4").astype(np.uint32))


def require_cryptographic(key: jax.Array) -> None:
    """Refuse a key that does not belong to `CHACHA20`.

    Raises:
        TypeError: `key` is a raw array of words, or a key of another generator, such as threefry.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        kind = type(key).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"key must be a typed key, made by lpgan_jax.mpc.prng.key(), not {kind}")
    if (impl := jax.random.key_impl(key)) != CHACHA20:
        raise TypeError(
            f"key belongs to {impl}, not to ChaCha20: make it by lpgan_jax.mpc.prng.key()"
        )
