"""The scales of a program's arguments and results, which nobody's data decide.

Everything has f fraction bits, but for what roots are taken of, which needs twice as many, because
squares are small (second moments, variances); and for what is divided by a root, which gets 8 more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lpgan_jax.transform.graph import MOVES, Graph, Node

_GUARD_BITS = 8
_LINEAR = MOVES | {
    "add",
    "add_any",
    "sub",
    "neg",
    "mul",
    "div",
    "max",
    "min",
    "select_n",
    "concatenate",
    "pad",
    "over_root",
}


def input_scales(
    graph: Graph, frac_bits: int, pairs: Sequence[tuple[int, int]] = ()
) -> dict[int, int]:
    """Fraction bits of secret inputs and outputs, by the id of their nodes.

    Args:
        graph: the program.
        frac_bits: f.
        pairs: (output, input) numbers of results that are arguments of the next call.
    """
    wide, guarded = _reached(graph)

    def own(node: Node) -> int:
        if node.is_integer:
            return 0
        if id(node) in wide:
            return 2 * frac_bits
        return frac_bits + _GUARD_BITS if id(node) in guarded else frac_bits

    scales = {id(n): own(n) for n in (*graph.inputs, *graph.outputs)}
    for output, argument in pairs:
        after, before = graph.outputs[output], graph.inputs[argument]
        scales[id(after)] = scales[id(before)] = max(scales[id(after)], scales[id(before)])
    return scales


def _reached(graph: Graph) -> tuple[set[int], set[int]]:
    """(what only a root is taken of, what only is divided by one), back to the arguments."""
    wide, guarded = [], []
    for node in graph.nodes():
        if node.operation in ("sqrt", "rsqrt"):
            wide.append(node.inputs[0])
        elif node.operation == "over_root":
            guarded.append(node.inputs[0])
            wide.append(node.inputs[1])
    found = _back(wide)
    for node in graph.nodes():  # running averages of what a root is taken of
        linear = node.operation in _LINEAR and not _is_product(node)
        if linear and any(id(n) in found for n in node.inputs) and node.secret:
            found |= _back([node])
    return found, _back(guarded)


def _back(starts: Iterable[Node]) -> set[int]:
    found: set[int] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if id(node) in found or not node.secret:
            continue
        found.add(id(node))
        if node.operation in _LINEAR and not _is_product(node):
            stack += node.inputs
    return found


def _is_product(node: Node) -> bool:
    """Whether a node depends on more than one secret, and not as a sum does."""
    return node.operation in ("mul", "div", "over_root") and sum(n.secret for n in node.inputs) > 1
