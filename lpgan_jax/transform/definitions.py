"""Primitives that are defined by others: each is inlined as the JAX function that it stands for.

Only where an operand is secret; what is public stays JAX's own primitive.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from lpgan_jax.transform.graph import Builder, Node, structure

Definition = Callable[..., Any]


class _Other(Exception):
    """With these parameters, a primitive is not defined by others."""


def _defined(*primitives: str) -> Callable[[Definition], Definition]:
    """Enter (params, *operands) -> result."""

    def entered(function: Definition) -> Definition:
        structure(*primitives)(functools.partial(_inlined, function))
        return function

    return entered


def _inlined(
    function: Definition, builder: Builder, equation: JaxprEqn, inputs: list[Node]
) -> list[Node] | None:
    if not any(n.secret for n in inputs):
        return None
    params = {"primitive": equation.primitive.name, **equation.params}
    try:
        return builder.call(functools.partial(function, params), inputs)
    except _Other:
        return None


@_defined("reshape")
def _reshape(params: Any, x: Any) -> Any:
    """A transposition, if there is one, and a reshape."""
    if params["dimensions"] is None:
        raise _Other
    return x.transpose(params["dimensions"]).reshape(params["new_sizes"])


@_defined("one_minus_square")
def _one_minus_square(params: Any, x: Any) -> Any:
    """Of the derivative of tanh, from JAX 0.11 on."""
    return 1 - lax.square(x)


@_defined("polynomial")
def _polynomial(params: Any, x: Any, *coefficients: Any) -> Any:
    """By Horner's rule, the lowest degree first; of series, from JAX 0.11 on."""
    *others, result = coefficients
    for coefficient in reversed(others):
        result = result * x + coefficient
    return result


@_defined("tile")
def _tile(params: Any, x: Any) -> Any:
    """An axis of copies in front of each, and a reshape."""
    both = [n for pair in zip(params["reps"], x.shape, strict=True) for n in pair]
    copies = lax.broadcast_in_dim(x, both, range(1, len(both), 2))
    return copies.reshape([r * n for r, n in zip(params["reps"], x.shape, strict=True)])


@structure("optimization_barrier")
def _barrier(builder: Builder, equation: JaxprEqn, inputs: list[Node]) -> list[Node] | None:
    """What says how to compile changes no value."""
    return inputs


@_defined("stack")
def _stack(params: Any, *parts: Any) -> Any:
    return lax.concatenate([jnp.expand_dims(x, params["axis"]) for x in parts], params["axis"])


@_defined("unstack")
def _unstack(params: Any, x: Any) -> Any:
    axis = params["axis"]
    return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]


# Several elements ---------------------------------------------------------------------------------

_COMBINED = {
    "cumprod": jnp.multiply,
    "cummax": jnp.maximum,
    "cummin": jnp.minimum,
    "cumlogsumexp": jnp.logaddexp,
}


@_defined(*_COMBINED)
def _cumulative(params: Any, x: Any) -> Any:
    """In as many levels as the length has bits."""
    combine = _COMBINED[params["primitive"]]
    return lax.associative_scan(combine, x, params["reverse"], params["axis"])


@_defined("reduce_prod")
def _reduce_prod(params: Any, x: Any) -> Any:
    """Products of halves."""
    axes = tuple(params["axes"])
    x = jnp.moveaxis(x, axes, range(len(axes)))
    x = x.reshape(-1, *x.shape[len(axes) :])
    if not len(x):
        return jnp.ones(x.shape[1:], x.dtype)
    while len(x) > 1:
        half = len(x) // 2
        x = jnp.concatenate([x[:half] * x[half : 2 * half], x[2 * half :]])
    return x[0]


@_defined("reduce_and", "reduce_or")
def _reduce_bits(params: Any, x: Any) -> Any:
    """One comparison: how many bits are set."""
    if x.dtype != bool:
        raise _Other
    axes = tuple(params["axes"])
    least = math.prod(x.shape[a] for a in axes) if params["primitive"] == "reduce_and" else 1
    return x.astype(np.int32).sum(axes) >= least


@_defined("select_n")
def _select(params: Any, which: Any, *cases: Any) -> Any:
    """Of several cases: one, and steps to the next, each taken if the number is large enough."""
    if len(cases) <= 2:
        raise _Other
    result = cases[0]
    for i, (before, after) in enumerate(itertools.pairwise(cases), 1):
        result = result + jnp.where(which >= i, after - before, jnp.zeros_like(after))
    return result


# One element --------------------------------------------------------------------------------------


@structure("pow")
def _pow(builder: Builder, equation: JaxprEqn, inputs: list[Node]) -> list[Node] | None:
    """e^(y ln x) of x > 0, with a sign if y is an integer; a constant y: `constant_power`."""
    x, y = inputs
    if not (x.secret or y.secret) or y.value is not None:
        return None
    return builder.call(_signed_power if x.secret and y.is_integer else _power, inputs)


def _power(x: Any, y: Any) -> Any:
    return jnp.exp(y * jnp.log(x))


def _signed_power(x: Any, y: Any) -> Any:
    size = _power(jnp.abs(x), y)
    return jnp.where(y % 2 == 1, jnp.sign(x) * size, size)


@_defined("exp2")
def _exp2(params: Any, x: Any) -> Any:
    return jnp.exp(x * math.log(2))


@_defined("tan")
def _tan(params: Any, x: Any) -> Any:
    return jnp.sin(x) / jnp.cos(x)


@_defined("sinh")
def _sinh(params: Any, x: Any) -> Any:
    return (jnp.exp(x) - jnp.exp(-x)) / 2


@_defined("cosh")
def _cosh(params: Any, x: Any) -> Any:
    return (jnp.exp(x) + jnp.exp(-x)) / 2


@_defined("asinh")
def _asinh(params: Any, x: Any) -> Any:
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.log(size + jnp.sqrt(size * size + 1))


@_defined("acosh")
def _acosh(params: Any, x: Any) -> Any:
    return jnp.log(x + jnp.sqrt(x * x - 1))


@_defined("atanh")
def _atanh(params: Any, x: Any) -> Any:
    return (jnp.log(1 + x) - jnp.log(1 - x)) / 2


@_defined("cbrt")
def _cbrt(params: Any, x: Any) -> Any:
    return jnp.sign(x) * jnp.exp(jnp.log(jnp.abs(x)) / 3)


@_defined("ceil")
def _ceil(params: Any, x: Any) -> Any:
    return -jnp.floor(-x)


@_defined("round")
def _round(params: Any, x: Any) -> Any:
    """To the nearest; of two, the larger (JAX's, the even one)."""
    return jnp.floor(x + 0.5)


@_defined("rem")
def _rem(params: Any, x: Any, y: Any) -> Any:
    """x - y trunc(x / y)."""
    return x - y * lax.div(x, y) if x.dtype.kind in "iu" else x - y * jnp.trunc(x / y)


@_defined("div")
def _div(params: Any, x: Any, y: Any) -> Any:
    """Of integers, towards 0: the half keeps a quotient's rounding on the right side."""
    if x.dtype.kind not in "iu":
        raise _Other
    quotient = (jnp.abs(x) + 0.5) / jnp.abs(y)
    return jnp.sign(x) * jnp.sign(y) * jnp.floor(quotient).astype(x.dtype)


# Giles (2010), "Approximating the erfinv function": polynomials in w = -ln(1 - x^2), shifted.
_NEAR = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_FAR = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)


@_defined("erf_inv")
def _erf_inv(params: Any, x: Any) -> Any:
    w = -(jnp.log(1 + x) + jnp.log(1 - x))
    far = w >= 5
    shifted = jnp.where(far, jnp.sqrt(w) - 3, w - 2.5)
    near, distant = (jnp.polyval(jnp.asarray(c, x.dtype), shifted) for c in (_NEAR, _FAR))
    return x * jnp.where(far, distant, near)
