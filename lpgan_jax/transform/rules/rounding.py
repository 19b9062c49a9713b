"""Whole numbers next to others."""

from __future__ import annotations

import numpy as np

from lpgan_jax.mpc import compare
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.graph import MOVES
from lpgan_jax.transform.rules.comparison import below
from lpgan_jax.transform.rules.registry import Node, Value, Values, rule


@rule("floor")
def _floor(values: Values, node: Node, x: Value) -> Value:
    source = x.stored

    def whole() -> Secret:
        own = source.form.frac_bits  # or as it is: the bits below its scale decide
        has_room = source.frac_bits <= own + values.frac_bits
        return compare.floor(values.party, source.at(source.frac_bits if has_room else own))

    return values.now(node.shape, whole)


@rule("convert_element_type")
def _convert(values: Values, node: Node, x: Value) -> Value:
    """Floats that become integers, towards 0: of negative numbers, the ceiling."""
    (given,) = node.inputs
    if not node.is_integer or _is_whole(given):
        return x
    almost_one = 1 - 2.0**-values.frac_bits
    return _floor(values, node, x + below(values, x, 0.0, True, False).times(almost_one))


def _is_whole(node: Node) -> bool:
    """Whether all elements are whole numbers whatever the data are."""
    if node.is_integer or node.operation in ("floor", "sign"):
        return True
    if node.value is not None:
        return bool((node.value == np.round(node.value)).all())
    linear = node.operation in ("neg", "abs", "mul", "add", "sub", *MOVES)
    return linear and all(map(_is_whole, node.inputs))
