"""How close a training run comes to the ring's limits: bits left below 2^62, place by place.

A value beyond 2^62 makes a truncation or a comparison wrong without anyone noticing, since nothing
is opened. So the same program is run in the clear on like data before it is run on shares.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.analysis.trainable import Trainable
from lpgan_jax.mpc.compiling import options_to_run_once
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.plain import bits_left
from lpgan_jax.mpc.share_trees import scaled


def headroom(
    gan: Trainable, state: Any, batches: Iterable[Any], first_step: int = 0
) -> dict[str, float]:
    """Train in the clear and report what the largest values leave free.

    Sums and products count as they are before they are truncated, where they are largest.

    Args:
        gan: what is trained.
        state: float arrays.
        batches: float arrays, one batch a step.
        first_step: the number of steps behind `state`.

    Returns:
        {place: the fewest bits left below 2^62 in any step}; negative where a value would wrap.
        Places that overflow come first, the rest follow, both in the order of the program. (Inverse
        roots use up all but about 5 bits by design.)

    Raises:
        ValueError: there are no batches.
    """
    places: list[str] = []  # known once `step` was traced

    @functools.partial(jax.jit, compiler_options=options_to_run_once())  # or a few times
    def step(state: Any, batch: Any, public: Any) -> tuple[Any, jax.Array]:
        party = ExactSeat()
        new, _ = gan.train_step(party, (state, batch), public)
        places[:] = [seen.place for seen in party.seen]
        return new, jnp.stack([bits_left(party, seen) for seen in party.seen])

    current = scaled(gan.secret(state), gan.scales)
    fewest = np.asarray(np.inf)
    for number, batch in enumerate(batches, first_step):
        values = scaled(batch, gan.batch_scales)
        current, bits = step(current, values, gan.schedule(number))
        fewest = np.minimum(fewest, bits)
    if not places:
        raise ValueError("batches: expected at least one")
    left: dict[str, float] = {}
    rows = zip(places, fewest.tolist(), strict=True)
    for place, bits in sorted(rows, key=lambda row: row[1] >= 0):
        if bits < np.inf:  # else there is nothing but range reductions that fit
            left[place] = min(left.get(place, bits), bits)
    return left


def worst(headroom: dict[str, float]) -> tuple[str, float]:
    """(place, bits) of the first that overflows, or else of the one with the fewest bits left.

    What is computed from a value that overflowed means nothing, so the first place is the cause.
    """
    first = next(iter(headroom.items()))
    return first if first[1] < 0 else min(headroom.items(), key=lambda item: item[1])
