"""Elements in the order that a sort of secrets gives: moved by the sort's bits, not by an index.

JAX gathers them by the sorted numbers of the places, also in the derivative of a sort, and scatters
in the transpose of that. What a gather or scatter does with such indices is found by trying: it is
run on numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.transform.graph import MOVES, Builder, Node
from lpgan_jax.transform.rewrites import make, rewrite


def _order(node: Node) -> Node | None:
    """The numbers of the sorted places, of which a node is a rearrangement."""
    while node.operation in (*MOVES, "convert_element_type"):
        node = node.inputs[0]
    if node.operation != "output":
        return None
    (found,) = node.inputs
    number = node.params["index"]
    if found.operation == "top_k":
        return node if number == 1 else None
    if found.operation != "sort" or not found.inputs[0].secret or number == 0:
        return None
    places = found.inputs[number]
    return node if places.value is not None and _is_count(places.value, _axis(node)) else None


def _axis(order: Node) -> int:
    (found,) = order.inputs
    return int(found.params["dimension" if found.operation == "sort" else "axis"])


def _is_count(value: np.ndarray, axis: int) -> bool:
    shape = [1] * value.ndim
    shape[axis] = value.shape[axis]
    return bool((value == np.arange(value.shape[axis]).reshape(shape)).all())


def _moved(node: Node, stop: Node, value: np.ndarray) -> Any:
    return value if node is stop else node.plain(_moved(node.inputs[0], stop, value))


def _spread(order: Any, axis: int, shape: tuple[int, ...]) -> Any:
    """Places along an axis of an array; all lines have the same if there is one axis of them."""
    if order.ndim == 1:
        order = order.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    order = order.reshape(order.shape + (1,) * (len(shape) - order.ndim))
    return jnp.broadcast_to(
        order, [order.shape[a] if a == axis else n for a, n in enumerate(shape)]
    )


def _taken(x: Any, order: Any, axis: int) -> Any:
    return jnp.take_along_axis(x, _spread(order, axis, x.shape), axis)


def _put(x: Any, order: Any, axis: int, size: int) -> Any:
    zeros = jnp.zeros([size if a == axis else n for a, n in enumerate(x.shape)], x.dtype)
    return jnp.put_along_axis(zeros, _spread(order, axis, x.shape), x, axis, inplace=False)


def _axes(order: Node, whole: Node) -> Iterator[int]:
    """Axes of an array along which its elements may be taken in this order."""
    count = order.inputs[0].inputs[0].shape
    if len(order.shape) == 1:
        yield from (a for a, n in enumerate(whole.shape) if n == count[0])
    elif whole.shape[: len(count)] == count:
        yield _axis(order)


def _permutation(order: Node) -> np.ndarray:
    """An example of the order."""
    (found,) = order.inputs
    keys = np.random.default_rng(0).random(found.inputs[0].shape)
    axis = _axis(order)
    return np.argsort(keys, axis).take(range(order.shape[axis]), axis)


def _permute(builder: Builder, order: Node, x: Node, axis: int, inverse: bool, result: Any) -> Node:
    (found,) = order.inputs
    number, size = order.params["index"], result.shape[axis]

    def plain(results: Any, x: Any) -> Any:
        places, x = jnp.asarray(results[number]).astype(np.int32), jnp.asarray(x)
        return _put(x, places, axis, size) if inverse else _taken(x, places, axis)

    return builder.add("permute", [found, x], result, plain, {"axis": axis, "inverse": inverse})


@rewrite("lt")
def no_place_is_negative(builder: Builder, node: Node) -> Node | None:
    """Whether an index counts from the end."""
    x, y = node.inputs
    if y.scalar == 0 and _order(x):
        return builder.constant(np.broadcast_to(False, node.shape))
    return None


@rewrite("gather")
def in_order(builder: Builder, node: Node) -> Node | None:
    """x[jnp.argsort(y)] and its like."""
    x, indices = node.inputs
    if (order := _order(indices)) is None:
        return None
    with jax.ensure_compile_time_eval():
        example, numbers = _permutation(order), np.arange(float(x.size)).reshape(x.shape)
        got = np.asarray(node.plain(numbers, _moved(indices, order, example)))
        for axis in _axes(order, x):
            if np.array_equal(got, _taken(numbers, example, axis)):
                return _permute(builder, order, x, axis, False, node)
    return None


@rewrite("scatter-add")
def back_in_place(builder: Builder, node: Node) -> Node | None:
    """The transpose of `in_order`."""
    x, indices, updates = node.inputs
    if (order := _order(indices)) is None:
        return None
    with jax.ensure_compile_time_eval():
        example, numbers = _permutation(order), np.arange(float(updates.size)) + 1
        numbers = numbers.reshape(updates.shape)
        got = np.asarray(node.plain(np.zeros(x.shape), _moved(indices, order, example), numbers))
        for axis in _axes(order, x):
            sizes = [n for a, n in enumerate(x.shape) if a != axis]
            if [n for a, n in enumerate(updates.shape) if a != axis] != sizes:
                continue
            if np.array_equal(got, _put(numbers, example, axis, x.shape[axis])):
                moved = _permute(builder, order, updates, axis, True, node)
                return make(builder, "add", x, moved)
    return None
