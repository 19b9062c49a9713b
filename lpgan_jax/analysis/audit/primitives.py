"""What the interpreter must know of JAX's primitives: tables, and questions about an equation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.analysis.audit.values import Sum, Value, sum_of
from lpgan_jax.mpc.party import AXIS


def broadcast_in_dim(array: np.ndarray, shape: Any, broadcast_dimensions: Any) -> np.ndarray:
    """As `jax.lax.broadcast_in_dim`, on a NumPy array."""
    expanded = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, array.shape, strict=True):
        expanded[axis] = size
    return np.broadcast_to(array.reshape(expanded), shape)


def _slice(array: np.ndarray, start: Any, limit: Any, strides: Any) -> np.ndarray:
    return array[tuple(map(slice, start, limit, strides or [None] * array.ndim))]


def _reshape(array: np.ndarray, sizes: Any, dimensions: Any) -> np.ndarray:
    return (array if dimensions is None else array.transpose(dimensions)).reshape(sizes)


# What moves the elements of one array: primitive -> the same on a NumPy array.
MOVES: dict[str, Callable[[np.ndarray, dict[str, Any]], np.ndarray]] = {
    "reshape": lambda a, p: _reshape(a, p["new_sizes"], p["dimensions"]),
    "squeeze": lambda a, p: a.squeeze(tuple(p["dimensions"])),
    "transpose": lambda a, p: a.transpose(p["permutation"]),
    "rev": lambda a, p: np.flip(a, p["dimensions"]),
    "slice": lambda a, p: _slice(a, p["start_indices"], p["limit_indices"], p["strides"]),
    "broadcast_in_dim": lambda a, p: broadcast_in_dim(a, p["shape"], p["broadcast_dimensions"]),
    "copy": lambda a, p: a,
    "copy_p": lambda a, p: a,
    "random_clone": lambda a, p: a,
}
# What cuts one into several.
CUTS: dict[str, Callable[[np.ndarray, dict[str, Any]], list[np.ndarray]]] = {
    "split": lambda a, p: np.split(a, np.cumsum(p["sizes"])[:-1], p["axis"]),
    "unstack": lambda a, p: list(np.moveaxis(a, p["axis"], 0)),
}
# What joins several.
JOINS: dict[str, Callable[[list[np.ndarray], dict[str, Any]], np.ndarray]] = {
    "concatenate": lambda arrays, p: np.concatenate(arrays, p["dimension"]),
    "stack": lambda arrays, p: np.stack(arrays, p["axis"]),
}
# Bijective in each operand on whole words.
BIJECTIVE = {"add", "sub", "xor", "neg", "not"}
# Linear, modulo a power of two and over bits: primitive -> over which of them (None: both).
LINEAR: dict[str, bool | None] = {
    **dict.fromkeys(
        [*MOVES, *CUTS, *JOINS, "pad", "convert_element_type", "gather", "dynamic_slice"]
    ),
    **dict.fromkeys(["scatter", "dynamic_update_slice"]),  # their indices are public: `STEERING`
    **dict.fromkeys(["add", "sub", "neg", "reduce_sum", "cumsum", "scatter-add"], False),
    **dict.fromkeys(["xor", "not", "reduce_xor", "bitcast_convert_type"], True),
}
# The same in one operand, if all others are public.
LINEAR_IN_ONE: dict[str, bool | None] = {
    "select_n": None,
    "shift_left": None,
    **dict.fromkeys(["mul", "dot_general", "ring_product"], False),
    **dict.fromkeys(["and", "shift_right_logical"], True),
}
# What is computed where all operands are known.
COMPUTED: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
}
# Operands that decide which memory is touched, or how often.
STEERING = {
    "cond": slice(1),
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
    "gather": slice(1, 2),
    "scatter": slice(1, 2),
    "sort": slice(None),
}
# Whose time and addresses do not depend on operands, but for those in `STEERING`.
UNSTEERED = {
    *MOVES,
    *CUTS,
    *JOINS,
    *BIJECTIVE,
    *COMPUTED,
    *STEERING,
    *("mul", "sign", "abs", "max", "min", "clamp", "le", "gt", "ge", "round", "floor", "ceil"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic", "population_count", "clz"),
    *("select_n", "convert_element_type", "bitcast_convert_type", "pad", "stop_gradient"),
    *("ring_product", "dot_general", "cumsum", "reduce", "scan", "while"),
    *(f"reduce_{name}" for name in ("sum", "prod", "max", "min", "and", "or", "xor")),
    *("random_bits", "random_split", "random_fold_in", "random_wrap", "random_unwrap"),
}
KEY_PRIMITIVES = {"random_bits", "random_split", "random_fold_in"}
_HOST = re.compile("callback|debug_print|infeed|outfeed|ffi_call|custom_call")


def padded(array: np.ndarray, params: dict[str, Any]) -> np.ndarray | None:
    """As `jax.lax.pad` with zeros, on a NumPy array; None if it takes away, or pads in between."""
    config = params["padding_config"]
    if any(low < 0 or high < 0 or interior for low, high, interior in config):
        return None
    return np.pad(array, [(int(low), int(high)) for low, high, _ in config])


def is_key(atom: Any) -> bool:
    """Whether a variable of a program is an array of typed keys."""
    return jnp.issubdtype(atom.aval.dtype, jax.dtypes.prng_key)


def whole_words(*atoms: Any) -> bool:
    """Whether all are integers of one width."""
    if any(is_key(atom) for atom in atoms):
        return False
    dtypes = [np.dtype(atom.aval.dtype) for atom in atoms]
    return all(d.kind in "iu" and d.itemsize == dtypes[0].itemsize for d in dtypes)


def summed(equation: Any, operands: Sequence[Value]) -> Sum | None:
    """What the results are sums of, if the operands are sums and it is linear in them."""
    name = equation.primitive.name
    private = [value for value in operands if value.private]
    alone = len(private) == 1 or (name == "select_n" and not operands[0].private)
    if name not in LINEAR and not (name in LINEAR_IN_ONE and alone):
        return None
    of = sum_of(operands, LINEAR.get(name, LINEAR_IN_ONE.get(name)))
    if name == "convert_element_type" and not _keeps_sums(equation, of):
        return None
    if name == "scatter" and equation.params["update_jaxpr"] is not None:  # a function of what was
        return None
    return of


def _keeps_sums(equation: Any, of: Sum | None) -> bool:
    """Whether a conversion is linear: to narrower integers, or of bits."""
    old, new = (np.dtype(a.aval.dtype) for a in (equation.invars[0], equation.outvars[0]))
    integers = old.kind in "iu" and new.kind in "iu"
    return integers and (new.itemsize <= old.itemsize or (of is not None and of.bits is True))


def names_axis(params: dict[str, Any]) -> bool:
    """Whether an equation talks over the axis of the servers."""
    names = [value if isinstance(value, tuple) else (value,) for value in params.values()]
    return any(isinstance(name, str) and name == AXIS for name in itertools.chain(*names))


def reaches_host(equation: Any) -> bool:
    """Whether an equation calls back to the host, or may."""
    effects = any(type(effect).__name__ != "NamedAxisEffect" for effect in equation.effects)
    return effects or _HOST.search(equation.primitive.name) is not None
