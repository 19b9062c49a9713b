"""The compiled program: it must send the messages that were traced, and nothing else."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr

from lpgan_jax.mpc import party, prng
from lpgan_jax.mpc.party import Party
from lpgan_jax.mpc.traces import bodies, mark


def audit_compiled(
    function: Callable[[Party, Any, Any], Any], secrets: Any, public: Any = None
) -> list[str]:
    """Check that the compiled program sends the traced messages and nothing else. Runs nothing.

    Args:
        function: as in `audit`.
        secrets: as in `audit`.
        public: as in `audit`.

    Returns:
        What is wrong: see `check_compiled`.

    Raises:
        ValueError: there are fewer than two devices.
    """
    mesh = server_mesh()
    key = prng.abstract_key()
    seeds = jax.eval_shape(lambda key: jax.random.key_data(party.server_seeds(key)), key)
    dealt = jax.eval_shape(functools.partial(party.deal, function), key, secrets, public)
    paired = [jax.ShapeDtypeStruct((2, *c.shape), c.dtype) for c in dealt]
    place = whole_sharding(mesh)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (seeds, paired, secrets)
    )
    traced = server_program(function, mesh).trace(*placed, public)
    text = traced.lower().compile().as_text()
    return check_compiled(text or "", _messages(traced.jaxpr.jaxpr))


Message = tuple[str, tuple[int, ...], np.dtype]


def _messages(program: Jaxpr) -> Iterator[Message]:
    """Each message that a program sends; in a scan, those of each iteration."""
    for equation in program.eqns:
        call = mark(equation)
        if call is not None and call.kind == "exchange":
            words: Any = equation.invars[0].aval
            yield call.path, words.shape, words.dtype
        else:
            inside = [m for body, _ in bodies(equation.params) for m in _messages(body)]
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            yield from inside * times


_INSTRUCTION = re.compile(r"= (?P<type>.*?) ?(?P<name>[a-z][\w-]*)\(")
_COLLECTIVE = re.compile("(all-|reduce-scatter|collective-|ragged-|send|recv|infeed|outfeed)")
_KINDS = {"u": "uint", "s": "int", "f": "float", "pred": "bool"}
_COMPUTATION = re.compile(r"(?:ENTRY )?%(\S+) .*{$")
_CALLED = re.compile(
    "(?:body|condition|calls|to_apply|[a-z]+_computations?)={?(%[^ ,}]+(?:, %[^ ,}]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":{"n":"(\d+)"')


def _executions(text: str) -> Iterator[tuple[str, int | None]]:
    """Each line of a program, and how often it is executed; None if that is not known."""
    lines: list[tuple[str, str]] = []  # (the computation that it is in, the line)
    calls: dict[str, list[tuple[str, int | None]]] = {}  # of a computation: (by which, times)
    inside = ""
    for line in map(str.strip, text.splitlines()):
        if header := _COMPUTATION.match(line):
            inside = header[1]
        lines.append((inside, line))
        trips = _TRIPS.search(line)
        times = (int(trips[1]) if trips else None) if " while(" in line else 1
        for called in re.findall(r"%([^ ,]+)", " ".join(_CALLED.findall(line))):
            calls.setdefault(called, []).append((inside, times))

    @functools.cache
    def executions(computation: str) -> int | None:
        total = 0 if computation in calls else 1  # nobody calls the entry
        for caller, times in calls.get(computation, []):
            outer = executions(caller)
            if times is None or outer is None:
                return None
            total += outer * times
        return total

    return ((line, executions(inside)) for inside, line in lines)


def check_compiled(text: str, messages: Iterable[Message]) -> list[str]:
    """Match what a compiled program sends with the messages of the traced one.

    Args:
        text: optimised HLO.
        messages: (name, shape, dtype) of each; those of a loop, once for each iteration.

    Returns:
        Problems: a collective that is no point-to-point exchange between the two servers, or that
        belongs to no message (by its name, shape and dtype), or is executed more often than its
        message is sent, or nobody knows how often; a transfer to the host. Messages that nobody
        reads may be missing.
    """
    left = Counter((name, tuple(shape), np.dtype(dtype)) for name, shape, dtype in messages)
    problems = []
    for line, times in _executions(text):
        instruction = _INSTRUCTION.search(line)
        name = instruction["name"] if instruction else ""
        if name == "custom-call" and re.search('custom_call_target="[^"]*callback', line):
            problems.append(f"a call of the host: {line[:200]}")
        if instruction is None or not _COLLECTIVE.match(name) or name.endswith("-done"):
            continue
        marker = re.search(r'op_name="[^"]*exchange:([^")]*)\)', line)
        kind = re.search(r"([a-z]+)(\d*)\[([\d,]*)\]", instruction["type"])
        swaps = name.startswith("collective-permute") and "_pairs={{0,1},{1,0}}" in line
        if not swaps or marker is None or kind is None:
            problems.append(f"{name} is no exchange of the protocol: {line[:200]}")
            continue
        shape = tuple(int(size) for size in kind[3].split(",") if size)
        message = marker[1], shape, np.dtype(_KINDS.get(kind[1], kind[1]) + kind[2])
        if times is None:
            problems.append(f"{name} sends {marker[1]} nobody knows how often: {line[:200]}")
        elif left[message] < times:
            problems.append(f"{name} sends {marker[1]} in another form or too often: {line[:200]}")
        left[message] -= times or 0
    return problems
