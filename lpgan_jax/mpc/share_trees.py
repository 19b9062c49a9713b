"""Trees of values, as they are shared, put together, and held by the seats of nobody.

A tree of scales has the fraction bits of each leaf.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.fixed_point import encode
from lpgan_jax.mpc.secret import Secret, is_secret
from lpgan_jax.mpc.shares import PARTIES, share_words


def shapes_of(shape: Sequence[int], frac_bits: int) -> Secret:
    """The shapes of a shared array, to be traced with."""
    pair: Any = jax.ShapeDtypeStruct((PARTIES, *shape), np.uint64)
    return Secret(pair, frac_bits)


def tree_of_shapes(values: Any, scales: Any) -> Any:
    """`shapes_of` every leaf (anything with a shape)."""
    return jax.tree.map(lambda leaf, scale: shapes_of(np.shape(leaf), scale), values, scales)


# On shares ----------------------------------------------------------------------------------------


def share_tree(key: jax.Array, values: Any, scales: Any) -> Any:
    """DS's splitting: float arrays to `Secret`s of paired arrays, each at its own scale."""
    keys = iter(jax.random.split(key, max(len(jax.tree.leaves(values)), 1)))
    return jax.tree.map(
        lambda leaf, scale: Secret(share_words(next(keys), encode(leaf, scale)), scale),
        values,
        scales,
    )


def share_arrays(key: jax.Array, values: Any, scales: Any) -> Any:
    """The same of arrays outside of any program, in one that is compiled for their shapes."""
    leaves, structure = jax.tree.flatten(values)
    shared = _share_leaves(key, leaves, tuple(jax.tree.leaves(scales)))
    return jax.tree.unflatten(structure, shared)


@functools.partial(jax.jit, static_argnums=2)
def _share_leaves(key: jax.Array, values: list[Any], scales: tuple[int, ...]) -> Any:
    return share_tree(key, values, list(scales))


def reveal_tree(secrets: Any) -> Any:
    """SP's reconstruction of paired arrays: float64 arrays."""

    def added(secret: Secret) -> Secret:
        words = np.asarray(secret.share)
        total: Any = words.sum(0, dtype=np.uint64)  # wraps, without NumPy's warning for scalars
        return dataclasses.replace(secret, words=total)

    return decoded(jax.tree.map(added, secrets, is_leaf=is_secret))


# On whole values ----------------------------------------------------------------------------------


def encoded(values: Any, scales: Any) -> Any:
    """Float arrays as `Secret`s of whole words of the ring, what the emulated seat takes."""
    return jax.tree.map(lambda v, f: Secret(encode(v, f), f), values, scales)


def decoded(secrets: Any) -> Any:
    """Whole words of the ring as float64 arrays."""

    def leaf(secret: Secret) -> np.ndarray:
        return np.asarray(secret.share).view(np.int64) * 2.0**-secret.frac_bits

    return jax.tree.map(leaf, secrets, is_leaf=is_secret)


def scaled(values: Any, scales: Any) -> Any:
    """Float arrays as the exact seat takes them: float64, in LSB, not rounded."""
    return jax.tree.map(
        lambda v, f: Secret(jnp.asarray(v, jnp.float64) * 2.0**f, f), values, scales
    )


def unscaled(secrets: Any) -> Any:
    """What the exact seat gives, as float64 arrays."""
    return jax.tree.map(lambda s: s.share * 2.0**-s.frac_bits, secrets, is_leaf=is_secret)
