"""A graph, run from one server's seat (or any other seat that takes a party's place)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.bounds import bounds
from lpgan_jax.transform.graph import Graph, Node, NotSecure
from lpgan_jax.transform.rules import RULES
from lpgan_jax.transform.rules.registry import TOGETHER, lifted
from lpgan_jax.transform.values import Setting, Value, Values


def plain_values(nodes: Sequence[Node], given: dict[int, Any], secret: bool = False) -> Any:
    """The values in float64 of the public nodes, or of the secret ones, and of constants, by id.

    `given`: of arguments, and of whatever else these nodes take.
    """
    known = dict(given)
    for node in nodes:
        if id(node) in known:
            continue
        if node.value is not None:
            known[id(node)] = node.value
        elif node.secret == secret:
            known[id(node)] = node.plain(*(known[id(n)] for n in node.inputs))
    return known


def frontier(nodes: Sequence[Node], outputs: Sequence[Node]) -> list[Node]:
    """The public values, not known while tracing, that secret operations take, or that come out."""
    found: dict[int, Node] = {}
    taken = [n for node in nodes if node.secret for n in node.inputs]
    for node in (*taken, *outputs):
        if not node.secret and node.value is None:
            found.setdefault(id(node), node)
    return list(found.values())


def levels(nodes: Sequence[Node]) -> dict[int, int]:
    """How many nodes of its own operation each node depends on, one after the other, by id.

    Nodes of one operation and level do not depend on each other.
    """
    chains: dict[int, dict[str, int]] = {}
    for node in nodes:
        own: dict[str, int] = {}
        for other in node.inputs:
            for operation, count in chains[id(other)].items():
                own[operation] = max(own.get(operation, 0), count)
        if node.secret and node.operation in TOGETHER:
            own[node.operation] = own.get(node.operation, -1) + 1
        chains[id(node)] = own
    return {id(n): chains[id(n)].get(n.operation, 0) for n in nodes}


def watching(values: Values, node: Node) -> AbstractContextManager[None]:
    """Around what is done with a node's value: whether a range guard may look at it."""
    unwatched = id(node) in values.setting.unwatched
    return values.party.filling_the_range() if unwatched else nullcontext()


class Evaluation:
    """The run of a graph.

    Attributes:
        known: what each node gave, by id: a `Value`, or a public array.
    """

    def __init__(self, values: Values, public: dict[int, Any]) -> None:
        """`public`: of the nodes of the frontier."""
        self.values = values
        self._uses: Counter[int] = Counter()
        self.known: dict[int, Any] = dict(public)

    def run(self, nodes: Sequence[Node], inputs: Sequence[Node], secrets: Sequence[Secret]) -> None:
        """Run the secret operations among `nodes`; `inputs` are the secret arguments."""
        self._uses = Counter(id(n) for node in nodes for n in node.inputs)
        setting = self.values.setting
        for node, secret in zip(inputs, secrets, strict=True):
            self.values.form = setting.format(node)
            self.known[id(node)] = self.values.of(secret)
        for node in nodes:
            if node.value is not None:
                self.known[id(node)] = node.value
            elif node.secret and id(node) not in self.known:
                self.values.form = setting.format(node)
                with self.values.party.at(setting.place(node)), watching(self.values, node):
                    self.known[id(node)] = self._result(node)

    def _result(self, node: Node) -> Any:
        operands = [self.known[id(n)] for n in node.inputs]
        if node.operation == "output":
            return operands[0][node.params["index"]]
        try:
            result = RULES[node.operation](self.values, node, *operands)
        except NotImplementedError as error:
            raise NotSecure(f"{node.operation}: {error} ({node.place})") from None
        if isinstance(result, Value) and len(result.terms) > 1 and self._uses[id(node)] > 1:
            factor, rest = result.factored()  # put together once, for all that take it
            return self.values.stored(rest, factor)
        return result

    def words(self, node: Node, frac_bits: int) -> Secret:
        """A secret result at a scale."""
        value = lifted(self.values, self.known[id(node)])
        with self.values.party.at("outputs"), watching(self.values, node):
            secret = value.stored.at(frac_bits)
        if secret.shape != node.shape:
            secret = secret.rearrange(lambda v: jnp.broadcast_to(v, node.shape))
        return secret.unmasked()


def run(
    graph: Graph,
    party: Seat,
    secrets: Sequence[Secret],
    public: Sequence[jax.Array],
    setting: Setting,
    scales: Sequence[int],
) -> list[Secret]:
    """The secret outputs of a graph.

    Args:
        graph: what to run.
        party: the seat.
        secrets: of the secret inputs, in order.
        public: of the frontier, in order.
        setting: how values are kept.
        scales: of the secret outputs, in order.
    """
    known = {id(n): v for n, v in zip(frontier(graph.nodes(), graph.outputs), public, strict=True)}
    outputs = [n for n in graph.outputs if n.secret]
    return secret_outputs(graph, party, secrets, known, setting, outputs, scales)


def secret_outputs(
    graph: Graph,
    party: Seat,
    secrets: Sequence[Secret],
    public: dict[int, Any],
    setting: Setting,
    outputs: Sequence[Node],
    scales: Sequence[int],
) -> list[Secret]:
    """Some outputs of a graph as secrets; `public`: of the frontier, by id. Others as of `run`."""
    run = evaluation(graph, party, public, setting)
    run.run(graph.nodes(), [n for n in graph.inputs if n.secret], secrets)
    return [run.words(n, s) for n, s in zip(outputs, scales, strict=True)]


def evaluation(graph: Graph, party: Seat, public: dict[int, Any], setting: Setting) -> Evaluation:
    """A graph that is about to be run; arguments as of `secret_outputs`."""
    nodes = graph.nodes()
    values = Values(party, setting, bounds(nodes), levels(nodes))
    return Evaluation(values, public)
