"""What a program releases of private examples: nothing but its private sums.

What depends on private arguments, but not through a private sum, has not been hidden by noise: it
may go into private sums, and nowhere else. This is looked at on the graph, as values depend on each
other, whatever the data are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lpgan_jax.transform.graph import MOVES, Graph, Node

SUM = "private_sum"


@dataclass(frozen=True)
class Sums:
    """Private sums of one kind.

    Attributes:
        clip: of each vector's norm.
        size: elements of a vector.
        examples: vectors, at most, that are added up.
        count: how many such sums there are.
    """

    clip: float
    size: int
    examples: int
    count: int


class Unhidden(ValueError):
    """Something would tell of private examples what no noise hides."""


@dataclass(frozen=True)
class Releases:
    """What was found.

    Attributes:
        sums: the private sums.
        before: ids of the nodes that depend on a private argument and are not hidden yet, and of
            the sums, of the graph and of loops in it.
    """

    sums: tuple[Sums, ...] = ()
    before: frozenset[int] = frozenset()


def releases(graph: Graph, private: Collection[Node], noise: Node | None) -> Releases:
    """Look at what a program releases.

    Args:
        graph: of the program.
        private: the arguments that are of private examples.
        noise: the argument that is the noise of its private sums; None if it has no private sums.

    Raises:
        Unhidden: a result depends on a private argument otherwise than through private sums, or the
            noise of a sum is not an argument as it is; names both.
    """
    sums = tuple(_sums(graph, noise, 1))
    used = sum(of.size * of.count for of in sums)
    if noise is None:
        return Releases(sums)
    if used != noise.size:
        raise Unhidden(f"noise: {noise.size} values, and private sums take {used}")
    for argument in private:
        _require_hidden(graph, argument, f"{argument.place} is of private examples")
    _require_hidden(graph, noise, "the noise hides private sums")
    found = _Dependents(graph, private)
    return Releases(sums, frozenset(found.ids | found.sums))


def _require_hidden(graph: Graph, argument: Node, reason: str) -> None:
    found = _Dependents(graph, [argument])
    for place, node in enumerate(graph.outputs):
        if id(node) in found.ids:
            raise Unhidden(
                f"result {place} ({node.place}) depends on {argument.place} otherwise than through "
                f"lp.private_sum: {reason}, so expected nothing else of it in a result"
            )


class _Dependents:
    """What depends on some arguments, but not on a private sum of them.

    Attributes:
        ids: of these nodes.
        sums: ids of the private sums whose vectors or weights are among them.
    """

    def __init__(self, graph: Graph, arguments: Iterable[Node]) -> None:
        self.ids: set[int] = set()
        self.sums: set[int] = set()
        self._results: dict[int, list[bool]] = {}
        self._spread(graph, {id(n) for n in arguments})

    def _spread(self, graph: Graph, arguments: set[int]) -> None:
        self.ids |= arguments
        for node in graph.nodes():
            if node.operation == SUM:
                if any(id(n) in self.ids for n in node.inputs[:2]):
                    self.sums.add(id(node))
            elif node.operation == "scan":
                self._results[id(node)] = self._scan(node)
            elif node.operation == "output" and id(node.inputs[0]) in self._results:
                if self._results[id(node.inputs[0])][node.params["index"]]:
                    self.ids.add(id(node))
            elif any(id(n) in self.ids for n in node.inputs):
                self.ids.add(id(node))

    def _scan(self, node: Node) -> list[bool]:
        """Which results of a loop do."""
        body, outputs = node.params["body"], node.params["outputs"]
        of_loop = list(zip(_secret(body), node.params["kinds"], node.inputs, strict=False))
        arguments = {id(own) for own, _, given in of_loop if id(given) in self.ids}
        carries = [own for own, kind, _ in of_loop if kind == "carry"]
        results = [body.outputs[i] for i in outputs]
        while True:
            self._spread(body, arguments)
            after = [id(own) for own, n in zip(carries, results, strict=False) if id(n) in self.ids]
            if arguments.issuperset(after):
                break
            arguments.update(after)
        return [id(n) in self.ids for n in results]


def _secret(graph: Graph) -> list[Node]:
    return [n for n in graph.inputs if n.secret]


def _sums(graph: Graph, noise: Node | None, times: int) -> Iterable[Sums]:
    """The private sums; `noise`: the argument, as this graph has it."""
    for node in graph.nodes():
        if node.operation == SUM:
            if not _is_part_of(node.inputs[2], noise):
                raise Unhidden(
                    f"private_sum ({node.place}): expected noise that is an argument, as it is, and"
                    " nothing that was computed"
                )
            yield Sums(node.params["clip"], node.size, node.inputs[0].shape[0], times)
        elif node.operation == "scan":
            of_loop = zip(_secret(node.params["body"]), node.inputs, strict=False)
            inner = next((own for own, given in of_loop if _is_part_of(given, noise)), None)
            yield from _sums(node.params["body"], inner, times * node.params["length"])


def _is_part_of(node: Node, noise: Node | None) -> bool:
    """Whether a value is some elements of the noise, each once at the most."""
    while node.operation in _PARTS:
        node = node.inputs[0]
    return noise is not None and node is noise


_PARTS = MOVES - {"broadcast_in_dim"}
