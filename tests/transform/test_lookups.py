"""Rows that secret indices name, values and gradients, against plain JAX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from secured import close, close_in_the_clear

import lpgan_jax as lp

RNG = np.random.default_rng(0)
TABLE, X = RNG.normal(size=(6, 5)), RNG.normal(size=(4, 8))
TOKENS, LABELS = RNG.integers(0, 6, (4, 3)), RNG.integers(0, 8, 4)


def embedding(table, tokens):
    def loss(table):
        return (nn.Embed(6, 5).apply({"params": {"embedding": table}}, tokens) ** 3).sum()

    return jax.value_and_grad(loss)(table)


def cross_entropy(x, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels
    return jax.value_and_grad(lambda x: loss(x, labels).mean())(x)


ROWS = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))
LOOKUPS = {
    "negative": (lambda t, i: t[i - 6], TABLE, TOKENS),
    "of another axis": (lambda x, i: x[:, i], RNG.normal(size=(2, 6, 3)), TOKENS),
    "filled": (lambda t, i: t.at[i + 3].get(mode="fill", fill_value=7.0), TABLE, TOKENS),
    "more rows than the index's type counts": (
        lambda t, i: jax.lax.gather(t, i[:, None], ROWS, (1, 2), mode="fill", fill_value=0),
        RNG.normal(size=(128, 2)),
        np.array([0, 5, 127], np.int8),
    ),
    "outside": (lambda t, i: t.at[i + 3].get(mode="fill", fill_value=0), TABLE, TOKENS),
    "clipped": (lambda t, i: jnp.take(t, i * 3 - 5, axis=0, mode="clip"), TABLE, TOKENS),
    "one of each row": (lambda x, i: jnp.take_along_axis(x, i[:, None], 1), X, LABELS),
    "rows of each": (lambda x, i: jnp.take_along_axis(x, i, 0), X, RNG.integers(0, 4, (2, 8))),
    "mapped": (jax.vmap(lambda x, i: x[i]), X, LABELS),
    "integers": (lambda t, i: t[i], RNG.integers(-9, 9, (6, 5)), TOKENS),
    "added to": (lambda t, i, u: t.at[i].add(u), TABLE, TOKENS, RNG.normal(size=(4, 3, 5))),
    "embedding": (embedding, TABLE, TOKENS),
    "cross entropy": (cross_entropy, X, LABELS),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_in_the_clear(name):
    close_in_the_clear(*LOOKUPS[name])


def test_lookups():
    def function(table, tokens):
        return table[tokens], jnp.zeros_like(table).at[tokens].add(1.0)

    close(function, TABLE, TOKENS[:2])


def test_a_lookup_of_n_rows_takes_about_n_comparisons():
    clipped = lp.secure(lambda t, i: jnp.take(t, i, axis=0, mode="clip"))
    assert lp.cost(clipped, TABLE, TOKENS).comparisons == (6 - 1) * TOKENS.size
    assert lp.audit(clipped, TABLE, TOKENS).problems == []
