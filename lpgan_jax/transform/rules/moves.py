"""Elements that are moved, repeated, left out or put side by side: local and exact."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpgan_jax.mpc import secret
from lpgan_jax.transform.rules.registry import Node, Value, Values, known_scalar, lifted, rule
from lpgan_jax.transform.values import Move, Part, Public, Stored, Term, View


def moved(
    values: Values, x: Value, shape: tuple[int, ...], move: Move, part: bool = False
) -> Value:
    """The elements of a value, moved; a multiple stays one, and a bit a bit.

    `part`: elements are left out.
    """
    if len(x.terms) == 1:
        (term,) = x.terms
        if term.source is None:
            bit = term.bit and term.bit.moved(shape, _broadcasting(move, x.shape, term.bit.shape))
            return Value(values, shape, [Term(term.coefficient, None, bit)])
        if isinstance(term.source, Public):
            array = move(jnp.broadcast_to(term.source.array, x.shape))
            return Value(values, shape, [Term(term.coefficient, Public(array))])
        if term.is_plain and term.source.shape == x.shape:
            return values.stored(_view(term.source, shape, move, part), term.coefficient)
    factor, source = x.factored()
    return values.stored(_view(source, shape, move, part), factor)


def _view(source: Stored, shape: tuple[int, ...], move: Move, part: bool) -> Stored:
    return Part(source, shape, move) if part else View(source, shape, move)


def _broadcasting(move: Move, whole: tuple[int, ...], own: tuple[int, ...]) -> Move:
    if whole == own:
        return move
    return lambda v: move(jnp.broadcast_to(v, whole))


@rule("keep_secret")
def _keep(values: Values, node: Node, x: Any) -> Value:
    return lifted(values, x)


@rule("reshape")
def _reshape(values: Values, node: Node, x: Value) -> Value:
    return moved(values, x, node.shape, lambda v: v.reshape(node.shape))


@rule("squeeze")
def _squeeze(values: Values, node: Node, x: Value) -> Value:
    return moved(values, x, node.shape, lambda v: v.reshape(node.shape))


@rule("transpose")
def _transpose(values: Values, node: Node, x: Value) -> Value:
    order = tuple(map(int, node.params["permutation"]))
    return moved(values, x, node.shape, lambda v: v.transpose(order))


@rule("broadcast_in_dim")
def _broadcast(values: Values, node: Node, x: Value) -> Value:
    axes = tuple(map(int, node.params["broadcast_dimensions"]))
    return moved(values, x, node.shape, lambda v: lax.broadcast_in_dim(v, node.shape, axes))


@rule("rev")
def _reverse(values: Values, node: Node, x: Value) -> Value:
    axes = tuple(map(int, node.params["dimensions"]))
    return moved(values, x, node.shape, lambda v: lax.rev(v, axes))


@rule("slice")
def _slice(values: Values, node: Node, x: Value) -> Value:
    starts, limits, strides = (
        node.params[name] for name in ("start_indices", "limit_indices", "strides")
    )
    index = tuple(
        slice(int(a), int(b), int(s))
        for a, b, s in zip(starts, limits, strides or (1,) * len(starts), strict=True)
    )
    return moved(values, x, node.shape, lambda v: v[index], part=True)


@rule("split")
def _split(values: Values, node: Node, x: Value) -> list[Value]:
    axis, sizes = int(node.params["axis"]), [int(n) for n in node.params["sizes"]]
    ends, x = np.cumsum(sizes), values.rounded(x)

    def piece(start: int, end: int) -> Value:
        shape = (*x.shape[:axis], end - start, *x.shape[axis + 1 :])
        return moved(
            values, x, shape, lambda v: lax.slice_in_dim(v, start, end, axis=axis), part=True
        )

    return [piece(int(end) - size, int(end)) for size, end in zip(sizes, ends, strict=True)]


@rule("pad")
def _pad(values: Values, node: Node, x: Any, fill: Any) -> Value:
    config: Any = [tuple(map(int, c)) for c in node.params["padding_config"]]

    def zeros(v: jax.Array) -> jax.Array:
        return lax.pad(v, jnp.zeros((), v.dtype), config)

    cut = any(n < 0 for low, high, _ in config for n in (low, high))
    x = lifted(values, x)
    nothing = Value(values, node.shape, [])
    padded = moved(values, x, node.shape, zeros, part=cut) if x.terms else nothing
    if known_scalar(fill) == 0:
        return padded
    outside = 1 - zeros(jnp.ones(x.shape))
    return padded + masked_by(values, lifted(values, fill), outside)


def masked_by(values: Values, x: Value, keep: Any) -> Value:
    """x where a public array is 1, and 0 where it is 0; local."""
    shape = np.broadcast_shapes(x.shape, np.shape(keep))
    terms = []
    for term in x.terms:
        source = term.source
        if term.bit is not None:
            return masked_by(values, values.stored(x.stored), keep)
        if source is None:
            flag = jnp.asarray(keep) != 0  # also of what is not finite where it is left out
            terms.append(Term(1.0, Public(jnp.where(flag, term.coefficient, 0.0))))
        elif isinstance(source, Public):
            array = jnp.where(jnp.asarray(keep) != 0, source.array, jnp.zeros_like(source.array))
            terms.append(Term(term.coefficient, Public(array)))
        else:
            terms.append(Term(term.coefficient, _kept(values, source, keep, shape)))
    return Value(values, shape, terms)


def _kept(values: Values, source: Stored, keep: Any, shape: tuple[int, ...]) -> Stored:
    flag = jnp.broadcast_to(jnp.asarray(keep) != 0, shape)

    def linear(v: jax.Array) -> jax.Array:
        return jnp.where(flag, v, jnp.zeros_like(v))

    return Stored(values.party, shape, lambda: source.raw.map(linear), source.form)


@rule("concatenate")
def _concatenate(values: Values, node: Node, *parts: Any) -> Value:
    """Side by side at the finest scale among them, or twice f; a common factor stays outside."""
    axis, form = int(node.params["dimension"]), values.form
    whole = [lifted(values, x) for x in parts]
    factor, _ = max(whole, key=lambda x: x.size).factored()

    def make() -> secret.Secret:
        sources = [x.times(1 / factor).stored for x in whole]
        scales = {s.frac_bits for s in sources}
        scale = min(max(scales), 2 * form.frac_bits) if len(scales) > 1 else scales.pop()
        return secret.concatenate([s.at(scale) for s in sources], axis)

    return values.now(node.shape, make, factor)


@rule("select_n")
def _select(values: Values, node: Node, which: Any, *cases: Any) -> Value:
    options = [lifted(values, c) for c in cases]
    if not isinstance(which, Value):
        total = Value(values, node.shape, [])
        for i, option in enumerate(options):
            total = total + masked_by(values, option, jnp.asarray(which) == i)
        return Value(values, node.shape, total.terms)
    first, second = options
    if (bit := which.as_bit) is not None:
        difference = second - first
        return first + chosen(values, bit, difference)
    from lpgan_jax.transform.rules.arithmetic import product

    return Value(values, node.shape, (first + product(values, which, second - first)).terms)


def chosen(values: Values, bit: Any, x: Value) -> Value:
    """bit * x, as long as possible as terms."""
    if len(x.terms) > 1 or any(t.bit is not None for t in x.terms):
        x = values.stored(x.stored) if not _simple(x) else x
    terms = []
    for term in x.terms:
        if isinstance(term.source, Public):
            return chosen(values, bit, values.stored(x.stored))
        terms.append(Term(term.coefficient, term.source, bit))
    return Value(values, x.shape, terms)


def _simple(x: Value) -> bool:
    """Whether a selection from its terms opens no more than one of the sum would."""
    return sum(t.source is not None for t in x.terms) <= 1 and all(t.bit is None for t in x.terms)
