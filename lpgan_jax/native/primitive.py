"""A primitive of JAX that is lowered in one way on CPUs and in another elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def primitive(
    name: str,
    abstract: Callable[..., Any],
    batch: Callable[..., tuple[jax.Array, int]],
    portable: Callable[..., jax.Array],
    on_cpu: Callable[..., jax.Array],
) -> Primitive:
    """A primitive with one result.

    It is traced and batched as one operation, and becomes code only for the platform that it is
    compiled for.

    Args:
        name: in a traced program.
        abstract: (abstract operands, parameters) -> the result's shape and type.
        batch: (operands, their batched axes, parameters) -> (result, its batched axis).
        portable: (operands, parameters) -> the result, in JAX.
        on_cpu: likewise, for CPUs.
    """
    made = Primitive(name)
    made.def_abstract_eval(abstract)
    made.def_impl(
        lambda *operands, **parameters: jax.jit(functools.partial(made.bind, **parameters))(
            *operands
        )
    )
    batching.primitive_batchers[made] = batch
    mlir.register_lowering(made, mlir.lower_fun(portable, multiple_results=False))
    mlir.register_lowering(made, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")
    return made
