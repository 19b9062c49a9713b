"""Windows that slide over an array: sums, the largest in each, and the gradients of these.

The windows of an array are a view of it, with one more axis. The largest of each comes from a
tournament along that axis, whose bits also tell which one it was: its gradient costs selections,
and no comparison.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.rules.comparison import Tournament, without_factor
from lpgan_jax.transform.rules.linear import linear
from lpgan_jax.transform.rules.registry import Node, Value, Values, lifted, rule
from lpgan_jax.transform.values import Stored, View


@dataclass(frozen=True)
class Window:
    """A window that slides along every axis; the attributes are JAX's parameters.

    Attributes:
        size: its length.
        strides: from one to the next.
        padding: (before, after), around the array; fewer than 0 cut it.
        base: between elements of the array; what is inserted counts as padding.
        dilation: between elements of a window.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    base: tuple[int, ...]
    dilation: tuple[int, ...]

    @staticmethod
    def of(node: Node) -> Window:
        """That of an operation."""
        params, rank = node.params, len(node.params["window_dimensions"])
        return Window(
            tuple(map(int, params["window_dimensions"])),
            tuple(map(int, params["window_strides"])),
            tuple((int(a), int(b)) for a, b in params["padding"]),
            tuple(map(int, params.get("base_dilation") or (1,) * rank)),
            tuple(map(int, params.get("window_dilation") or (1,) * rank)),
        )

    @property
    def is_inside(self) -> bool:
        """Whether all of its elements are elements of the array."""
        outside = any(n > 0 for sides in self.padding for n in sides)
        return not outside and max(self.base, default=1) == 1

    def parts(self, v: jax.Array) -> jax.Array:
        """[*positions, elements of a window]; 0 lies outside of the array."""
        margins = [(a, b, n - 1) for (a, b), n in zip(self.padding, self.base, strict=True)]
        padded = lax.pad(v, jnp.zeros((), v.dtype), margins)
        positions = [
            max(0, (n - (k - 1) * d - 1) // s + 1)
            for n, k, s, d in zip(padded.shape, self.size, self.strides, self.dilation, strict=True)
        ]
        if 0 in positions:
            return jnp.zeros((*positions, math.prod(self.size)), v.dtype)
        found = []
        for start in self._starts():
            rows = zip(start, positions, self.strides, strict=True)
            stops = [o + (n - 1) * s + 1 for o, n, s in rows]
            found.append(lax.slice(padded, start, stops, self.strides))
        return jnp.stack(found, -1)

    def back(self, parts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The transpose of `parts`, without a base: what lies in several windows adds up."""
        padded = [n + a + b for n, (a, b) in zip(shape, self.padding, strict=True)]
        total = jnp.zeros(padded, parts.dtype)
        for i, start in enumerate(self._starts()):
            part = parts[..., i]
            margins = [
                (o, n - o - (m - 1) * s - 1, s - 1)
                for o, n, m, s in zip(start, padded, part.shape, self.strides, strict=True)
            ]
            total = total + lax.pad(part, jnp.zeros((), part.dtype), margins)
        cut = [(-a, -b, 0) for a, b in self.padding]
        return lax.pad(total, jnp.zeros((), total.dtype), cut)

    def _starts(self) -> Iterable[tuple[int, ...]]:
        """Where each element of the first window lies."""
        both = zip(self.size, self.dilation, strict=True)
        return itertools.product(*(range(0, n * d, d) for n, d in both))


@rule("reduce_window_sum")
def _sum(values: Values, node: Node, x: Value) -> Value:
    window = Window.of(node)
    return linear(values, node, x, lambda v: window.parts(v).sum(-1, dtype=v.dtype))


def _tournament(values: Values, node: Node, x: Value) -> Tournament:
    """Of an array's windows, of which a factor was taken; one for them and their gradient."""
    window, source = Window.of(node), x.stored
    key = "windows", id(source), window
    if key not in values.kept:
        shape = jax.ShapeDtypeStruct(x.shape, np.uint64)
        positions = jax.eval_shape(window.parts, shape).shape

        def make() -> Stored:
            if window.is_inside:
                return View(source, positions, window.parts)
            form = source.form
            f = min(source.frac_bits, form.frac_bits)
            known = source.at(f).settled(values.party).unmasked()
            # What lies outside never wins: it is the least ordinary value.
            least = -(2.0 ** (31 if node.is_integer else form.log_range))
            outside = values.words_of(least, f, positions).astype(known.words.dtype)
            inside = window.parts(jnp.ones(x.shape, bool))
            words = jnp.where(inside, window.parts(known.words), outside)
            return Stored(values.party, positions, lambda: Secret(words, f), form)

        values.kept[key] = source, Tournament(values, make(), node.is_integer)
    return values.kept[key][1]


def _chooses_least(node: Node) -> bool:
    return node.params["select_prim"].name == "le"


@rule("reduce_window_max")
def _largest(values: Values, node: Node, x: Value) -> Value:
    factor, x = without_factor(x)
    return values.stored(_tournament(values, node, x).largest, factor)


@rule("reduce_window_min")
def _least(values: Values, node: Node, x: Value) -> Value:
    factor, x = without_factor(x.times(-1.0))
    return values.stored(_tournament(values, node, x).largest, -factor)


@rule("select_and_scatter_add")
def _gradient(values: Values, node: Node, cotangent: Any, x: Value) -> Value:
    """The cotangent of each window, given to the element that was chosen."""
    window = Window.of(node)
    _, x = without_factor(x.times(-1.0) if _chooses_least(node) else x)
    shares = _tournament(values, node, x).given(lifted(values, cotangent))
    factor, source = shares.factored()
    return values.now(
        node.shape, lambda: source.raw.map(lambda v: window.back(v, node.shape)), factor
    )


@rule("select_and_gather_add")
def _tangent(values: Values, node: Node, tangent: Any, x: Value) -> Value:
    """The tangent of the element that was chosen in each window."""
    window = Window.of(node)
    _, x = without_factor(x.times(-1.0) if _chooses_least(node) else x)
    tournament = _tournament(values, node, x)
    source = lifted(values, tangent).stored
    shape = (*node.shape, math.prod(window.size))
    return values.later(node.shape, lambda: tournament.taken(View(source, shape, window.parts)))
