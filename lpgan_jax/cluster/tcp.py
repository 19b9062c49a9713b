"""How many bytes this process's TCP connections have carried, as the kernel counts them (Linux)."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Collection

_ACKED_AT, _RECEIVED_AT = 120, 128
"""Where tcpi_bytes_acked and tcpi_bytes_received are in struct tcp_info (linux/tcp.h)."""


def bytes_with(addresses: Collection[str], without_port: int) -> tuple[int, int]:
    """Bytes (sent and acknowledged, received) on the connections that are open now.

    Args:
        addresses: both ends must be among these.
        without_port: connections of this local port are left out.
    """
    sent = received = 0
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            descriptor = int(entry)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as connection:
                local, remote = connection.getsockname(), connection.getpeername()
                ends = {str(end[0]).removeprefix("::ffff:") for end in (local, remote)}
                if not ends <= set(addresses) or without_port in (local[1], remote[1]):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except (OSError, ValueError, IndexError, TypeError):
            continue
        sent += struct.unpack_from("Q", info, _ACKED_AT)[0]
        received += struct.unpack_from("Q", info, _RECEIVED_AT)[0]
    return sent, received
