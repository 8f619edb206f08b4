"""In place of a host's cable: every packet arrives later by a fixed time, both ways, in order.

    python delayed_cable.py HOST_PID CABLE ADDRESS/24 GATEWAY ONE_WAY_MS      in the office's network; SIGTERM restores the cable

Two TAP devices: one in the host as eth0, one on the bridge. They offload nothing, so a packet is what the wire would carry.
"""

import collections
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
LIMIT = 100_000


def ip(*lines: str, at: Sequence[str] = ()) -> None:
    for line in lines:
        subprocess.run([*at, "ip", *line.split()], check=True)


def tap(name: str) -> int:
    """A new TAP device; it stays this process's, whichever network namespace it is moved to."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def main() -> None:
    host, cable, address, gateway, delay_ms = sys.argv[1:]
    number, delay_s = cable[1:], float(delay_ms) / 1000
    there = ["nsenter", "-t", host, "-n", "--"]
    mac = f"02:77:00:00:00:{int(number):02x}"
    ends: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(1))
    inner, outer = tap(f"in{number}"), tap(f"out{number}")
    ip(f"link set in{number} netns {host}", f"link set out{number} master br0 up", f"link set {cable} down")
    ip(
        "link set eth0 down",
        "link set eth0 name aside",
        "addr flush dev aside",
        f"link set in{number} name eth0",
        at=there,
    )
    back = ("link set eth0 up", f"route replace default via {gateway}")
    ip(f"link set eth0 address {mac}", f"addr add {address} dev eth0", *back, at=there)
    print("up", flush=True)
    carry(inner, outer, delay_s, ends)
    os.close(inner)
    os.close(outer)
    ip("link set aside name eth0", f"addr add {address} dev eth0", at=there)
    ip(f"link set {cable} up")
    ip(*back, at=there)


def carry(inner: int, outer: int, delay_s: float, ends: list[int]) -> None:
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while not ends:
        wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
        for device in select.select([inner, outer], [], [], wait_s)[0]:
            try:
                while len(waiting) < LIMIT:
                    packet = os.read(device, 1 << 16)
                    waiting.append((time.monotonic() + delay_s, outer if device == inner else inner, packet))
            except BlockingIOError:
                pass
        while waiting and waiting[0][0] <= time.monotonic():
            _, device, packet = waiting.popleft()
            try:
                os.write(device, packet)
            except OSError:
                continue  # as a cable would lose it


main()
