"""What becomes of a function under sharing, operation by operation: scales, room, and cost."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lpgan_jax.analysis.cost import UNPLACED, Cost, program_cost
from lpgan_jax.common.tables import aligned
from lpgan_jax.mpc.compiling import options_to_run_once
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.plain import bits_left
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.share_trees import scaled
from lpgan_jax.transform import evaluate

if TYPE_CHECKING:
    from lpgan_jax.transform.function import Program

FEW = 2.0
"""Bits left below which a value is called too large: it may grow by less than four times."""


@dataclass(frozen=True)
class Row:
    """An operation on secrets.

    Attributes:
        primitive: JAX's name of it, or one of ours.
        place: where it stands in the function.
        scale: fraction bits in which its result is kept.
        bits_left: the fewest bits between a magnitude that it truncates or compares and what that
            takes; negative where a value wraps. None if nothing is, or if there are no values.
        rounds: of its own messages.
        bytes: that each server sends.
        dealer_bytes: that DS sends S2 (those of the arguments with its seed).
    """

    primitive: str
    place: str
    scale: int
    bits_left: float | None
    rounds: int
    bytes: int
    dealer_bytes: int


@dataclass(frozen=True)
class Explanation:
    """A table of a function's operations, in its order; `str` shows those that cost or may wrap.

    Attributes:
        rows: of all operations on secrets.
        public: names of argument leaves that all may know, and what the function closes over.
    """

    rows: tuple[Row, ...]
    public: tuple[str, ...]

    @property
    def too_large(self) -> list[Row]:
        """Rows with fewer than `FEW` bits left."""
        return [row for row in self.rows if row.bits_left is not None and row.bits_left < FEW]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {"public": list(self.public), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        shown = [r for r in self.rows if r.bytes or r.dealer_bytes or r.bits_left is not None]
        header = ["primitive", "scale", "bits left", "rounds", "a server sends", "DS to S2"]
        lines = aligned([[*header, "place"], *map(_cells, shown)], left=(0, len(header)))
        lines.insert(1, "-" * max(map(len, lines)))
        lines += ["", f"Public: {', '.join(self.public) or 'nothing'}. All else is secret."]
        for row in self.too_large:
            lines.append(
                f"Too large: {row.primitive} has {row.bits_left:.1f} bits left ({row.place})."
            )
        return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    left = "" if row.bits_left is None else f"{row.bits_left:.1f}"
    numbers = [f"{n:,}" if n else "" for n in (row.rounds, row.bytes, row.dealer_bytes)]
    return [row.primitive, str(row.scale), left, *numbers, row.place.replace(f"{os.getcwd()}/", "")]


def _sent(cost: Cost) -> tuple[int, int, int]:
    return cost.rounds, cost.online_bytes, cost.dealer_bytes_s2


def explained(
    program: Program, secrets: Sequence[Secret], public: Any, values: Sequence[Any] | None
) -> Explanation:
    """See `Secure.explain`.

    Args:
        program: the traced function.
        secrets: shapes of its secret inputs.
        public: shapes or values of its frontier; values if there are `values`.
        values: real arrays of its secret inputs, if there are any.
    """
    numbers = {id(n): str(i) for i, n in enumerate(program.nodes)}
    setting = dataclasses.replace(program.setting, place=lambda n: numbers.get(id(n), ""))

    def run(party: Seat, secrets: Sequence[Secret], public: Sequence[Any]) -> list[Secret]:
        return evaluate.run(program.graph, party, secrets, public, setting, program.output_scales)

    layers = program_cost(run, secrets, jax.eval_shape(lambda p: p, public)).layers
    left = {} if values is None else _bits_left(run, values, program.scales, public)
    rows = []
    for node in program.nodes:
        if not node.secret or node.results:
            continue
        number = numbers[id(node)]
        scale = 0 if node.is_integer else setting.format(node).frac_bits
        sent = _sent(layers.get(number, Cost()))
        rows.append(Row(node.operation, str(node.place), scale, left.get(number), *sent))
    for name, place in ((UNPLACED, "arguments"), ("outputs", "results")):
        if name in layers:
            rows.append(Row("rescaling", place, setting.frac_bits, None, *_sent(layers[name])))
    public_leaves = [x.name for x in program.leaves if x.public]
    constants = [f"a constant {array} of the program" for array in program.closed_over]
    return Explanation(tuple(rows), (*public_leaves, *constants))


def _bits_left(
    run: Callable[..., Any], values: Sequence[Any], scales: Sequence[int], public: Any
) -> dict[str, float]:
    """The fewest bits that each place's values leave, in float64; not within iterations."""
    places: list[str] = []

    @functools.partial(jax.jit, compiler_options=options_to_run_once())
    def fewest(values: Sequence[Any], public: Any) -> jax.Array:
        party = ExactSeat()
        run(party, scaled(list(values), list(scales)), public)
        places[:] = [seen.place.partition("/")[0] for seen in party.seen]
        return jnp.asarray([bits_left(party, seen) for seen in party.seen])

    found: dict[str, float] = {}
    for bits, place in zip(fewest(values, public).tolist(), places, strict=True):
        if math.isfinite(bits):
            found[place] = min(bits, found.get(place, math.inf))
    return found
