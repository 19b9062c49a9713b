"""What an audit found: the messages, and what is wrong with them or elsewhere."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Opening:
    """One exchange: what each server sends to the other.

    Attributes:
        name: place/.../name in the program.
        shape: of a message.
        dtype: of a message.
        mask: where the words come from that pad the messages.
        problems: why a message may tell its receiver something; empty if it cannot.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    mask: str
    problems: list[str] = field(default_factory=list)

    @property
    def elements(self) -> int:
        """Number of elements that each server sends."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of bytes that each server sends."""
        return self.elements * self.dtype.itemsize


@dataclass
class Report:
    """What an audit found.

    Attributes:
        openings: every exchange, in the order of the program.
        problems: everything that is wrong; empty if every view is uniform whatever the secrets.
    """

    openings: list[Opening]
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether the audit found no problem."""
        return not self.problems

    def table(self) -> str:
        """The openings by place, the origins of their masks, totals, and the problems."""
        width = max((len(_split(o.name)[1]) for o in self.openings), default=0)
        lines = []
        for place, openings in itertools.groupby(self.openings, key=lambda o: _split(o.name)[0]):
            group = list(openings)
            lines.append(f"{place or '(top)'}: {_totals(group)}")
            for o in group:
                kind = f"{o.dtype}{list(o.shape)}"
                mark = "!" if o.problems else " "
                lines.append(f" {mark} {_split(o.name)[1]:{width}}  {kind:24}  {o.mask}")
        lines.append(f"in all: {_totals(self.openings)}")
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        if self.ok:
            lines.append("every message is uniform given its receiver's view")
        return "\n".join(lines)


def _split(name: str) -> tuple[str, str]:
    place, _, kind = name.rpartition("/")
    return place, kind


def _totals(openings: list[Opening]) -> str:
    sizes = sum(o.elements for o in openings), sum(o.bytes for o in openings)
    return f"{len(openings)} messages, {sizes[0]:,} elements, {sizes[1]:,} bytes from each server"


def origin(origins: dict[tuple[Any, str], int]) -> str:
    """How many words come from which key of a server's seed."""
    return ", ".join(f"{n:,} words of key {path}" for (_, path), n in origins.items()) or "none"
