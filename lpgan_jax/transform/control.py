"""Loops and branches in the graph: what is known while tracing, and what is chosen by a bit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from lpgan_jax.transform import evaluate
from lpgan_jax.transform.graph import SEVERAL, Builder, Graph, Node, NotSecure, argument, structure
from lpgan_jax.transform.plain import Plain, opened, taken_by_scan

_MOST_ITERATIONS = 1024  # of a `while_loop`, which is unrolled


@structure("cond")
def _cond(builder: Builder, equation: JaxprEqn, inputs: list[Node]) -> list[Node] | None:
    """The known branch; or all of them, and a choice."""
    index, *operands = inputs
    branches = equation.params["branches"]
    if index.scalar is not None:
        number = min(max(int(index.scalar), 0), len(branches) - 1)
        return builder.inline(*opened(branches[number]), operands)
    if not any(n.secret for n in inputs):
        return None
    results = [builder.inline(*opened(branch), operands) for branch in branches]
    chosen = []
    for options in zip(*results, strict=True):
        chosen += builder.call(
            lambda which, *cases: lax.select_n(jnp.broadcast_to(which, cases[0].shape), *cases),
            [index, *options],
        )
    return chosen


@structure("while")
def _while(builder: Builder, equation: JaxprEqn, inputs: list[Node]) -> list[Node] | None:
    """Iterations whose condition is known, one after the other."""
    if not any(n.secret for n in inputs):
        return None
    params = equation.params
    own, others = params["cond_nconsts"], params["body_nconsts"]
    first, second = inputs[:own], inputs[own : own + others]
    state = inputs[own + others :]
    for _ in range(_MOST_ITERATIONS):
        (going,) = builder.inline(*opened(params["cond_jaxpr"]), [*first, *state])
        if going.value is None:
            raise NotSecure(
                "while_loop: whether it goes on is not known while tracing; with a secret it may "
                "not be, and a public number of iterations must be a Python number: use scan or "
                f"fori_loop ({builder.place})"
            )
        if not going.scalar:
            return state
        state = builder.inline(*opened(params["body_jaxpr"]), [*second, *state])
    raise NotSecure(f"while_loop: more than {_MOST_ITERATIONS} iterations ({builder.place})")


@dataclass(frozen=True)
class _Scan:
    """A scan some of which is secret.

    Attributes:
        body: an iteration.
        secret: which of its inputs are secret.
        consts: how many of its inputs, the first, are the same in each iteration.
        carried: how many come next, which it gives anew; the others are scanned over.
        length: iterations.
        reverse: from the last to the first.
    """

    body: Graph
    secret: tuple[bool, ...]
    consts: int
    carried: int
    length: int
    reverse: bool

    @functools.cached_property
    def nodes(self) -> list[Node]:
        """The operations of an iteration, in order."""
        return self.body.nodes()

    @functools.cached_property
    def shipped(self) -> tuple[Node, ...]:
        """Public values that the secret part of an iteration takes."""
        return tuple(evaluate.frontier(self.nodes, [n for n in self.body.outputs if n.secret]))

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """What each secret input is."""
        end = self.consts + self.carried
        kinds = ["const" if i < self.consts else "carry" if i < end else "x" for i in self._secret]
        return tuple(kinds)

    @property
    def _secret(self) -> list[int]:
        return [i for i, s in enumerate(self.secret) if s]

    @functools.cached_property
    def outputs(self) -> tuple[int, ...]:
        """The numbers of the secret outputs: a carry that becomes secret is so from the start."""
        return tuple(
            i
            for i, n in enumerate(self.body.outputs)
            if n.secret or (i < self.carried and self.secret[self.consts + i])
        )


@structure("scan")
def _scan(builder: Builder, equation: JaxprEqn, inputs: list[Node]) -> list[Node] | None:
    """A scan of what is public, and one of what is secret that takes the first one's values."""
    if not any(n.secret for n in inputs):
        return None
    params = equation.params
    length = params["length"]
    consts, carried = taken_by_scan(equation)
    program = opened(params["jaxpr"])
    outer = [n.secret for n in inputs]
    secret = outer
    while True:  # a carry is secret if it becomes so in any iteration
        avals: list[Any] = [v.aval for v in program[0].invars]
        body_inputs = [
            argument(a.shape, a.dtype, s, "carry") for a, s in zip(avals, secret, strict=True)
        ]
        inner = Builder(builder.rewrites, builder.hits, builder.most, builder.place)
        outputs = inner.inline(*program, body_inputs)
        after = list(secret)
        for i in range(carried):
            after[consts + i] = secret[consts + i] or outputs[i].secret
        if after == secret:
            break
        secret = after
    scan = _Scan(
        Graph(body_inputs, outputs), tuple(secret), consts, carried, length, params["reverse"]
    )
    public = _public_scan(builder, scan, inputs)
    results = [
        jax.ShapeDtypeStruct(n.shape if i < carried else (length, *n.shape), n.dtype)
        for i, n in enumerate(outputs)
        if i in scan.outputs
    ]
    node = builder.add(
        "scan",
        [
            *(n for n, s in zip(inputs, secret, strict=True) if s),
            *public[len(public) - len(scan.shipped) :],
        ],
        SEVERAL,
        _plain(scan),
        {
            "body": scan.body,
            "kinds": scan.kinds,
            "length": length,
            "reverse": scan.reverse,
            "carried": carried,
            "shipped": scan.shipped,
            "outputs": scan.outputs,
        },
        results,
    )
    by_output = {i: builder.output(node, k) for k, i in enumerate(scan.outputs)}
    others = iter(public)
    return [by_output[i] if i in by_output else next(others) for i in range(len(outputs))]


def _public_scan(builder: Builder, scan: _Scan, inputs: Sequence[Node]) -> list[Node]:
    """Public results of a scan, and what the secret part needs of each iteration, stacked."""
    body, consts, carried, length = scan.body, scan.consts, scan.carried, scan.length
    own = [i for i, s in enumerate(scan.secret) if not s]
    carry = [i for i in own if consts <= i < consts + carried]
    results = [i for i in range(len(body.outputs)) if i not in scan.outputs]
    finals = [i for i in results if i < carried]
    stacked = [body.outputs[i] for i in results if i >= carried] + list(scan.shipped)
    if not finals and not stacked:
        return []

    def plain(*operands: Any) -> list[Any]:
        given = dict(zip(own, map(jnp.asarray, operands), strict=True))
        xs = {i: given[i] for i in own if i >= consts + carried}

        def step(state: dict[int, Any], x: dict[int, Any]) -> Any:
            values = {**given, **state, **x}
            known = evaluate.plain_values(scan.nodes, {id(body.inputs[i]): values[i] for i in own})

            def read(node: Node) -> Any:
                return jnp.asarray(known[id(node)] if node.value is None else node.value)

            new = {i: read(body.outputs[i - consts]) for i in carry}
            new = {i: v.astype(state[i].dtype) for i, v in new.items()}
            return new, [read(n) for n in stacked]

        state, ys = lax.scan(step, {i: given[i] for i in carry}, xs, length, scan.reverse)
        return [state[consts + i] for i in finals] + list(ys)

    shapes = [jax.ShapeDtypeStruct(body.outputs[i].shape, body.outputs[i].dtype) for i in finals]
    shapes += [jax.ShapeDtypeStruct((length, *n.shape), n.dtype) for n in stacked]
    node = builder.add(
        "public scan",
        [inputs[i] for i in own],
        SEVERAL,
        plain,
        {"body": body},
        shapes,
    )
    return [builder.output(node, k) for k in range(len(shapes))]


def _plain(scan: _Scan) -> Plain:
    """The secret scan in float64, for comparisons with it."""
    body, consts, carried = scan.body, scan.consts, scan.carried
    own = [i for i, s in enumerate(scan.secret) if s]

    def plain(*operands: Any) -> list[Any]:
        given = dict(zip(own, map(jnp.asarray, operands[: len(own)]), strict=True))
        stacks = list(map(jnp.asarray, operands[len(own) :]))
        carry = [i for i, kind in zip(own, scan.kinds, strict=True) if kind == "carry"]
        xs = {i: given[i] for i, kind in zip(own, scan.kinds, strict=True) if kind == "x"}

        def step(state: dict[int, Any], x: Any) -> Any:
            scanned, taken = x
            values = {**given, **state, **scanned}
            known = {id(body.inputs[i]): values[i] for i in own}
            known |= {id(n): v for n, v in zip(scan.shipped, taken, strict=True)}
            known = evaluate.plain_values(scan.nodes, known, secret=True)
            results: list[Any] = [
                jnp.asarray(known[id(n)]) if id(n) in known else None for n in body.outputs
            ]
            new = {i: results[i - consts].astype(state[i].dtype) for i in carry}
            return new, [results[i] for i in scan.outputs if i >= carried]

        init = {
            i: given[i].astype(jnp.float64)
            if jnp.issubdtype(given[i].dtype, jnp.floating)
            else given[i]
            for i in carry
        }
        state, ys = lax.scan(step, init, (xs, stacks), scan.length, scan.reverse)
        return [state[consts + i] for i in scan.outputs if i < carried] + list(ys)

    return plain
