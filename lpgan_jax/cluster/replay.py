"""DS runs what both servers should have done, from their shares of a state on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lpgan_jax.cluster.dealer import Dealer, Dealt, Order
from lpgan_jax.cluster.parcels import server_programs
from lpgan_jax.cluster.session import GUARD
from lpgan_jax.cluster.transcript import Between, arrays, digests_of
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.exchange import carrying
from lpgan_jax.mpc.server import ServerProgram
from lpgan_jax.programs import SecureProgram


@dataclass(frozen=True)
class Done:
    """What both servers should have done in a task: lists have S1's, then S2's.

    Attributes:
        which: of the programs; None for a task without one.
        sent: digests of their messages.
        result: digests of their shares of the result.
        state: digests of their shares of the state after it.
        alarm: their shares of it; None if nobody looked at ranges.
    """

    which: str | None
    sent: list[bytes]
    result: list[bytes]
    state: list[bytes]
    alarm: list[int] | None = None


@functools.lru_cache(2)
def _programs(program: SecureProgram) -> tuple[dict[str, ServerProgram], dict[str, Any]]:
    """Of both servers: traced, and jitted."""
    programs, options = server_programs(program), options_to_run_often()
    jitted = {
        which: jax.jit(of.run_both, compiler_options=options) for which, of in programs.items()
    }
    return programs, jitted


class Replay:
    """Both servers in this process, at some point of a training.

    Attributes:
        state: paired arrays.
    """

    def __init__(self, program: SecureProgram, dealer: Dealer) -> None:
        """Traces; each program is compiled when it is first needed."""
        self._program, self._dealer = program, dealer
        self._programs, self._jitted = _programs(program)
        self.state: Any = None
        self._elements: Any = None
        self._digests: list[bytes] | None = None

    def set_state(self, state: Any) -> None:
        """Go on from here; paired arrays."""
        self.state, self._digests = state, None

    def do(self, order: Order) -> Done | None:
        """A task; None for one in which servers do nothing that could be looked at."""
        kind = order.task.kind
        if kind == "finish":
            learnt = self._program.learnt(self.state)
            return Done(None, [b"", b""], digests_of(learnt), self._state_digests())
        dealt = self._dealer.deal(order)
        if dealt is None or (kind == "answer" and dealt.inputs is None):
            return None
        secrets = self._elements if dealt.which == GUARD else (self.state, dealt.inputs)
        outputs, sent = self.run(dealt, secrets)
        alarm = None
        if kind == "train":
            state, outputs, self._elements = outputs
            self.set_state(state)
        elif kind == "guard":
            outputs, shares = arrays(outputs)
            alarm = [int(share) for share in shares]
        return Done(dealt.which, sent, digests_of(outputs), self._state_digests(), alarm)

    def run(self, dealt: Dealt, secrets: Any) -> tuple[Any, list[bytes]]:
        """(paired outputs, digests of both servers' messages) of a program."""
        between = Between()
        with carrying(between) as number:
            line = np.uint32(number)
            material = dealt.seeds, dealt.corrections, secrets, dealt.public
            _, outputs = jax.block_until_ready(self._jitted[dealt.which](line, *material))
        return outputs, [digests.bytes() for digests in between.sent]

    def _state_digests(self) -> list[bytes]:
        if self._digests is None:
            self._digests = digests_of(self.state)
        return self._digests

    def message(self, which: str | None, place: int) -> str:
        """What to call the messages of a digest's place, for people."""
        if which is None:
            return "a message"
        plan = self._programs[which].plan
        number = f"message {place + 1} of {plan.count}"
        rounds = [level for level, _ in plan.rounds()]
        if len(rounds) != plan.count or place >= plan.count:  # in loops, or there are too many
            return number
        names = dict.fromkeys(message.name for message in rounds[place].messages)
        return f"{number} ({', '.join([*names][:3])})"
