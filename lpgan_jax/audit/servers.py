"""The audit: the programs of DS, S1 and S2 are interpreted, and must meet the criteria."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from lpgan_jax import party, prng
from lpgan_jax.audit.interpreter import Interpreter
from lpgan_jax.audit.primitives import bodies, call_name
from lpgan_jax.audit.report import Opening, Report
from lpgan_jax.audit.values import NO_WORD, PUBLIC, Index, Numbering, Rest, Value, closure, grown
from lpgan_jax.party import AXIS, Party


class Dealer(Interpreter):
    """DS's program.

    Attributes:
        owner: for each word, the number of the correction that it pads (from 1), or 0.
        masks: for each correction, the words that it depends on besides.
    """

    def __init__(self, numbering: Numbering) -> None:
        super().__init__(numbering)
        self.owner = np.zeros(1, np.int32)
        self.masks: list[list[Index]] = []
        self._opened = Rest()

    def where(self) -> str:
        """In DS's program."""
        return "DS"

    def steered(self, text: str) -> None:
        """DS knows the masks: what its program does with them is seen by nobody."""

    def deal(self, program: ClosedJaxpr, operands: Sequence[Value]) -> None:
        """Interpret the program and check its corrections."""
        corrections = self.run(program.jaxpr, program.consts, operands)
        self.owner = grown(self.owner, self.numbering.total)
        places = {
            id(atom): call_name(equation).removeprefix("deal:").strip("/")
            for equation in program.jaxpr.eqns
            for atom in equation.outvars
        }
        names = [
            f"correction {number} ({places.get(id(atom)) or 'top'})"
            for number, atom in enumerate(program.jaxpr.outvars, 1)
        ]
        used = np.zeros(self.numbering.total, bool)
        for number, (name, value) in enumerate(zip(names, corrections, strict=True), 1):
            depends = closure(value.rest, set())
            self.masks.append([words for rest in depends for words in rest.words])
            if self._opened in depends:
                self.problem(f"{name} depends on what the servers open")
            for words in self.masks[-1]:
                used[words] = True
            pads = np.zeros(1, np.int64) if value.ids is None else value.ids.reshape(-1)
            servers = {server for server, _ in self.numbering.origins(pads)}
            if (pads == NO_WORD).any() or servers != {0}:
                self.problem(f"{name} is not padded by words of S1's seed")
            elif self.owner[pads].any() or len(np.unique(pads)) < len(pads):
                self.problem(f"{name}: a word pads it and another element of a correction")
            self.owner[pads[pads != NO_WORD]] = number
        for number in np.unique(self.owner[used]).tolist():
            if number:
                self.problem(f"{names[number - 1]}: a word that pads it is used otherwise")

    def exchange(self, equation: Any, operands: list[Value]) -> Value:
        """What the servers open: nothing that DS may use."""
        return Value(rest=self._opened)


class Server(Interpreter):
    """The program of S1 (server 0) or S2 (server 1), its messages checked in order.

    Attributes:
        openings: the messages so far.
    """

    def __init__(self, numbering: Numbering, dealer: Dealer, server: int) -> None:
        super().__init__(numbering)
        self.openings: list[Opening] = []
        self._server = server
        self._masks = dealer.masks
        self._owner = dealer.owner
        # A word that pads a correction is no pad for a message: S2 knows what was subtracted.
        self.spent = self._owner > 0
        self.spent[NO_WORD] = True
        self._seen: set[Rest] = set()
        self._seen_dealt: set[int] = set()

    def where(self) -> str:
        """After which message."""
        after = f" after {self.openings[-1].name}" if self.openings else ""
        return f"S{self._server + 1}{after}"

    def axis_index(self) -> Value:
        """This server."""
        return Value(known=np.asarray(self._server, np.int32))

    def cover(self) -> None:
        """Make room for new words."""
        super().cover()
        self._owner = grown(self._owner, self.numbering.total)

    def exchange(self, equation: Any, operands: list[Value]) -> Value:
        """Check the message. What comes back is private, and nothing of it is padded."""
        name = call_name(equation).removeprefix("exchange:")
        (body,) = bodies(equation.params)
        aval = equation.invars[0].aval if equation.invars else None
        if aval is None or not _is_plain_exchange(body[0]):
            self.problem(f"{name} is no plain exchange between the two servers")
            return Value(rest=Rest())
        if self.depth:
            self.problem(f"{name} is sent in a loop or a branch, with the same masks every time")
            return Value(rest=Rest())
        (message,) = operands
        ids = np.zeros(aval.shape, np.int64) if message.ids is None else message.ids
        problems = self._check(np.broadcast_to(ids, aval.shape).reshape(-1), message.rest)
        receiver = f"S{self._server + 1} -> S{2 - self._server}"
        self.openings.append(
            Opening(
                name,
                tuple(aval.shape),
                np.dtype(aval.dtype),
                _origin(self.numbering.origins(ids)),
                [f"{receiver} {name}: {problem}" for problem in problems],
            )
        )
        return Value(rest=Rest())

    def _check(self, pads: np.ndarray, rest: Rest | None) -> list[str]:
        """Criteria 1 to 3 for one message; then its words are spent."""
        if not pads.size:
            return []
        problems = []
        bare, dealt = pads == NO_WORD, self._owner[pads] > 0
        reused = self.spent[pads] & ~bare & ~dealt
        self._spend(rest)
        inside = self.spent[pads] & ~reused & ~bare & ~dealt
        self.spent[pads] = True
        real = pads[~bare]
        repeated = len(real) - len(np.unique(real))
        for count, text in (
            (bare.sum(), "are not masked by a word of the sender's own"),
            (dealt.sum(), "are masked by nothing but a share of a dealt value"),
            (reused.sum(), "have a mask that an earlier message depends on"),
            (inside.sum(), "have a mask that the message depends on otherwise"),
            (repeated, "repeat the mask of another element"),
        ):
            if count:
                problems.append(f"{count:,} of {pads.size:,} elements {text}")
        return problems

    def _spend(self, start: Rest | None) -> None:
        """All that `start` depends on can mask nothing from here on."""
        for rest in closure(start, self._seen):
            dealt = set() if rest.dealt is None else {rest.dealt}
            for words in rest.words:
                self.spent[words] = True
                dealt.update(np.unique(self._owner[words]).tolist())
            for number in dealt - self._seen_dealt - {0}:
                self._seen_dealt.add(number)
                for words in self._masks[number - 1]:
                    self.spent[words] = True


def _origin(origins: dict[tuple[Any, str], int]) -> str:
    """How many words come from which key of a server's seed."""
    return ", ".join(f"{n:,} words of key {path}" for (_, path), n in origins.items()) or "none"


def _is_plain_exchange(body: Jaxpr) -> bool:
    """Whether a program does nothing but swap its only operand with the other server's."""
    if len(body.eqns) != 1 or body.eqns[0].primitive.name != "ppermute":
        return False
    swap = body.eqns[0]
    return (
        list(swap.invars) == list(body.invars)
        and list(swap.outvars) == list(body.outvars)
        and sorted(swap.params["perm"]) == [(0, 1), (1, 0)]
        and tuple(swap.params["axis_name"]) == (AXIS,)
    )


def audit(function: Callable[[Party, Any, Any], Any], secrets: Any, public: Any = None) -> Report:
    """Check every message that the two servers send, and DS's corrections. Runs nothing.

    Args:
        function: (party, secrets, public) -> outputs, as in `party.simulate`.
        secrets: a pytree of paired arrays (leading axis 2) or of their `jax.ShapeDtypeStruct`s.
        public: what both servers know.

    Returns:
        The messages, and what is wrong with them or elsewhere.
    """
    key = prng.abstract_key()
    numbering = Numbering()
    dealer = Dealer(numbering)
    dealing = jax.make_jaxpr(functools.partial(party.deal, function))(key, secrets, public)
    corrections = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in dealing.out_avals]
    ds_key = Value(ids=np.asarray(numbering.root))
    inputs = len(dealing.in_avals) - 1
    dealer.deal(dealing, [ds_key, *[PUBLIC] * inputs])

    mine = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), secrets)
    online = jax.make_jaxpr(functools.partial(party.online, function), axis_env=[(AXIS, 2)])(
        key, corrections, mine, public
    )
    servers = [Server(numbering, dealer, server) for server in range(2)]
    for number, server in enumerate(servers):
        # S1 gets no corrections, but zeros.
        received = [
            Value(rest=Rest(dealt=c)) if number else PUBLIC for c, _ in enumerate(corrections, 1)
        ]
        shares = [Value(rest=Rest()) for _ in jax.tree.leaves(mine)]
        known = [PUBLIC for _ in jax.tree.leaves(public)]
        seed = Value(ids=np.asarray(numbering.child(numbering.root, number)))
        server.run(online.jaxpr, online.consts, [seed, *received, *shares, *known])
    return _merge(dealer, *servers)


def _merge(dealer: Dealer, first: Server, second: Server) -> Report:
    problems = [*dealer.problems, *first.problems, *second.problems]
    openings = []
    sent = [[(o.name, o.shape, o.dtype) for o in server.openings] for server in (first, second)]
    if sent[0] != sent[1]:
        problems.append("the two servers do not send the same messages")
    for mine, other in zip(first.openings, second.openings, strict=False):
        mask = mine.mask if mine.mask == other.mask else f"S1: {mine.mask}; S2: {other.mask}"
        found = [*mine.problems, *other.problems]
        openings.append(dataclasses.replace(mine, mask=mask, problems=found))
        problems += found
    return Report(openings, problems)
