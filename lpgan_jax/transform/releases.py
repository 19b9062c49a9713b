"""What a program releases of private examples: nothing but its private sums.

What depends on private arguments, but not through a private sum, has not been hidden by noise: it
may go into private sums, and nowhere else. This is looked at on the graph, as values depend on each
other, whatever the data are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
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
        for of, noise, weights in _uses(graph, _whole, 1):
            self.sums.append(of)
            for taken, (argument, places) in ((self.noise, noise), (self.weights, weights)):
                before = taken.get(argument, np.zeros(0, np.int64))
                taken[argument] = np.sort(np.concatenate([before, places.ravel()]))


_Part = tuple[int, np.ndarray]  # (id of an argument of the program, places of its elements)
_Find = Callable[[Node], _Part | None]
"""What an argument of a graph is of the whole program's, if it is elements of one."""


def _whole(argument: Node) -> _Part:
    return id(argument), np.arange(argument.size).reshape(argument.shape)


def _uses(graph: Graph, find: _Find, times: int) -> Iterator[tuple[Sums, _Part, _Part]]:
    """Private sums, and what each has as its noise and weights; `times`: the graph runs so often.

    Operands are followed back from there, so that a program without private sums costs nothing.
    """
    for node in graph.nodes():
        if node.operation == SUM:
            _, weights, noise = node.inputs
            of = Sums(node.params["clip"], node.size, node.inputs[0].shape[0], times)
            yield of, _part(node, "noise", noise, find), _part(node, "weights", weights, find)
        elif node.operation == "scan":
            inner = functools.partial(_scanned, node, find)
            yield from _uses(node.params["body"], inner, times * node.params["length"])


def _scanned(loop: Node, find: _Find, argument: Node) -> _Part | None:
    """What an argument of a loop's body is; its iterations are the last axis of the places."""
    body = loop.params["body"]
    of_loop = zip(_secret(body), loop.params["kinds"], loop.inputs, strict=False)
    kind, operand = next((kind, given) for own, kind, given in of_loop if own is argument)
    # What is not scanned over would be the same in each iteration.
    if kind != "x" or (part := _followed(operand, find)) is None:
        return None
    rows = np.moveaxis(part[1].reshape(loop.params["length"], *argument.shape, -1), 0, -1)
    return part[0], rows.reshape(*argument.shape, -1)


def _followed(node: Node, find: _Find) -> _Part | None:
    """What a value is of an argument, if it is elements of one, as they are."""
    if node.operation == "input":
        return find(node) if node.secret else None
    if node.operation not in _PARTS:
        return None
    if (part := _followed(node.inputs[0], find)) is None:
        return None
    argument, places = part
    inner = node.inputs[0].shape
    lead = places.reshape(*inner, -1)  # iterations of loops come last
    moved = [
        np.asarray(node.plain(lead[..., k].astype(np.float64))).astype(np.int64)
        for k in range(lead.shape[-1])
    ]
    return argument, np.stack(moved, -1)


def _part(node: Node, name: str, operand: Node, find: _Find) -> _Part:
    part = _followed(operand, find)
    if part is None:
        raise Unhidden(
            f"private_sum ({node.place}): {name}: expected an argument, or what a loop goes over "
            "in one, as it is, and nothing that was computed"
        )
    return part


_PARTS = MOVES - {"broadcast_in_dim"}
