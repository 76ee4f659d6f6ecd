"""Nothing is silent: what the hooks counted since the last look, as log lines."""

import logging
from collections import Counter

from sockhop.agent.installer import Installer
from sockhop.agent.policy_installer import read_policies
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.policies import PolicyMaps
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

    def __init__(self, maps: BalanceMaps, installer: Installer, policies: PolicyMaps) -> None:
        self._maps = maps
        self._installer = installer
        self._policies = policies
        self._denied = self._denials()
        self._totals = maps.events()
        # With many services these are slow to read, and nobody has been rejected where all is well.
        self._counts = self._rejected() if self._totals[Total.REJECTED] else {}

    def write(self) -> None:
        """Log at most a line for each of a few services and policies, and for each rare event."""
        totals = self._maps.events()
        grown = {total: totals[total] - self._totals[total] for total in Total}
        self._totals = totals
        if grown[Total.REJECTED] > 0:
            self._write_services(grown[Total.REJECTED])
        for total, meaning in _MEANING.items():
            if grown[total] > 0:
                _LOG.warning("%s: %d", meaning, grown[total])
        denied = self._denials()
        for name, n in (denied - self._denied).most_common(_SERVICES):
            _LOG.warning("policy %s: denied with EPERM: %d", name, n)
        self._denied = denied

    def _write_services(self, rejected: int) -> None:
        before, self._counts = self._counts, self._rejected()
        services: Counter[str] = Counter()
        for old in self._installer.installed.entries.values():
            services[old.entry.service] += max(0, self._counts[old.id] - before.get(old.id, 0))
        services["services that are gone"] = rejected - services.total()
        for name, n in (+services).most_common(_SERVICES):
            _LOG.warning("%s: rejected with EHOSTUNREACH, no backend is active: %d", name, n)

    def _denials(self) -> Counter[str]:
        return Counter({policy.name: policy.denied for policy in read_policies(self._policies)})

    def _rejected(self) -> dict[int, int]:
        """Counts by the id of the frontend."""
        counters = dict(self._maps.counters.items())
        return {
            old.id: counters[old.id].no_backend
            for old in self._installer.installed.entries.values()
        }
