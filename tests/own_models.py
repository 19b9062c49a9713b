"""Training steps as a JAX user writes them, none of which knows of sharing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Example(NamedTuple):
    """A step and arguments for it; `public` and `carry` as of `lp.secure`."""

    step: Callable[..., Any]
    args: tuple[Any, ...]
    public: tuple[str, ...] = ()
    carry: dict[int, int] = {}  # noqa: RUF012


def _float64(tree: Any) -> Any:
    def leaf(value: Any) -> np.ndarray:
        array = np.asarray(value)
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    return jax.tree.map(leaf, tree)


def trained(loss: Callable[..., Any], optimizer: Any, params: Any, *batch: Any) -> Example:
    """(params, optimizer's state) after one step on a batch, the loss and the gradients."""

    def step(state: Any, *batch: Any) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value, grads

    params = _float64(params)
    state = params, _float64(optimizer.init(params))
    return Example(step, (state, *_float64(batch)), carry={0: 0})


RNG = np.random.default_rng(0)
LABELS = np.eye(3)[[0, 2, 1, 2]]


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape)


def _init(module: nn.Module, *inputs: Any) -> Any:
    return module.init(jax.random.key(0), *(jnp.asarray(x, jnp.float32) for x in inputs))


def _cross_entropy(module: nn.Module) -> Callable[..., Any]:
    def loss(params: Any, x: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy(module.apply(params, x), labels).mean()

    return loss


def classifier(module: nn.Module, x: np.ndarray, optimizer: Any = None) -> Example:
    """A linen module and a cross entropy."""
    optimizer = optimizer or optax.sgd(0.1)
    return trained(_cross_entropy(module), optimizer, _init(module, x), x, LABELS)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(3)(nn.tanh(nn.Dense(8)(x)))


def mlp(optimizer: Any = None) -> Example:
    return classifier(MLP(), _normal(4, 6), optimizer)


def mlp_nnx() -> Example:
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(6, 16, rngs=rngs)
            self.second = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.second(nnx.gelu(self.first(x)))

    graph, params = nnx.split(Network(nnx.Rngs(0)))

    def loss(params: Any, x: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy(nnx.merge(graph, params)(x), labels).mean()

    return trained(loss, optax.sgd(0.1), params, _normal(4, 6), LABELS)


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for features in (3, 4):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def lenet() -> Example:
    return classifier(LeNet(), _normal(4, 8, 8, 1))


class GroupResNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(4, (3, 3))(x)
        y = nn.relu(nn.GroupNorm(num_groups=2)(nn.Conv(4, (3, 3))(x)))
        y = nn.GroupNorm(num_groups=2)(nn.Conv(4, (3, 3))(y))
        return nn.Dense(3)(nn.relu(x + y).mean((1, 2)))


def resnet_group_norm() -> Example:
    return classifier(GroupResNet(), _normal(4, 6, 6, 2))


class BatchResNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        y = nn.Conv(4, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=False)(y)
        return nn.Dense(3)(nn.relu(x + y).mean((1, 2)))


def resnet_batch_norm() -> Example:
    module, x = BatchResNet(), _normal(4, 6, 6, 2)
    optimizer = optax.sgd(0.1)
    variables = _float64(_init(module, x))

    def step(state: Any, x: Any, labels: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, updated = module.apply(
                {"params": params, "batch_stats": state["batch_stats"]}, x, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy(logits, labels).mean(), updated["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, _ = optimizer.update(grads, optimizer.init(state["params"]))
        new = optax.apply_updates(state["params"], updates)
        return {"params": new, "batch_stats": stats}, value, grads

    return Example(step, (variables, x, LABELS), carry={0: 0})


class GRU(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(nn.RNN(nn.GRUCell(5))(x)[:, -1])


def gru() -> Example:
    return classifier(GRU(), _normal(4, 5, 3))


class Transformer(nn.Module):
    exact: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y, mask = nn.LayerNorm()(x), None if self.exact else nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, deterministic=True)(y, y, mask=mask)
        y = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)), approximate=not self.exact)
        return nn.Dense(3)((x + nn.Dense(8)(y)).mean(1))


def transformer(exact: bool = False) -> Example:
    return classifier(Transformer(exact), _normal(4, 5, 8))


def vae() -> Example:
    class Coder(nn.Module):
        @nn.compact
        def __call__(self, x: Any, noise: Any) -> Any:
            h = nn.softplus(nn.Dense(12)(x))
            mean, log_variance = nn.Dense(2)(h), nn.Dense(2)(h)
            z = mean + jnp.exp(log_variance / 2) * noise
            return nn.Dense(8)(nn.softplus(nn.Dense(12)(z))), mean, log_variance

    module, x, noise = Coder(), np.abs(_normal(4, 8)) % 1, _normal(4, 2)

    def loss(params: Any, x: Any, noise: Any) -> Any:
        logits, mean, log_variance = module.apply(params, x, noise)
        fit = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        kl = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1)
        return (fit + kl).mean()

    return trained(loss, optax.sgd(0.05), _init(module, x, noise), x, noise)


def wgan_gp() -> Example:
    class Critic(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(1)(nn.tanh(nn.Dense(8)(nn.tanh(nn.Dense(8)(x)))))[..., 0]

    module, real, fake = Critic(), _normal(4, 6), _normal(4, 6)[::-1]
    mix = np.linspace(0.1, 0.9, 4)[:, None]

    def loss(params: Any, real: Any, fake: Any, mix: Any) -> Any:
        between = mix * real + (1 - mix) * fake
        slope = jax.vmap(jax.grad(lambda x: module.apply(params, x)))(between)
        norm = jnp.sqrt(jnp.sum(slope**2, -1) + 1e-6)
        difference = module.apply(params, fake).mean() - module.apply(params, real).mean()
        return difference + 10 * ((norm - 1) ** 2).mean()

    return trained(loss, optax.sgd(0.05), _init(module, real), real, fake, mix)


def ddpm() -> Example:
    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any, embedding: Any) -> Any:
            first = nn.swish(nn.Conv(4, (3, 3))(x))
            y = nn.Conv(6, (3, 3), strides=(2, 2))(first)
            y = y + nn.Dense(6)(embedding)[:, None, None]
            y = nn.swish(nn.GroupNorm(num_groups=2)(y))
            y = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(y)
            return nn.Conv(1, (3, 3))(jnp.concatenate([first, y], -1))

    module, x, noise = UNet(), _normal(4, 8, 8, 1), _normal(4, 8, 8, 1)[::-1]
    angles = np.outer([3, 50, 400, 900], [1.0, 0.1])
    embedding = np.concatenate([np.sin(angles), np.cos(angles)], -1)

    def loss(params: Any, x: Any, noise: Any, level: Any, embedding: Any) -> Any:
        level = level[:, None, None, None]
        noisy = jnp.sqrt(level) * x + jnp.sqrt(1 - level) * noise
        return ((module.apply(params, noisy, embedding) - noise) ** 2).mean()

    level = np.array([0.99, 0.8, 0.4, 0.05])
    example = trained(
        loss, optax.sgd(0.05), _init(module, x, embedding), x, noise, level, embedding
    )
    return example


def dp_sgd() -> Example:
    """Each example's gradient clipped to norm 1, noise from DS added to the sum."""
    module, x = MLP(), _normal(4, 6)
    params = _float64(_init(module, x))
    loss = _cross_entropy(module)
    noise = jax.tree.map(lambda p: 0.1 * _normal(*p.shape), params)

    def step(params: Any, x: Any, labels: Any, noise: Any, rate: Any) -> Any:
        def one(x: Any, label: Any) -> Any:
            grads = jax.grad(loss)(params, x[None], label[None])
            norm = optax.tree.norm(grads)
            scale = jnp.minimum(1.0, 1.0 / norm)
            return jax.tree.map(lambda g: g * scale, grads)

        grads = jax.tree.map(lambda g: g.sum(0), jax.vmap(one)(x, labels))
        grads = jax.tree.map(lambda g, n: (g + n) / len(x), grads, noise)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), grads

    return Example(step, (params, x, LABELS, noise, 0.1), ("rate",), {0: 0})


def dp_sgd_of_jax_privacy() -> Example:
    """The library's own clipping; noise from DS added to the sum."""
    from jax_privacy import clipping

    module, x = MLP(), _normal(4, 6)
    params = _float64(_init(module, x))
    noise = jax.tree.map(lambda p: 0.1 * _normal(*p.shape), params)
    clipped = clipping.clipped_grad(
        _cross_entropy(module), l2_clip_norm=1.0, batch_argnums=(1, 2), normalize_by=4.0
    )

    def step(params: Any, x: Any, labels: Any, noise: Any, rate: Any) -> Any:
        grads = jax.tree.map(lambda g, n: g + n / len(x), clipped(params, x, labels), noise)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), grads

    return Example(step, (params, x, LABELS, noise, 0.1), ("rate",), {0: 0})


EXAMPLES: dict[str, Callable[[], Example]] = {
    "mlp": mlp,
    "mlp (nnx)": mlp_nnx,
    "mlp, momentum": lambda: mlp(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "mlp, adam": lambda: mlp(optax.adam(1e-3)),
    "mlp, adamw": lambda: mlp(optax.adamw(1e-3)),
    "mlp, rmsprop": lambda: mlp(optax.rmsprop(1e-3)),
    "mlp, clipped": lambda: mlp(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))),
    "mlp, schedule": lambda: mlp(optax.sgd(optax.cosine_decay_schedule(0.1, 100))),
    "lenet": lenet,
    "resnet, batch norm": resnet_batch_norm,
    "resnet, group norm": resnet_group_norm,
    "gru": gru,
    "transformer": transformer,
    "transformer, exact gelu": lambda: transformer(True),
    "vae": vae,
    "wgan-gp": wgan_gp,
    "ddpm": ddpm,
    "dp-sgd": dp_sgd,
}
if importlib.util.find_spec("jax_privacy"):
    EXAMPLES["dp-sgd, jax_privacy"] = dp_sgd_of_jax_privacy
