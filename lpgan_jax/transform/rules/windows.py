"""Windows that slide over an array: sums, the largest in each, and the gradients of these.

The windows of an array are a view of it, with one more axis. The largest of each comes from a
tournament along that axis, whose bits also tell which one it was: its gradient costs selections,
and no comparison.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpgan_jax.secret import Secret
from lpgan_jax.transform.rules.comparison import Tournament
from lpgan_jax.transform.rules.linear import linear
from lpgan_jax.transform.rules.registry import Node, Value, Values, rule
from lpgan_jax.transform.values import Stored, View


def _unwound(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]:
    params = node.params
    rank = len(params["window_dimensions"])
    for name in ("base_dilation", "window_dilation"):
        if any(int(n) != 1 for n in params.get(name) or (1,) * rank):
            raise NotImplementedError(f"a dilated window ({name})")
    return (
        tuple(map(int, params["window_dimensions"])),
        tuple(map(int, params["window_strides"])),
        tuple((int(a), int(b)) for a, b in params["padding"]),
    )


def windows(v: jax.Array, node: Node) -> jax.Array:
    """[*positions, elements of a window]; 0 lies outside of the array."""
    size, strides, padding = _unwound(node)
    padded = jnp.pad(v, padding)
    shapes = [(n - k) // s + 1 for n, k, s in zip(padded.shape, size, strides, strict=True)]
    parts = []
    for offset in itertools.product(*map(range, size)):
        stops = [o + (n - 1) * s + 1 for o, n, s in zip(offset, shapes, strides, strict=True)]
        parts.append(lax.slice(padded, offset, stops, strides))
    return jnp.stack(parts, -1)


def unwindowed(parts: jax.Array, node: Node, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of `windows`: what lies in several windows adds up."""
    size, strides, padding = _unwound(node)
    padded = [n + a + b for n, (a, b) in zip(shape, padding, strict=True)]
    total = jnp.zeros(padded, parts.dtype)
    for i, offset in enumerate(itertools.product(*map(range, size))):
        part = parts[..., i]
        margins = [
            (o, n - o - (m - 1) * s - 1, s - 1)
            for o, n, m, s in zip(offset, padded, part.shape, strides, strict=True)
        ]
        total = total + lax.pad(part, jnp.zeros((), part.dtype), margins)
    index = tuple(slice(a, a + n) for n, (a, _) in zip(shape, padding, strict=True))
    return total[index]


@rule("reduce_window_sum")
def _sum(values: Values, node: Node, x: Value) -> Value:
    return linear(values, node, x, lambda v: windows(v, node).sum(-1, dtype=v.dtype))


def _of_windows(values: Values, node: Node, x: Value) -> Tournament:
    """The tournament of an array's windows; one for the windows and their gradient."""
    _, source = x.factored() if x.factored()[0] > 0 else (1.0, x.stored)
    size, strides, padding = _unwound(node)
    key = "windows", id(source), size, strides, padding
    if key not in values.kept:
        positions = jax.eval_shape(
            lambda v: windows(v, node), jax.ShapeDtypeStruct(x.shape, np.uint64)
        ).shape
        padded = any(n for sides in padding for n in sides)

        def make() -> Stored:
            if not padded:
                return View(source, positions, lambda v: windows(v, node))
            f = min(source.frac_bits, source.form.frac_bits)
            known = source.at(f).settled(values.party).unmasked()
            # What lies outside never wins: it is the least ordinary value.
            inside = windows(jnp.ones(x.shape, bool), node)
            words = windows(known.words, node)
            least = values.words_of(-(2.0**source.form.log_range), f, positions)
            kept = jnp.where(inside, words, least.astype(words.dtype))
            return Stored(values.party, positions, lambda: Secret(kept, f), source.form)

        values.kept[key] = source, Tournament(values, make(), node.is_integer)
    return values.kept[key][1]


@rule("reduce_window_max")
def _largest(values: Values, node: Node, x: Value) -> Value:
    factor = x.factored()[0]
    return values.stored(_of_windows(values, node, x).largest, factor if factor > 0 else 1.0)


@rule("select_and_scatter_add")
def _gradient(values: Values, node: Node, cotangent: Value, x: Value) -> Value:
    """The cotangent of each window, given to the element that was the largest."""
    tournament = _of_windows(values, node, x)
    shares = tournament.given(cotangent)
    factor, source = shares.factored()
    return values.now(
        node.shape, lambda: source.raw.map(lambda v: unwindowed(v, node, node.shape)), factor
    )
