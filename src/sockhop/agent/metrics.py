"""What Prometheus scrapes: /metrics and /healthz on a TCP address."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sockhop.agent.installed import map_usage
from sockhop.agent.installer import Installer
from sockhop.agent.policy_installer import read_policies
from sockhop.agent.splices import count_splices
from sockhop.agent.state import AgentState, HealthState, Termination
from sockhop.agent.target import split_service_port
from sockhop.agent.terminate import Terminator
from sockhop.agent.watching import Watching
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.policies import PolicyMaps, PolicySetting
from sockhop.datapath.records import Setting
from sockhop.diagnose.watch import Watch
from sockhop.model import Protocol, endpoint

__all__ = ["AgentCollector", "metrics_application"]

_PROTOCOLS = {protocol.number: protocol.lower() for protocol in Protocol}


class AgentCollector(Collector):
    """Reads the maps and the agent's state anew at each scrape."""

    def __init__(
        self,
        maps: BalanceMaps,
        policies: PolicyMaps,
        installer: Installer,
        state: Callable[[], AgentState],
        terminator: Terminator,
        watching: Watching,
    ) -> None:
        self._maps = maps
        self._policies = policies
        self._installer = installer
        self._state = state
        self._terminator = terminator
        self._watching = watching

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics of the agent."""
        yield from self._connects()
        yield from self._denials()
        yield from self._maps_used()
        yield from self._datapath()
        state = self._state()
        yield from self._termination(state.termination)
        yield from self._splices(state)
        yield from self._findings()
        yield from _health(state.health)
        yield GaugeMetricFamily(
            "sockhop_backends_by_hand",
            "Backends whose state is one given by hand.",
            value=len(state.overrides),
        )
        yield from self._sources(state)

    def _connects(self) -> Iterator[Metric]:
        counters = dict(self._maps.counters.items())
        sums: defaultdict[tuple[str, ...], int] = defaultdict(int)
        for key, old in self._installer.installed.entries.items():
            labels = (*split_service_port(old.entry.service), _PROTOCOLS[key.protocol])
            sums[*labels, "balanced"] += counters[old.id].connects
            sums[*labels, "no_backend"] += counters[old.id].no_backend
        family = CounterMetricFamily(
            "sockhop_connects",
            "connect() calls to a frontend; no_backend: rejected with EHOSTUNREACH.",
            labels=["service", "port", "protocol", "result"],
        )
        for label_values, value in sorted(sums.items()):
            family.add_metric(label_values, value)
        yield family

    def _denials(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "sockhop_policy_denied",
            "connect() calls and datagrams that a policy has denied, with EPERM.",
            labels=["policy"],
        )
        for policy in read_policies(self._policies):
            family.add_metric([policy.name], policy.denied)
        yield family
        yield CounterMetricFamily(
            "sockhop_policy_lost",
            "Denied because the rules were not where they should be.",
            value=self._policies.setting(PolicySetting.LOST),
        )

    def _maps_used(self) -> Iterator[Metric]:
        used = GaugeMetricFamily("sockhop_map_entries", "Entries in use.", labels=["map"])
        size = GaugeMetricFamily(
            "sockhop_map_max_entries", "Entries it has room for.", labels=["map"]
        )
        for name, entries, room in map_usage(self._maps):
            used.add_metric([name], entries)
            size.add_metric([name], room)
        yield used
        yield size

    def _datapath(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "sockhop_bypass",
            "1 while every hook lets everything pass.",
            value=self._maps.setting(Setting.BYPASS),
        )
        family = CounterMetricFamily(
            "sockhop_datapath_events", "Rare events in the hooks.", labels=["event"]
        )
        for event, count in self._maps.events().items():
            family.add_metric([event.name.lower()], count)
        yield family

    def _termination(self, state: Termination) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "sockhop_terminations",
            "What was done to live sockets, and what triggered it.",
            labels=["action", "trigger", "protocol"],
        )
        for labels, count in sorted(self._terminator.totals.items()):
            family.add_metric(labels, count)
        yield family
        moves = CounterMetricFamily(
            "sockhop_resteers",
            "UDP sockets that were to be moved, by what kept them from it.",
            labels=["result"],
        )
        for result, count in sorted(self._terminator.moves.items()):
            moves.add_metric([result], count)
        yield moves
        failures = CounterMetricFamily(
            "sockhop_engine_failures",
            "How often the kernel refused a way to end sockets.",
            labels=["engine"],
        )
        for engine, count in sorted(state.failures.items()):
            failures.add_metric([engine], count)
        yield failures
        for name, text, value in (
            ("held_changes", "Changes that wait for sockhop approve.", len(state.held)),
            (
                "held_sockets",
                "Live sockets of changes that wait for sockhop approve.",
                sum(change.sockets for change in state.held),
            ),
            ("draining_sockets", "Live sockets that may end when they are idle.", state.draining),
            ("parked_sockets", "UDP sockets that wait for a backend.", state.parked),
        ):
            yield GaugeMetricFamily(f"sockhop_{name}", text, value=float(value))

    def _splices(self, state: AgentState) -> Iterator[Metric]:
        pairs = CounterMetricFamily(
            "sockhop_splice_pairs", "Pairs of local sockets found.", labels=["service", "port"]
        )
        sent = CounterMetricFamily(
            "sockhop_splice_bytes",
            "What sockets of pairs have sent, spliced or by the stack.",
            labels=["service", "port", "path"],
        )
        left = CounterMetricFamily(
            "sockhop_splice_refusals",
            "Directions that went to the stack, and sockets that were left alone.",
            labels=["service", "port", "reason"],
        )
        for service, port, counters, reasons in count_splices(self._maps, Path(state.bpffs)):
            pairs.add_metric([service, port], counters.pairs)
            sent.add_metric([service, port, "spliced"], counters.spliced_bytes)
            sent.add_metric([service, port, "stack"], counters.stack_bytes)
            for reason, count in reasons.items():
                if reason:
                    left.add_metric([service, port, reason.text], count)
        yield GaugeMetricFamily(
            "sockhop_splicing",
            "1 while new pairs are spliced.",
            value=float(state.splicing.state == "on"),
        )
        yield from (pairs, sent, left)

    def _findings(self) -> Iterator[Metric]:
        now = GaugeMetricFamily(
            "sockhop_findings", "What harms connections of this node, now.", labels=["cause"]
        )
        since = CounterMetricFamily(
            "sockhop_found", "What was found to harm connections, each once.", labels=["cause"]
        )
        present = Counter(each.cause for each in self._watching.state.findings)
        for cause in Watch.causes:
            now.add_metric([cause], present[cause])
            since.add_metric([cause], self._watching.totals[cause])
        yield from (now, since)
        yield GaugeMetricFamily(
            "sockhop_watch_look_seconds",
            "CPU time of the last look at whether connections are harmed.",
            value=self._watching.state.seconds,
        )

    def _sources(self, state: AgentState) -> Iterator[Metric]:
        for name, text, value in (
            (
                "source_error",
                "1 while the sources are broken: the last good state is in force.",
                bool(state.source.error),
            ),
            (
                "sync_error",
                "1 while the kernel does not take what the sources say.",
                bool(state.sync_error),
            ),
            ("last_sync_timestamp_seconds", "When the last good sync ended.", state.synced_at),
            (
                "last_sync_duration_seconds",
                "From reading the sources to the read-back.",
                state.sync_seconds,
            ),
            ("generation", "Number of the last change of the installed state.", state.generation),
            ("services", "Services that are installed.", state.services),
            ("backends", "Backends that the services name.", state.backends),
        ):
            yield GaugeMetricFamily(f"sockhop_{name}", text, value=float(value))


def _health(state: HealthState) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "sockhop_health_checked_backends", "Backends that are checked.", value=state.checked
    )
    yield GaugeMetricFamily(
        "sockhop_health_unasked_backends",
        "Backends that the agent could not ask last time, for a reason of its own.",
        value=sum(state.unasked.values()),
    )
    family = GaugeMetricFamily(
        "sockhop_backend_unhealthy",
        "1 for each backend that is quarantined since its checks fail.",
        labels=["service", "backend"],
    )
    for found in state.unhealthy:
        family.add_metric([found.service, endpoint(found.address, found.port)], 1)
    yield family


def metrics_application(collector: AgentCollector, state: AgentState) -> web.Application:
    """Return the application with GET /metrics and GET /healthz."""
    registry = CollectorRegistry()
    registry.register(collector)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def healthz(_: web.Request) -> web.Response:
        # Alive as long as it follows its sources; a broken file is no reason to restart it.
        note = state.source.error or state.sync_error or "ok"
        return web.Response(text=note + "\n")

    application = web.Application()
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/healthz", healthz)
    return application
