"""Each operation's rule against JAX itself, in float64: which one is wrong, if any is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.compiling import options_to_run_once
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.share_trees import scaled
from lpgan_jax.transform.evaluate import Evaluation, evaluation
from lpgan_jax.transform.graph import Graph, Node
from lpgan_jax.transform.rules.functions import at_least
from lpgan_jax.transform.rules.registry import lifted
from lpgan_jax.transform.values import Setting


@dataclass(frozen=True)
class Difference:
    """An operation whose result is not JAX's.

    Attributes:
        operation: its name.
        place: where it stands in the function.
        error: the largest difference, in LSB.
    """

    operation: str
    place: str
    error: float

    def __str__(self) -> str:
        return f"{self.operation}: {self.error:.3g} LSB off ({self.place})"


def first_difference(
    graph: Graph,
    secrets: Sequence[Any],
    scales: Sequence[int],
    public: dict[int, Any],
    setting: Setting,
    tolerance: float,
) -> Difference | None:
    """The first operation that differs from JAX's own of the same operands.

    Args:
        graph: the program.
        secrets: real arrays for its secret inputs.
        scales: their fraction bits.
        public: values of its public nodes, by id.
        setting: how values are kept.
        tolerance: in LSB, for values up to 1 in magnitude; in proportion beyond.
    """
    nodes = graph.nodes()
    looked_at = [n for n in nodes if n.secret and n.inputs and not n.results]

    @functools.partial(jax.jit, compiler_options=options_to_run_once())
    def errors(secrets: Sequence[Any], public: dict[int, Any]) -> list[jax.Array]:
        inputs = scaled(list(secrets), list(scales))
        run = evaluation(graph, ExactSeat(), public, setting)
        run.run(nodes, [n for n in graph.inputs if n.secret], inputs)
        return [_error(run, node) for node in looked_at]

    for node, error in zip(looked_at, errors(secrets, public), strict=True):
        lsb = float(error) * 2.0**setting.frac_bits
        if not lsb <= tolerance:
            return Difference(node.operation, str(node.place), lsb)
    return None


def _error(run: Evaluation, node: Node) -> jax.Array:
    """The largest difference of a node's value from that of JAX, for the same operands."""
    want = _plain(run, node)
    got = _real(run, node)
    error = jnp.abs(jnp.asarray(got, jnp.float64) - want) / jnp.maximum(1.0, jnp.abs(want))
    return error.max(initial=0.0)


def _plain(run: Evaluation, node: Node) -> Any:
    operands = (
        _plain(run, n) if n.results else _real(run, n).astype(_type(n)) for n in node.inputs
    )
    if node.operation == "over_root":  # by a root that is never 0
        x, v, eps = operands
        least = at_least(run.values, lifted(run.values, run.known[id(node.inputs[1])]).stored, eps)
        return node.plain(x, v, least)
    return node.plain(*operands)


def _type(node: Node) -> Any:
    return node.dtype if node.is_integer else np.float64


def _real(run: Evaluation, node: Node) -> jax.Array:
    if not node.secret:
        return jnp.asarray(run.known[id(node)])
    secret = lifted(run.values, run.known[id(node)]).stored.raw
    return jnp.broadcast_to(secret.words * 2.0**-secret.frac_bits, node.shape)
