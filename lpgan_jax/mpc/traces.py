"""Where in JAX's traces a value belongs: what keeps a mask from serving several values.

The body of a `scan`, `map` or `jit` is traced once and executed any number of times, so what is
made outside of it is the same in every execution. Data that change under masks that do not would
show their differences to the servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, get_opaque_trace_state


class StaleKey(RuntimeError):
    """A key that belongs outside of the trace that its data belong to."""


def current() -> Any:
    """The trace that is going on, to be compared with another."""
    return get_opaque_trace_state(convention="flax")


def is_tracing() -> bool:
    """Whether what is computed now is traced, to be executed later and perhaps often."""
    return isinstance(jnp.zeros((), jnp.uint32) + jnp.uint32(1), jax.core.Tracer)


def depth(value: Any) -> int:
    """How many traces lie around the place that a value comes from; 0 for a concrete array.

    A batch of `vmap` comes from where the whole batch does. This is the only place that needs
    something of JAX that is not public: a tracer's trace, and the trace around that one.
    """
    while isinstance(value, jax.core.Tracer):
        trace = value._trace
        inside = getattr(value, "val" if hasattr(trace, "axis_data") else "primal", None)
        if inside is None:
            return _enclosing(trace)
        value = inside
    return 0


def _enclosing(trace: Any) -> int:
    count = 0
    while (trace := getattr(trace, "parent_trace", None)) is not None:
        count += 1
    return count


def require_own_keys(keys: Any, data: Any) -> None:
    """Check that no key is the same in several executions of a body with other data.

    Args:
        keys: a pytree of typed keys.
        data: a pytree of all that is masked, or masked values are combined with, under these keys.

    Raises:
        StaleKey: a key is concrete, or of an outer trace, and some data belong to an inner one.
    """
    depths = [depth(leaf) for leaf in jax.tree.leaves(keys)]  # none: it is no key, as is said later
    if depths and any(depth(leaf) > min(depths) for leaf in jax.tree.leaves(data)):
        raise StaleKey(
            "key: made outside of the scan, map, loop or jit that the data belong to, so that "
            "every execution would use the same masks, and the servers could compute the "
            "differences of their secrets: make the key an argument (jit), scan over keys "
            "(jax.random.split(key, n)), or fold the counter in (jax.random.fold_in(key, i))"
        )


def mapped_axes() -> set[str]:
    """The axes of devices of which a `shard_map` or `pmap` around runs its body on each."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {str(name) for name, kind in axes if kind == manual}


class Mark(NamedTuple):
    """The name of a named call, kind:path.

    Attributes:
        kind: "exchange", "deal", "compare", "convert", "seeds" (of the servers, from DS's key) or
            "share" (splitting).
        path: place/.../name of an exchange, place/... of others; empty at the top.
    """

    kind: str
    path: str

    @property
    def places(self) -> list[str]:
        """Where it is, from the outermost place in."""
        places = self.path.split("/") if self.path else []
        return places[:-1] if self.kind == "exchange" else places

    @property
    def name(self) -> str:
        """An exchange's own name."""
        return self.path.rpartition("/")[2]


def mark(equation: JaxprEqn) -> Mark | None:
    """The mark of an equation, if it is a call that `named` made."""
    if equation.primitive.name not in ("jit", "pjit"):
        return None
    kind, colon, path = str(equation.params.get("name", "")).partition(":")
    return Mark(kind, path.strip("/")) if colon else None


def path_of(equation: JaxprEqn) -> str:
    """The path of a marked call; empty for anything else."""
    found = mark(equation)
    return "" if found is None else found.path


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a call of this name in a traced program, which every transformation keeps.

    This is how the cost model and the audit find what they must know: see `Mark`.
    """

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = name
    return jax.jit(call)


# What an equation holds ---------------------------------------------------------------------------

CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vmap_call",
}
"""Primitives that run one program, once."""


def bodies(params: dict[str, Any]) -> list[tuple[Jaxpr, Sequence[Any]]]:
    """The programs that an equation holds, each with its constants."""
    found: list[tuple[Jaxpr, Sequence[Any]]] = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append((item.jaxpr, item.consts))
            elif isinstance(item, Jaxpr):
                found.append((item, ()))
    return found


def scan_parts(equation: Any) -> tuple[int, int]:
    """How many of a scan's last operands are sliced, and how many of its first results carried.

    Its operands are constants, what is carried, and what is sliced; only the last have another rank
    inside, and so do the results that are not carried.
    """
    (body,) = bodies(equation.params)
    inner: Any = body[0]
    inputs = zip(equation.invars, inner.invars, strict=True)
    results = zip(equation.outvars, inner.outvars, strict=True)
    sliced = sum(a.aval.ndim != b.aval.ndim for a, b in inputs)
    return sliced, sum(a.aval.ndim == b.aval.ndim for a, b in results)
