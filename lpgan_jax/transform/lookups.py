"""Elements that a secret index names: products with rows that hold one 1, found by comparisons.

A public index moves words and costs nothing (`rules/indices`). A secret one of n rows takes n - 1
to n + 1 comparisons, and a product with all of them. Whoever holds the index in the clear does
better to hand over the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lpgan_jax.transform import permutations  # noqa: F401  what a sort gives moves by its bits first
from lpgan_jax.transform.graph import Builder, Node
from lpgan_jax.transform.rewrites import rewrite


@rewrite("gather", "scatter-add")
def looked_up(builder: Builder, node: Node) -> Node | None:
    """Rows at a secret index, read or added to, by one-hot rows."""
    if not node.inputs[1].secret or not _is_of_rows(node):
        return None
    function = _gather if node.operation == "gather" else _scatter_add
    return builder.call(functools.partial(function, node.params), node.inputs)[0]


def _is_of_rows(node: Node) -> bool:
    """Whether an index of one axis names whole rows, as `table[index]` and `take_along_axis` do."""
    axes, left_out, batch, _, offset = _numbers(node.params["dimension_numbers"])
    shape = node.inputs[0].shape
    if len(axes) != 1:
        return False
    ones = {*axes, *batch}
    whole = [1 if i in ones else size for i, size in enumerate(shape)]
    if node.operation == "gather":
        return list(node.params["slice_sizes"]) == whole
    window = [size for i, size in enumerate(whole) if i not in {*left_out, *batch}]
    return [node.inputs[2].shape[i] for i in offset] == window


def _numbers(numbers: Any) -> tuple[Sequence[int], ...]:
    """(indexed axes, those left out, batch axes of x, of the indices, of the result's rows)."""
    if isinstance(numbers, lax.GatherDimensionNumbers):
        return (
            numbers.start_index_map,
            numbers.collapsed_slice_dims,
            numbers.operand_batching_dims,
            numbers.start_indices_batching_dims,
            numbers.offset_dims,
        )
    return (
        numbers.scatter_dims_to_operand_dims,
        numbers.inserted_window_dims,
        numbers.operand_batching_dims,
        numbers.scatter_indices_batching_dims,
        numbers.update_window_dims,
    )


def filled_with(params: Any) -> float:
    """What a gather gives where an index lies outside; 0 in the place of NaN, or by the mode."""
    fill = params.get("fill_value")
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP or fill is None:
        return 0
    return fill if np.isfinite(fill) else 0


def _one_hot(index: jax.Array, size: int, mode: Any, dtype: Any) -> jax.Array:
    """[..., size]: 1 at the index; outside nothing, or 1 at the nearer end, by the mode."""
    filled = mode in (None, lax.GatherScatterMode.FILL_OR_DROP)
    limits = np.arange(0 if filled else 1, size + 1 if filled else size)
    # Not in the index's own type, in which the last limit may not fit.
    steps = jnp.where(index.astype(jnp.int32)[..., None] >= limits.astype(np.int32), 1, 0)
    steps = steps.astype(dtype)
    if not filled:
        ones = jnp.ones((*index.shape, 1), dtype)
        steps = jnp.concatenate([ones, steps, jnp.zeros_like(ones)], -1)
    return steps[..., :-1] - steps[..., 1:]


def _rows(params: Any, one_hot: jax.Array, x: jax.Array) -> jax.Array:
    """What a gather gives, of one-hot rows in the place of indices."""
    (axis,), left_out, batch, index_batch, offset = _numbers(params["dimension_numbers"])
    last = one_hot.ndim - 1
    kept = [i for i in range(x.ndim) if i not in {*left_out, *batch}]  # at `offset`
    single = [o for o, i in zip(offset, kept, strict=True) if i == axis]
    found = lax.dot_general(one_hot, x, (((last,), (axis,)), (index_batch, batch)))
    # The batch axes come first, then the others of the indices, then those of x.
    others = [i for i in range(last) if i not in index_batch]
    place = {axis: i for i, axis in enumerate([*index_batch, *others])}
    rows, whole = iter(range(last)), iter(range(last, found.ndim))
    order = [i for i in range(found.ndim + len(single)) if i not in single]
    found = found.transpose([next(whole) if i in offset else place[next(rows)] for i in order])
    return jnp.expand_dims(found, single)


def _gather(params: Any, x: jax.Array, indices: jax.Array) -> jax.Array:
    size = x.shape[params["dimension_numbers"].start_index_map[0]]
    one_hot = _one_hot(indices[..., 0], size, params["mode"], x.dtype)
    found, fill = _rows(params, one_hot, x), filled_with(params)
    if not fill:
        return found
    return found + fill * (1 - _rows(params, one_hot, jnp.ones(x.shape, x.dtype)))


def _scatter_add(params: Any, x: jax.Array, indices: jax.Array, updates: jax.Array) -> jax.Array:
    size = x.shape[params["dimension_numbers"].scatter_dims_to_operand_dims[0]]
    one_hot = _one_hot(indices[..., 0], size, params["mode"], x.dtype)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (added,) = jax.linear_transpose(functools.partial(_rows, params, one_hot), like)(updates)
    return x + added
