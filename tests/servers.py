"""S1 and S2 in two threads of this process, and the line between them."""

import functools
import queue
import threading

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import party
from lpgan_jax.mpc.exchange import carrying
from lpgan_jax.mpc.server import S1, S2, ServerProgram

QUICKLY = {"xla_backend_optimization_level": "0"}
WAIT_S = 120


class End:
    """One end of a line in memory; keeps what it sent, a list of parts for each message."""

    def __init__(self, own, other):
        self._own, self._other, self.sent = own, other, []

    def swap(self, number, sent, received):
        assert number == len(self.sent)
        self.sent.append([bytes(part) for part in sent])
        self._own.put(self.sent[-1])
        for part, words in zip(received, self._other.get(timeout=WAIT_S), strict=True):
            part[:] = words

    @property
    def sizes(self):
        """Bytes of each message."""
        return [sum(map(len, parts)) for parts in self.sent]


class Nobody:
    """A line that nothing comes from."""

    def swap(self, number, sent, received):
        pass


class Again:
    """A line on which the same must be sent as was, to get the same as then."""

    def __init__(self, own, other):
        self._own, self._other = own.sent, other.sent

    def swap(self, number, sent, received):
        assert [bytes(part) for part in sent] == self._own[number]
        for part, words in zip(received, self._other[number], strict=True):
            part[:] = words


def ends():
    """Both ends."""
    first, second = queue.Queue(), queue.Queue()
    return End(first, second), End(second, first)


def halves(paired):
    """S1's and S2's."""
    return [jax.tree.map(lambda x, place=place: x[place], paired) for place in (S1, S2)]


def dealing(function):
    """DS's program, (key, secrets, public) -> corrections."""
    return jax.jit(functools.partial(party.deal, function), compiler_options=QUICKLY)


def dealt(function, key, secrets, public):
    """DS's corrections."""
    return dealing(function)(key, secrets, public)


def server_program(function, secrets, public=None, mesh=None):
    """The program of both servers, traced."""
    return ServerProgram(function, halves(secrets)[0], public, mesh)


def run_servers(program, run, key, corrections, secrets, public=None, lines=None, in_turn=False):
    """Run both, each in a thread.

    Args:
        program: a `ServerProgram`.
        run: what it is compiled or jitted to.
        corrections: of `dealt`.
        lines: both ends; by default in memory.
        in_turn: whether S2 begins when S1 is done, as only `Again` lets it.

    Returns:
        (outputs as paired arrays, both ends).
    """
    lines, found = lines or ends(), [None, None]
    seeds = jax.random.key_data(party.server_seeds(key))
    mine = halves(secrets)

    def play(place):
        with carrying(lines[place]) as number:
            which = np.asarray([place, number], np.uint32)
            own = corrections if place == S2 else jax.tree.map(jnp.zeros_like, corrections)
            found[place] = jax.block_until_ready(run(which, seeds[place], own, mine[place], public))
            assert int(found[place][0]) == program.plan.count

    if not in_turn:  # JAX lets a program's first call end before a second one begins
        with carrying(Nobody()) as number:
            which = np.asarray([S1, number], np.uint32)
            jax.block_until_ready(run(which, seeds[S1], corrections, mine[S1], public))
    threads = [threading.Thread(target=play, args=(place,), daemon=True) for place in (S1, S2)]
    for thread in threads:
        thread.start()
        if in_turn:
            thread.join(WAIT_S)
    for thread in threads:
        thread.join(WAIT_S)
    assert all(result is not None for result in found)
    return jax.tree.map(lambda *x: np.stack(x), *(outputs for _, outputs in found)), lines
