"""The audit of a program: those of DS, S1 and S2 are interpreted, and must meet the criteria."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from lpgan_jax.analysis.audit.interpreter import Interpreter
from lpgan_jax.analysis.audit.ledger import Ledger
from lpgan_jax.analysis.audit.report import Opening, Report
from lpgan_jax.analysis.audit.sender import Sender, naming_results
from lpgan_jax.analysis.audit.tracing import trace_twice
from lpgan_jax.analysis.audit.values import (
    PUBLIC,
    Numbering,
    Rest,
    Value,
    closure,
    given,
    stacked,
)
from lpgan_jax.mpc import party, prng
from lpgan_jax.mpc.exchange import is_plain
from lpgan_jax.mpc.party import Party
from lpgan_jax.mpc.traces import bodies, path_of


class Dealer(Interpreter):
    """DS's program."""

    def __init__(self, numbering: Numbering, ledger: Ledger) -> None:
        super().__init__(numbering, ledger)
        self._opened = Rest()

    def where(self) -> str:
        """In DS's program."""
        return "DS"

    def steered(self, text: str) -> None:
        """DS knows the masks: what its program does with them is seen by nobody."""

    def deal(self, program: ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
        """Interpret the program and check its corrections; what they are to S2."""
        corrections = self.run(program.jaxpr, program.consts, operands)
        received = [
            self._correct(_place(program.jaxpr, atom), value)
            for atom, value in zip(program.jaxpr.outvars, corrections, strict=True)
        ]
        for problem in self.ledger.settle():
            self.problem(problem)
        return received

    def _correct(self, place: str, value: Value) -> Value:
        """Check a correction, or those of each iteration of a scan."""
        if value.rows is not None:
            return stacked([self._correct(place, row) for row in value.rows], ())
        number = len(self.ledger.names) + 1
        name = f"correction {number} ({place or 'top'})"
        opened = self._opened in closure(value.rest, set())
        for problem in self.ledger.correct(name, value, self._from_s1(value), opened):
            self.problem(problem)
        return Value(rest=Rest(dealt=number))

    def _from_s1(self, value: Value) -> bool:
        pads = np.zeros(0, np.int32) if value.ids is None else value.ids
        return {server for server, _ in self.numbering.origins(pads)} <= {0}

    def exchange(self, equation: Any, operands: list[Value]) -> Value:
        """What the servers open: nothing that DS may use."""
        return Value(rest=self._opened)


class Server(Sender):
    """The program of S1 (server 0) or S2 (server 1)."""

    def __init__(self, numbering: Numbering, ledger: Ledger, server: int) -> None:
        super().__init__(numbering, ledger)
        self._server = server

    def where(self) -> str:
        """After which message."""
        after = f" after {self.openings[-1].name}" if self.openings else ""
        return f"S{self._server + 1}{after}"

    def serve(self, program: ClosedJaxpr, operands: Sequence[Value], names: Sequence[str]) -> None:
        """Interpret the program; check its messages, and what S1 returns."""
        results = self.run(program.jaxpr, program.consts, operands)
        if self._server == 0:  # the other half is what is left of the value
            self.check_results(names, results)

    def fresh(self, value: Value) -> Value:
        """At S1, what a dealt share blinds."""
        return value if self._server else value._replace(sum=self.ledger.term(value.ids))

    def check_rules(self, equation: Any) -> None:
        """A rule for `vmap` that is not ours would run in simulation only."""
        rule = equation.params.get("rule")
        if equation.primitive.name == "custom_vmap_call" and not party.is_own_rule(rule):
            self.problem("custom_vmap: a simulation would run its rule, and not what is audited")

    def is_plain(self, body: Jaxpr) -> bool:
        """See `Sender.is_plain`."""
        return is_plain(body)

    def send(self, name: str, message: Value, ids: np.ndarray) -> tuple[tuple[int, ...], list[str]]:
        """See `Sender.send`."""
        line = f"S{self._server + 1} -> S{2 - self._server} {name}"
        problems = self.ledger.send(ids.reshape(-1), message.rest)
        return ids.shape, [f"{line}: {problem}" for problem in problems]


def _place(program: Jaxpr, result: Any) -> str:
    """Where in a program a correction is dealt: place/.../name, empty at the top."""
    for equation in program.eqns:
        if result in equation.outvars:
            if equation.primitive.name == "scan":
                ((body, _),) = bodies(equation.params)
                return _place(body, body.outvars[equation.outvars.index(result)])
            return path_of(equation)
    return ""


def audit_program(
    function: Callable[[Party, Any, Any], Any], secrets: Any, public: Any = None
) -> Report:
    """Check every message that the two servers send, DS's corrections, and results. Runs nothing.

    Args:
        function: (party, secrets, public) -> outputs, as in `party.simulate`.
        secrets: a pytree of paired arrays (leading axis 2) or of their `jax.ShapeDtypeStruct`s.
        public: what both servers know.

    Returns:
        The messages, and what is wrong with them or elsewhere.
    """
    key = prng.abstract_key()
    numbering, ledger = Numbering(), Ledger()

    def deal(key: jax.Array, secrets: Any, public: Any) -> Any:
        return party.deal(function, key, secrets, public)

    dealing, again = trace_twice("DS", deal, key, secrets, public)
    corrections = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in dealing.out_avals]
    mine = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), secrets)
    names: list[str] = []

    def serve(is_s1: jax.Array, seed: jax.Array, *rest: Any) -> Any:
        return party.online(function, is_s1, seed, *rest)

    which = jax.ShapeDtypeStruct((), np.bool_)
    serving = naming_results(serve, names)
    online, too = trace_twice("the servers", serving, which, key, corrections, mine, public)
    dealer = Dealer(numbering, ledger)
    dealt = dealer.deal(
        dealing, [Value(ids=np.asarray(numbering.root)), *[PUBLIC] * (len(dealing.in_avals) - 1)]
    )
    sides = []
    for number in range(2):
        server = Server(numbering, ledger.for_server(), number)
        shares = [given(share.dtype) for share in jax.tree.leaves(mine)]
        known = [PUBLIC for _ in jax.tree.leaves(public)]
        seed = Value(ids=np.asarray(numbering.seed(numbering.root, number)))
        is_s1 = Value(known=np.asarray(number == 0))
        server.serve(
            online, [is_s1, seed, *dealt, *shares, *known], names
        )  # S1 takes words instead
        sides.append((server.openings, [*server.problems]))  # its ledger may go
    return _merge([*again, *too, *dealer.problems], *sides)


def _merge(
    problems: list[str],
    first: tuple[list[Opening], list[str]],
    second: tuple[list[Opening], list[str]],
) -> Report:
    problems = [*problems, *first[1], *second[1]]
    openings = []
    sent = [[(o.name, o.shape, o.dtype) for o in side] for side, _ in (first, second)]
    if sent[0] != sent[1]:
        problems.append("the two servers do not send the same messages")
    for mine, other in zip(first[0], second[0], strict=False):
        mask = mine.mask if mine.mask == other.mask else f"S1: {mine.mask}; S2: {other.mask}"
        found = [*mine.problems, *other.problems]
        openings.append(dataclasses.replace(mine, mask=mask, problems=found))
        problems += found
    return Report(openings, problems)
