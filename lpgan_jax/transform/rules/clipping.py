"""Clipped sums: see `mpc.clipping`."""

from __future__ import annotations

from typing import Any

from lpgan_jax.mpc import arithmetic, clipping
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.rules.registry import Node, Value, Values, lifted, rule


@rule("clipped_sum")
def _clipped_sum(values: Values, node: Node, vectors: Any, weights: Any) -> Value:
    x, counts = (lifted(values, operand) for operand in (vectors, weights))
    party, f = values.party, values.frac_bits

    def make() -> Secret:
        total = clipping.clipped_sum(
            party, x.stored.at(f), counts.stored.at(0).unmasked(), node.params["clip"]
        )
        # To LSBs, before anything is done with it: what hides it is added to integers of these.
        return arithmetic.truncate(party, total, f).unmasked()

    return values.now(node.shape, make)
