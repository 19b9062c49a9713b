"""Parameters as a file: what SP exports (of both networks or one), and what a run starts from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from lpgan_jax.bounded import require_size
from lpgan_jax.files import atomic_write
from lpgan_jax.gan import NETWORKS
from lpgan_jax.models.dcgan import DCGAN
from lpgan_jax.models.twin import from_flax, to_flax
from lpgan_jax.nn.layer import Params

_SHORT = {"generator": "g", "discriminator": "d"}  # names in the file


def save_parameters(
    path: str | os.PathLike[str], params: Params, stats: Params, *, private: bool = True
) -> None:
    """Write {"g": variables, "d": variables} in float32 as Flax's msgpack, whole or not at all.

    Args:
        path: the file.
        params: {network: {layer: {name: array}}}; a network that is not there is not in the file.
        stats: running statistics, in the same form.
        private: see `files.atomic_write`.
    """
    variables = {
        _SHORT[name]: jax.tree.map(
            lambda v: np.asarray(v, np.float32), to_flax(params[name], stats[name])
        )
        for name in NETWORKS
        if name in params
    }
    atomic_write(path, serialization.to_bytes(variables), private=private)


def load_parameters(path: str | os.PathLike[str], model: DCGAN) -> tuple[Params, Params]:
    """(params, stats) of both networks from a file that `save_parameters` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, has one network only, is much larger than the networks, of
            other ones, or with values that are no finite numbers; names what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, expected parameters as `lpgan export` writes"
        )
    require_size(path.stat().st_size, str(path), _largest(model))
    expected = f'{path}: expected a Flax msgpack file of {{"g": ..., "d": ...}}'
    try:
        variables = serialization.msgpack_restore(path.read_bytes())
        both: dict[str, Any] = {n: variables[s] for n, s in _SHORT.items() if s in variables}
    except Exception as error:
        raise ValueError(expected) from error
    if not both:
        raise ValueError(expected)
    if missing := [f'"{_SHORT[name]}" (the {name})' for name in NETWORKS if name not in both]:
        raise ValueError(
            f"{path}: has no {' and no '.join(missing)}, expected parameters of both networks, as "
            "`lpgan export` writes, or SP gets with results: [generator, discriminator]"
        )
    params, stats = {}, {}
    for name in NETWORKS:
        try:
            params[name], stats[name] = from_flax(model, name, both[name])
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        for keys, value in jax.tree.leaves_with_path((params[name], stats[name])):
            if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
                place = ".".join(str(key.key) for key in keys[1:])
                raise ValueError(f"{path}: {name}: {place}: expected finite floating-point values")
    return params, stats


def _largest(model: DCGAN) -> int:
    """Bytes that a file may have: the values in float64, and names. Reading takes a multiple."""
    networks = [model.generator(), model.discriminator()]
    trees = [network.init(np.random.default_rng(0)) for network in networks]
    return sum(np.asarray(value, np.float64).nbytes for value in jax.tree.leaves(trees)) + 2**16
