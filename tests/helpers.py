"""Sharing, running and decoding for tests. Shares come from NumPy, not from the library."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax import key
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def script(name: str) -> ModuleType:
    """A script of experiments/ as a module; as when it is run, its neighbours can be imported."""
    if str(EXPERIMENTS) not in sys.path:
        sys.path.append(str(EXPERIMENTS))
    return importlib.import_module(name)


def same_scale(values: Any, frac_bits: int) -> Any:
    """The tree of scales of values that have the same."""
    return jax.tree.map(lambda _: frac_bits, values)


def integers(values: Any, frac_bits: int) -> np.ndarray:
    """The fixed-point integers nearest to real values."""
    return np.rint(np.asarray(values, np.float64) * 2.0**frac_bits).astype(np.int64)


def pair_of(integers: Any, seed: int = 0) -> jax.Array:
    """Uniform shares uint64[2, ...] of signed integers."""
    words = np.asarray(integers, np.int64).astype(np.uint64)
    first = np.random.default_rng([7, seed]).integers(0, 2**64, words.shape, np.uint64)
    with np.errstate(over="ignore"):
        return jnp.asarray(np.stack([first, words - first]))


def pair(values: Any, frac_bits: int = 18, seed: int = 0) -> jax.Array:
    """Uniform shares of real values."""
    return pair_of(integers(values, frac_bits), seed)


def secret(values: Any, frac_bits: int = 18, seed: int = 0) -> Secret:
    """Real values as a paired `Secret`, what `run` takes."""
    return Secret(pair(values, frac_bits, seed), frac_bits)


def whole(shares: Any) -> np.ndarray:
    """The signed integers that shares add up to."""
    words = np.asarray(shares, np.uint64)
    with np.errstate(over="ignore"):
        return np.asarray(words[0] + words[1]).astype(np.int64)


def real(value: Secret) -> np.ndarray:
    """The real values of a paired `Secret`."""
    return whole(value.share) * 2.0**-value.frac_bits


def on_grid(
    rng: np.random.Generator, shape: Any, frac_bits: int = 18, std: float = 1.0
) -> np.ndarray:
    """Normal values that fixed point holds exactly."""
    return integers(rng.normal(0, std, shape), frac_bits) * 2.0**-frac_bits


def run(function: Callable[..., Any], *secrets: Any, seed: int = 0, public: Any = None) -> Any:
    """function(party, *secrets[, public]) with both servers and DS, jitted."""

    def program(ds_key: jax.Array, secrets: Any, public: Any) -> Any:
        def seat(party: Any, shares: Any, public: Any) -> Any:
            return function(party, *shares, *(() if public is None else (public,)))

        return simulate(seat, ds_key, secrets, public)

    return jax.jit(program)(key(seed), list(secrets), public)


def distance(first: dict[str, Any], second: dict[str, Any]) -> int:
    """The largest difference of a parameter between two checkpoints of shares, in LSB."""
    assert first.keys() == second.keys()
    names = [name for name in first if name.startswith("params.")]
    assert names
    return max(int(np.abs(whole(first[n]) - whole(second[n])).max()) for n in names)
