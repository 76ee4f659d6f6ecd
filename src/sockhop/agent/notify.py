"""The service manager's notification protocol, sd_notify(3)."""

import os
import socket
import time
from contextlib import suppress

__all__ = ["notify", "watchdog_interval"]

_SECONDS = 5.0


def notify(*assignments: str) -> None:
    """Send assignments such as `READY=1` to the service manager; without one, do nothing.

    A manager that does not read is waited for, some seconds, only when it is told READY=1.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if "RELOADING=1" in assignments:
        assignments += (f"MONOTONIC_USEC={time.monotonic_ns() // 1000}",)
    # A leading @ stands for the NUL of an abstract address.
    to = "\0" + address[1:] if address.startswith("@") else address
    # Nobody may listen any more, or no descriptor be left: no reason to end.
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
    ):
        channel.settimeout(_SECONDS if "READY=1" in assignments else 0)
        channel.sendto("\n".join(assignments).encode(), to)


def watchdog_interval() -> float | None:
    """Return how often to send WATCHDOG=1, in seconds: half of what the manager allows."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdecimal() else None
