"""What the agent knows of itself, as `status` and the API show it."""

import time

import msgspec

from sockhop.diagnose.causes import Finding
from sockhop.model import BackendState, Rule

__all__ = [
    "AgentState",
    "BackendRequest",
    "HealthState",
    "HeldChange",
    "Override",
    "PolicyState",
    "SourceState",
    "SplicingState",
    "Termination",
    "WatchState",
    "UnhealthyBackend",
]


class SourceState(msgspec.Struct):
    """How the last reading of the sources went. Times are Unix seconds, 0.0 for never.

    `error` is empty while the sources are good; else the last good state stays in force.
    """

    paths: list[str]
    node_name: str = ""
    coexist: bool = False
    good_at: float = 0.0
    error: str = ""
    error_at: float = 0.0
    warnings: list[str] = []


class PolicyState(msgspec.Struct):
    """A policy or a redirect as the sources ask for it.

    `action`: allow, deny or redirect. `refused`: why none of it is enforced; `missing`: the
    namespaces and cgroups of its clients that are not there. `rules`: those of a policy, which
    `targets` has as text.
    """

    name: str
    action: str
    clients: str
    targets: list[str]
    refused: list[str]
    missing: list[str]
    rules: list[Rule] = []


class HeldChange(msgspec.Struct):
    """A change that ends and moves no socket before somebody approves of it.

    `sockets`: how many live ones it concerns, never too few; `what`: what befell which backends.
    """

    change: int
    reason: str
    sockets: int
    what: list[str]


class Termination(msgspec.Struct):
    """What is done to live sockets. `draining` and `parked` count them, never too few.

    `brake` and `approve_above` are as in :class:`sockhop.agent.brake.Limits`. Since the agent
    started: `done` by what was done, `failures` of each way to end sockets.
    """

    engine: str = ""
    brake: bool = True
    approve_above: int | None = None
    held: list[HeldChange] = []
    draining: int = 0
    parked: int = 0
    done: dict[str, int] = {}
    failures: dict[str, int] = {}


class SplicingState(msgspec.Struct):
    """Whether anything is spliced. `state`: off, on, unavailable or faulty; `reason` says why.

    `given_up`: services with `auto` whose answers were not quicker; `faults`: known ones of
    kernels of this version.
    """

    state: str = "off"
    reason: str = "nothing is opted in"
    services: list[str] = []
    given_up: list[str] = []
    faults: list[str] = []


class WatchState(msgspec.Struct):
    """What the agent sees of harmed connections; it looks `every` so many seconds, 0: never.

    `reason`: why it cannot; `seconds`: the CPU time of the last look.
    """

    every: float = 0.0
    reason: str = ""
    seconds: float = 0.0
    findings: list[Finding] = []


class UnhealthyBackend(msgspec.Struct):
    """A backend that is quarantined since its checks fail; `since` in Unix seconds."""

    service: str
    address: str
    port: int
    reason: str
    since: float


class HealthState(msgspec.Struct):
    """How many backends are checked, and which of them are unhealthy, once for each service.

    `unasked`: how many could not be asked last time, by what kept the agent from it: nothing is
    learnt of them then.
    """

    checked: int = 0
    unhealthy: list[UnhealthyBackend] = []
    unasked: dict[str, int] = {}


class Override(msgspec.Struct, frozen=True, order=True):
    """The state that a backend of a service has by hand, instead of the manifest's.

    `until` is in seconds of CLOCK_BOOTTIME, None for no end.
    """

    service: str
    address: str
    port: int
    state: BackendState
    until: float | None = None


class BackendRequest(msgspec.Struct):
    """What somebody wants of a backend: a state by hand, `active`: the manifest's again.

    `service`: in this one only, "": wherever it is; `seconds`: for how long, 0 for no end.
    """

    address: str
    port: int
    state: BackendState
    service: str = ""
    seconds: float = 0.0


class AgentState(msgspec.Struct):
    """A running agent."""

    pid: int
    version: str
    started_at: float
    cgroup: str
    bpffs: str
    source: SourceState
    services: int = 0
    frontends: int = 0
    backends: int = 0
    generation: int = 0
    synced_at: float = 0.0
    sync_seconds: float = 0.0
    sync_error: str = ""
    policies: list[PolicyState] = []
    termination: Termination = msgspec.field(default_factory=Termination)
    splicing: SplicingState = msgspec.field(default_factory=SplicingState)
    watch: WatchState = msgspec.field(default_factory=WatchState)
    health: HealthState = msgspec.field(default_factory=HealthState)
    overrides: list[Override] = []

    @property
    def healthy(self) -> bool:
        """Whether what is installed is what the sources say."""
        return not self.source.error and not self.sync_error

    def failed(self, error: str) -> None:
        """Note that the sources could not be read."""
        self.source.error, self.source.error_at = error, time.time()
