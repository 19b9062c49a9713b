"""What is known of values without their data: intervals that they lie in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lpgan_jax.transform.graph import MOVES, Node

Interval = tuple[float, float]

ANY: Interval = (-math.inf, math.inf)

_BOUNDED_AS = MOVES | {
    "copy",
    "reduce_max",
    "reduce_min",
    "dynamic_slice",
    "gather",
    "convert_element_type",
}


def bounds(nodes: Sequence[Node]) -> dict[int, Interval]:
    """The interval of each node, by id; of nodes in an order in which they can be computed."""
    known: dict[int, Interval] = {}
    for node in nodes:
        known[id(node)] = _bounds(node, known)
    return known


def _bounds(node: Node, known: dict[int, Interval]) -> Interval:
    if node.value is not None:
        if not node.value.size or not np.isfinite(node.value.astype(np.float64)).all():
            return ANY
        return float(node.value.min()), float(node.value.max())
    if node.dtype == bool:
        return 0.0, 1.0
    operands = [known.get(id(n), ANY) for n in node.inputs]
    if node.operation in _BOUNDED_AS:
        return operands[0]
    if (rule := _RULES.get(node.operation)) is not None:
        interval = rule(node, operands)
        return ANY if any(map(math.isnan, interval)) else interval
    return ANY


def _sub(node: Node, operands: list[Interval]) -> Interval:
    low, high = operands[0][0] - operands[1][1], operands[0][1] - operands[1][0]
    return low, (high if largest_over(node) is None else min(high, 0.0))


def largest_over(node: Node) -> tuple[int, ...] | None:
    """The axes of x - max(x), where each element is less its own largest; None of others."""
    x, y = node.inputs
    found = y
    while found.operation in SHAPES:
        found = found.inputs[0]
    if found.operation != "reduce_max" or found.inputs[0] is not x:
        return None
    axes = tuple(map(int, found.params["axes"]))
    return axes if repeats(y, found, axes) else None


SHAPES = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")


def repeats(node: Node, few: Node, axes: tuple[int, ...]) -> bool:
    """Whether a node is `few`, repeated along these axes (by the shapes of the moves alone)."""
    kept = [n for a, n in enumerate(node.shape) if a not in axes]
    if few.size != math.prod(kept) or few.size == 1:
        return few.size == math.prod(kept)
    probe = np.arange(few.size, dtype=np.float64)
    moved = _moved(node, few, probe.reshape(few.shape))
    wanted = np.broadcast_to(np.expand_dims(probe.reshape(kept), axes), node.shape)
    return bool(np.array_equal(moved, wanted))


def _moved(node: Node, stop: Node, value: np.ndarray) -> np.ndarray:
    if node is stop:
        return value
    inner = _moved(node.inputs[0], stop, value)
    if node.operation == "broadcast_in_dim":
        axes = tuple(map(int, node.params["broadcast_dimensions"]))
        shape = [1] * len(node.shape)
        for axis, size in zip(axes, inner.shape, strict=True):
            shape[axis] = size
        return np.broadcast_to(inner.reshape(shape), node.shape)
    return inner.reshape(node.shape)


def _product(x: Interval, y: Interval) -> Interval:
    corners = [0.0 if 0 in (a, b) else a * b for a in x for b in y]
    return min(corners), max(corners)


def _mul(node: Node, operands: list[Interval]) -> Interval:
    if node.inputs[0] is node.inputs[1]:
        return _square(node, operands)
    return _product(*operands)


def _square(node: Node, operands: list[Interval]) -> Interval:
    low, high = operands[0]
    least = 0.0 if low <= 0 <= high else min(low * low, high * high)
    return least, max(low * low, high * high)


def _sum(node: Node, operands: list[Interval]) -> Interval:
    (x,) = node.inputs
    axes = tuple(map(int, node.params["axes"]))
    count = math.prod(x.shape[a] for a in axes)
    low, high = _product(operands[0], (count, count))
    if x.operation == "exp" and x.inputs[0].operation == "sub":
        over = largest_over(x.inputs[0])
        if over is not None and set(over) <= set(axes):
            low = max(low, 1.0)  # that of the largest itself
    return low, high


def _monotone(function: Callable[[float], float]) -> Callable[[Node, list[Interval]], Interval]:
    def rule(node: Node, operands: list[Interval]) -> Interval:
        low, high = operands[0]
        return function(low), function(high)

    return rule


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x))) if math.isfinite(x) else max(x, 0.0)


def _root(x: float) -> float:
    return math.sqrt(max(x, 0.0))


def _inverse_root(node: Node, operands: list[Interval]) -> Interval:
    low, high = map(_root, operands[0])
    return (1 / high if high else math.inf), (1 / low if low else math.inf)


def _abs(node: Node, operands: list[Interval]) -> Interval:
    low, high = operands[0]
    return max(low, -high, 0.0), max(-low, high)


_RULES: dict[str, Callable[[Node, list[Interval]], Interval]] = {
    "add": lambda n, o: (o[0][0] + o[1][0], o[0][1] + o[1][1]),
    "add_any": lambda n, o: (o[0][0] + o[1][0], o[0][1] + o[1][1]),
    "sub": _sub,
    "neg": lambda n, o: (-o[0][1], -o[0][0]),
    "mul": _mul,
    "square": _square,
    "abs": _abs,
    "max": lambda n, o: (max(o[0][0], o[1][0]), max(o[0][1], o[1][1])),
    "min": lambda n, o: (min(o[0][0], o[1][0]), min(o[0][1], o[1][1])),
    "select_n": lambda n, o: (min(low for low, _ in o[1:]), max(high for _, high in o[1:])),
    "reduce_sum": _sum,
    "inner": lambda n, o: (0.0, math.inf) if n.inputs[0] is n.inputs[1] else ANY,
    "exp": _monotone(_exp),
    "tanh": _monotone(math.tanh),
    "logistic": lambda n, o: (0.0, 1.0),
    "softplus": _monotone(_softplus),
    "sqrt": _monotone(_root),
    "rsqrt": _inverse_root,
    "erf": _monotone(math.erf),
    "erfc": lambda n, o: (0.0, 2.0),
    "sin": lambda n, o: (-1.0, 1.0),
    "cos": lambda n, o: (-1.0, 1.0),
    "sign": lambda n, o: (-1.0, 1.0),
    "concatenate": lambda n, o: (min(low for low, _ in o), max(high for _, high in o)),
}
