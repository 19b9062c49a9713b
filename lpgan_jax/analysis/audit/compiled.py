"""The compiled program: it must send the messages that were traced, and nothing else."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lpgan_jax import native
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.exchange import ROUND
from lpgan_jax.mpc.party import Party
from lpgan_jax.mpc.rounds import Plan
from lpgan_jax.mpc.server import ServerProgram


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
    """
    mine = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), secrets)
    program = ServerProgram(function, mine, public)
    compiled = program.compile(options=options_to_run_often())
    return check_compiled(compiled.as_text() or "", program.plan)


_INSTRUCTION = re.compile(r"%(?P<own>\S+) = (?P<type>.*?) ?(?P<name>[a-z][\w-]*)\((?P<operands>.*)")
_TRANSFER = re.compile("(all-|reduce-scatter|collective-|ragged-|send|recv|infeed|outfeed)")
_TARGET = re.compile('custom_call_target="([^"]*)"')
_NUMBER = re.compile(r"backend_config={number = (\d+)")
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
_KINDS = {"u": "uint", "s": "int", "f": "float", "pred": "bool"}
_OURS = {native.RING_PRODUCT, native.CHACHA20}
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


def check_compiled(text: str, plan: Plan) -> list[str]:
    """Match what a compiled program sends with the rounds of the traced one.

    Args:
        text: optimised HLO.
        plan: of the traced program.

    It counts rounds, and looks at types, sizes and order. Which words a round carries is what XLA
    made of the traced program, and is not looked at.

    Returns:
        Problems: a round that is missing, or there twice, sends words in other shapes or types, or
        another number of times, or does not get its token from the round before (or the loop
        around); a collective, a transfer to the host, or a call of anything but the package's own
        kernels.
    """
    problems: list[str] = []
    expected = {level.number: (level, times) for level, times in plan.rounds()}
    found: dict[str, _Found] = {}
    rounds: dict[str, int] = {}
    for line, times in _executions(text):
        instruction = _INSTRUCTION.search(line)
        if instruction is None:
            continue
        name, own = instruction["name"], instruction["own"]
        operand = re.match(r"[^%]*%([^,) ]+)", instruction["operands"])
        index = re.search(r", index=(\d+)", line)
        found[own] = _Found(name, operand[1] if operand else "", int(index[1]) if index else 0)
        if _TRANSFER.match(name):
            problems.append(f"{name} is no message of the protocol: {line[:200]}")
        target = _TARGET.search(line)
        if target is None or target[1] in _OURS:
            continue
        number = _NUMBER.search(line)
        if target[1] != ROUND or number is None or int(number[1]) not in expected:
            problems.append(f"a call of {target[1]}, which is no round: {line[:200]}")
            continue
        level, wanted = expected.pop(int(number[1]))
        if times != wanted:
            problems.append(f"round {level.number} takes place {times} times, expected {wanted}")
        words = [((2,), np.dtype(np.uint32)), *((m.shape, m.dtype) for m in level.messages)]
        operands = re.search(r"operand_layout_constraints={(.*?)}(?:, [a-z_]+=|$)", line)
        for arrays in (instruction["type"], operands[1] if operands else ""):
            sent = [_array(array) for array in _ARRAY.finditer(_uncommented(arrays))]
            if sent != words:
                problems.append(f"round {level.number} sends {sent[1:]}, expected {words[1:]}")
        rounds[own] = int(number[1])
    problems += [f"round {place} is missing" for place in expected]
    return problems + _disorder(found, rounds)


class _Found(NamedTuple):
    """An instruction, its first operand, and which part of that it takes."""

    name: str
    operand: str
    part: int


def _disorder(found: dict[str, _Found], rounds: dict[str, int]) -> list[str]:
    """Rounds that do not get their token from the one before, a loop, or (one) the beginning."""
    problems, sources = [], Counter[str]()
    for own, place in rounds.items():
        token, part = found[own].operand, 0
        while token in found and found[token].name in ("get-tuple-element", "copy", "bitcast"):
            part = found[token].part if found[token].name == "get-tuple-element" else part
            token = found[token].operand
        kind = found[token].name if token in found else ""
        if token in rounds and part:
            problems.append(f"round {place} has words of round {rounds[token]} for its token")
        beginning = token not in rounds and kind not in ("while", "parameter", "conditional")
        sources["the beginning" if beginning else f"{token} {part}"] += 1
    for source, count in sources.items():
        if count > 1:
            problems.append(f"{count} rounds have one token, of {source}")
    return problems


def _uncommented(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text)


def _array(found: re.Match[str]) -> tuple[tuple[int, ...], np.dtype]:
    shape = tuple(int(size) for size in found[3].split(",") if size)
    return shape, np.dtype(_KINDS.get(found[1], found[1]) + found[2])
