"""What a program releases of private examples: nothing but its private sums.

What depends on private arguments, but not through a private sum, has not been hidden by noise: it
may go into private sums, and nowhere else. This is looked at on the graph, as values depend on each
other, whatever the data are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

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
        weights: the arguments that say which examples count.
    """

    sums: tuple[Sums, ...] = ()
    before: frozenset[int] = frozenset()
    weights: tuple[Node, ...] = ()


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
    uses = _Uses()
    uses.look_at(graph)
    sums = tuple(uses.sums)
    if noise is None:
        return Releases(sums)
    if set(uses.noise) != {id(noise)}:
        raise Unhidden("noise: expected private sums that take the program's, and no other values")
    taken = uses.noise[id(noise)]
    if not np.array_equal(taken, np.arange(noise.size)):
        raise Unhidden(
            f"noise: {noise.size} values, and private sums take {len(np.unique(taken))} of them in "
            f"{len(taken)} places: expected each once"
        )
    of_examples = {id(n): n for n in private}
    for of, places in uses.weights.items():
        if of not in of_examples or len(np.unique(places)) < len(places):
            raise Unhidden(
                "weights: expected those of the batch, each in one place: an example that is there "
                "twice counts twice"
            )
    for argument in private:
        _require_hidden(graph, argument, f"{argument.place} is of private examples")
    _require_hidden(graph, noise, "the noise hides private sums")
    found = _Dependents(graph, private)
    weights = tuple(of_examples[of] for of in uses.weights)
    return Releases(sums, frozenset(found.ids | found.sums), weights)


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


class _Uses:
    """Which elements of some arguments private sums take, as what, and how often.

    Attributes:
        sums: the private sums.
        noise, weights: {id of an argument: the places of its elements, each as often as it is
            taken, in order}.
    """

    def __init__(self) -> None:
        self.sums: list[Sums] = []
        self.noise: dict[int, np.ndarray] = {}
        self.weights: dict[int, np.ndarray] = {}

    def look_at(self, graph: Graph) -> None:
        """All of a program."""
        every = np.arange
        own = {id(n): (id(n), every(n.size).reshape(n.shape)) for n in graph.inputs if n.secret}
        for of, noise, weights in self._in(graph, own, 1):
            self.sums.append(of)
            for taken, (argument, places) in ((self.noise, noise), (self.weights, weights)):
                before = taken.get(argument, np.zeros(0, np.int64))
                taken[argument] = np.sort(np.concatenate([before, places.ravel()]))

    def _in(self, graph: Graph, own: dict[int, _Part], times: int) -> Iterator[_Use]:
        """`own`: of each argument, what it is of the whole program's; `times`: it runs so often."""
        for node in graph.nodes():
            if node.operation == SUM:
                noise, weights = (
                    _part(node, name, operand, own)
                    for name, operand in zip(("noise", "weights"), node.inputs[:0:-1], strict=True)
                )
                of = Sums(node.params["clip"], node.size, node.inputs[0].shape[0], times)
                yield of, noise, weights
            elif node.operation == "scan":
                yield from self._in_scan(node, own, times)

    def _in_scan(self, node: Node, own: dict[int, _Part], times: int) -> Iterator[_Use]:
        body, length = node.params["body"], node.params["length"]
        given: dict[int, _Part] = {}
        for argument, kind, operand in zip(
            _secret(body), node.params["kinds"], node.inputs, strict=False
        ):
            # What is not scanned over would be the same in each iteration.
            if kind == "x" and (part := _followed(operand, own)) is not None:
                rows = np.moveaxis(part[1].reshape(length, *argument.shape, -1), 0, -1)
                given[id(argument)] = part[0], rows.reshape(*argument.shape, -1)
        yield from self._in(body, given, times * length)


_Part = tuple[int, np.ndarray]  # (id of an argument of the program, places of its elements)
_Use = tuple[Sums, _Part, _Part]


def _followed(node: Node, own: Mapping[int, _Part]) -> _Part | None:
    """What a value is of an argument, if it is elements of one, as they are."""
    if id(node) in own:
        return own[id(node)]
    if node.operation not in _PARTS:
        return None
    if (part := _followed(node.inputs[0], own)) is None:
        return None
    argument, places = part
    inner = node.inputs[0].shape
    lead = places.reshape(*inner, -1)  # iterations of loops come last
    moved = [
        np.asarray(node.plain(lead[..., k].astype(np.float64))).astype(np.int64)
        for k in range(lead.shape[-1])
    ]
    return argument, np.stack(moved, -1)


def _part(node: Node, name: str, operand: Node, own: Mapping[int, _Part]) -> _Part:
    part = _followed(operand, own)
    if part is None:
        raise Unhidden(
            f"private_sum ({node.place}): {name}: expected an argument, or what a loop goes over "
            "in one, as it is, and nothing that was computed"
        )
    return part


_PARTS = MOVES - {"broadcast_in_dim"}
