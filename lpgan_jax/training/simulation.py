"""DS, S1, S2 and SP in one process: what a simulated training run is made of."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax.gan import Batch, Losses, SecureLPGAN, State
from lpgan_jax.mpc.compiling import options_to_run_often
from lpgan_jax.mpc.dealer_keys import DealerKeys
from lpgan_jax.mpc.fixed_point import FixedPoint
from lpgan_jax.mpc.party import simulate
from lpgan_jax.mpc.secret import Secret, is_secret
from lpgan_jax.mpc.share_trees import reveal_tree, same_scale, share_tree

Tree = dict[str, Any]
"""Arrays by name, as checkpoints have them."""


@functools.lru_cache(8)
def _programs(gan: SecureLPGAN) -> tuple[Any, Any]:
    """(step, generation), jitted: traced and compiled once for all runs of one GAN."""
    f = gan.frac_bits

    def step(keys: jax.Array, state: State, batch: Batch, public: Any) -> tuple[State, Any]:
        shared = share_tree(keys[0], batch, same_scale(batch, f))
        return simulate(gan.train_step, keys[1], (state, shared), public)

    def generate(keys: jax.Array, state: State, noise: jax.Array) -> Secret:
        return simulate(gan.generate, keys[1], (state, share_tree(keys[0], noise, f)))

    # Keys and shares are arguments: closed over, they would be constants of a cached program.
    options = options_to_run_often()
    return (
        jax.jit(step, donate_argnums=1, compiler_options=options),
        jax.jit(generate, compiler_options=options),
    )


class Simulation:
    """A training run's state, and the programs that change it.

    Attributes:
        gan: what is trained.
        state: everything secret, as `Secret`s of paired arrays.
    """

    def __init__(self, gan: SecureLPGAN, state: State, keys: DealerKeys) -> None:
        """`state`: of paired arrays, from `share_state` or `restore`; `keys`: DS's."""
        self.gan = gan
        self.state = state
        self._keys = keys
        self._fxp = FixedPoint(gan.frac_bits)
        self._step, self._generate = _programs(gan)

    @classmethod
    def begin(cls, gan: SecureLPGAN, initial: State, master: jax.Array) -> Simulation:
        """Share an initial state (float arrays) under DS's key, and go on from there."""
        keys = DealerKeys(master)
        return cls(gan, share_state(gan, keys, initial), keys)

    def train_step(self, step: int, batch: Batch) -> Losses | None:
        """One step on a batch of real values; the losses are still shared."""
        checked = jax.tree.map(self._check, batch)
        public = self.gan.schedule(step)
        self.state, losses = self._step(self._keys.take_two(), self.state, checked, public)
        return losses

    def trace_step(self, step: int, batch: Batch) -> jax.stages.Traced:
        """The program of `train_step`, to be lowered and compiled; nothing runs."""
        public = self.gan.schedule(step)
        return self._step.trace(self._keys.take_two(), self.state, batch, public)

    def _check(self, values: np.ndarray) -> np.ndarray:
        self._fxp.check(values)
        return values

    def generate(self, noise: np.ndarray) -> np.ndarray:
        """SG-FP on shared noise, opened by SP: float64 images [n, H, W, C]."""
        images = self._generate(self._keys.take_two(), self.state, self._check(noise))
        return reveal_tree(images)

    def shares(self) -> Tree:
        """The state's paired arrays by name, for a checkpoint."""
        return {name: np.asarray(s.share) for name, s in by_name(self.state).items()}


def share_state(gan: SecureLPGAN, keys: DealerKeys, initial: State) -> State:
    """DS's first message: the initial state (float arrays) as shares."""
    return share_tree(keys.for_state(), gan.secret(initial), gan.scales)


def restore_state(gan: SecureLPGAN, tree: Tree) -> State:
    """The state from a checkpoint's paired arrays.

    Args:
        gan: what was trained.
        tree: uint64[2, ...] by name.

    Raises:
        ValueError: names or shapes are not those of this configuration.
    """
    expected, scales = by_name(gan.shapes), by_name(gan.scales)
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
    restored: State = jax.tree.unflatten(jax.tree.structure(gan.shapes), leaves)
    return restored


def by_name(state: State) -> Tree:
    """The leaves of a state (arrays, scales or secrets) by name, in order."""
    paths = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_secret)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _describe(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {shape}"
