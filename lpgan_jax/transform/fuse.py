"""Pairs of operations that are cheaper as one."""

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


def fuse_roots(graph: Graph) -> int:
    """Turn x * rsqrt(v) into one operation, "times_root", where x is known before (a scale, say).

    Returns:
        How often.
    """
    nodes = graph.nodes()
    count = 0
    for root in [n for n in nodes if n.operation == "rsqrt" and n.secret]:
        after = {id(root)}
        for node in nodes:
            known = [n for n in node.inputs if id(n) not in after]
            if len(known) == len(node.inputs):
                continue
            after.add(id(node))
            is_product = node.operation == "mul" and node.shape == root.shape
            if not (is_product and root in node.inputs and known and known[0].secret):
                continue

            def plain(x: Any, v: Any) -> Any:
                return jnp.asarray(x) / jnp.sqrt(jnp.asarray(v))

            node.operation, node.inputs, node.plain = "times_root", (known[0], *root.inputs), plain
            count += 1
    return count
