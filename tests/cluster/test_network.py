"""On a network: bytes and seconds as estimated, and nothing to be seen on the servers' line.

Four machines (network namespaces). Slow: `pytest -m slow`.
"""

import json
import socket
import struct

import jax
import numpy as np
import pytest
from clusters import SEED, Simulated, statuses
from networks import IP_AND_TCP, LINK, Machines, Roles, possible
from scipy import stats
from uniformity import byte_counts, correlations, kolmogorov_smirnov

from lpgan_jax.analysis.cost import LAN, WAN, program_cost
from lpgan_jax.programs import shapes
from lpgan_jax.training import checkpoint, config
from lpgan_jax.training.building import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="needs root, iproute2 and TUN devices"),
]

GLOO_HEADS = 3 * 48
"""Bytes of heads for a message: that it is ready to be sent, that it may come, and its own."""


def _trained(directory, settings, network, mtu, seed=None, record=None):
    """Train on four machines; (what left S1 over the line, S1's statuses, the run's summary)."""
    machines = Machines(network.bandwidth_bits_per_s, network.latency_s, mtu, record)
    try:
        roles = Roles(machines, directory, settings, seed)
        try:
            assert roles.wait("sp", 560) == 0, roles.errors("sp")
            counted = machines.counted("s1", "line")
        finally:
            roles.stop()
    finally:
        machines.close()
    summary = json.loads((directory / "run" / "summary.json").read_text())
    return counted, statuses(directory / "s1", "s1"), summary


@pytest.mark.parametrize(
    ("network", "mtu", "steps"), [(LAN, 9000, 40), (WAN, 1500, 8)], ids=["LAN", "WAN"]
)
def test_bytes_and_seconds_are_as_estimated(network, mtu, steps, tmp_path):
    wanted = ["open_samples=false", f"steps={steps}", f"checkpoint_every={steps}"]
    settings = config.load("digits", wanted)
    function, secrets, public = shapes.step_program(build(settings))
    cost = program_cost(function, secrets, public, inputs=secrets[1])
    counted, reports, summary = _trained(tmp_path, settings, network, mtu, SEED)
    framing = counted["packets"] * IP_AND_TCP + steps * cost.messages * GLOO_HEADS
    bytes_a_step = (counted["bytes"] - framing) / steps
    seconds, estimate = summary["seconds_per_step"], cost.seconds(*network)
    print(
        f"{network}: {seconds:.3f} s a step, messages estimated at {estimate:.3f} s; "
        f"{counted['bytes'] / steps / 1e6:.2f} MB a step on the interface, "
        f"{bytes_a_step / 1e6:.2f} MB without framing, {cost.online_bytes / 1e6:.2f} MB estimated"
    )
    assert bytes_a_step == pytest.approx(cost.online_bytes, rel=0.05)
    # What the role itself reports is what the kernel counts in its sockets.
    assert reports[-1]["sent"]["s2"] < counted["bytes"]
    assert estimate / 1.5 < seconds < estimate * 1.5
    simulated = Simulated(settings)
    simulated.attempt(1, 0, steps)
    for place, server in enumerate(("s1", "s2")):
        share = checkpoint.load_share(tmp_path / server, server, steps)[1]
        jax.tree.map(
            lambda own, both, place=place: np.testing.assert_array_equal(own, both[place]),
            share,
            simulated.shares[steps],
        )


# What is on the line ------------------------------------------------------------------------------


def _streams(record):
    """{(sender's address, its port, the other's port): bytes} of the TCP connections recorded."""
    data, place = record.read_bytes(), 0
    starts, parts = {}, {}
    while place + 4 <= len(data):
        (length,) = struct.unpack_from("!I", data, place)
        packet = data[place + 4 : place + 4 + length]
        place += 4 + length
        if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
            continue
        ip = 4 * (packet[0] & 15)
        own, other, number = struct.unpack_from("!HHI", packet, ip)
        flow = (socket.inet_ntoa(packet[12:16]), own, other)
        if packet[ip + 13] & 2:  # SYN
            starts[flow] = number + 1
        payload = packet[ip + 4 * (packet[ip + 12] >> 4) :]
        if payload:
            parts.setdefault(flow, {})[(number - starts[flow]) % 2**32] = payload
    streams = {}
    for flow, pieces in parts.items():
        stream = bytearray()
        for start in sorted(pieces):
            assert start <= len(stream), "a piece is missing"
            stream[start : start + len(pieces[start])] = pieces[start]
        streams[flow] = bytes(stream)
    return streams


def _messages(stream):
    """The heads and payloads of gloo's messages, one after the other."""
    # Who connected first tells its number (8 bytes); then come messages, the first without payload.
    place = 0 if struct.unpack_from("<Q", stream, 0)[0] == 48 else 8
    heads, payloads = [], []
    while place < len(stream):
        size, *rest = struct.unpack_from("<6Q", stream, place)
        assert 48 <= size < 2**32
        heads.append((size, *rest))
        if size > 48:
            payloads.append(stream[place + 48 : place + size])
        place += size
    return heads, payloads


def test_the_line_looks_alike_for_different_images(tmp_path):
    """Black images and white noise: the same sizes, and words that no test tells apart."""
    pixels = {
        "black": np.zeros((64, 16, 16), np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, (64, 16, 16), np.uint8),
    }
    words, shapes = {}, {}
    for name, images in pixels.items():
        directory = tmp_path / name
        directory.mkdir()
        np.savez(directory / "images.npz", train_images=images)
        of = ["steps=6", "batch_size=16", "model.features=4", "open_samples=false"]
        settings = config.load("digits", of)
        own = settings.data.model_copy(
            update={"dataset": "npz", "path": str(directory / "images.npz")}
        )
        settings = settings.model_copy(update={"data": own})
        record = directory / "packets"
        _trained(directory, settings, LAN, 9000, record=record)
        streams = _streams(record)
        coordination = sum(len(s) for (_, *ports), s in streams.items() if 7002 in ports)
        assert coordination < 2**16, "JAX's coordinator carries addresses only"
        parsed = {
            address: _messages(stream)
            for (address, *ports), stream in streams.items()
            if 7002 not in ports
        }
        shapes[name] = {address: heads for address, (heads, _) in parsed.items()}
        payloads = [b"".join(parsed[address][1]) for address in LINK.values()]
        words[name] = [np.frombuffer(p, np.uint64, len(p) // 8) for p in payloads]
    sizes = {n: {a: sorted(h[0] for h in of) for a, of in s.items()} for n, s in shapes.items()}
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
