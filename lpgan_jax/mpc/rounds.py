"""Rounds: exchanges that do not depend on each other travel as one message.

A traced program is cut at its exchanges. Every value has a *level*, the number of cuts that lie
before it on the longest way from the inputs; the exchanges whose words have one level are one
round. A loop that exchanges something is a cut of its own, and its body has rounds likewise. So a
program sends as many messages as its longest chain of exchanges has links (and loops beside which
something else could be sent cost that, too). Nothing is reordered that depends on each other, and
no word is changed: the results are the same, bit for bit.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from lpgan_jax.mpc.exchange import RoundCall, correction_p, is_plain
from lpgan_jax.mpc.traces import CALLS, bodies, mark, path_of, scan_parts


class Step(NamedTuple):
    """An equation, with numbers (or literals) for what it takes, and numbers of what it gives."""

    equation: JaxprEqn
    inputs: tuple[int | Literal, ...]
    outputs: tuple[int, ...]


class Message(NamedTuple):
    """What one exchange sends: its name, and the shape and type of its words."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass
class Level:
    """What depends on the same number of cuts, and the cut that follows.

    Attributes:
        number: of the round, among all that are written down in a program.
        steps: computations.
        exchanges: of the round.
        loops: that exchange something, with the plans of their bodies.
    """

    number: int | None = None
    steps: list[Step] = field(default_factory=list)
    exchanges: list[Step] = field(default_factory=list)
    loops: list[tuple[Step, Plan]] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """Of the round, in their order."""
        found = []
        for step in self.exchanges:
            words: Any = step.equation.invars[0].aval
            found.append(Message(path_of(step.equation), words.shape, np.dtype(words.dtype)))
        return found


@dataclass
class Plan:
    """A program, cut into levels.

    Attributes:
        constants: by their numbers.
        inputs: numbers of its inputs, and of its corrections after them.
        corrections: shapes and types.
        outputs: numbers (or literals) of its results.
        levels: in order; the last one is followed by no cut.
    """

    constants: dict[int, Any]
    inputs: tuple[int, ...]
    corrections: list[Any]
    outputs: tuple[int | Literal, ...]
    levels: list[Level]

    def rounds(self) -> Iterator[tuple[Level, int]]:
        """The rounds as they are written down, and how often each takes place in a run."""
        for level in self.levels:
            if level.exchanges:
                yield level, 1
            for step, plan in level.loops:
                length = step.equation.params.get("length", 1)
                yield from ((inner, length * times) for inner, times in plan.rounds())

    @functools.cached_property
    def count(self) -> int:
        """Rounds of a run; messages that each server sends."""
        return sum(times for _, times in self.rounds())

    @property
    def digest(self) -> str:
        """Of what its messages are, in order: of one program, the same on any machine."""
        sites = [
            (level.messages, [step.outputs for step in level.exchanges], times)
            for level, times in self.rounds()
        ]
        return hashlib.sha256(repr(sites).encode()).hexdigest()

    def run(self, call: RoundCall, token: Any, operands: Iterable[Any]) -> tuple[Any, list[Any]]:
        """Run the program, or trace it: a round is one `call`.

        Args:
            call: see `exchange.round_call`.
            token: of its first message.
            operands: the program's inputs, and then its corrections.

        Returns:
            (the token of the next message, results).

        Raises:
            ValueError: something is exchanged in a branch, or an exchange does more than that.
        """
        values = self.constants | dict(zip(self.inputs, operands, strict=True))

        def read(atoms: Iterable[int | Literal]) -> list[Any]:
            return [atom.val if isinstance(atom, Literal) else values[atom] for atom in atoms]

        for level in self.levels:
            for step in level.steps:
                results = _evaluate(step.equation, read(step.inputs))
                values.update(zip(step.outputs, results, strict=True))
            if level.exchanges:
                words = [_sent(step.equation, read(step.inputs)) for step in level.exchanges]
                token, *received = call(level.number, token, *words)
                values.update(
                    (step.outputs[0], other)
                    for step, other in zip(level.exchanges, received, strict=True)
                )
            for step, plan in level.loops:
                token, results = _scan(step.equation, plan, call, token, read(step.inputs))
                values.update(zip(step.outputs, results, strict=True))
        return token, read(self.outputs)


def _sent(equation: JaxprEqn, operands: Sequence[Any]) -> Any:
    """The words of an exchange, which must do nothing but send them."""
    ((body, consts),) = bodies(equation.params)
    if consts or len(operands) != 1 or not is_plain(body):
        raise ValueError(f"{path_of(equation)} is no plain exchange between the two servers")
    return operands[0]


def _evaluate(equation: JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """An equation's results, as a program of its own."""
    given: dict[Any, Any] = {
        atom: value
        for atom, value in zip(equation.invars, operands, strict=True)
        if not isinstance(atom, Literal)
    }
    names = DebugInfo("rounds", "rounds", ("",) * len(given), ("",) * len(equation.outvars))
    alone = Jaxpr([], [*given], equation.outvars, [equation], equation.effects, debug_info=names)
    results: Sequence[Any] = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*given.values())
    return results


def _scan(
    equation: JaxprEqn, plan: Plan, call: RoundCall, token: Any, operands: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """A scan whose body's exchanges travel in rounds."""
    if equation.primitive.name != "scan":
        raise ValueError(
            f"{equation.primitive.name}: something is exchanged in it, expected scan alone "
            "(fori_loop with bounds that are Python integers is one)"
        )
    sliced, carried = scan_parts(equation)
    first, last = len(operands) - sliced - carried, len(operands) - sliced

    def body(carry: tuple[Any, list[Any]], xs: list[Any]) -> tuple[tuple[Any, list[Any]], Any]:
        token, values = carry
        token, results = plan.run(call, token, [*operands[:first], *values, *xs])
        return (token, results[:carried]), results[carried:]

    (token, carry), stacks = lax.scan(
        body,
        (token, list(operands[first:last])),
        list(operands[last:]),
        equation.params["length"],
        equation.params["reverse"],
    )
    return token, [*carry, *stacks]


# From a trace to its plan -------------------------------------------------------------------------


def planned(program: ClosedJaxpr) -> Plan:
    """Cut a traced program into levels.

    Raises:
        ValueError: something is exchanged in a loop whose length is not known.
    """
    plan = _planned(program.jaxpr, program.consts)
    for number, (level, _) in enumerate(plan.rounds()):
        level.number = number
    return plan


def _planned(jaxpr: Jaxpr, consts: Sequence[Any]) -> Plan:
    flat = _Flat()
    inputs = flat.numbered(len(jaxpr.invars))
    outputs = flat.inline(jaxpr, consts, inputs)
    inputs = (*inputs, *flat.corrections)
    levels, level_of = [Level()], dict.fromkeys([*inputs, *flat.constants], 0)
    for step in flat.steps:
        level = max((level_of[n] for n in step.inputs if not isinstance(n, Literal)), default=0)
        inner = [] if is_exchange(step.equation) else _exchanging(step.equation)
        cuts = is_exchange(step.equation) or bool(inner)
        if cuts and level + 1 == len(levels):
            levels.append(Level())
        if inner:
            levels[level].loops.append((step, _longest(step.equation, inner)))
        else:
            (levels[level].exchanges if cuts else levels[level].steps).append(step)
        level_of.update(dict.fromkeys(step.outputs, level + cuts))
    return Plan(flat.constants, inputs, [*flat.corrections.values()], outputs, levels)


def _longest(equation: JaxprEqn, inner: list[tuple[Jaxpr, Sequence[Any]]]) -> Plan:
    """The plan of a scan's body; of a branch, that with the most rounds."""
    if equation.primitive.name not in ("scan", "cond"):
        raise ValueError(
            f"{equation.primitive.name}: a protocol runs inside it, and how often is not known "
            "from a trace; use scan, or fori_loop with bounds that are Python integers"
        )
    return max((_planned(*body) for body in inner), key=lambda plan: plan.count)


def is_exchange(equation: JaxprEqn) -> bool:
    """Whether it is an exchange, by its mark."""
    found = mark(equation)
    return found is not None and found.kind == "exchange"


def _exchanging(equation: JaxprEqn) -> list[tuple[Jaxpr, Sequence[Any]]]:
    """Programs in an equation in which something is exchanged."""
    return [
        (body, consts)
        for body, consts in bodies(equation.params)
        if any(is_exchange(inside) or _exchanging(inside) for inside in body.eqns)
    ]


class _Flat:
    """A program without the calls in which something is exchanged: what they do is in their place.

    Attributes:
        steps: its equations.
        constants: by their numbers.
        corrections: shapes and types, by their numbers.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.corrections: dict[int, Any] = {}
        self._count = 0

    def numbered(self, count: int) -> tuple[int, ...]:
        """As many new numbers."""
        self._count += count
        return tuple(range(self._count - count, self._count))

    def inline(
        self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[int | Literal]
    ) -> tuple[int | Literal, ...]:
        """Add the equations of a program; the numbers of its results."""
        constants = self.numbered(len(consts))
        self.constants.update(zip(constants, consts, strict=True))
        # JAX has one program for several calls of a function: its variables are each call's own.
        numbers: dict[Any, int | Literal] = dict(
            zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True)
        )

        def read(atoms: Iterable[Any]) -> tuple[int | Literal, ...]:
            return tuple(a if isinstance(a, Literal) else numbers[a] for a in atoms)

        for equation in jaxpr.eqns:
            given = read(equation.invars)
            call = equation.primitive.name in CALLS and not is_exchange(equation)
            if call and (inner := _exchanging(equation)):
                made = self.inline(*inner[0], given)
            else:
                made = self.numbered(len(equation.outvars))
                if equation.primitive is correction_p:
                    self.corrections[made[0]] = equation.params["like"]
                else:
                    self.steps.append(Step(equation, given, made))
            numbers.update(zip(equation.outvars, made, strict=True))
        return read(jaxpr.outvars)
