"""How each value of a program is kept: its plan, which is public, and decided before it runs.

Without examples everything has f fraction bits and is taken to lie below 2^LOG_RANGE. Examples,
run in float64, tell how large each value is: it then gets `SIGNIFICANT_BITS` fraction bits below
the largest magnitude that was seen, and room for one that is 2^MARGIN_BITS as large.

Whatever a root is taken of has more than f bits more among the arguments and results, because
squares are small (second moments, variances), and so have running averages; what is divided by a
root has 8, and, if there are examples, the gradients that are have 4.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lpgan_jax.common import files
from lpgan_jax.transform.graph import MOVES, Graph, Node, NotSecure
from lpgan_jax.transform.values import Format, Setting

SIGNIFICANT_BITS = 22
MARGIN_BITS = 4

_MOST_BITS = 46
_TOO_LARGE = 2.0**20
_GRADIENT_BITS = 4
_SQUARES = ("square", "inner")
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


@dataclass(frozen=True)
class Plan:
    """The format of each secret value of a program, in its order.

    It does not depend on shapes: a plan that was made on a small batch serves a large one.

    Attributes:
        frac_bits: f.
        operations: what computes each value, to tell programs apart.
        formats: of the values; None of those that have f bits.
    """

    frac_bits: int
    operations: tuple[str, ...]
    formats: tuple[Format | None, ...]

    @staticmethod
    def default(graph: Graph, frac_bits: int) -> Plan:
        """That of a program of which no examples were seen."""
        nodes = _planned(graph)
        return Plan(frac_bits, tuple(n.operation for n in nodes), (None,) * len(nodes))

    @staticmethod
    def measured(
        graph: Graph,
        frac_bits: int,
        values: Mapping[int, Any],
        pairs: Sequence[tuple[Node, Node]] = (),
    ) -> Plan:
        """That of a program that was run on examples.

        Args:
            graph: the program.
            frac_bits: f.
            values: float64 arrays of its secret arguments and of all its public nodes, by id.
            pairs: (result, argument) nodes of what is handed on to the next call.

        Raises:
            NotSecure: a value is not finite, or beyond 2^20.
        """
        largest: dict[int, float] = {}
        known = _measure(graph.nodes(), values, largest)
        for average in averages(pairs):  # as large as they become
            added = known[id(average.result)] - average.decay * known[id(average.argument)]
            steady = float(jnp.abs(added).max(initial=0.0)) / (1 - average.decay)
            largest[id(average.result)] = max(largest[id(average.result)], steady)
        for after, before in pairs:
            both = max(largest[id(after)], largest[id(before)])
            largest[id(after)] = largest[id(before)] = both
        nodes = _planned(graph)
        adaptive = any(n.operation == "over_root" for n in nodes)
        wide, _ = _reached(graph)

        def form(node: Node) -> Format | None:
            if node.is_integer or not largest[id(node)]:
                return None
            if largest[id(node)] > _TOO_LARGE:
                raise NotSecure(
                    f"{node.operation}: {largest[id(node)]:.3g} on the examples leaves no fraction "
                    f"bits: scale it down, or mask with less ({node.place})"
                )
            more = _GRADIENT_BITS if adaptive and node.place.backward else 0
            found = _format(largest[id(node)], frac_bits, SIGNIFICANT_BITS + more)
            if id(node) in wide and (node.operation in _SQUARES or _is_product(node)):
                return dataclasses.replace(found, frac_bits=Setting(frac_bits).doubled(found))
            return found

        formats = map(form, nodes)
        return Plan(frac_bits, tuple(n.operation for n in nodes), tuple(formats))

    def by_node(self, graph: Graph) -> dict[int, Format]:
        """The formats of a program's nodes, by id.

        Raises:
            ValueError: the plan is that of another program.
        """
        nodes = _planned(graph)
        for node, operation in zip(nodes, self.operations, strict=False):
            if node.operation != operation:
                raise ValueError(
                    f"plan: made for another program: it has {operation} where this one has "
                    f"{node.operation} ({node.place})"
                )
        if len(nodes) != len(self.operations):
            raise ValueError(
                f"plan: made for another program: it has {len(self.operations)} operations, this "
                f"one {len(nodes)}"
            )
        rows = zip(nodes, self.formats, strict=True)
        return {id(n): form for n, form in rows if form is not None}

    def save(self, path: str | Path) -> None:
        """Write a JSON file: f, and of each value the operation, fraction bits and range."""
        rows = [
            [operation, *((form.frac_bits, form.log_range) if form else ())]
            for operation, form in zip(self.operations, self.formats, strict=True)
        ]
        text = json.dumps({"frac_bits": self.frac_bits, "values": rows}, indent=0)
        files.atomic_write(path, text.encode(), private=False)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a plan.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            frac_bits, rows = content["frac_bits"], content["values"]
            operations = tuple(str(row[0]) for row in rows)
            formats = tuple(Format(int(r[1]), int(r[2]), True) if r[1:] else None for r in rows)
            return Plan(int(frac_bits), operations, formats)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: expected a plan as `Plan.save` writes it: {error}") from None


def _planned(graph: Graph) -> list[Node]:
    """The secret values of a program in order, with those in the bodies of its loops."""
    found = []
    for node in graph.nodes():
        if node.operation == "scan" and node.secret:
            found += _planned(node.params["body"])
        elif node.secret and not node.results:
            found.append(node)
    return found


# Looking at examples ------------------------------------------------------------------------------


def _measure(
    nodes: Sequence[Node], given: Mapping[int, Any], largest: dict[int, float]
) -> dict[int, Any]:
    """Compute values in float64, and enter the largest magnitude of each secret one.

    `given`: of the arguments, and of what is public.
    """
    known = dict(given)
    for node in nodes:
        if node.value is not None:
            known[id(node)] = node.value
        elif node.secret:
            if id(node) not in known:
                operands = [known[id(n)] for n in node.inputs]
                known[id(node)] = node.plain(*operands)
                if node.operation == "scan":
                    _measure_loop(node, operands, largest)
            if not node.results:
                largest[id(node)] = max(_magnitude(node, known[id(node)]), largest.get(id(node), 0))
    return known


def _magnitude(node: Node, value: Any) -> float:
    magnitude = float(jnp.abs(jnp.asarray(value, jnp.float64)).max(initial=0.0))
    if not math.isfinite(magnitude):
        raise NotSecure(
            f"{node.operation}: {magnitude} on the examples: there is no such number under "
            f"sharing ({node.place})"
        )
    return magnitude


def _measure_loop(node: Node, operands: Sequence[Any], largest: dict[int, float]) -> None:
    """As `_measure`, of the values of all iterations."""
    params = node.params
    body, kinds, shipped = params["body"], params["kinds"], params["shipped"]
    nodes, inputs = body.nodes(), [n for n in body.inputs if n.secret]
    own, stacks = operands[: len(inputs)], operands[len(inputs) :]
    rows = list(zip(inputs, own, kinds, strict=True))
    carry = [n for n, _, kind in rows if kind == "carry"]
    after = [body.outputs[i] for i in params["outputs"]][: len(carry)]
    state = {id(n): v for n, v, kind in rows if kind == "carry"}
    order = range(params["length"])
    for i in reversed(order) if params["reverse"] else order:
        given = {id(n): v[i] if kind == "x" else v for n, v, kind in rows if kind != "carry"}
        given |= {id(n): stack[i] for n, stack in zip(shipped, stacks, strict=True)}
        known = _measure(nodes, state | given, largest)
        state = {id(n): known[id(result)] for n, result in zip(carry, after, strict=True)}


def _format(magnitude: float, frac_bits: int, significant_bits: int) -> Format:
    """Of a value that is up to so large.

    What is large keeps f bits as long as a comparison of it has room, instead of a margin.
    """
    log = max(math.ceil(math.log2(magnitude)), significant_bits - _MOST_BITS)
    least = min(frac_bits, significant_bits + MARGIN_BITS - log)
    return Format(max(significant_bits - log, least), log + MARGIN_BITS, True)


# What is handed on --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Average:
    """A result a x + y that is the argument x of the next call: of steady y, y / (1 - a).

    Attributes:
        result: its node.
        argument: x.
        decay: a, between 0 and 1.
    """

    result: Node
    argument: Node
    decay: float


def averages(pairs: Iterable[tuple[Node, Node]]) -> list[Average]:
    """The running averages among (result, argument) pairs: moments, statistics, traces."""
    found = []
    for result, argument in pairs:
        ways = list(itertools.islice(_ways(result, argument, set()), 2))
        if len(ways) == 1 and 0 < ways[0] < 1:  # two: decayed weights, which are no average
            found.append(Average(result, argument, ways[0]))
    return found


_SUMS = ("add", "add_any", "sub")


def _ways(node: Node, argument: Node, without: set[int]) -> Iterator[float]:
    """The factor of an argument in a result, for each way that it enters its sums.

    `without`: the nodes that are known to have no way to it, by id.
    """
    if node is argument:
        yield 1.0
        return
    if id(node) in without:
        return
    factor: float | None = 1.0
    inputs = [n for n in node.inputs if n.secret]
    if node.operation in ("mul", "div") and len(inputs) == 1:
        (by,) = (
            (n.scalar for n in node.inputs if not n.secret) if len(node.inputs) == 2 else (None,)
        )
        if node.operation == "mul":
            factor = by
        else:
            factor = 1 / by if by and inputs[0] is node.inputs[0] else None
    elif node.operation == "reduce_sum":
        factor = inputs[0].size / max(node.size, 1)
    elif node.operation not in (*_SUMS, *MOVES):
        return
    found = False
    for one in inputs if factor is not None else ():
        for way in _ways(one, argument, without):
            found = True
            yield (factor or 1.0) * way
    if not found:
        without.add(id(node))


def input_scales(
    graph: Graph, setting: Setting, pairs: Sequence[tuple[Node, Node]] = ()
) -> dict[int, int]:
    """Fraction bits of secret arguments and results, by the id of their nodes.

    Args:
        graph: the program.
        setting: how values are kept.
        pairs: (result, argument) nodes of what is handed on to the next call.
    """
    squares, guarded = _reached(graph)
    wide = squares | {
        id(n) for average in averages(pairs) for n in (average.result, average.argument)
    }

    def own(node: Node) -> int:
        if node.is_integer:
            return 0
        form = setting.format(node)
        if id(node) in squares:
            form = form.squared()
        if id(node) in guarded:
            return setting.guarded(form)
        return setting.doubled(form) if id(node) in wide else form.frac_bits

    bits = {id(n): own(n) for n in (*graph.inputs, *graph.outputs)}
    for after, before in pairs:
        bits[id(after)] = bits[id(before)] = max(bits[id(after)], bits[id(before)])
    return bits


def _reached(graph: Graph) -> tuple[set[int], set[int]]:
    """(what only a root is taken of, what only is divided by one), back to the arguments."""
    wide, guarded = [], []
    for node in graph.nodes():
        if node.operation in ("sqrt", "rsqrt"):
            wide.append(node.inputs[0])
        elif node.operation == "times_root":
            wide.append(node.inputs[1])
        elif node.operation == "over_root":
            guarded.append(node.inputs[0])
            wide.append(node.inputs[1])
    found = _back(wide)
    for node in graph.nodes():  # running averages of what a root is taken of
        linear = node.operation in _LINEAR and not _is_product(node)
        if linear and any(id(n) in found for n in node.inputs) and node.secret:
            found |= _back([node])
    return found, _back(guarded) - found


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
    products = "mul", "div", "over_root", "times_root"
    return node.operation in products and sum(n.secret for n in node.inputs) > 1
