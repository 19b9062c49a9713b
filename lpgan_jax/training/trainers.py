"""The ways to run one program: under sharing, in shadow mode, and in the clear.

All start from the same float arrays and take the same batches, so that what they do can be
compared step by step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc import emulated
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.plain import bits_left, named
from lpgan_jax.mpc.share_trees import decoded, encoded, reveal_tree
from lpgan_jax.programs import Program, SecureProgram
from lpgan_jax.programs.simulation import Simulation

Mode = Literal["secure", "shadow", "plaintext"]
"""`secure`: on shares; `shadow`: on integers, rounded alike; `plaintext`: in floats."""


class Trainer(Protocol):
    """A training run in progress."""

    def step(self, step: int, batch: Any) -> Any:
        """Do a step, counted from 0; what SP is told of it, as float arrays."""

    def guard(self) -> list[str]:
        """The tensors of the last step with a value out of range, as far as it is looked at."""

    def answer(self, name: str, question: Any) -> Any:
        """What a name's function answers to a question, as float arrays."""

    def state(self) -> Any:
        """Everything secret that training changes, as float arrays."""


class SecureTrainer:
    """DS, both servers and SP in one process."""

    def __init__(self, simulation: Simulation) -> None:
        """`simulation`: it is changed."""
        self.simulation = simulation

    def step(self, step: int, batch: Any) -> Any:
        """See `Trainer`; SP opens what is for it."""
        told = self.simulation.train_step(step, batch)
        jax.block_until_ready(self.simulation.state)
        return reveal_tree(told)

    def guard(self) -> list[str]:
        """See `Trainer`: some elements of each tensor (`mpc.guard`)."""
        return list(map(str, self.simulation.guard()))

    def answer(self, name: str, question: Any) -> Any:
        """See `Trainer`; whoever asks opens it."""
        return self.simulation.answer(name, question)

    def state(self) -> Any:
        """See `Trainer`: what nobody has where the servers are apart."""
        return reveal_tree(self.simulation.state)


class ShadowTrainer:
    """The secure program on plaintext integers."""

    def __init__(
        self,
        program: SecureProgram,
        initial: Any,
        master: jax.Array,
        rounding: emulated.Rounding = "stochastic",
    ) -> None:
        """`initial`: float arrays; `master`: decides the rounding; `rounding`: see `emulated`."""
        self._program = program
        self._keys = DealerKeys(master)
        self._state = encoded(program.secret(initial), program.scales)

        self._seen: list[str] = []  # known once `step` was traced
        self._outside = np.zeros(0, bool)

        def step(key: jax.Array, state: Any, batch: Any, public: Any) -> tuple[Any, Any, jax.Array]:
            values = state, encoded(batch, program.batch_scales)
            seat = emulated.EmulatedSeat(key, rounding)
            after, told = program.train_step(seat, values, public)
            self._seen[:] = named(seat.seen)
            left = [bits_left(seat, seen) for seen in seat.seen]
            return after, told, jnp.stack(left) < 0 if left else jnp.zeros(0, bool)

        def answer(name: str, key: jax.Array, state: Any, question: Any) -> Any:
            asked = encoded(question, program.question_scales(name, question))
            return emulated.run(program.answer(name), key, (state, asked), None, rounding)

        options = options_to_run_often()
        self._step = jax.jit(step, donate_argnums=1, compiler_options=options)
        self._answer = jax.jit(answer, static_argnums=0, compiler_options=options)

    def step(self, step: int, batch: Any) -> Any:
        """See `Trainer`."""
        public = self._program.schedule(step)
        after = self._step(self._keys.take(), self._state, batch, public)
        self._state, told, self._outside = jax.block_until_ready(after)
        return decoded(told)

    def guard(self) -> list[str]:
        """See `Trainer`: all elements of each tensor."""
        return [name for name, out in zip(self._seen, self._outside, strict=True) if out]

    def answer(self, name: str, question: Any) -> Any:
        """See `Trainer`."""
        return decoded(self._answer(name, self._keys.take(), self._state, question))

    def state(self) -> Any:
        """See `Trainer`; float64."""
        return decoded(self._state)


@functools.lru_cache(8)
def _in_the_clear(program: Program) -> tuple[Any, dict[str, Callable[..., Any]]]:
    """(step, answers), jitted: traced and compiled once for all runs of one program."""
    return jax.jit(program.run), {n: jax.jit(a.function) for n, a in program.answers.items()}


class PlaintextTrainer:
    """The program itself, as the plain JAX that it is."""

    def __init__(
        self,
        program: Program,
        initial: Any,
        dtype: jax.typing.DTypeLike = jnp.float32,
        after: Callable[[Any, int], Any] | None = None,
    ) -> None:
        """`initial`: a whole state; `dtype`: of everything, float32 or float64.

        `after`: (state, step) -> state, what happens to it after each step.
        """
        self._program, self._dtype, self._after = program, dtype, after
        self._state = self._floats(initial)
        self._step, self._answers = _in_the_clear(program)

    def _floats(self, tree: Any) -> Any:
        def leaf(value: Any) -> jax.Array:
            array = jnp.asarray(value)
            return array.astype(self._dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

        return jax.tree.map(leaf, tree)

    def step(self, step: int, batch: Any) -> Any:
        """See `Trainer`."""
        after = self._step(self._state, self._floats(batch))
        self._state, told = jax.block_until_ready(after)
        if self._after is not None:
            self._state = self._after(self._state, step)
        return told

    def guard(self) -> list[str]:
        """See `Trainer`: floats are in range."""
        return []

    def answer(self, name: str, question: Any) -> Any:
        """See `Trainer`."""
        part = self._program.answers[name].part(self._state)
        return jax.tree.map(np.asarray, self._answers[name](part, self._floats(question)))

    def state(self) -> Any:
        """See `Trainer`, and what is public too."""
        return jax.tree.map(np.asarray, self._state)
