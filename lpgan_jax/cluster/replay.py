"""DS runs what both servers should have done, from their shares of a state on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.cluster.dealer import Dealer, Dealt, Order
from lpgan_jax.cluster.parcels import server_programs
from lpgan_jax.cluster.reporting import BadInput
from lpgan_jax.cluster.session import GUARD
from lpgan_jax.cluster.settings import DEALER, SERVERS
from lpgan_jax.cluster.transcript import Between, arrays, digests_of, first_difference
from lpgan_jax.cluster.wire import Commitment, Opened, Sent
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.exchange import carrying
from lpgan_jax.mpc.secret import Secret
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

    def __init__(
        self, program: SecureProgram, dealer: Dealer, noise_keys: Sequence[bytes] = ()
    ) -> None:
        """Traces; each program is compiled when it is first needed.

        `noise_keys`: of S1 and S2, if they draw noise.
        """
        self._program, self._dealer, self._noise_keys = program, dealer, noise_keys
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
        inputs, noise = dealt.inputs, self._program.servers_draw
        if kind == "train" and noise is not None:
            step, bits = order.task.step, self._program.frac_bits
            shares = [noise.share(key, step, bits) for key in self._noise_keys]
            inputs = inputs, Secret(jnp.stack(shares), bits)
        secrets = self._elements if dealt.which == GUARD else (self.state, inputs)
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


def difference(
    replay: Replay,
    done: Done,
    said: Sequence[Commitment | None] | None,
    opened: Sequence[Opened | None] | None,
) -> tuple[str, str] | None:
    """What servers said that they did, against what they should have: (server, what) or None.

    Before the first difference all was right, and so it cannot be at both servers: what one does
    there does not depend on the other's doing otherwise.

    Args:
        replay: that did it.
        done: what they should have.
        said: by S1 and S2; nothing of one that had gone.
        opened: likewise of an alarm.

    Raises:
        BadInput: both differ: it is DS's own run that is another.
    """
    said, opened = said or [None, None], opened or [None, None]
    sent = [_sent(said, place) for place in range(len(SERVERS))]
    places = [
        None if own is None else first_difference(own.digests, right)
        for own, right in zip(sent, done.sent, strict=True)
    ]
    if found := [place for place in places if place is not None]:
        first = min(found)
        where = replay.message(done.which, first)
        return _one([place == first for place in places], where), where
    if done.alarm is not None:
        heard = [
            [
                *(o.own.share for o in [opened[place]] if o is not None),
                *(o.other.share for o in [opened[1 - place]] if o is not None),
            ]
            for place in range(len(SERVERS))
        ]
        wrong = [any(s != own for s in both) for both, own in zip(heard, done.alarm, strict=True)]
        if any(wrong):
            return _one(wrong, "the alarm"), "its share of the alarm"
    for name in ("state", "result"):
        right = getattr(done, name)
        wrong = [o is not None and getattr(o, name) != right[k] for k, o in enumerate(said)]
        if any(wrong):
            return _one(wrong, name), f"its share of the {name}"
    return None


def _one(wrong: Sequence[bool], what: str) -> str:
    """The server that differs."""
    if all(wrong):
        raise BadInput(
            f"{what}: both servers have another than {DEALER}, which cannot be by what one of them "
            "did: expected the same versions at all roles"
        )
    return SERVERS[wrong.index(True)]


def _sent(said: Sequence[Commitment | None], place: int) -> Sent | None:
    """What a server said that it sent, to DS or to the other one."""
    own, other = said[place], said[1 - place]
    if own is not None:
        return own.own
    return None if other is None else other.other
