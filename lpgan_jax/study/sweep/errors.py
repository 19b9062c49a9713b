"""Errors of single protocols, of the layers and of the gradients, against float64.

Each function takes a `Variant`: it runs on shares, or in shadow mode with the variant's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from lpgan_jax.analysis.ranges import observe, summary
from lpgan_jax.common.tables import Row
from lpgan_jax.gan import LPGAN, NETWORKS, Batch, State, gan_program
from lpgan_jax.mpc import elementary, emulated
from lpgan_jax.mpc.activation import leaky
from lpgan_jax.mpc.arithmetic import bilinear, masked, mul, square, truncate
from lpgan_jax.mpc.compare import positive
from lpgan_jax.mpc.compiling import options_to_run_once
from lpgan_jax.mpc.exact import ExactSeat
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.prng import key as make_key
from lpgan_jax.mpc.roots import inverse_sqrt
from lpgan_jax.mpc.seat import Seat
from lpgan_jax.mpc.secret import Secret
from lpgan_jax.mpc.share_trees import (
    decoded,
    encoded,
    reveal_tree,
    scaled,
    share_tree,
    unscaled,
)
from lpgan_jax.programs import SecureProgram
from lpgan_jax.study.sweep.plan import Variant

VALUES = 4096  # of each protocol
_TERMS = 256  # of an inner product


def _run(
    variant: Variant, function: Any, key: jax.Array, values: Any, scales: Any, public: Any = None
) -> Any:
    """The outputs of (party, values, public), as float64; floats go in."""
    keys = jax.random.split(key, 2)
    options = options_to_run_once()
    if variant.mode == "secure":
        shared = share_tree(keys[0], values, scales)
        program = jax.jit(lambda key, v, p: simulate(function, key, v, p), compiler_options=options)
        return reveal_tree(program(keys[1], shared, public))
    program = jax.jit(
        lambda key, v, p: emulated.run(function, key, v, p, variant.rounding),
        compiler_options=options,
    )
    return decoded(program(keys[1], encoded(values, scales), public))


def _key(seed: int, number: int) -> jax.Array:
    """A key for each measurement; training runs of the seed split theirs, and fold nothing in."""
    return jax.random.fold_in(make_key(seed), number)


# Protocols ----------------------------------------------------------------------------------------

Protocol = tuple[Callable[[Seat, list[Secret], int], Secret], Callable[..., Any], int]


def _multiplication(party: Seat, v: list[Secret], f: int) -> Secret:
    return truncate(party, mul(party, v[0], v[1]), f)


def _inner_product(party: Seat, v: list[Secret], f: int) -> Secret:
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return (x * y).reshape(-1, _TERMS).sum(1, dtype=x.dtype)

    return truncate(party, bilinear(party, product, v[0], v[1]), f)


def _leaky_relu(party: Seat, v: list[Secret], f: int) -> Secret:
    x = masked(party, v[0])
    return leaky(party, positive(party, x), x, 0.2, f)


def _inverse_root(party: Seat, v: list[Secret], f: int) -> Secret:
    return inverse_sqrt(party, square(party, v[0]).unmasked(), f)  # at double fraction


PROTOCOLS: dict[str, Protocol] = {
    # (protocol, the same in float64, number of arguments)
    "multiplication": (_multiplication, np.multiply, 2),
    "inner product": (
        _inner_product,
        lambda x, y: (x * y).reshape(-1, _TERMS).sum(1),
        2,
    ),
    "leaky ReLU": (_leaky_relu, lambda x: np.where(x > 0, x, 0.2 * x), 1),
    "sigmoid": (
        lambda party, v, f: elementary.sigmoid(party, v[0], f),
        lambda x: 1 / (1 + np.exp(-x)),
        1,
    ),
    "tanh": (lambda party, v, f: elementary.tanh(party, v[0], f), np.tanh, 1),
    "softplus": (
        lambda party, v, f: elementary.softplus(party, v[0], f),
        lambda x: np.logaddexp(x, 0),
        1,
    ),
    "inverse root": (_inverse_root, lambda x: 1 / np.sqrt(x**2), 1),
}


def protocol_errors(variant: Variant, seed: int) -> list[Row]:
    """Errors on normal values (of at least 1/4 for the root), in LSB of the result."""
    f = variant.frac_bits
    rng = np.random.default_rng([seed, f])
    rows = []
    for index, (name, (protocol, exact, count)) in enumerate(PROTOCOLS.items()):
        values = rng.normal(size=(count, VALUES))
        if name == "inverse root":
            values = np.sign(values) * np.maximum(np.abs(values), 0.25)
        values = np.round(values * 2.0**f) * 2.0**-f  # what fixed point holds exactly
        arguments = list(values)

        def function(party: Seat, v: Any, public: None, protocol: Any = protocol) -> Secret:
            return protocol(party, v, f).unmasked().settled(party)

        key = _key(seed, index)
        result = _run(variant, function, key, arguments, [f] * count)
        lsb = (result - exact(*arguments)) * 2.0**f
        rms, most = float(np.sqrt(np.mean(lsb**2))), float(np.abs(lsb).max())
        rows.append({"protocol": name, "error_rms": rms, "error_max": most})
    return rows


# A step's layers and gradients --------------------------------------------------------------------


def _recorder() -> optax.GradientTransformation:
    """An optimizer that keeps the gradients as its state and changes nothing."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, grads), grads

    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)


def _probe(gan: LPGAN, state: State, batch: Batch, frac_bits: int) -> tuple[SecureProgram, State]:
    """(a GAN whose step records the gradients, its state)."""
    recorders = {name: _recorder() for name in NETWORKS}
    recording = replace(gan, optimizers=recorders, opens_losses=False)
    probe = SecureProgram(gan_program(recording, len(batch.images), frac_bits))
    empty = {name: recorders[name].init(state.params[name]) for name in NETWORKS}
    return probe, replace(state, optimizer=empty)


def gradient_errors(
    gan: LPGAN, state: State, batch: Batch, variant: Variant, seed: int
) -> list[Row]:
    """Relative errors |g - exact| / |exact| of each parameter's gradient, and of all together.

    A gradient is a sum over the batch. Plaintext variants have none of these errors.
    """
    if variant.mode == "plaintext":
        return []
    recording, state = _probe(gan, state, batch, variant.frac_bits)
    scales = recording.scales
    values = (state, batch)
    scaled_by = (scales, recording.batch_scales)
    public = recording.schedule(0)
    key = _key(seed, len(PROTOCOLS))
    (found, _) = _run(variant, recording.train_step, key, values, scaled_by, public)
    clear = jax.jit(
        lambda v, p: recording.train_step(ExactSeat(), v, p), compiler_options=options_to_run_once()
    )
    exact = unscaled(clear(scaled(values, scaled_by), public)[0])
    rows = []
    for network in NETWORKS:
        pairs = jax.tree_util.tree_leaves_with_path(exact.optimizer[network])
        others = jax.tree.leaves(found.optimizer[network])
        squares = [
            (float(((a - b) ** 2).sum()), float((a**2).sum()))
            for (_, a), b in zip(pairs, others, strict=True)
        ]
        names = [keystr(path, simple=True, separator=".") for path, _ in pairs]
        names, squares = ["all", *names], [tuple(np.sum(squares, axis=0)), *squares]
        for name, (error, size) in zip(names, squares, strict=True):
            relative = float(np.sqrt(error / size)) if size else None
            rows.append({"network": network, "parameter": name, "relative_error": relative})
    return rows


def layer_errors(gan: LPGAN, state: State, batch: Batch, variant: Variant, seed: int) -> list[Row]:
    """What each truncated tensor of a step lost, in LSB; shadow variants only."""
    if variant.mode != "shadow":
        return []
    recording, state = _probe(gan, state, batch, variant.frac_bits)
    scales = recording.scales
    values = encoded(state, scales), encoded(batch, recording.batch_scales)
    public = recording.schedule(0)
    seen: list[Any] = []

    def step(key: jax.Array, values: Any, public: Any) -> jax.Array:
        _, _, operations, statistics = observe(
            recording.train_step, key, values, public, variant.rounding
        )
        seen[:] = operations
        return statistics

    options = options_to_run_once()
    key = _key(seed, len(PROTOCOLS) + 1)
    statistics = jax.jit(step, compiler_options=options)(key, values, public)
    rows = [row._asdict() for row in summary(seen, np.asarray(statistics)[None])]
    # The variant has fraction bits of its own; these are of the tensor.
    return [
        {"scale": row.pop("frac_bits"), **row} for row in rows if row["operation"] == "truncate"
    ]
