"""ChaCha20 in plain Python, and what JAX should draw from it."""

import struct

import jax
import numpy as np

from lpgan_jax.mpc import prng

CHUNK = prng._CHUNK_BLOCKS


def reference_block(key_words, counter, nonce):
    """The block function of RFC 8439, section 2.3, in plain Python: 16 words."""
    state = [*struct.unpack("<4I", b"expand 32-byte k"), *key_words, counter, *nonce]
    x = list(state)

    def rotate(v, n):
        return (v << n | v >> (32 - n)) & 0xFFFFFFFF

    def quarter(a, b, c, d):
        for p, q, r, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[q]) & 0xFFFFFFFF
            x[r] = rotate(x[r] ^ x[p], n)

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(u + v) & 0xFFFFFFFF for u, v in zip(state, x, strict=True)]


def reference_bits(k, width, size):
    """What `jax.random.bits` promises to return, from the plain implementation."""
    words = [int(w) for w in jax.random.key_data(k)]
    draw_width = max(width, 32)
    per_block = 512 // draw_width
    result = np.zeros(-(-size * width // draw_width), f"uint{draw_width}")

    def chunk(first, count):
        rows = np.array(
            [reference_block(words, first + i, (1, width, 0)) for i in range(count)], np.uint64
        ).T
        return (rows[:8] << np.uint64(32) | rows[8:] if width == 64 else rows).ravel()

    blocks = -(-len(result) // per_block)
    if blocks <= CHUNK:
        result[:] = chunk(0, blocks)[: len(result)]
    else:
        span = CHUNK * per_block
        for i in range(-(-len(result) // span)):
            start = min(i * span, len(result) - span)
            result[start : start + span] = chunk(i * CHUNK, CHUNK)
    return result.astype(f"<u{draw_width // 8}").view(f"<u{width // 8}")[:size]
