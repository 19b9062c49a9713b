"""Noised sums of clipped vectors: see `mpc.clipping`."""

from __future__ import annotations

from typing import Any

from lpgan_jax.mpc import arithmetic, clipping
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform.rules.registry import Node, Value, Values, lifted, rule


@rule("private_sum")
def _private_sum(values: Values, node: Node, vectors: Any, weights: Any, noise: Any) -> Value:
    x, counts, hiding = (lifted(values, operand) for operand in (vectors, weights, noise))
    party, f = values.party, values.frac_bits
    clipping.check_sum(node.params["clip"], node.inputs[0].shape[0], f)

    def make() -> Secret:
        total = clipping.clipped_sum(
            party, x.stored.at(f), counts.stored.at(0).unmasked(), node.params["clip"]
        )
        # To LSBs, before anything is done with it: what hides it are integers of these.
        rounded = arithmetic.truncate(party, total, f).unmasked()
        return rounded + hiding.stored.at(f).unmasked()

    return values.now(node.shape, make)
