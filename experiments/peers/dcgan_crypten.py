"""A training step of the published 32x32 DCGAN under CrypTen: two processes, its own dealer (TFP).

Prints a JSON object: seconds of the first step and of later ones (the median), and what a party
sends in a step, as CrypTen counts it. Runs in CrypTen's environment: see ../compare_peers.py.
"""

import argparse
import importlib.machinery
import json
import multiprocessing
import os
import statistics
import sys
import time
import types
from importlib.metadata import version


def stub(name: str, **attributes: object) -> None:
    """Stand in for a module that CrypTen imports and this script does not need."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(attributes)
    sys.modules[name] = module


# Of PyTorch that CrypTen 0.4.1 knew, and of data sets.
converters = ("from_onnx", "from_pytorch", "from_tensorflow", "TF_AND_TF2ONNX")
stub("crypten.nn.onnx_converter", **dict.fromkeys(converters))
for part in ("datasets", "models", "transforms"):
    stub(f"torchvision.{part}")
stub("torchvision", **{part: sys.modules[f"torchvision.{part}"] for part in ("datasets", "models")})

import crypten  # noqa: E402
import crypten.communicator  # noqa: E402
import torch  # noqa: E402
from crypten.config import cfg  # noqa: E402
from crypten.gradients import AutogradFunction, register_function  # noqa: E402
from crypten.mpc import run_multiprocess  # noqa: E402

NOISE, FEATURES, LEARNING_RATE = 100, 64, 2e-3
EPS = 1e-2  # the 1e-5 of others is less than the last of CrypTen's 16 fraction bits


@register_function("deconv2d")
class Deconv2d(AutogradFunction):
    """A transposed convolution with its gradient, which CrypTen lacks."""

    @staticmethod
    def forward(ctx, x, w, stride=2, padding=1):
        """As `conv_transpose2d`."""
        ctx.save_multiple_for_backward((x, w, stride, padding))
        return x.conv_transpose2d(w, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx, dy):
        """dw[i, o, a] = sum x[n, i, p] dy[n, o, s p - padding + a]."""
        x, w, stride, padding = ctx.saved_tensors
        dx = dy.conv2d(w, stride=stride, padding=padding)
        dw = dy.transpose(0, 1).conv2d(x.transpose(0, 1), dilation=stride, padding=padding)
        return dx, dw.transpose(0, 1)[:, :, : w.size(2), : w.size(3)]


def norm(p, name, x):
    """Batch normalisation with the batch's own statistics."""
    return x.batchnorm(p[f"{name}.scale"], p[f"{name}.bias"], training=True, eps=EPS)


def leaky(x):
    """Slope 0.2."""
    return x.relu() * 0.8 + x * 0.2


def discriminator(p, x):
    """Logits [N, 1] of images [N, 1, 32, 32]."""
    x = leaky(x.conv2d(p["conv0"], stride=2, padding=1))
    x = leaky(norm(p, "norm1", x.conv2d(p["conv1"], stride=2, padding=1)))
    x = leaky(norm(p, "norm2", x.conv2d(p["conv2"], stride=2, padding=1)))
    return x.flatten(start_dim=1).matmul(p["dense"]) + p["dense.bias"]


def generator(p, z):
    """Images of noise [N, 100]."""
    x = norm(p, "norm0", z.matmul(p["dense"]).view(-1, 4 * FEATURES, 4, 4)).relu()
    x = norm(p, "norm1", x.deconv2d(p["deconv0"])).relu()
    x = norm(p, "norm2", x.deconv2d(p["deconv1"])).relu()
    return x.deconv2d(p["deconv2"]).tanh()


def initial():
    """(generator's, discriminator's) parameters: normal weights of deviation 0.02."""

    def weights(*shape):
        return 0.02 * torch.randn(*shape)

    def norms(**channels):
        scales = {f"{name}.scale": torch.ones(count) for name, count in channels.items()}
        return scales | {f"{name}.bias": torch.zeros(count) for name, count in channels.items()}

    f = FEATURES
    g = {
        "dense": weights(NOISE, 64 * f),
        "deconv0": weights(4 * f, 2 * f, 4, 4),
        "deconv1": weights(2 * f, f, 4, 4),
        "deconv2": weights(f, 1, 4, 4),
        **norms(norm0=4 * f, norm1=2 * f, norm2=f),
    }
    d = {
        "conv0": weights(f, 1, 4, 4),
        "conv1": weights(2 * f, f, 4, 4),
        "conv2": weights(4 * f, 2 * f, 4, 4),
        "dense": weights(64 * f, 1),
        "dense.bias": torch.zeros(1),
        **norms(norm1=2 * f, norm2=4 * f),
    }
    return g, d


def descend(p):
    """SGD, and no gradients left."""
    for name, value in p.items():
        p[name] = value.detach() - value.grad * LEARNING_RATE
        p[name].requires_grad = True


@run_multiprocess(world_size=2)
def train(batch_size: int, steps: int):
    """What each party runs; its figures."""
    torch.manual_seed(0)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    g, d = (
        {name: crypten.cryptensor(value, requires_grad=True) for name, value in p.items()}
        for p in initial()
    )
    images = crypten.cryptensor(2 * torch.rand(batch_size, 1, 32, 32) - 1)

    def noise():
        return crypten.cryptensor(torch.randn(batch_size, NOISE))

    def push(logits, label):
        """Gradients of the mean cross-entropy with a label."""
        logits.backward((logits.detach().sigmoid() - label) / batch_size)

    def step():
        fakes = generator(g, noise()).detach()
        push(discriminator(d, images), 1.0)
        push(discriminator(d, fakes), 0.0)
        descend(d)
        push(discriminator(d, generator(g, noise())), 1.0)
        descend(g)
        for value in d.values():
            value.grad = None

    def seconds():
        before = time.perf_counter()
        step()
        return time.perf_counter() - before

    communicator = crypten.communicator.get()
    cfg.communicator.verbose = True  # counts, in the first step only
    first = seconds()
    cfg.communicator.verbose = False
    sent = communicator.get_communication_stats()
    times = [seconds() for _ in range(steps)]
    return {
        "version": version("crypten"),
        "batch_size": batch_size,
        "first_s": first,
        "step_s": statistics.median(times),
        "online_bytes": sent["bytes"],
        "messages": sent["rounds"],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("batch_size", type=int)
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="timed, after a first")
    args = parser.parse_args()
    multiprocessing.set_start_method("fork")  # `train` is no longer what its name says: no pickling
    figures, *_ = train(args.batch_size, args.steps)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
