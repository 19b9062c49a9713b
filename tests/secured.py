"""Functions of plain JAX, and what they give under sharing or in the clear."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import lpgan_jax as lp
from lpgan_jax.mpc import exact
from lpgan_jax.mpc.secret import Secret

FAST = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
LSB = 2.0**-18


def as_float64(tree):
    def leaf(value):
        array = jnp.asarray(value)
        return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(leaf, tree)


def expected(step, *args):
    """In float64; in float32 where the code insists on it (whose error is below 1 LSB here)."""
    try:
        return FAST(step)(*as_float64(args))
    except TypeError:
        with jax.enable_x64(False):
            return step(*jax.tree.map(jnp.asarray, args))


def largest_error(got, want):
    errors = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max(initial=0)),
        got,
        want,
    )
    return max(jax.tree.leaves(errors))


def in_the_clear(step, args):
    """What the program computes with numbers of any size and precision."""
    program = step.program(*args)
    secret, public = step._parted(args)
    public = program.public(public)
    secret = [jnp.asarray(v, jnp.float64) for v in secret]

    @FAST
    def run(secret, public):
        secrets = [
            Secret(v * 2.0**scale, scale) for v, scale in zip(secret, program.scales, strict=True)
        ]
        outputs = program.run(exact.ExactSeat(), secrets, public)
        return [v.share * 2.0**-v.frac_bits for v in outputs]

    return program.outputs(run(secret, public), public)


def close(function, *args, lsb=4.0, public=()):
    """On shares."""
    step = lp.secure(function, public=public)
    outputs = FAST(step)(lp.key(4), *step.share(lp.key(3), *args))
    want = expected(function, *args)
    error = largest_error(lp.reveal(outputs), want)
    assert error / LSB < lsb


def close_in_the_clear(function, *args, lsb=2.0, **options):
    step = lp.secure(function, **options)
    assert largest_error(in_the_clear(step, args), expected(function, *args)) / LSB < lsb
