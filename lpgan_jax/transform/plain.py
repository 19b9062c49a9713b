"""Operations of a traced function in float64: what they mean, and what is done with public values.

The function was traced as the ordinary float32 code that it is; here every floating type is taken
as float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

Plain = Callable[..., Any]

_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def called(equation: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    """(the program, its constants) of a call that is no more than its program; None of others."""
    if equation.primitive.name in _CALLS:
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    elif equation.primitive.name in _CUSTOM:
        inner = equation.params.get("call_jaxpr", equation.params.get("fun_jaxpr"))
    else:
        return None
    return opened(inner)


def opened(program: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """(program, constants) of a program with or without them."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def widened(value: Any) -> Any:
    """A dtype as float64 if it is a floating one; anything else as it is."""
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        dtype = np.dtype(value)
        return np.dtype(np.float64) if jnp.issubdtype(dtype, jnp.floating) else dtype
    return value


def literal(value: Any, dtype: Any = None) -> np.ndarray:
    """A constant of a program as a NumPy array, of its type or another; floats as float64."""
    array = np.asarray(value)
    wanted = widened(np.dtype(dtype or array.dtype))
    if array.dtype != wanted and array.size > 1 and not any(array.strides):  # stays one number
        return np.broadcast_to(array.flat[0].astype(wanted), array.shape)
    return array.astype(wanted, copy=False)


def operation(equation: JaxprEqn) -> Plain:
    """An equation as a function of float64 arrays; of several outputs, a list."""
    if equation.primitive.name == "scan":
        return _scan(equation)
    if equation.primitive.name == "while":
        return _while(equation)
    if equation.primitive.name == "cond":
        return _cond(equation)
    if (inner := called(equation)) is not None:
        return program(*inner)
    if equation.primitive.name in _SCATTERS:
        function = scatter(equation.primitive.name, equation.params)
        return lambda *operands: function(*map(jnp.asarray, operands))
    if equation.primitive.name == "bitcast_convert_type":
        return _bitcast(equation)
    params = {name: widened(value) for name, value in equation.params.items()}
    primitive = equation.primitive

    def bind(*operands: Any) -> Any:
        return primitive.bind(*map(jnp.asarray, operands), **params)

    return bind


def _bitcast(equation: JaxprEqn) -> Plain:
    """Bits are those of the types that were traced."""
    given: Any = equation.invars[0].aval
    result: Any = equation.outvars[0].aval

    def bind(x: Any) -> Any:
        bits = equation.primitive.bind(jnp.asarray(x, given.dtype), **equation.params)
        return bits.astype(widened(result.dtype))

    return bind


_SCATTERS: dict[str, Plain] = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}
"""Primitives that have a program of the traced type among their parameters."""


def scatter(name: str, params: Mapping[str, Any]) -> Plain:
    """(array, indices, updates) -> array, in any type: the primitive's own sum is of one type."""
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    options = {name: params[name] for name in names if name in params}
    return functools.partial(_SCATTERS[name], **options)


def program(jaxpr: Jaxpr, consts: Sequence[Any] = ()) -> Plain:
    """A program as a function of float64 arrays that returns the list of its outputs."""
    operations = [operation(equation) for equation in jaxpr.eqns]

    def run(*operands: Any) -> list[Any]:
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, map(literal, consts), strict=True))
        known.update(zip(jaxpr.invars, operands, strict=True))

        def read(atom: Any) -> Any:
            return literal(atom.val) if isinstance(atom, Literal) else known[atom]

        for equation, plain in zip(jaxpr.eqns, operations, strict=True):
            results = plain(*map(read, equation.invars))
            single = not isinstance(results, list | tuple)
            known.update(zip(equation.outvars, [results] if single else results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    return run


def taken_by_scan(equation: JaxprEqn) -> tuple[int, int]:
    """(constants, carried values) among the operands of a scan."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # JAX from 0.11 on keeps the tree of (constants, carry, xs) instead.
    constants, carried, _ = params["ft_in"].update(range(len(equation.invars))).unpack()
    return len(list(constants)), len(list(carried))


def _scan(equation: JaxprEqn) -> Plain:
    params = equation.params
    body = program(*opened(params["jaxpr"]))
    constants, carried = taken_by_scan(equation)

    def run(*operands: Any) -> list[Any]:
        consts, xs = operands[:constants], operands[constants + carried :]

        def step(carry: Any, x: Any) -> Any:
            results = body(*consts, *carry, *x)
            return tuple(map(jnp.asarray, results[:carried])), tuple(results[carried:])

        init = tuple(map(jnp.asarray, operands[constants : constants + carried]))
        carry, ys = lax.scan(step, init, xs, params["length"], params["reverse"])
        return [*carry, *ys]

    return run


def _while(equation: JaxprEqn) -> Plain:
    params = equation.params
    condition, body = (program(*opened(params[name])) for name in ("cond_jaxpr", "body_jaxpr"))
    own, others = params["cond_nconsts"], params["body_nconsts"]

    def run(*operands: Any) -> list[Any]:
        first, second = operands[:own], operands[own : own + others]
        init = tuple(map(jnp.asarray, operands[own + others :]))
        return list(
            lax.while_loop(
                lambda state: condition(*first, *state)[0],
                lambda state: tuple(map(jnp.asarray, body(*second, *state))),
                init,
            )
        )

    return run


def _cond(equation: JaxprEqn) -> Plain:
    branches = [program(*opened(branch)) for branch in equation.params["branches"]]

    def run(index: Any, *operands: Any) -> list[Any]:
        wrapped = [lambda *v, b=b: tuple(map(jnp.asarray, b(*v))) for b in branches]
        return list(lax.switch(jnp.asarray(index, jnp.int32), wrapped, *operands))

    return run
