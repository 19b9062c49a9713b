"""On a network: messages, bytes and seconds as stated, and nothing but TLS on the servers' line.

Four machines (network namespaces). Slow: `pytest -m slow`.
"""

import json
import socket
import struct
import time

import jax
import numpy as np
import pytest
from clusters import SEED, Simulated, statuses
from networks import IP_AND_TCP, LINE, Machines, Roles, possible
from scipy import stats

from lpgan_jax.analysis.cost import LAN, WAN, program_cost
from lpgan_jax.cluster.line import HEAD
from lpgan_jax.programs import shapes
from lpgan_jax.training import checkpoint, config
from lpgan_jax.training.building import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="needs root, iproute2 and TUN devices"),
]

TLS_RECORD = 5 + 1 + 16
"""Bytes that TLS 1.3 adds to each record (of 2**14 bytes): head, type and tag."""


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
    heads = cost.rounds * HEAD.size
    tls = TLS_RECORD * (cost.rounds + (cost.online_bytes + heads) / 2**14)
    bytes_a_step = (counted["bytes"] - counted["packets"] * IP_AND_TCP) / steps - tls - heads
    seconds, estimate = summary["seconds_per_step"], cost.seconds(*network)
    print(
        f"{network}: {seconds:.3f} s a step, messages estimated at {estimate:.3f} s; "
        f"{counted['bytes'] / steps / 1e6:.2f} MB a step on the interface, "
        f"{bytes_a_step / 1e6:.2f} MB without framing, {cost.online_bytes / 1e6:.2f} MB estimated"
    )
    # Handshake and notes are of all steps together.
    assert bytes_a_step == pytest.approx(cost.online_bytes, rel=0.01)
    notes = reports[-1]["sent"]["s2"] - steps * (cost.online_bytes + heads)
    assert 0 < notes < 2**12
    simulated = Simulated(settings)
    simulated.attempt(1, 0, steps)
    for place, server in enumerate(("s1", "s2")):
        share = checkpoint.load_share(tmp_path / server, server, steps)[1]
        jax.tree.map(
            lambda own, both, place=place: np.testing.assert_array_equal(own, both[place]),
            share,
            simulated.shares[steps],
        )
    begin = time.perf_counter()
    simulated.attempt(2, steps, steps + 8)  # compiled by now
    computing = (time.perf_counter() - begin) / 8
    # The messages alone, and beside them what one process computes in the place of four.
    assert estimate / 1.5 < seconds < 1.5 * estimate + 2 * computing


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


def _records(stream):
    """(type, version, payload) of the TLS records of a stream; nothing else may be in it."""
    place, records = 0, []
    while place < len(stream):
        kind, version, size = struct.unpack_from("!BHH", stream, place)
        assert place + 5 + size <= len(stream)
        records.append((kind, version, stream[place + 5 : place + 5 + size]))
        place += 5 + size
    return records


HANDSHAKE, CHANGE_CIPHER, DATA = 22, 20, 23


def test_nothing_but_tls_1_3_is_on_the_line(tmp_path):
    """One connection, S2's; after two hellos every byte is encrypted, and looks like noise."""
    settings = config.load("digits", ["steps=4", "batch_size=4", "open_samples=false"])
    record = tmp_path / "packets"
    _trained(tmp_path, settings, LAN, 9000, record=record)
    streams = _streams(record)
    assert {(address, 7002 in (own,)) for address, own, _ in streams} == {
        (LINE["s1"], True),
        (LINE["s2"], False),
    }
    for (address, *_), stream in streams.items():
        hello, *others = _records(stream)
        assert (hello[0], hello[2][0]) == (HANDSHAKE, 1 if address == LINE["s2"] else 2)
        assert b"\x03\x04" in hello[2]  # in its extension: TLS 1.3
        assert {kind for kind, _, _ in others} <= {CHANGE_CIPHER, DATA}
        payload = b"".join(part for kind, _, part in others if kind == DATA)
        assert len(payload) > 2**20
        counts = np.bincount(np.frombuffer(payload, np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
