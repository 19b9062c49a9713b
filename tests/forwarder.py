"""A network in user space: packets between namespaces, with a delay, and lines that can be cut.

`python forwarder.py SETTINGS` makes a TUN device for each end of each line, moves it into its
namespace, and forwards IP packets from end to end. It reads commands from its standard input, a
line each: `cut NET`, `heal NET`, `delay SECONDS`.

SETTINGS is JSON: {"delay_s": 0.02, "ends": [[net, namespace, address], ...], "mtu": 1500,
"record": [net, file] or null}. A record has each packet after its length (4 bytes, big-endian).
"""

import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
LARGEST_PACKET = 2**16


def make_end(number: int, net: str, namespace: str, address: str, mtu: int) -> int:
    """A TUN device in a namespace; its descriptor."""
    device = f"{net}{os.getpid() % 10000}x{number}"[:15]
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI)
    fcntl.ioctl(descriptor, TUNSETIFF, request)

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    ip("link", "set", device, "netns", namespace)
    ip("-n", namespace, "link", "set", device, "name", net)
    ip("-n", namespace, "addr", "add", f"{address}/24", "dev", net)
    ip("-n", namespace, "link", "set", "dev", net, "mtu", str(mtu), "txqueuelen", "10000", "up")
    return descriptor


def main() -> None:
    settings = json.loads(sys.argv[1])
    delay, cut = settings["delay_s"], set()
    recorded, path = settings["record"] or (None, os.devnull)
    record = open(path, "wb", 2**20)  # noqa: SIM115
    net_of, towards = {}, {}
    for number, (net, namespace, address) in enumerate(settings["ends"]):
        descriptor = make_end(number, net, namespace, address, settings["mtu"])
        net_of[descriptor] = net
        towards[net, socket.inet_aton(address)] = descriptor
    print("ready", flush=True)
    waiting: deque[tuple[float, int, bytes]] = deque()
    poll = select.poll()
    for descriptor in [0, *net_of]:
        poll.register(descriptor, select.POLLIN)
    commands = b""
    while True:
        limit = None if not waiting else max(0.0, waiting[0][0] - time.monotonic())
        # poll counts in milliseconds: for the last one, look again and again
        ready = poll.poll(None if limit is None else int(1000 * limit))
        now = time.monotonic()
        for descriptor, _ in ready:
            if descriptor == 0:
                data = os.read(0, 4096)
                if not data:
                    record.close()
                    return
                *lines, commands = (commands + data).split(b"\n")
                for line in lines:
                    verb, what = line.decode().split()
                    if verb == "cut":
                        cut.add(what)
                    elif verb == "heal":
                        cut.discard(what)
                    else:
                        delay = float(what)
                continue
            net = net_of[descriptor]
            for _ in range(64):
                try:
                    packet = os.read(descriptor, LARGEST_PACKET)
                except BlockingIOError:
                    break
                if net == recorded:
                    record.write(struct.pack("!I", len(packet)) + packet)
                end = towards.get((net, packet[16:20]))
                if end is not None and net not in cut:
                    waiting.append((now + delay, end, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, end, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # as a full queue drops packets
                os.write(end, packet)


if __name__ == "__main__":
    main()
