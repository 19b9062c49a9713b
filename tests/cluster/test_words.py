"""What S1 and S2 send each other looks alike for different images: below TLS, words that no test
tells apart.
"""

import dataclasses

import jax
import numpy as np
from gans import random_batch, shared_batch, small_gan
from scipy import stats
from servers import QUICKLY, dealing, run_servers, server_program
from uniformity import byte_counts, correlations, kolmogorov_smirnov

import lpgan_jax as lp
from lpgan_jax.mpc.share_trees import share_tree

STEPS = 40


def test_messages_look_alike_for_different_images():
    """Black images and white noise: the same sizes, and uniform words."""
    gan, rng = small_gan(depth=1), np.random.default_rng(0)
    initial, batch = gan.init(rng), random_batch(gan, rng)
    shape = batch.images.shape
    pixels = {"black": np.full(shape, -1.0), "noise": rng.choice([-1.0, 1.0], shape)}
    words, sizes, program, deal = {}, {}, None, dealing(gan.train_step)
    for number, (name, images) in enumerate(pixels.items()):
        sent = [[], []]
        for step in range(STEPS):
            run_number = 1000 * number + step
            key, for_state = jax.random.split(lp.key(run_number))
            state = share_tree(for_state, initial, gan.scales)
            batch = dataclasses.replace(batch, images=images)
            secrets = state, shared_batch(gan, batch, seed=100 + run_number)
            public = gan.schedule(0)
            if program is None:
                program = server_program(gan.train_step, secrets, public)
                run = program.compile(options=QUICKLY)
            corrections = deal(key, secrets, public)
            _, lines = run_servers(program, run, key, corrections, secrets, public)
            for place, line in enumerate(lines):
                sent[place] += [part for parts in line.sent for part in parts]
        sizes[name] = [[len(part) for part in parts] for parts in sent]
        whole = [b"".join(part for part in parts if len(part) % 8 == 0) for parts in sent]
        words[name] = [np.frombuffer(part, np.uint64) for part in whole]
    assert sizes["black"] == sizes["noise"]
    views = {}
    for name, (first, second) in words.items():
        after = np.roll(first, -1)
        views[name] = [first, second, first + second, first ^ second, first + after, first ^ after]
    p_values = []
    for black, noise in zip(views["black"], views["noise"], strict=True):
        counts = [byte_counts(stream) for stream in (black, noise)]
        total = counts[0] + counts[1]
        between = ((counts[0] - counts[1]) ** 2 / np.maximum(total, 1)).sum(-1)
        expected = total.sum(-1, keepdims=True) / 256
        uniform = ((total - expected) ** 2 / expected).sum(-1)
        p_values += stats.chi2.sf(np.concatenate([between, uniform]), 255).tolist()
        p_values += [kolmogorov_smirnov(stream) for stream in (black, noise)]
        p_values += [stats.ks_2samp(black[::8], noise[::8]).pvalue]
    some = slice(0, 2**17)
    p_values += [correlations(v[0][some].copy(), lag) for v in views.values() for lag in (1, 64)]
    print(
        f"{len(words['black'][0])} words of each server, {len(p_values)} tests, "
        f"smallest p-value {min(p_values):.2g}"
    )
    assert min(p_values) > 1e-6 / len(p_values)
    # The same tests on words that a plain image is in: one in 256 of a stream is a pixel.
    leaking = views["black"][0].copy()
    leaking[::256] = np.uint64(2**64 - 2**18)
    counts = byte_counts(leaking)
    expected = counts.sum(-1, keepdims=True) / 256
    leak = stats.chi2.sf(((counts - expected) ** 2 / expected).sum(-1), 255).min()
    assert leak < 1e-6 / len(p_values)
