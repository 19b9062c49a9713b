"""What a traced function does, as text: equal for two roles that are about to run the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lpgan_jax.transform.function import Program
from lpgan_jax.transform.graph import Graph, Node
from lpgan_jax.transform.values import Setting


def listing(program: Program) -> list[tuple[str, Node]]:
    """Each operation, with its operands, parameters and format; and the node that it is of."""
    lines, number = _lines(program.graph, program.setting), _numbers(program.graph)
    for result, argument in (*program.pairs, *program.counters):
        handed = number[id(result)], number[id(argument)]
        lines.append((f"handed on {handed}", result))
    return lines


def _numbers(graph: Graph) -> dict[int, int]:
    return {id(node): i for i, node in enumerate(graph.nodes())}


def _lines(graph: Graph, setting: Setting) -> list[tuple[str, Node]]:
    number = _numbers(graph)
    lines = []
    for node in graph.nodes():
        operands = ",".join(str(number[id(n)]) for n in node.inputs)
        form = setting.format(node) if node.secret and not node.results else ""
        value = "" if node.value is None else _text(node.value, setting)
        lines.append(
            (
                f"{node!r} ({operands}) {_text(node.params, setting)} {form} {value}",
                node,
            )
        )
    outputs = ",".join(str(number[id(n)]) for n in graph.outputs)
    return [*lines, (f"results ({outputs})", graph.outputs[0])] if graph.outputs else lines


def _text(value: Any, setting: Setting) -> str:
    """The same for equal parameters, in every process."""
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: str(item[0]))
        return "{" + ",".join(f"{k}:{_text(v, setting)}" for k, v in items if v is not None) + "}"
    if isinstance(value, np.ndarray | jax.Array):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, Graph):
        return "[" + ";".join(line for line, _ in _lines(value, setting)) + "]"
    if isinstance(value, Node):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str) and type(value) in (tuple, list):
        return "(" + ",".join(_text(v, setting) for v in value) + ")"
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value))}"
    return f"{type(value).__name__}:{value}"


def digests(program: Program) -> str:
    """Four bytes of each operation's hash, in hexadecimal, one after the other."""
    return "".join(_digest(line) for line, _ in listing(program))


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:8]


def first_difference(program: Program, other: str) -> str | None:
    """Where a function differs from one of which the digests are known; None if it does not."""
    lines, there = listing(program), len(other) // 8
    for index, (line, node) in enumerate(lines):
        if _digest(line) != other[8 * index : 8 * index + 8]:
            counts = f"{len(lines)} ({there} there)"
            return f"operation {index} of {counts}, {node!r} at {node.place}"
    return f"{len(lines)} operations, {there} there" if there > len(lines) else None
