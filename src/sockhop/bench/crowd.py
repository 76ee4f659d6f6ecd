"""Many balanced sockets in many network namespaces, some of them at backends that are to go."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from sockhop.agent.installer import Installer
from sockhop.agent.plan import make_plan
from sockhop.agent.target import expand
from sockhop.bench.holder import COMMAND, MOST, Close, Group, Holder, Open, Prepare
from sockhop.bench.rooms import Site
from sockhop.datapath.balancer import Balancer, remove_pins
from sockhop.datapath.sockets import Pair
from sockhop.kernel import netns
from sockhop.kernel.cgroups import open_cgroup
from sockhop.model import Backend, Desired, Frontend, Protocol, Service, pack_address

__all__ = ["Crowd", "Shape"]

PORT = 7000
_DOOMED, _REST = "10.255.0.1", "10.255.0.2"
_REST_BACKENDS = 50
_MATCHING_NAMESPACES = 3
_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class Shape(NamedTuple):
    """How many sockets there are, in how many namespaces, and how many backends are to go.

    `own_tables`: whether each namespace has hash tables of its own for TCP and UDP.
    """

    sockets: int
    namespaces: int
    backends: int
    own_tables: bool

    @property
    def matching(self) -> int:
        """How many sockets are at the backends that go: 1 %."""
        return self.sockets // 100

    @property
    def direct(self) -> int:
        """How many more are at the same backends without us, and have to stay."""
        return max(self.matching // 10, 1)


class Crowd:
    """The sockets, held by processes of their own; services are installed and attached."""

    def __init__(self, site: Site, shape: Shape) -> None:
        self.site = site
        self.shape = shape
        self.names = [f"{site.name}-{number}" for number in range(shape.namespaces)]
        self._holders: list[Holder] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Make all of it, run the body, and remove it."""
        with ExitStack() as stack:
            stack.callback(remove_pins, self.site.pins)
            self._make_namespaces(stack)
            stack.callback(self._disperse)
            self._balance(stack)
            self._start_holders()
            yield

    def reopen(self) -> None:
        """Make the sockets that are at the backends that go, anew."""
        shape, places = self.shape, self.names[:_MATCHING_NAMESPACES]
        holder = self._holders[0]
        holder.ask(Close("doomed"))
        holder.ask(Close("direct"))
        doomed = _parts(shape.matching, places, _DOOMED, 80)
        direct = _parts(shape.direct, places, self.doomed[0].address, PORT)
        holder.ask(Open("doomed", doomed))
        holder.ask(Open("direct", direct))

    # --- what is made -------------------------------------------------------------------------

    def _make_namespaces(self, stack: ExitStack) -> None:
        parent = f"{self.site.name}-parent"
        with _namespace(parent, stack), netns.entered(_path(parent)):
            for name in ("tcp_child_ehash_entries", "udp_child_hash_entries"):
                size = "2048" if self.shape.own_tables else "0"
                Path("/proc/sys/net/ipv4", name).write_text(size)
            for name in self.names:
                stack.enter_context(_namespace(name, stack))

    def _balance(self, stack: ExitStack) -> None:
        self.site.pins.mkdir(mode=0o700, exist_ok=True)
        balancer = stack.enter_context(Balancer(self.site.pins))
        self.doomed = tuple(
            Backend(f"10.1.{n // 250}.{n % 250 + 1}", PORT) for n in range(self.shape.backends)
        )
        rest = tuple(Backend(f"10.2.0.{n + 1}", PORT) for n in range(_REST_BACKENDS))
        services = (_service("doomed", _DOOMED, self.doomed), _service("rest", _REST, rest))
        installer = Installer(balancer.maps)
        target = expand(Desired(services), netns.current_cookie())
        installer.apply(make_plan(target, installer.installed))
        doomed = {pack_address(each.address) for each in self.doomed}
        self.pairs = {
            Pair(record.service, number)
            for number, record in balancer.maps.backends.items()
            if record.address in doomed
        }
        balancer.attach(stack.enter_context(open_cgroup(self.site.cgroup)))

    def _start_holders(self) -> None:
        shape = self.shape
        groups = _parts(shape.sockets - shape.matching, self.names, _REST, 80)
        self._start().ask(Prepare([str(_path(name)) for name in self.names], PORT))
        for share in _shares(groups):
            self._start().ask(Open("rest", share))

    def _start(self) -> Holder:
        group = self.site.cgroup / "holders"
        group.mkdir(exist_ok=True)
        process = subprocess.Popen(
            ["sh", "-c", _JOIN, str(group), *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._holders.append(Holder(process))
        return self._holders[-1]

    def _disperse(self) -> None:
        for holder in self._holders:
            holder.end()
        self._holders = []


def _service(name: str, address: str, backends: tuple[Backend, ...]) -> Service:
    frontends = (Frontend(address, 80, protocol, backends=backends) for protocol in Protocol)
    return Service(name, tuple(frontends))


def _path(name: str) -> Path:
    return Path("/run/netns") / name


def _parts(count: int, places: Sequence[str], address: str, port: int) -> list[Group]:
    """Spread *count* sockets evenly over *places*."""
    each, over = divmod(count, len(places))
    return [
        Group(str(_path(place)), each + (number < over), address, port)
        for number, place in enumerate(places)
    ]


def _shares(groups: Sequence[Group]) -> list[list[Group]]:
    """Part groups so that no process has too many sockets."""
    shares: list[list[Group]] = [[]]
    room = MOST
    for group in groups:
        left = group.count
        while left:
            if not room:
                shares.append([])
                room = MOST
            some = min(left, room)
            shares[-1].append(Group(group.namespace, some, group.address, group.port))
            left, room = left - some, room - some
    return shares


@contextmanager
def _namespace(name: str, stack: ExitStack) -> Iterator[None]:
    """Make a namespace below this thread's in which 10.0.0.0/8 is local; *stack* removes it."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
    commands = "link set lo up\naddr add 10.0.0.1/8 dev lo\n"
    subprocess.run(["ip", "-n", name, "-batch", "-"], input=commands.encode(), check=True)
    yield
