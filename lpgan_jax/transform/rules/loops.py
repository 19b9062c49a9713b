"""A scan under sharing: a party, and so fresh masks, for each iteration."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.transform import evaluate
from lpgan_jax.transform.rules.registry import Node, Value, Values, lifted, rule


@rule("scan")
def _scan(values: Values, node: Node, *operands: Any) -> list[Value]:
    params = node.params
    body, kinds = params["body"], params["kinds"]
    own, stacks = operands[: len(kinds)], operands[len(kinds) :]
    secret_inputs = [n for n in body.inputs if n.secret]
    scales = [_scale(values, n) for n in secret_inputs]
    given = []
    for x, scale, of in zip(own, scales, node.inputs, strict=False):
        with evaluate.watching(values, of):
            given.append(lifted(values, x).stored.at(scale).settled(values.party).unmasked())
    by_kind = {
        kind: [x for x, k in zip(given, kinds, strict=True) if k == kind]
        for kind in ("const", "carry", "x")
    }
    outputs = [body.outputs[i] for i in params["outputs"]]
    carries = [s for s, kind in zip(scales, kinds, strict=True) if kind == "carry"]
    count = len(carries)
    output_scales = [*carries, *(_scale(values, n) for n in outputs[count:])]

    def step(party: Seat, carry: list[Secret], x: Any) -> tuple[list[Secret], list[Secret]]:
        scanned, taken = x
        queues = {"const": iter(by_kind["const"]), "carry": iter(carry), "x": iter(scanned)}
        inputs = [next(queues[kind]) for kind in kinds]
        public = {id(n): v for n, v in zip(params["shipped"], taken, strict=True)}
        results = evaluate.secret_outputs(
            body, party, inputs, public, values.setting, outputs, output_scales
        )
        settled = [r.settled(party).unmasked() for r in results]
        return settled[:count], settled[count:]

    stacked = [jnp.asarray(s) for s in stacks]
    carry, ys = values.party.scan(
        step, by_kind["carry"], (by_kind["x"], stacked), params["length"], params["reverse"]
    )
    return [values.of(s) for s in (*carry, *ys)]


def _scale(values: Values, node: Node) -> int:
    return 0 if node.is_integer else values.setting.format(node).frac_bits
