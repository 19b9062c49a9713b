"""Where does a training run lose precision, or leave the ring's range? Tensor by tensor.

The secure program runs in shadow mode and, from the same values, in float64. Whatever either
truncates or compares is looked at: the range of the values, the bits left below 2^62, and how far
the truncated integers lie from what float64 gives. A fixed-point program has no NaN: a value that
left the range is a wrong number, and this says which was the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

from lpgan_jax.analysis.trainable import Trainable
from lpgan_jax.mpc.compiling import options_to_run_once
from lpgan_jax.mpc.emulated import EmulatedSeat, Rounding
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.guard import numbered
from lpgan_jax.mpc.plain import PlainSeat, Seen, bits_left
from lpgan_jax.mpc.secret import Secret, is_secret
from lpgan_jax.mpc.share_trees import encoded, scaled


class Range(NamedTuple):
    """What was seen of one tensor, over all steps.

    Attributes:
        place: where in the program, and the number of the operation there.
        operation: "truncate" or "compare".
        frac_bits: of the result of a truncation; of what is compared.
        low: the smallest value, in real terms.
        high: the largest value.
        bits_left: the fewest bits between a magnitude and what the operation takes, of integers or
            of float64; negative where values wrap, infinite for what fills the range by design.
        wrapped_at: the first step (from 0) at which they do; None if they never do.
        lost_rms: root mean square of (result - the float64 program's), in LSB of the result; NaN
            for comparisons.
        lost_max: the largest magnitude of that.
    """

    place: str
    operation: str
    frac_bits: int
    low: float
    high: float
    bits_left: float
    wrapped_at: int | None
    lost_rms: float
    lost_max: float


def _statistics(shadow: EmulatedSeat, clear: ExactSeat, seen: Seen, exact: Seen) -> jax.Array:
    """[low, high, bits left (of either), mean square loss, largest loss] of one operation."""
    values = shadow.real(seen.value)
    fewest = jnp.minimum(bits_left(shadow, seen), bits_left(clear, exact))
    mean = largest = jnp.asarray(jnp.nan)
    if seen.result is not None and exact.result is not None:
        lost = shadow.real(seen.result) - clear.real(exact.result)
        lost *= 2.0**seen.result.frac_bits
        mean, largest = (lost**2).mean(), jnp.abs(lost).max(initial=0.0)
    return jnp.stack([values.min(), values.max(), fewest, mean, largest])


def observe(
    function: Any, key: jax.Array, values: Any, public: Any, rounding: Rounding
) -> tuple[Any, Any, list[Seen], jax.Array]:
    """Run a program in shadow mode and in float64, from the same values; traceable.

    Args:
        function: (party, values, public) -> outputs.
        key: decides the rounding.
        values: a pytree of `Secret`s of whole words.
        public: as for `party.simulate`.
        rounding: see `shadow`.

    Returns:
        (outputs in shadow mode, outputs in float64, what was seen, [operations, 5] of
        `_statistics`).
    """
    shadow, clear = EmulatedSeat(key, rounding), ExactSeat()
    floats = jax.tree.map(lambda v: scaled(shadow.real(v), v.frac_bits), values, is_leaf=is_secret)
    outputs, exact = function(shadow, values, public), function(clear, floats, public)
    assert _operations(shadow) == _operations(clear)
    pairs = zip(shadow.seen, clear.seen, strict=True)
    return outputs, exact, shadow.seen, jnp.stack([_statistics(shadow, clear, *p) for p in pairs])


def _operations(party: PlainSeat) -> list[tuple[str, str]]:
    return [(seen.place, seen.kind) for seen in party.seen]


def ranges(
    gan: Trainable,
    initial: Any,
    batches: Iterable[Any],
    key: jax.Array,
    rounding: Rounding = "stochastic",
) -> list[Range]:
    """Train in shadow mode, compare each step with the same step in float64.

    Args:
        gan: what is trained.
        initial: a state of float arrays.
        batches: float arrays, one batch a step.
        key: decides the rounding.
        rounding: see `shadow`.

    Returns:
        A row for each truncation and comparison of a step, in the order of the program.

    Raises:
        ValueError: there are no batches.
    """
    seen: list[Seen] = []  # known once `step` was traced

    def step(key: jax.Array, state: Any, batch: Any, public: Any) -> tuple[Any, jax.Array]:
        values = state, encoded(batch, gan.batch_scales)
        (new, _), _, operations, statistics = observe(gan.train_step, key, values, public, rounding)
        seen[:] = operations
        return new, statistics

    compiled = jax.jit(step, compiler_options=options_to_run_once())
    state = encoded(gan.secret(initial), gan.scales)
    steps = []
    for number, batch in enumerate(batches):
        key, now = jax.random.split(key)
        state, statistics = compiled(now, state, batch, gan.schedule(number))
        steps.append(np.asarray(statistics))
    if not steps:
        raise ValueError("batches: expected at least one")
    return summary(seen, np.stack(steps))


def summary(seen: list[Seen], statistics: np.ndarray) -> list[Range]:
    """The rows of [steps, operations, 5]."""
    rows = []
    for index, (one, name) in enumerate(zip(seen, numbered(s.place for s in seen), strict=True)):
        low, high, left, mean, largest = statistics[:, index].T
        result: Secret = one.value if one.result is None else one.result
        rows.append(
            Range(
                name,
                one.kind,
                result.frac_bits,
                float(low.min()),
                float(high.max()),
                float(left.min()),
                int(np.argmax(left < 0)) if (left < 0).any() else None,
                float(np.sqrt(mean.mean())),
                float(largest.max()),
            )
        )
    return rows


def table(rows: list[Range]) -> Table:
    """The rows as a table, in the order of the program; what is out of range is marked."""
    result = Table(box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("tensor", "operation", "fraction bits"):
        result.add_column(name, justify="right" if "bits" in name else "left")
    for name in ("smallest", "largest", "bits left", "lost, rms [LSB]", "lost, most [LSB]"):
        result.add_column(name, justify="right")
    for row in rows:
        left = "by design" if row.bits_left == np.inf else f"{row.bits_left:.1f}"
        lost = ["" if np.isnan(v) else f"{v:.3g}" for v in (row.lost_rms, row.lost_max)]
        result.add_row(
            row.place,
            row.operation,
            str(row.frac_bits),
            f"{row.low:.4g}",
            f"{row.high:.4g}",
            left,
            *lost,
            style="bold red" if row.bits_left < 0 else None,
        )
    return result


def verdict(rows: list[Range]) -> str:
    """One sentence: the tensor that left the range first, or the one with the fewest bits left."""
    out = [(row.wrapped_at, index) for index, row in enumerate(rows) if row.wrapped_at is not None]
    if out:
        step, index = min(out)
        return (
            f"out of range: {rows[index].place}, first in step {step + 1}, by up to "
            f"{-rows[index].bits_left:.1f} bits; what follows from it is wrong"
        )
    least = min(rows, key=lambda row: row.bits_left)
    return f"everything is in range; the fewest bits left, {least.bits_left:.1f}: {least.place}"
