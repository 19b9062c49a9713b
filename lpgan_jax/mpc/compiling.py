"""How XLA:CPU should compile the protocols; measured on two cores with JAX 0.10."""

from __future__ import annotations

import functools

import jax

from lpgan_jax import native

Options = dict[str, bool | str] | None


@functools.cache
def options_to_run_often() -> Options:
    """Of a training step, say.

    The older code generator compiles in half the time. Where ring products are left to XLA, the
    newer one with wide vectors runs them up to three times as fast. A schedule that saves memory
    needs a third of it, which makes the step faster by a tenth as well.
    """
    if jax.default_backend() != "cpu":
        return None
    wanted: dict[str, bool | str] = {
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    }
    if native.available():
        wanted["xla_cpu_use_fusion_emitters"] = False
    else:
        wanted["xla_cpu_prefer_vector_width"] = "512"
    return {name: value for name, value in wanted.items() if _knows(name, value)} or None


def options_to_run_once() -> Options:
    """What compiles quickly."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": "0"}


def _knows(option: str, value: bool | str) -> bool:
    """Whether this JAX has such an option."""
    try:
        jax.jit(lambda x: x, compiler_options={option: value})(0)
    except jax.errors.JaxRuntimeError:
        return False
    return True
