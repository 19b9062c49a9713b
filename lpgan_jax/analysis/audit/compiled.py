"""The compiled program: it must send the messages that were traced, and nothing else."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lpgan_jax import party, prng
from lpgan_jax.deployed import server_mesh, server_program, whole_sharding
from lpgan_jax.party import Party


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
    messages: list[tuple[str, tuple[int, ...], np.dtype]] = []

    def noted(seat: Party, secrets: Any, public: Any) -> Any:
        outputs = function(seat, secrets, public)
        messages[:] = [(m.name, m.words.shape, m.words.dtype) for m in seat.messages]
        return outputs

    key = prng.abstract_key()
    seeds = jax.eval_shape(lambda key: jax.random.key_data(party.server_seeds(key)), key)
    dealt = jax.eval_shape(functools.partial(party.deal, function), key, secrets, public)
    paired = [jax.ShapeDtypeStruct((2, *c.shape), c.dtype) for c in dealt]
    place = whole_sharding(mesh)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (seeds, paired, secrets)
    )
    text = server_program(noted, mesh).lower(*placed, public).compile().as_text()
    return check_compiled(text or "", messages)


_INSTRUCTION = re.compile(r"= (?P<type>.*?) ?(?P<name>[a-z][\w-]*)\(")
_COLLECTIVE = re.compile("(all-|reduce-scatter|collective-|ragged-|send|recv|infeed|outfeed)")
_KINDS = {"u": "uint", "s": "int", "f": "float", "pred": "bool"}


def check_compiled(
    text: str, messages: Iterable[tuple[str, tuple[int, ...], np.dtype]]
) -> list[str]:
    """Match what a compiled program sends with the messages of the traced one.

    Args:
        text: optimised HLO.
        messages: (name, shape, dtype) of each.

    Returns:
        Problems: a collective that is no point-to-point exchange between the two servers, or that
        belongs to no message (by its name, shape and dtype), or is there more often than its
        message; a transfer to the host. Messages that nobody reads may be missing.
    """
    left = Counter((name, tuple(shape), np.dtype(dtype)) for name, shape, dtype in messages)
    problems = []
    for line in map(str.strip, text.splitlines()):
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
        if not left[message]:
            problems.append(f"{name} sends {marker[1]} in another form or too often: {line[:200]}")
        left[message] -= 1
    return problems
