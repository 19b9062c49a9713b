"""Elements that public indices name: the same primitive, on words."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.lookups import filled_with
from lpgan_jax.transform.plain import scatter
from lpgan_jax.transform.rules.moves import moved
from lpgan_jax.transform.rules.registry import Node, Value, Values, lifted, rule


@rule("gather")
def _gather(values: Values, node: Node, x: Any, indices: Any) -> Value:
    indices = jnp.asarray(indices)
    names = ("dimension_numbers", "slice_sizes", "indices_are_sorted", "unique_indices", "mode")
    options = {name: node.params[name] for name in names if name in node.params}
    filled = options.get("mode") == lax.GatherScatterMode.FILL_OR_DROP

    def move(v: jax.Array) -> jax.Array:
        return lax.gather(v, indices, **options, fill_value=0 if filled else None)

    found = moved(values, x, node.shape, move, part=node.size < x.size)
    fill = filled_with(node.params)
    if not fill:
        return found
    outside = 1 - move(jnp.ones(x.shape))
    return found + values.public(fill * outside)


@rule("dynamic_slice")
def _dynamic_slice(values: Values, node: Node, x: Any, *starts: Any) -> Value:
    starts = tuple(map(jnp.asarray, starts))
    sizes = node.params["slice_sizes"]
    return moved(values, x, node.shape, lambda v: lax.dynamic_slice(v, starts, sizes), part=True)


@rule("dynamic_update_slice")
def _dynamic_update(values: Values, node: Node, x: Any, update: Any, *starts: Any) -> Value:
    starts = tuple(map(jnp.asarray, starts))
    return _aligned(values, node, x, update, lambda v, u: lax.dynamic_update_slice(v, u, starts))


@rule("scatter", "scatter-add")
def _scatter(values: Values, node: Node, x: Any, indices: Any, updates: Any) -> Value:
    indices = jnp.asarray(indices)
    function = scatter(node.operation, node.params)
    return _aligned(values, node, x, updates, lambda v, u: function(v, indices, u))


def _aligned(values: Values, node: Node, x: Any, y: Any, function: Any) -> Value:
    """A map that is linear in both operands together: their words at one scale."""
    first, second = lifted(values, x).stored, lifted(values, y).stored
    form = values.form

    def make() -> Secret:
        scales = {first.frac_bits, second.frac_bits}
        scale = scales.pop() if len(scales) == 1 else form.frac_bits
        a, b = (s.at(scale).settled(values.party) for s in (first, second))
        return Secret(function(a.words, b.words), scale)

    return values.now(node.shape, make)
