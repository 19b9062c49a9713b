"""The table of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate

import numpy as np

from lpgan_jax.transform.graph import Node
from lpgan_jax.transform.values import Value, Values

Rule = Callable[Concatenate[Values, Node, ...], Any]
"""(values, node, *operands) -> the result; operands are `Value`s, or arrays if they are public."""

RULES: dict[str, Rule] = {}
"""The rule of each operation."""

TOGETHER: set[str] = set()
"""Operations whose independent calls run as one (`functions.together`)."""


def rule(*operations: str, together: bool = False) -> Callable[[Rule], Rule]:
    """Enter a function into the table; `together`: into that of `TOGETHER` too."""

    def entered(function: Rule) -> Rule:
        TOGETHER.update(operations if together else ())
        for operation in operations:
            RULES[operation] = function
        return function

    return entered


def lifted(values: Values, operand: Any) -> Value:
    """An operand as a value."""
    return operand if isinstance(operand, Value) else values.public(operand)


def known_scalar(operand: Any) -> float | None:
    """The number that a public operand is everywhere, if it is known while tracing."""
    if isinstance(operand, np.ndarray) and operand.size and (operand == operand.flat[0]).all():
        return float(operand.flat[0])
    return None


__all__ = ["RULES", "TOGETHER", "Node", "Rule", "Value", "Values", "known_scalar", "lifted", "rule"]
