"""How a server's compiled program reaches the other server: a line, and one call a round.

An `exchange` of a protocol is a primitive that only stands for itself (`exchange_p`): it has no
code. `rounds` puts all that do not depend on each other into one `round_call`, which hands the
words to a `Line` as they lie in memory, and has the other server's in their place. XLA keeps no
order among calls, so a token goes through them: the number of the line, and how many messages
there were, which the line compares with its own count.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import batching
from jax.sharding import Mesh, PartitionSpec

from lpgan_jax.native import host_call

ROUND = "lpgan_round"
"""The target of the call in a compiled program."""

exchange_p = Primitive("exchange")
"""Words for the other server's; without code, so that only what `rounds` made of it can run."""
exchange_p.def_abstract_eval(lambda words: words)
batching.primitive_batchers[exchange_p] = lambda operands, axes: (
    exchange_p.bind(*operands),
    axes[0],
)

correction_p = Primitive("correction")
"""A correction that the server will get: `rounds` makes an input of it. Without code too."""
correction_p.def_abstract_eval(lambda *, like: like)


def is_plain(body: Jaxpr) -> bool:
    """Whether the program of an exchange does nothing but swap its only operand."""
    if len(body.eqns) != 1 or body.eqns[0].primitive is not exchange_p:
        return False
    swap = body.eqns[0]
    return [*swap.invars] == [*body.invars] and [*swap.outvars] == [*body.outvars]


class Line(Protocol):
    """What carries messages between the servers, each for one of the other's."""

    def swap(self, number: int, sent: Sequence[memoryview], received: Sequence[memoryview]) -> None:
        """Send a message and receive the other server's, whose parts have the same sizes.

        Args:
            number: of the message in this program's run, from 0.
            sent: its parts, as bytes.
            received: to be filled.

        Raises:
            Exception: of any kind; the program ends with its text.
        """


_lines: dict[int, Line] = {}
_numbers = itertools.count(1)


@contextmanager
def carrying(line: Line) -> Iterator[int]:
    """The number by which programs find the line, while it is open."""
    number = next(_numbers)
    _lines[number] = line
    try:
        yield number
    finally:
        del _lines[number]


def _swap(operands: Sequence[memoryview], results: Sequence[memoryview]) -> None:
    token, after = (np.frombuffer(view, np.uint32) for view in (operands[0], results[0]))
    line, number = map(int, token)
    if line not in _lines:
        raise RuntimeError(f"line {line}: not open")
    _lines[line].swap(number, operands[1:], results[1:])
    after[:] = line, number + 1


def _swap_arrays(*operands: jax.Array) -> tuple[np.ndarray, ...]:
    """The same for `io_callback`."""
    arrays = [np.asarray(x, order="C") for x in operands]
    results = [np.empty_like(x) for x in arrays]
    _swap([_bytes(x) for x in arrays], [_bytes(x) for x in results])
    return tuple(results)


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type, unused-ignore]


@functools.cache
def _on_cpu() -> bool:
    """Whether programs call the line by FFI; else by a callback, which no cache keeps."""
    if jax.default_backend() != "cpu" or not host_call.works():
        return False
    host_call.register(ROUND, _swap)
    return True


RoundCall = Callable[..., tuple[jax.Array, ...]]
"""(number, token, *words) -> (token, *the other server's words)."""


def round_call(number: int, token: jax.Array, *words: jax.Array) -> tuple[jax.Array, ...]:
    """One message each way.

    Args:
        number: of the call in a program, for those who read it.
        token: uint32[2]: the line's number, and that of the message.
        words: of any unsigned types and shapes.

    Returns:
        (the token of the next message, *the other server's words).
    """
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (token, *words)]
    if _on_cpu():
        call = jax.ffi.ffi_call(ROUND, shapes)  # the token keeps it alive, and in its place
        results: tuple[jax.Array, ...] = tuple(call(token, *words, number=np.int32(number)))
        return results
    return tuple(io_callback(_swap_arrays, tuple(shapes), token, *words))


def round_call_of_both(number: int, token: jax.Array, *words: jax.Array) -> tuple[jax.Array, ...]:
    """The same for both servers, as places of one `vmap`, to which the token does not belong.

    Each part of the line's message has S1's words, and then S2's.
    """

    @custom_vmap
    def call(token: jax.Array, *words: jax.Array) -> tuple[jax.Array, ...]:
        return round_call(number, token, *words)

    @call.def_vmap
    def _(size: int, batched: list[bool], token: jax.Array, *words: jax.Array) -> Any:
        paired = [
            x if both else jnp.broadcast_to(x, (size, *x.shape))
            for x, both in zip(words, batched[1:], strict=True)
        ]
        return round_call(number, token, *paired), (False, *(True for _ in words))

    found: tuple[jax.Array, ...] = call(token, *words)
    return found


def round_call_on(mesh: Mesh, axis: str) -> RoundCall:
    """The same for a server that has several devices, an axis of a mesh.

    The first of them has the line. It hands the words to the others in a sum with their zeros, a
    collective between the devices of this one server.
    """

    def zeros(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.zeros_like, operands))

    def call(number: int, *operands: jax.Array) -> tuple[jax.Array, ...]:
        def first_only(*operands: jax.Array) -> tuple[jax.Array, ...]:
            swap = functools.partial(round_call, number)
            own = lax.cond(lax.axis_index(axis) == 0, swap, zeros, *operands)
            return tuple(lax.psum(x, axis) for x in own)

        everywhere = PartitionSpec()
        results: tuple[jax.Array, ...] = jax.shard_map(
            first_only,
            mesh=mesh,
            in_specs=everywhere,
            out_specs=everywhere,
            axis_names={axis},
            check_vma=False,
        )(*operands)
        return results

    return call


def first_token(line: Any) -> jax.Array:
    """The token of a program's first message, on the line of this number."""
    return jnp.stack([jnp.asarray(line, jnp.uint32), jnp.zeros((), jnp.uint32)])
