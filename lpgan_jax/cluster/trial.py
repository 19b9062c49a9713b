"""The line between the servers tried out: both operators run the doctor at the same time.

They meet where S1 and S2 will, with the same certificates and the same `Line`, in an attempt of a
number that none has. So what is measured is what a step's messages will take: with TLS, with heads,
with the interpreter's part in them.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from contextlib import closing
from dataclasses import dataclass

from lpgan_jax.analysis.cost import Network
from lpgan_jax.cluster.certificates import line_context
from lpgan_jax.cluster.condition import Condition, own_condition
from lpgan_jax.cluster.line import Line, LineBroken, Listener, dial
from lpgan_jax.cluster.settings import ClusterConfig, ServerName
from lpgan_jax.training.config import Fields

ATTEMPT = 0
"""Its number: those of a session count from 1."""

_SMALL, _PINGS = 8, 101
_LARGE, _PIECES = 2**22, 5
_LIMIT_S = 60.0


class _Note(Fields):
    """What both say of themselves, when all is measured."""

    condition: Condition
    functions: dict[str, str]
    """Of the program (`agreement.short`); none if no program was given."""


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        network: as measured; both directions at the same time.
        ahead_s: of the other server's clock against this one, to a few one-way latencies.
        other: what the other server's machine is like.
        functions: digests of its program; none if it was given none.
    """

    network: Network
    ahead_s: float
    other: Condition
    functions: dict[str, str]


def try_line(
    config: ClusterConfig, server: ServerName, functions: dict[str, str], wait_s: float
) -> Trial:
    """Meet the other server's doctor, and measure.

    Args:
        config: of the cluster.
        server: which one this is.
        functions: digests of its program (`agreement.short`), or none.
        wait_s: for the other one to be there.

    Raises:
        OSError: S1's port is taken.
        LineBroken: the other one was not there, is not who it should be, or the line is too slow.
    """
    with closing(_meet(config, server, wait_s)) as line:
        latency = _latency(line)
        seconds = _large_messages(line)
        note = line.swap_notes(
            _Note(condition=own_condition(), functions=functions), config.timeouts.silence_s
        )
        # The other one wrote its note at about the same time as this one, and it came just now.
        ahead = note.condition.now - time.time() + latency
    # What a large message takes beyond a small one is its bytes'.
    network = Network(8 * _LARGE / max(seconds - latency, 1e-9), latency)
    return Trial(network, ahead, note.condition, note.functions)


def _meet(config: ClusterConfig, server: ServerName, wait_s: float) -> Line:
    context = line_context(config, server)
    if server == "s2":
        return dial(config, context, ATTEMPT, wait_s)
    refused: list[str] = []
    try:
        return Listener(config, context).accept(ATTEMPT, wait_s, refused.append)
    except LineBroken as error:
        raise LineBroken(
            f"{error}; turned away: {refused[-1]}" if refused else f"{error}"
        ) from None


def _latency(line: Line) -> float:
    """Seconds one way, the median.

    Both ends send at once, and then wait: two messages one after the other take a whole turn, who
    of both began them first.
    """
    ends = _ends(line, "latency", _PINGS, bytes(_SMALL))
    return statistics.median(
        (after - before) / 2 for before, after in itertools.pairwise(ends[::2])
    )


def _large_messages(line: Line) -> float:
    """Seconds of one, the median of all but the first, in which TCP finds its pace."""
    ends = _ends(line, "bandwidth", _PIECES, os.urandom(_LARGE))
    return statistics.median(after - before for before, after in itertools.pairwise(ends))


def _ends(line: Line, name: str, count: int, message: bytes) -> list[float]:
    """When each of so many messages had come."""
    sent, received = memoryview(message), memoryview(bytearray(len(message)))
    line.begin(name, count, _LIMIT_S)
    ends = []
    for number in range(count):
        line.swap(number, [sent], [received])
        ends.append(time.perf_counter())
    line.finish()
    return ends
