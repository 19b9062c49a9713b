"""A noised sum of clipped vectors as an operation of JAX, with a meaning under sharing.

It is one operation: its bound has to hold for the words that are shared (`mpc.clipping`), and its
noise has to be there before anything else is done with the sum (`releases` sees to it that nothing
else is).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from lpgan_jax.mpc import clipping

private_sum_p = Primitive("private_sum")


def _plain(vectors: jax.Array, weights: jax.Array, noise: jax.Array, *, clip: float) -> jax.Array:
    total = clipping.of_reals(vectors, weights.astype(vectors.dtype), clip)
    return total.astype(vectors.dtype) + noise


private_sum_p.def_impl(functools.partial(jax.jit, static_argnames="clip")(_plain))
private_sum_p.def_abstract_eval(
    lambda vectors, weights, noise, clip: ShapedArray(vectors.shape[1:], vectors.dtype)
)
mlir.register_lowering(private_sum_p, mlir.lower_fun(_plain, multiple_results=False))


def private_sum(gradients: Any, weights: jax.Array, noise: jax.Array, clip: float) -> Any:
    """The sum of examples' gradients, each scaled down to a norm of `clip` at most, and noise.

    Under `lp.secure` no example moves the sum by more than `clip`, whatever its gradient is, but
    for the rounding of each element to an LSB: the noise is made for clip + sqrt(d) LSB
    (`lp.Noise`). Examples whose norm is 64 clips and more, or that have a large element (4 of 2^20
    elements, 16 of 2^16, 4,096 of two, at 18 fraction bits), count for nothing.

    Each gradient has to be of one example alone, as `jax.vmap(jax.grad(loss), (None, 0))` gives it:
    nothing is known of gradients in which examples are mixed, as by a normalisation over the batch.

    Args:
        gradients: a pytree of floats [m, ...].
        weights: integers [m], 0 or 1: which examples count.
        noise: floats [d], one for each element of a gradient, leaf after leaf.
        clip: 2^-6 to 2^6.

    Returns:
        The same pytree of [...]. It has no derivative.

    Raises:
        TypeError: the weights are no integers, or the gradients no floats.
        ValueError: the clip is out of range, or shapes do not fit.
    """
    leaves, structure = jax.tree.flatten(gradients)
    weights, noise = jnp.asarray(weights), jnp.asarray(noise)
    if not jnp.issubdtype(weights.dtype, jnp.integer) or weights.ndim != 1:
        raise TypeError(f"weights: {weights.dtype}{list(weights.shape)}, expected integers [m]")
    count = weights.shape[0]
    for leaf in leaves:
        if jnp.shape(leaf)[:1] != (count,):
            raise ValueError(f"gradients: shape {jnp.shape(leaf)}, expected [{count}, ...]")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"gradients: {leaf.dtype}, expected floats")
    clipping.check_clip(clip, 1)
    vectors = jnp.concatenate([leaf.reshape(count, -1) for leaf in leaves], 1)
    if noise.shape != vectors.shape[1:]:
        raise ValueError(f"noise: shape {noise.shape}, expected {vectors.shape[1:]}")
    total = private_sum_p.bind(vectors, weights, noise.astype(vectors.dtype), clip=float(clip))
    parts, start = [], 0
    for leaf in leaves:
        shape = leaf.shape[1:]
        size = leaf.size // count
        parts.append(total[start : start + size].reshape(shape))
        start += size
    return jax.tree.unflatten(structure, parts)
