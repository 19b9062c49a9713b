"""DS, S1, S2 and SP in one process: what a simulated run is made of."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.guard import Watched
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret, is_secret
from lpgan_jax.mpc.share_trees import reveal_tree, share_arrays, share_tree
from lpgan_jax.programs.secured import SecureProgram

Tree = dict[str, Any]
"""Arrays by name, as checkpoints have them."""


@functools.lru_cache(8)
def _compiled(program: SecureProgram) -> tuple[Any, Any, Any]:
    """(step, answer, guard), jitted: traced and compiled once for all runs of one program."""

    def step(keys: jax.Array, state: Any, batch: Any, public: Any) -> tuple[Any, Any, Any]:
        shared = share_tree(keys[0], batch, program.batch_scales)
        return simulate(program.guarded_step, keys[1], (state, shared), public)

    def answer(name: str, keys: jax.Array, state: Any, question: Any) -> Any:
        shared = share_tree(keys[0], question, program.question_scales(name, question))
        return simulate(program.answer(name), keys[1], (state, shared))

    def guard(key: jax.Array, elements: Any) -> tuple[Any, Any]:
        return simulate(program.guard, key, elements)

    # Keys and shares are arguments: closed over, they would be constants of a cached program.
    options = options_to_run_often()
    return (
        jax.jit(step, donate_argnums=1, compiler_options=options),
        jax.jit(answer, static_argnums=0, compiler_options=options),
        jax.jit(guard, compiler_options=options),
    )


class Simulation:
    """A run's state, and the programs that change it and are asked of it.

    Attributes:
        program: what is run.
        state: everything secret, as `Secret`s of paired arrays.
    """

    def __init__(self, program: SecureProgram, state: Any, keys: DealerKeys) -> None:
        """`state`: of paired arrays, from `share_state` or `restore_state`; `keys`: DS's."""
        self.program = program
        self.state = state
        self._keys = keys
        self._elements: Any = None
        self._step, self._answer, self._guard = _compiled(program)

    @classmethod
    def begin(cls, program: SecureProgram, initial: Any, master: jax.Array) -> Simulation:
        """Share an initial state (float arrays) under DS's key, and go on from there."""
        keys = DealerKeys(master)
        return cls(program, share_state(program, keys, initial), keys)

    def train_step(self, step: int, batch: Any) -> Any:
        """One step on real values, a batch and its noise; what SP is told of it is still shared.

        Raises:
            ValueError: the batch has other shapes, or a value is out of range.
        """
        self.program.check_batch(self.program.batch_of(batch))
        public = self.program.schedule(step)
        self.state, told, self._elements = self._step(
            self._keys.take_two(), self.state, batch, public
        )
        return told

    def guard(self) -> list[Watched]:
        """Which tensors of the last step had an element out of range, of those looked at."""
        outside, alarm = self._guard(self._keys.take(), self._elements)
        if not reveal_tree(alarm):
            return []
        return self.program.out_of_range(reveal_tree(outside))

    def trace_step(self, step: int, batch: Any) -> jax.stages.Traced:
        """The program of `train_step`, to be lowered and compiled; nothing runs."""
        public = self.program.schedule(step)
        return self._step.trace(self._keys.take_two(), self.state, batch, public)

    def answer(self, name: str, question: Any) -> Any:
        """What a name's function answers to a question, opened: float64 arrays.

        Raises:
            ValueError: a value is out of range.
        """
        self.program.check_question(name, question)
        return reveal_tree(self._answer(name, self._keys.take_two(), self.state, question))

    def shares(self) -> Tree:
        """The state's paired arrays by name, for a checkpoint."""
        return {name: np.asarray(s.share) for name, s in by_name(self.state).items()}


def share_state(program: SecureProgram, keys: DealerKeys, initial: Any) -> Any:
    """DS's first message: the initial state (float arrays) as shares."""
    return share_arrays(keys.for_state(), program.secret(initial), program.scales)


def restore_state(program: SecureProgram, tree: Tree) -> Any:
    """The state from a checkpoint's paired arrays.

    Args:
        program: what was trained.
        tree: uint64[2, ...] by name.

    Raises:
        ValueError: names or shapes are not those of this program.
    """
    expected, scales = by_name(program.shapes), by_name(program.scales)
    for name in sorted(expected.keys() | tree.keys()):
        want = np.shape(expected[name]) if name in expected else None
        have = np.shape(tree[name])[1:] if name in tree else None
        if want != have:
            raise ValueError(
                f"checkpoint: {name}: expected {_describe(want)} by the configuration, "
                f"got {_describe(have)}"
            )
    # The structure is not the checkpoint's, where an empty state (SGD's) has no leaves.
    leaves = [Secret(jnp.asarray(tree[name]), scales[name]) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(program.shapes), leaves)


def by_name(state: Any) -> Tree:
    """The leaves of a state (arrays, scales or secrets) by name, in order."""
    paths = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_secret)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _describe(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {shape}"
