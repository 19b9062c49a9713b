"""Products that are only summed: one dealt word for each sum, instead of one for each product."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax.numpy as jnp

from lpgan_jax.transform.graph import Graph


def fuse_sums(graph: Graph) -> int:
    """Turn reduce_sum(x * y) into one operation, "inner", where nothing else takes the product.

    Returns:
        How often.
    """
    nodes = graph.nodes()
    uses = Counter(id(n) for node in nodes for n in node.inputs)
    uses.update(id(n) for n in graph.outputs)
    count = 0
    for node in nodes:
        if node.operation != "reduce_sum" or not node.secret:
            continue
        (product,) = node.inputs
        if uses[id(product)] != 1 or product.operation not in ("mul", "square"):
            continue
        x, y = product.inputs if product.operation == "mul" else product.inputs * 2
        if not (x.secret and y.secret):
            continue
        axes = tuple(map(int, node.params["axes"]))

        def plain(u: Any, v: Any, axes: tuple[int, ...] = axes) -> Any:
            return jnp.sum(jnp.asarray(u) * jnp.asarray(v), axes)

        node.operation, node.inputs, node.plain = "inner", (x, y), plain
        count += 1
    return count
