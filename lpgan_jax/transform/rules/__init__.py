"""What each operation is on secret values: one function each, by JAX's name of it."""

from lpgan_jax.transform.rules import (  # noqa: F401
    arithmetic,
    comparison,
    functions,
    indices,
    linear,
    loops,
    moves,
    private,
    rounding,
    sorting,
    windows,
)
from lpgan_jax.transform.rules.registry import RULES

__all__ = ["RULES"]
