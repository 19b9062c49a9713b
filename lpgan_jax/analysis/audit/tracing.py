"""Whether a function is traced alike every time: what is audited must be what will run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from lpgan_jax.mpc.party import AXIS


def trace_twice(
    whose: str, function: Callable[..., Any], *operands: Any
) -> tuple[ClosedJaxpr, list[str]]:
    """A function's program, and what to say if it is another one the second time."""

    def trace() -> ClosedJaxpr:
        # JAX keeps the trace of a function that it knows.
        return jax.make_jaxpr(lambda *args: function(*args), axis_env=[(AXIS, 2)])(*operands)

    first = trace()
    return first, differences(whose, first, trace())


def differences(whose: str, first: ClosedJaxpr, second: ClosedJaxpr) -> list[str]:
    """What to say if a function's second program is another one."""
    for one, other in itertools.zip_longest(_lines(first), _lines(second)):
        if one != other:
            where = " and ".join(dict.fromkeys(str(line[0]) for line in (one, other) if line))
            return [f"{whose}: the function is traced otherwise the second time ({where})"]
    return []


def _lines(program: ClosedJaxpr) -> Iterator[tuple[Any, ...]]:
    yield ("its constants", *map(_constant, program.consts))
    yield from _equations(program.jaxpr)


def _equations(program: Jaxpr) -> Iterator[tuple[Any, ...]]:
    numbers: dict[Any, int] = {}

    def name(atom: Any) -> Any:
        if isinstance(atom, Literal):
            return _constant(atom.val)
        return numbers.setdefault(atom, len(numbers))

    yield (
        "its arguments",
        *((name(a), str(a.aval)) for a in (*program.constvars, *program.invars)),
    )
    for equation in program.eqns:
        params, inner = [], []
        for key, value in equation.params.items():
            items = value if isinstance(value, (tuple, list)) else (value,)
            programs = [item for item in items if isinstance(item, (Jaxpr, ClosedJaxpr))]
            inner += programs
            if not programs:
                # Functions are made anew at every trace; what they do is in the programs.
                params.append((key, *("f" if callable(item) else repr(item) for item in items)))
        yield (
            equation.params.get("name", equation.primitive.name),
            equation.primitive.name,
            *map(name, equation.invars),
            *((name(atom), str(atom.aval)) for atom in equation.outvars),
            *params,
        )
        for body in inner:
            yield from _lines(body) if isinstance(body, ClosedJaxpr) else _equations(body)
    yield ("its results", *map(name, program.outvars))


def _constant(value: Any) -> Any:
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return array.shape, str(array.dtype), hash(array.tobytes())
