"""Who could compute each element of an array, in a traced program of both servers.

What an element depends on, as bits: words of a server's own seed, what else that server alone has
(shares, corrections), what both opened. DS knows the seeds, S1 and S2 each their own and the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lpgan_jax.analysis.audit.primitives import CUTS, JOINS, MOVES, padded
from lpgan_jax.analysis.audit.values import Value

WORDS = (np.uint8(1), np.uint8(2))  # of S1's seed, of S2's
HELD = (np.uint8(4), np.uint8(8))
OPENED = np.uint8(16)
DEALER = WORDS[0] | WORDS[1]
SERVERS = tuple(words | held | OPENED for words, held in zip(WORDS, HELD, strict=True))

# Whose results depend, element by element, on the same elements of all operands.
_ELEMENTWISE = {
    *("add", "sub", "mul", "div", "rem", "neg", "sign", "abs", "max", "min", "clamp", "pow"),
    *("and", "or", "xor", "not", "eq", "ne", "lt", "le", "gt", "ge", "select_n", "is_finite"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic", "population_count", "clz"),
    *("convert_element_type", "bitcast_convert_type", "round", "floor", "ceil", "stop_gradient"),
    *("exp", "exp2", "log", "log1p", "expm1", "sqrt", "rsqrt", "square", "integer_pow"),
    *("sin", "cos", "tanh", "logistic"),
}

Holders = np.ndarray | None


def joined(holders: np.ndarray) -> bool:
    """Whether an element depends on what S1 alone has and on what S2 alone has."""
    return bool(((holders & HELD[0] != 0) & (holders & HELD[1] != 0)).any())


def of_any(holders: Any, axis: Any = 0) -> Any:
    """Of what depends on all elements along an axis (None: on all)."""
    reduce: Any = np.bitwise_or.reduce  # whose types depend on NumPy's version
    return reduce(holders, axis=axis)


def of_either(cases: Sequence[Holders]) -> Holders:
    """Of a result that is one of several, nobody knows which."""
    known = [case for case in cases if case is not None]
    return of_any(known) if known else None


def of_results(equation: Any, operands: Sequence[Value]) -> list[Holders]:
    """Of an equation's results; of what is not known, everything depends on everything."""
    given = [value.holders for value in operands]
    shapes = [atom.aval.shape for atom in equation.outvars]
    if all(holders is None for holders in given):
        return [None] * len(shapes)
    if equation.primitive.name in CUTS and given[0] is not None:
        return list(CUTS[equation.primitive.name](given[0], equation.params))
    if len(shapes) == 1:
        filled = [
            np.broadcast_to(np.uint8(0), atom.aval.shape) if holders is None else holders
            for holders, atom in zip(given, equation.invars, strict=True)
        ]
        result = _single(equation, operands, filled)
        if result is not None:
            return [np.broadcast_to(result, shapes[0])]
    everything = of_any([_any(h) for h in given if h is not None])
    return [np.broadcast_to(everything, shape) for shape in shapes]


def _any(holders: np.ndarray) -> np.uint8:
    return np.uint8(of_any(holders, axis=None)) if holders.size else np.uint8(0)


def _single(equation: Any, operands: Sequence[Value], given: list[np.ndarray]) -> np.ndarray | None:
    name, params = equation.primitive.name, equation.params
    shape = equation.outvars[0].aval.shape
    if name in MOVES:
        return MOVES[name](given[0], params)
    if name in JOINS:
        return JOINS[name](given, params)
    if name == "select_n" and (which := operands[0].known) is not None:
        cases = [np.broadcast_to(case, shape) for case in given[1:]]
        return np.choose(np.broadcast_to(which, shape).astype(np.int8), cases)
    if name == "bitcast_convert_type" and given[0].shape != shape:
        if given[0].ndim < len(shape):
            return np.broadcast_to(given[0][..., None], shape)
        return of_any(given[0], axis=-1)
    if name == "pad":
        return padded(given[0], params)
    if name.startswith("reduce_") and "axes" in params:
        return of_any(given[0], axis=tuple(params["axes"]))
    if name == "cumsum":
        turned = np.flip(given[0], params["axis"]) if params["reverse"] else given[0]
        summed = np.bitwise_or.accumulate(turned, axis=params["axis"])
        return np.flip(summed, params["axis"]) if params["reverse"] else summed
    if name == "dot_general":
        return _dot(given[0], given[1], params["dimension_numbers"])
    if name == "ring_product":
        return _contracted(given[0], given[1], params["contraction"])
    if name in ("gather", "dynamic_slice") and all(v.known is not None for v in operands[1:]):
        # Where they are taken from is known, so the same is done with their holders.
        places = [np.asarray(value.known) for value in operands[1:]]
        moved = {**params, "fill_value": None} if "fill_value" in params else params
        return np.asarray(equation.primitive.bind(jax.numpy.asarray(given[0]), *places, **moved))
    elementwise = name in _ELEMENTWISE and all(h.ndim in (0, len(shape)) for h in given)
    if elementwise and _broadcast(given) == shape:
        return of_any([np.broadcast_to(holders, shape) for holders in given])
    return None


def _broadcast(arrays: Sequence[np.ndarray]) -> tuple[int, ...] | None:
    try:
        return np.broadcast_shapes(*(array.shape for array in arrays))
    except ValueError:
        return None


def _dot(x: np.ndarray, y: np.ndarray, dimensions: Any) -> np.ndarray:
    """Batch axes first, then what is left of x, then of y: each depends on what it sums."""
    (x_summed, y_summed), (x_batch, y_batch) = dimensions
    lines = []
    for array, summed, batch in ((x, x_summed, x_batch), (y, y_summed, y_batch)):
        rest = [a for a in range(array.ndim) if a not in summed and a not in batch]
        ordered = array.transpose(*batch, *rest, *summed)
        kept = len(batch) + len(rest)
        axes = tuple(range(kept, array.ndim))
        lines.append((of_any(ordered, axis=axes) if axes else ordered, len(batch)))
    (left, batches), (right, _) = lines
    spread = left.reshape(*left.shape, *[1] * (right.ndim - batches))
    inserted = [1] * (left.ndim - batches)
    return spread | right.reshape(*right.shape[:batches], *inserted, *right.shape[batches:])


def _contracted(x: np.ndarray, y: np.ndarray, contraction: Any) -> np.ndarray:
    """The same for `ring.contraction`, whose operands are strided views."""
    c = contraction
    x = np.pad(x, c.padding) if c.padding else x
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    out = np.zeros(math.prod(c.shape), np.uint8)
    rows, inner, columns = (tuple(a.size for a in axes) for axes in (c.rows, c.inner, c.columns))
    summed = tuple(range(-len(inner), 0)) if inner else ()
    view = np.lib.stride_tricks.as_strided

    def steps(axes: Any, place: int) -> tuple[int, ...]:
        return tuple(axis.strides[place] for axis in axes)

    for at_x, at_y, at_out in c.starts:
        xs = view(x.reshape(-1)[at_x:], (*rows, *inner), (*steps(c.rows, 0), *steps(c.inner, 0)))
        ys = view(
            y.reshape(-1)[at_y:], (*columns, *inner), (*steps(c.columns, 0), *steps(c.inner, 1))
        )
        left, right = (of_any(v, axis=summed) if summed else v for v in (xs, ys))
        into = view(out[at_out:], (*rows, *columns), (*steps(c.rows, 1), *steps(c.columns, 1)))
        into[...] = left.reshape(*rows, *[1] * len(columns)) | right
    return out.reshape(c.shape)
