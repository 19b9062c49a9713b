"""The audit of any function of protocols over paired arrays: the traced simulation is interpreted.

Everybody's work is one program here, so that each element says who could compute it (`holders`).
Nothing but an exchange or a dealing may join what two of them have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr

from lpgan_jax.analysis.audit import holders
from lpgan_jax.analysis.audit.ledger import Ledger
from lpgan_jax.analysis.audit.primitives import JOINS, MOVES
from lpgan_jax.analysis.audit.report import Report
from lpgan_jax.analysis.audit.sender import Sender, naming_results
from lpgan_jax.analysis.audit.servers import audit_program
from lpgan_jax.analysis.audit.tracing import differences, trace_twice
from lpgan_jax.analysis.audit.values import (
    NO_WORD,
    PUBLIC,
    Numbering,
    Rest,
    Value,
    given,
    grown,
)
from lpgan_jax.analysis.cost import Shape, arguments
from lpgan_jax.mpc.shares import PARTIES
from lpgan_jax.mpc.traces import bodies, path_of


class Simulated(Sender):
    """DS's work and both servers', in one program."""

    def __init__(self) -> None:
        super().__init__(Numbering(), Ledger())
        self._dealing = False
        self._server_of = np.zeros(1, np.uint8)  # of each word: 1, 2, or 0 for DS's own
        self._shared: set[int] = set()  # keys that shared something

    def where(self) -> str:
        """After which message."""
        return f"after {self.openings[-1].name}" if self.openings else "the function"

    def steered(self, text: str) -> None:
        """DS may do with masks what it likes."""
        if not self._dealing:
            super().steered(text)

    def fresh(self, value: Value) -> Value:
        """What a dealt share blinds at S1."""
        if value.ids is None or value.holders is None:
            return value
        mine = (value.holders & (holders.WORDS[0] | holders.HELD[0])) != 0
        return value._replace(sum=self.ledger.term(value.ids[mine]))

    # Equations ----------------------------------------------------------------------------------

    def finish_equation(
        self, equation: Any, operands: list[Value], results: list[Value]
    ) -> list[Value]:
        """The results, with who could compute them."""
        if equation.primitive.name == "random_bits":
            return [results[0]._replace(holders=self._holders_of_words(results[0]))]
        if equation.primitive.name == "cond":
            return results
        made = []
        for result, who in zip(results, holders.of_results(equation, operands), strict=True):
            if who is not None and holders.joined(who):
                name = equation.primitive.name
                self.problem(f"{name} joins a share of S1 with one of S2 outside of an exchange")
                who = None
            made.append(result._replace(holders=who))
        return made

    def either(self, unknown: Value, cases: Sequence[Value]) -> Value:
        """See `Interpreter.either`."""
        return unknown._replace(holders=holders.of_either([case.holders for case in cases]))

    def _holders_of_words(self, value: Value) -> np.ndarray | None:
        return None if value.ids is None else self._server_of[value.ids]

    def draw(self, key: int, width: int, size: int) -> np.ndarray:
        """Of whose seed the words are is written down."""
        words = super().draw(key, width, size)
        if words.size and words[0] != NO_WORD:
            server = self.numbering.server_of(key)
            self._server_of = grown(self._server_of, self.numbering.total)
            self._server_of[words] = holders.DEALER if server is None else holders.WORDS[server]
        return words

    # Marked calls -------------------------------------------------------------------------------

    def call(self, kind: str, equation: Any, operands: list[Value]) -> list[Value] | None:
        """See `Interpreter.call`."""
        if kind == "deal":
            return self._deal(equation, operands)
        if kind == "share":
            return [self._share(equation, operands)]
        return super().call(kind, equation, operands)

    def _deal(self, equation: Any, operands: list[Value]) -> list[Value]:
        self._dealing = True
        try:
            (body,) = bodies(equation.params)
            results = self.run(*body, operands)
        finally:
            self._dealing = False
        if len(results) < 2:  # owed: nothing is sent yet
            return results
        plain, correction = results
        place = path_of(equation)
        name = f"correction {len(self.ledger.names) + 1} ({place or 'top'})"
        who = np.zeros(0, np.uint8) if correction.holders is None else correction.holders
        pads = np.zeros(0, np.int32) if correction.ids is None else correction.ids
        from_s1 = bool((self._server_of[pads] == holders.WORDS[0]).all())
        opened = bool((who & ~holders.DEALER).any())
        for problem in self.ledger.correct(name, correction, from_s1, opened):
            self.problem(f"DS: {problem}")
        self.ledger.spend_corrections(pads)
        shape = equation.outvars[1].aval.shape
        received = Value(
            rest=Rest(dealt=len(self.ledger.names)),
            holders=np.broadcast_to(holders.HELD[1], shape),
        )
        return [plain, received]

    def _share(self, equation: Any, operands: list[Value]) -> Value:
        """DS splits a value."""
        keys, words = operands
        for key in [] if keys.ids is None else keys.ids.reshape(-1).tolist():
            if key in self._shared:
                self.problem("share: one key shares two values")
            self._shared.add(key)
        if keys.ids is None or self.depth:
            self.problem("share: its key is not one of this function's own, used once")
        if words.private or (keys.private and keys.rest is not None):
            self.problem("share: DS cannot share what it does not know")
        (body,) = bodies(equation.params)
        axis = _joined_along(body[0])
        shape = equation.outvars[0].aval.shape
        if axis is None or shape[axis] != PARTIES:
            self.problem("share: it is not known which half is whose")
            return Value(rest=Rest())
        return _paired(shape, axis, equation.outvars[0].aval.dtype)

    def is_plain(self, body: Jaxpr) -> bool:
        """In a simulation, both messages are put into one array, and that is all."""
        return all(equation.primitive.name in MOVES for equation in body.eqns)

    def send(self, name: str, message: Value, ids: np.ndarray) -> tuple[tuple[int, ...], list[str]]:
        """See `Sender.send`; here are both servers' messages, one after the other."""
        who = np.uint8(0) if message.holders is None else message.holders
        who = np.broadcast_to(who, ids.shape)
        own = self._server_of[ids] & who != 0  # each word must be of its sender's own seed
        texts = self.ledger.send(np.where(own, ids, NO_WORD).reshape(-1), message.rest)
        if not _alternates(who):
            texts.append("one server's message has what only the other, or DS, knows")
        texts = [f"{name}: {text}" for text in texts]
        self.problems.update(dict.fromkeys(texts))
        return _without(PARTIES, ids.shape), texts

    def exchange(self, equation: Any, operands: list[Value]) -> Value:
        """See `Sender.exchange`: both servers know what was opened."""
        return _opened(super().exchange(equation, operands), equation.outvars[0].aval.shape)

    def sent(self, equation: Any, received: Value) -> Value:
        """See `Interpreter.sent`."""
        return _opened(received, equation.invars[0].aval.shape)

    # Results ------------------------------------------------------------------------------------

    def finish(self, names: Sequence[str], avals: Sequence[Any], results: Sequence[Value]) -> None:
        """Check what the function returns, and all corrections together."""
        for name, aval, value in zip(names, avals, results, strict=True):
            if not value.private:
                continue
            who = value.holders
            if who is None or not _alternates(np.broadcast_to(who, aval.shape)):
                self.problem(f"{name} is no pair of shares, S1's first")
        self.check_results(names, results)
        for problem in self.ledger.settle():
            self.problem(f"DS: {problem}")


def _opened(value: Value, shape: tuple[int, ...]) -> Value:
    return value._replace(holders=np.broadcast_to(holders.OPENED, shape))


def _alternates(who: np.ndarray) -> bool:
    """Whether along some axis of 2 S1 could compute the first half, and S2 the second."""
    return any(
        not (who.take(0, axis) & ~holders.SERVERS[0]).any()
        and not (who.take(1, axis) & ~holders.SERVERS[1]).any()
        for axis, size in enumerate(who.shape)
        if size == PARTIES
    )


def _without(size: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its first axis of a size, if it has one."""
    if size not in shape:
        return shape
    place = shape.index(size)
    return (*shape[:place], *shape[place + 1 :])


def _paired(shape: tuple[int, ...], axis: int, dtype: Any) -> Value:
    """Shares that the function is given: S1's first along an axis."""
    rows = np.array(holders.HELD).reshape(-1, *[1] * (len(shape) - axis - 1))
    return given(dtype)._replace(holders=np.broadcast_to(rows, shape))


def _joined_along(body: Jaxpr) -> int | None:
    """The axis along which a program's only result is joined, last of all."""
    last = body.eqns[-1] if body.eqns else None
    if last is None or last.primitive.name not in JOINS or last.outvars != body.outvars:
        return None
    return int(last.params["dimension" if last.primitive.name == "concatenate" else "axis"])


def audit(function: Callable[..., Any], *shapes: Shape) -> Report:
    """Check a function of protocols over paired arrays, as a user writes it. Runs nothing.

        audit(lambda key, x, y: P.sec_relu(key, x + y), (64, 10), (64, 10))

    Every message, correction and result must meet the criteria of the package, and nothing but the
    exchanges of protocols may join what S1 and S2 have: `x[0] + x[1]` is found, and so is `reveal`.
    It is the simulated program that is looked at, since that is what runs, and every execution of a
    scan's body.

    Args:
        function: (DS's key, *paired arrays) -> a pytree of paired arrays, or of public ones.
        shapes: as for `cost_model.cost`. What is taken as it is (a `jax.ShapeDtypeStruct`, an
            array) is shares if it is of unsigned integers with a leading axis of 2, else public.
            Of a function that was made `secure`: its own arguments; what is deployed is audited.

    Returns:
        The messages, and what is wrong with them or elsewhere.

    Raises:
        TypeError, ValueError: as `cost_model.cost`.
    """
    if hasattr(function, "parts"):
        secure: Any = function
        report = audit_program(*secure.parts(*shapes))
        programs = [secure.traced(*shapes) for _ in range(2)]
        report.problems[:0] = differences("the function", *programs)
        return report
    operands = arguments(function, shapes)
    names: list[str] = []
    traced, again = trace_twice("the function", naming_results(function, names), *operands)
    auditor = Simulated()
    values = [Value(ids=np.asarray(auditor.numbering.root))]
    for operand in operands[1:]:
        unsigned = np.issubdtype(operand.dtype, np.unsignedinteger)
        shares = unsigned and operand.shape[:1] == (PARTIES,)
        values.append(_paired(operand.shape, 0, operand.dtype) if shares else PUBLIC)
    results = auditor.run(traced.jaxpr, traced.consts, values)
    auditor.finish(names, traced.out_avals, results)
    return Report(auditor.openings, [*again, *auditor.problems])
