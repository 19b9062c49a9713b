"""A training step of the published 32x32 DCGAN under SPU: SEMI2K, two parties in one process.

Prints a JSON object: seconds of the first step and of later ones (the median), and the largest
difference of a parameter from the same step in the clear. Runs in SPU's environment: see
../compare_peers.py.
"""

import argparse
import json
import statistics
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import spu.utils.simulation as simulation
from jax import lax
from spu import libspu

NOISE, FEATURES, LEARNING_RATE, FRACTION_BITS = 100, 64, 2e-3, 18
LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x, w):
    """4x4, stride 2."""
    return lax.conv_general_dilated(x, w, (2, 2), [(1, 1)] * 2, dimension_numbers=LAYOUT)


def deconv(x, w):
    """4x4, stride 2, to twice the size."""
    return lax.conv_general_dilated(
        x, w, (1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2), dimension_numbers=LAYOUT
    )


def norm(p, name, x):
    """Batch normalisation with the batch's own statistics."""
    mean = x.mean((0, 1, 2))
    variance = ((x - mean) ** 2).mean((0, 1, 2))
    return (x - mean) * lax.rsqrt(variance + 1e-5) * p[f"{name}.scale"] + p[f"{name}.bias"]


def leaky(x):
    """Slope 0.2."""
    return 0.8 * jax.nn.relu(x) + 0.2 * x


def discriminator(p, x):
    """Logits [N, 1] of images [N, 32, 32, 1]."""
    x = leaky(conv(x, p["conv0"]))
    x = leaky(norm(p, "norm1", conv(x, p["conv1"])))
    x = leaky(norm(p, "norm2", conv(x, p["conv2"])))
    return x.reshape(x.shape[0], -1) @ p["dense"] + p["dense.bias"]


def generator(p, z):
    """Images of noise [N, 100]."""
    x = jax.nn.relu(norm(p, "norm0", (z @ p["dense"]).reshape(-1, 4, 4, 4 * FEATURES)))
    x = jax.nn.relu(norm(p, "norm1", deconv(x, p["deconv0"])))
    x = jax.nn.relu(norm(p, "norm2", deconv(x, p["deconv1"])))
    return jnp.tanh(deconv(x, p["deconv2"]))


def initial(rng):
    """(generator's, discriminator's) parameters: normal weights of deviation 0.02."""

    def weights(*shape):
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    def norms(**channels):
        scales = {f"{name}.scale": np.ones(n, np.float32) for name, n in channels.items()}
        return scales | {f"{name}.bias": np.zeros(n, np.float32) for name, n in channels.items()}

    f = FEATURES
    g = {
        "dense": weights(NOISE, 64 * f),
        "deconv0": weights(4, 4, 4 * f, 2 * f),
        "deconv1": weights(4, 4, 2 * f, f),
        "deconv2": weights(4, 4, f, 1),
        **norms(norm0=4 * f, norm1=2 * f, norm2=f),
    }
    d = {
        "conv0": weights(4, 4, 1, f),
        "conv1": weights(4, 4, f, 2 * f),
        "conv2": weights(4, 4, 2 * f, 4 * f),
        "dense": weights(64 * f, 1),
        "dense.bias": np.zeros(1, np.float32),
        **norms(norm1=2 * f, norm2=4 * f),
    }
    return g, d


def loss(logits, label):
    """Its gradient is that of the mean cross-entropy with a label; its value is not."""
    return jnp.sum(lax.stop_gradient((jax.nn.sigmoid(logits) - label) / len(logits)) * logits)


def step(g, d, images, noise_d, noise_g):
    """One step of D and one of G; (generator's, discriminator's) parameters after it."""

    def descend(of, p):
        return jax.tree.map(lambda value, slope: value - LEARNING_RATE * slope, p, jax.grad(of)(p))

    fakes = generator(g, noise_d)
    d = descend(lambda d: loss(discriminator(d, images), 1) + loss(discriminator(d, fakes), 0), d)
    return descend(lambda g: loss(discriminator(d, generator(g, noise_g)), 1), g), d


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("batch_size", type=int)
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="timed, after a first")
    args = parser.parse_args()

    rng, m = np.random.default_rng(0), args.batch_size
    images = rng.uniform(-1, 1, (m, 32, 32, 1)).astype(np.float32)
    noises = rng.standard_normal((2, m, NOISE)).astype(np.float32)
    inputs = (*initial(rng), images, *noises)
    parties = simulation.Simulator(
        2,
        libspu.RuntimeConfig(
            protocol=libspu.ProtocolKind.SEMI2K,
            field=libspu.FieldType.FM64,
            fxp_fraction_bits=FRACTION_BITS,
        ),
    )
    secure = simulation.sim_jax(parties, step)

    def seconds():
        before = time.perf_counter()
        return secure(*inputs), time.perf_counter() - before

    result, first = seconds()
    expected = jax.jit(step)(*inputs)
    differences = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), result, expected)
    times = [seconds()[1] for _ in range(args.steps)]
    figures = {
        "version": version("spu"),
        "batch_size": m,
        "first_s": first,
        "step_s": statistics.median(times),
        "largest_difference": float(max(jax.tree.leaves(differences))),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
