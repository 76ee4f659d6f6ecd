"""Whether an address is a frontend that sockhop balances here."""

import socket
from pathlib import Path

from sockhop.datapath.balancer import BalanceMaps, NotInstalled
from sockhop.datapath.records import BackendRecord, FrontendKey

__all__ = ["backends_of"]


def backends_of(pins: Path, target: tuple[bytes, int]) -> list[BackendRecord] | None:
    """Return the backends of the frontend at *target*, TCP; None if there is none.

    *target*: a packed address and a port; *pins*: the bpffs directory of an agent, if one runs.
    """
    try:
        with BalanceMaps(pins) as maps:
            frontend = maps.frontends.get(FrontendKey(target[0], 0, target[1], socket.IPPROTO_TCP))
            if frontend is None:
                return None
            return [each for _, each in maps.backends.items() if each.service == frontend.service]
    except NotInstalled:
        return None
