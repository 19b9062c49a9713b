"""Whoever sends messages and returns results: what the two kinds of audit have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr

from lpgan_jax.analysis.audit.interpreter import Interpreter
from lpgan_jax.analysis.audit.ledger import Ledger
from lpgan_jax.analysis.audit.report import Opening, origin
from lpgan_jax.analysis.audit.values import NO_WORD, Numbering, Rest, Value
from lpgan_jax.mpc.traces import bodies, path_of


class Sender(Interpreter):
    """A program with messages, which are checked in order.

    A subclass says what an exchange does when it is plain (`is_plain`), and what is wrong with a
    message (`send`).

    Attributes:
        openings: the messages so far.
    """

    def __init__(self, numbering: Numbering, ledger: Ledger) -> None:
        super().__init__(numbering, ledger)
        self.openings: list[Opening] = []

    def is_plain(self, body: Jaxpr) -> bool:
        """Whether an exchange does nothing but swap its only operand with the other server's."""
        raise NotImplementedError

    def send(self, name: str, message: Value, ids: np.ndarray) -> tuple[tuple[int, ...], list[str]]:
        """The shape of a server's message whose elements these words pad, and what is wrong."""
        raise NotImplementedError

    def exchange(self, equation: Any, operands: list[Value]) -> Value:
        """Check the message. What comes back is private, and nothing of it is padded."""
        name = path_of(equation)
        (body,) = bodies(equation.params)
        aval = equation.invars[0].aval if equation.invars else None
        if aval is None or not self.is_plain(body[0]):
            self.problem(f"{name} is no plain exchange between the two servers")
            return Value(rest=Rest())
        if self.depth:
            self.problem(f"{name} is sent in a branch, or a loop, whose course is not known")
            return Value(rest=Rest())
        (message,) = operands
        pads = np.int32(NO_WORD) if message.ids is None else message.ids
        ids = np.broadcast_to(pads, aval.shape)
        shape, problems = self.send(name, message, ids)
        mask = origin(self.numbering.origins(ids))
        self.openings.append(Opening(name, shape, np.dtype(aval.dtype), mask, problems))
        return Value(rest=Rest(message=self.ledger.messages))

    def check_results(self, names: Sequence[str], results: Sequence[Value]) -> None:
        """Criterion 6."""
        for name, value in zip(names, results, strict=True):
            for problem in self.ledger.show(name, value):
                self.problem(problem)
        for problem in self.ledger.shown():
            self.problem(problem)


def naming_results(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """The function, which when it is traced leaves the names of its results in `names`."""

    def named(*operands: Any) -> Any:
        outputs = function(*operands)
        paths = jax.tree_util.tree_flatten_with_path(outputs)[0]
        names[:] = [f"result{jax.tree_util.keystr(path)}" for path, _ in paths]
        return outputs

    return named
