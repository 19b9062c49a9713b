"""Splitting values into two additive shares, and putting them together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float64, PRNGKeyArray, UInt64

from lpgan_jax.mpc.fixed_point import FixedPoint, require_x64
from lpgan_jax.mpc.party import bound
from lpgan_jax.mpc.prng import require_cryptographic, sharing_words
from lpgan_jax.mpc.traces import named
from lpgan_jax.ring.words import Elements

PARTIES = 2

Shares = UInt64[jax.Array, "2 *shape"]
"""S1's shares, then S2's, of values of any shape."""


def share_words(key: PRNGKeyArray, words: Elements) -> Shares:
    """Split ring elements: x' uniform under `key`, x'' = x - x'.

    Raises:
        TypeError: the key is not of a cryptographic PRNG.
        StaleKey, ValueError: the words are traced or batched and the key is not, as for a protocol.
    """
    require_cryptographic(key)
    return _split(key, bound(key, words))


def _halves(key: PRNGKeyArray, words: Elements) -> Shares:
    first = sharing_words(key, words.shape, words.dtype)
    return jnp.stack([first, words - first])


_split = named("share:", _halves)


def share(key: PRNGKeyArray, values: ArrayLike, fxp: FixedPoint) -> Shares:
    """DS's splitting of real values into a share for S1 and a share for S2.

    Each share alone is uniform over the ring, whatever the values. A key must be used once: the
    same key with other values shows their difference to both servers.

    Args:
        key: a ChaCha20 key (`lpgan_jax.key`).
        values: real numbers of any shape, |x| < 2^(62 - f).
        fxp: the encoding.

    Returns:
        S1's share, then S2's, of the shape of the values.

    Raises:
        TypeError: the key is not of a cryptographic PRNG.
        ValueError: a value is NaN, infinite or out of range; or values are batched by `vmap` and
            the key is not.
        StaleKey: values belong to a trace that the key does not belong to.
    """
    require_x64()
    return share_words(key, fxp.encode(values))


def require_shares(name: str, shares: jax.Array, words: type = np.uint64) -> None:
    """Check that an argument is a paired array of `words`.

    Raises:
        TypeError: its dtype is another.
        ValueError: its leading axis is not 2.
    """
    require_x64()
    dtype, shape = getattr(shares, "dtype", type(shares).__name__), getattr(shares, "shape", ())
    if dtype != words:
        raise TypeError(f"{name}: expected {words.__name__} shares, got {dtype}")
    if not shape or shape[0] != PARTIES:
        raise ValueError(
            f"{name}: expected both shares along a leading axis of 2, got shape {shape}"
        )


def reveal(shares: Shares, fxp: FixedPoint) -> Float64[jax.Array, "*shape"]:
    """SP's reconstruction of real values.

    Raises:
        TypeError: the shares are not uint64.
        ValueError: the leading axis is not 2.
    """
    require_shares("shares", shares)
    return fxp.decode(shares[0] + shares[1])
