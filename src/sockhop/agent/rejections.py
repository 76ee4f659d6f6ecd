"""Nothing is silent: what the hooks counted since the last look, as log lines."""

import logging
from collections import Counter

from sockhop.agent.installer import Installer
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import Total

__all__ = ["RejectionLog"]

_LOG = logging.getLogger(__name__)
_SERVICES = 10

_MEANING = {
    Total.STORAGE_FAILED: "sockets without sk_storage (net.core.optmem_max?), "
    "whose provenance is kept by cookie",
    Total.LIVE_FULL: "sockets that found no room in the map live (sockhop agent --map-size live=N)",
    Total.EXHAUSTED: "connects refused because their service changed four times under them",
    Total.AMBIGUOUS: "UDP sockets that use one backend for two services",
    Total.RESERVED: "binds to a reserved frontend, refused",
}


class RejectionLog:
    """Compares the counters with those of the last call, and logs what has grown."""

    def __init__(self, maps: BalanceMaps, installer: Installer) -> None:
        self._maps = maps
        self._installer = installer
        self._services = self._rejected()
        self._totals = dict(maps.totals.items())

    def write(self) -> None:
        """Log at most a line for each of a few services, and for each rare event."""
        now = self._rejected()
        grown = Counter({name: n - self._services[name] for name, n in now.items()})
        self._services = now
        for name, n in (+grown).most_common(_SERVICES):
            _LOG.warning("%s: rejected with EHOSTUNREACH, no backend is active: %d", name, n)
        totals = dict(self._maps.totals.items())
        for total, meaning in _MEANING.items():
            if (n := totals[total] - self._totals[total]) > 0:
                _LOG.warning("%s: %d", meaning, n)
        self._totals = totals

    def _rejected(self) -> Counter[str]:
        counters = dict(self._maps.counters.items())
        rejected: Counter[str] = Counter()
        for old in self._installer.installed.entries.values():
            rejected[old.entry.service] += counters[old.id].no_backend
        return rejected
