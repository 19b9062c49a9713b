"""DS, S1, S2 and SP in one process: what a simulated training run is made of."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpgan_jax import native
from lpgan_jax.fixed_point import FixedPoint, encode
from lpgan_jax.gan import LPGAN, Batch, Losses, State
from lpgan_jax.party import simulate
from lpgan_jax.secret import Secret, is_secret
from lpgan_jax.shares import share_words

Tree = dict[str, Any]


class StepKeys:
    """DS's keys, one for each use; asking for one twice is an error.

    A repeated or resumed run must be given a new master key: never the same keys for other values.
    """

    def __init__(self, master: jax.Array) -> None:
        """`master`: a typed ChaCha20 key."""
        self._parent = master

    def take(self) -> jax.Array:
        """A key that was never handed out before."""
        self._parent, key = jax.random.split(self._parent)
        return key

    def take_two(self) -> jax.Array:
        """Two of them, for a task: to share its inputs, and to deal for it."""
        return jnp.stack([self.take(), self.take()])


def share_tree(key: jax.Array, values: Any, frac_bits: Any) -> Any:
    """Share every leaf at its own scale: float arrays to `Secret`s of paired arrays."""
    number = len(jax.tree.leaves(values))
    keys = iter(jax.random.split(key, max(number, 1)))
    return jax.tree.map(
        lambda leaf, scale: Secret(share_words(next(keys), encode(leaf, scale)), scale),
        values,
        frac_bits,
    )


def share_batch(key: jax.Array, batch: Batch, frac_bits: int) -> Any:
    """Share a batch at one scale."""
    return share_tree(key, batch, jax.tree.map(lambda _: frac_bits, batch))


def reveal_tree(secrets: Any) -> Any:
    """SP's reconstruction of paired arrays: float64 arrays."""

    def added(secret: Secret) -> Secret:
        words = np.asarray(secret.share)
        total = words.sum(0, dtype=np.uint64)  # wraps, without NumPy's warning for scalars
        return dataclasses.replace(secret, words=total)

    return whole_tree(jax.tree.map(added, secrets, is_leaf=is_secret))


def whole_tree(secrets: Any) -> Any:
    """Whole words of the ring (of a shadow run, say) as float64 arrays."""

    def leaf(secret: Secret) -> np.ndarray:
        return np.asarray(secret.share).view(np.int64) * 2.0**-secret.frac_bits

    return jax.tree.map(leaf, secrets, is_leaf=is_secret)


_MANY_FEATURES = 32  # from here on, ring products take most of a step


@functools.cache
def compiler_options(features: int) -> dict[str, bool | str] | None:
    """How XLA:CPU should compile a step; measured on two cores with JAX 0.10.

    The older code generator compiles in half the time. Where ring products are left to XLA and take
    most of a step, the newer one with wide vectors runs them up to three times as fast. A schedule
    that saves memory needs a third of it, which makes the step faster by a tenth as well.
    """
    if jax.default_backend() != "cpu":
        return None
    wanted: dict[str, bool | str] = {
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    }
    if features >= _MANY_FEATURES and not native.available():
        wanted["xla_cpu_prefer_vector_width"] = "512"
    else:
        wanted["xla_cpu_use_fusion_emitters"] = False
    return {name: value for name, value in wanted.items() if _knows(name, value)} or None


def options_to_run_once() -> dict[str, bool | str] | None:
    """How XLA:CPU should compile what runs once: quickly."""
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


@functools.lru_cache(8)
def _programs(gan: LPGAN) -> tuple[Any, Any]:
    """(step, generation), jitted: traced and compiled once for all runs of one GAN."""
    frac_bits = gan.model.frac_bits

    def step(keys: jax.Array, state: State, batch: Batch, public: Any) -> tuple[State, Any]:
        shared = share_batch(keys[0], batch, frac_bits)
        return simulate(gan.train_step, keys[1], (state, shared), public)

    def generate(keys: jax.Array, state: State, noise: jax.Array) -> Secret:
        shared = Secret(share_words(keys[0], encode(noise, frac_bits)), frac_bits)
        return simulate(gan.generate, keys[1], (state, shared))

    # Keys and shares are arguments: closed over, they would be constants of a cached program.
    options = compiler_options(gan.model.features)
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

    def __init__(self, gan: LPGAN, state: State, master: jax.Array) -> None:
        """`state`: of paired arrays, from `share_state` or `restore`; `master`: DS's key."""
        self.gan = gan
        self.state = state
        self._keys = StepKeys(master)
        self._fxp = FixedPoint(gan.model.frac_bits)
        self._step, self._generate = _programs(gan)

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
        """The state's paired arrays as a nested dict, for a checkpoint."""
        return jax.tree.map(
            lambda s: np.asarray(s.share),
            state_tree(self.state),
            is_leaf=is_secret,
        )


def share_state(gan: LPGAN, key: jax.Array, state: State) -> State:
    """DS's first message: the initial state (float arrays) as shares."""
    return share_tree(key, state, gan.scales(state))


def restore_state(gan: LPGAN, template: State, tree: Tree) -> State:
    """The state from a checkpoint's paired arrays.

    Args:
        gan: what was trained.
        template: a state of float arrays with the expected shapes (`LPGAN.init`).
        tree: nested dict of uint64[2, ...].

    Raises:
        ValueError: names or shapes are not those of this configuration.
    """
    expected, saved = _by_name(state_tree(template)), _by_name(tree)
    for name in sorted(expected.keys() | saved.keys()):
        want = np.shape(expected[name]) if name in expected else None
        have = np.shape(saved[name])[1:] if name in saved else None
        if want != have:
            raise ValueError(
                f"checkpoint: {name}: expected {_describe(want)} by the configuration, "
                f"got {_describe(have)}"
            )
    scales = _by_name(state_tree(gan.scales(template)))
    # The structure comes from the template: an empty state (SGD's) has no leaves in a checkpoint.
    restored = jax.tree.unflatten(
        jax.tree.structure(state_tree(template)),
        [Secret(jnp.asarray(saved[name]), scales[name]) for name in expected],
    )
    return State(**restored)


def state_tree(state: State) -> Tree:
    """The state as a nested dict, as checkpoints have it."""
    return {"params": state.params, "stats": state.stats, "optimizer": state.optimizer}


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by their path, in the order of flattening."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _describe(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {shape}"
