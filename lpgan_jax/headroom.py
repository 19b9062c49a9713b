"""How close a training run comes to the ring's limits: bits left below 2^62, place by place.

A value beyond 2^62 makes a truncation or a comparison wrong without anyone noticing, since nothing
is opened. So the same program is run in the clear on like data before it is run on shares.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from lpgan_jax.clear import RANGE_BITS, Clear, headroom_bits
from lpgan_jax.gan import LPGAN, Batch, State
from lpgan_jax.secret import Secret


def headroom(
    gan: LPGAN, state: State, batches: Iterable[Batch], first_step: int = 0
) -> dict[str, float]:
    """Train in the clear and report what the largest values leave free.

    Sums and products count as they are before they are truncated, where they are largest.

    Args:
        gan: the networks and their optimizers.
        state: float64 arrays, as of `LPGAN.init`.
        batches: float64 arrays, one batch a step.
        first_step: the number of steps behind `state`.

    Returns:
        {place: the fewest bits left below 2^62 in any step}, in the order of the program; negative
        where a value would wrap. Inverse roots use up all but 5 bits or so by design.

    Raises:
        ValueError: there are no batches.
    """
    order: dict[str, None] = {}  # jit returns a dict sorted

    @jax.jit
    def step(state: State, batch: Batch, public: dict) -> tuple[State, dict[str, jax.Array]]:
        party = Clear()
        new, _ = gan.train_step(party, (state, batch), public)
        largest: dict[str, jax.Array] = {}
        for place, magnitude in party.largest:
            largest[place] = jnp.maximum(largest.get(place, 0.0), magnitude)
        order.update(dict.fromkeys(largest))
        return new, jax.tree.map(headroom_bits, largest)

    frac_bits = gan.model.frac_bits
    current = jax.tree.map(_scaled, state, gan.scales(state))
    fewest: dict[str, float] = {}
    for number, batch in enumerate(batches, first_step):
        encoded = jax.tree.map(lambda values: _scaled(values, frac_bits), batch)
        current, bits = step(current, encoded, gan.schedule(number))
        for place in order:
            fewest[place] = min(fewest.get(place, RANGE_BITS), float(bits[place]))
    if not fewest:
        raise ValueError("batches: expected at least one")
    # Where all 62 are left, there is nothing but comparisons that fit.
    return {place: bits for place, bits in fewest.items() if bits < RANGE_BITS}


def worst(headroom: dict[str, float]) -> tuple[str, float]:
    """(place, bits) of the first place that overflows, or else of the one with the fewest bits left.

    What is computed from a value that overflowed means nothing, so the first place is the cause.
    """
    overflows = ((place, bits) for place, bits in headroom.items() if bits < 0)
    return next(overflows, None) or min(headroom.items(), key=lambda item: item[1])


def table(headroom: dict[str, float]) -> str:
    """One line a place, the fewest bits first."""
    rows = sorted(headroom.items(), key=lambda item: item[1])
    return "\n".join(["  bits  place", *(f"{bits:6.1f}  {place}" for place, bits in rows)])


def _scaled(values: jax.Array, frac_bits: int) -> Secret:
    """A real array as `Clear` expects it: in LSB, not rounded."""
    return Secret(jnp.asarray(values, jnp.float64) * 2.0**frac_bits, frac_bits)
