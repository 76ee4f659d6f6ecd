"""What the tests of attaching share: clients that never stop, strangers' programs, old kernels."""

import functools
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_bool
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sockhop.agent.installer import Installer
from sockhop.agent.plan import make_plan
from sockhop.agent.target import expand
from sockhop.datapath.balancer import HOOKS, Balancer
from sockhop.kernel._libbpf import lib
from sockhop.kernel.cgroups import AttachType, attached_programs, open_cgroup
from sockhop.kernel.netns import current_cookie
from sockhop.kernel.objects import BpfObject
from sockhop.kernel.syscall import check
from sockhop.model import Backend, Desired, Frontend, Protocol, Service
from tests.mutants import mutant
from tests.sandbox import Agent, Sandbox

__all__ = [
    "CONNECT",
    "NO_LINKS",
    "Clients",
    "Seen",
    "Stranger",
    "attach_flagless",
    "connects",
    "install",
    "lighter",
    "on_cgroup",
    "running_agent",
    "tree_of",
]

CONNECT = (AttachType.SOCK_RELEASE, AttachType.GETPEERNAME4, AttachType.CONNECT4)
"""The hooks that a connected IPv4 client meets, in the order of attaching."""

# bpf(2) as it was before links: BPF_LINK_CREATE (28, enum bpf_cmd) is EINVAL.
NO_LINKS = (sys.executable, str(Path(__file__).with_name("without_links.py")))

PORT = 80


def lighter(directory: Path) -> Path:
    """Compile the balance programs so that only those of CONNECT are loaded, which is quick."""
    directory.mkdir()
    rest = [hook.hook for hook in HOOKS if hook not in CONNECT]
    marks = [(f'SEC("cgroup/{hook}")', f'SEC("?cgroup/{hook}")') for hook in rest]
    return mutant(directory, "balance", *marks)


# --- clients ------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What clients met: how many connects were right, and what was not."""

    connects: int
    failed: list[str]
    untranslated: list[str]


class Clients:
    """One process a core; each connects over UDP and TCP to a service of its own, all the time.

    The body of `with` runs meanwhile; `seen` holds from its end on.
    """

    seen: Seen

    def __init__(self) -> None:
        self._cores = sorted(os.sched_getaffinity(0))
        self._listeners = [socket.create_server(("127.0.0.1", 0), backlog=64) for _ in self._cores]

    def services(self) -> Desired:
        """What to install for them."""
        return Desired(tuple(map(self._service, range(len(self._cores)))))

    def _service(self, index: int) -> Service:
        backends = (Backend(*self._listeners[index].getsockname()),)
        frontends = [Frontend(_vip(index), PORT, p, backends=backends) for p in Protocol]
        return Service(f"s{index}", tuple(frontends))

    def __enter__(self) -> "Clients":
        context = multiprocessing.get_context("fork")
        self._stop, self._results = context.Value(c_bool, False), context.SimpleQueue()
        self._processes = [
            context.Process(target=self._run, args=(index,)) for index in range(len(self._cores))
        ]
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.value = True
        found: list[Seen] = [self._results.get() for _ in self._processes]
        for process in self._processes:
            process.join(30)
        for listener in self._listeners:
            listener.close()
        self.seen = Seen(
            sum(seen.connects for seen in found),
            [line for seen in found for line in seen.failed],
            [line for seen in found for line in seen.untranslated],
        )

    def _run(self, index: int) -> None:
        os.sched_setaffinity(0, {self._cores[index]})
        seen, begin = Seen(0, [], []), time.monotonic()
        right = 0
        while not self._stop.value:
            time.sleep(0.0002)  # some hundred connects an upgrade are enough; leave it its time
            for connect in (_connect_udp, _connect_tcp):
                try:
                    wrong = connect(_vip(index), self._listeners[index])
                except OSError as error:
                    seen.failed.append(f"{time.monotonic() - begin:.3f} s: {error!r}")
                    continue
                if wrong:
                    seen.untranslated.append(f"{time.monotonic() - begin:.3f} s: {wrong}")
                right += not wrong
        self._results.put(seen._replace(connects=right))


def _vip(index: int) -> str:
    return f"10.0.0.{10 + index}"


def _connect_udp(vip: str, _: socket.socket) -> str:
    """Return what is wrong: nobody there tells that the socket's own address is the backend's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((vip, PORT))
        ours, peer = client.getsockname()[0], client.getpeername()
    return "" if (ours, peer) == ("127.0.0.1", (vip, PORT)) else f"UDP from {ours} to {peer}"


def _connect_tcp(vip: str, listener: socket.socket) -> str:
    with socket.socket() as client:
        # No TIME_WAIT: the ports would not last.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.connect((vip, PORT))
        peer = client.getpeername()
        listener.settimeout(5)
        listener.accept()[0].close()
    return "" if peer == (vip, PORT) else f"TCP to {peer}"


def install(balancer: Balancer, desired: Desired) -> None:
    """Install the services, as the agent does."""
    installer = Installer(balancer.maps)
    installer.apply(make_plan(expand(desired, current_cookie()), installer.installed))


def connects(address: str, port: int = PORT) -> bool:
    """Whether a TCP connect gets through."""
    with socket.socket() as client:
        return client.connect_ex((address, port)) == 0


# --- what is attached ---------------------------------------------------------------------------


def on_cgroup(cgroup: Path, hooks: tuple[AttachType, ...] = HOOKS) -> dict[str, tuple[int, ...]]:
    """Return the ids of all programs on the cgroup itself, by hook."""
    with open_cgroup(cgroup) as fd:
        found = {hook.hook: attached_programs(fd, hook).programs for hook in hooks}
    return {hook: programs for hook, programs in found.items() if programs}


def tree_of(directory: Path) -> set[str]:
    """Return the paths of everything below a directory."""
    return {str(path) for path in directory.rglob("*")}


def attach_flagless(program: int, cgroup: Path, hook: AttachType) -> None:
    """PROG_ATTACH without flags, as tools did before links."""
    with open_cgroup(cgroup) as fd:
        check(lib.bpf_prog_attach(program, fd, hook, 0), f"attaching at {hook.hook}")


STRANGER = """
struct bpf_sock_addr { unsigned family, ip4, ip6[4], port; };
struct __sk_buff;
#define PROGRAM(at, name) __attribute__((section(at), used)) int name
PROGRAM("cgroup/connect4", other_connect4)(struct bpf_sock_addr *ctx)
{
	return ctx->port != (unsigned)__builtin_bswap16(6666);
}
PROGRAM("cgroup/sendmsg4", other_sendmsg4)(struct bpf_sock_addr *ctx) { return 1; }
PROGRAM("cgroup/getpeername4", other_peername4)(struct bpf_sock_addr *ctx) { return 1; }
PROGRAM("cgroup/bind4", other_bind4)(struct bpf_sock_addr *ctx) { return 1; }
PROGRAM("cgroup_skb/egress", other_egress)(struct __sk_buff *skb) { return 1; }
__attribute__((section("license"), used)) char terms[] = "GPL";
"""


@functools.cache
def _compiled_stranger() -> bytes:
    command = ("clang", "-O2", "-g", "-target", "bpf", "-x", "c", "-c", "-", "-o", "-")
    return subprocess.run(command, input=STRANGER.encode(), capture_output=True, check=True).stdout


class Stranger:
    """Programs of another tool. The one at connect4 forbids port 6666, so one sees if it runs."""

    names: ClassVar = {
        AttachType.CONNECT4: "other_connect4",
        AttachType.SENDMSG4: "other_sendmsg4",
        AttachType.GETPEERNAME4: "other_peername4",
        AttachType.BIND4: "other_bind4",
        AttachType.EGRESS: "other_egress",
    }

    def __init__(self, directory: Path) -> None:
        made = directory / "stranger.bpf.o"
        made.write_bytes(_compiled_stranger())
        self._object = BpfObject(made)

    def program(self, hook: AttachType) -> int:
        """Return the descriptor of the program for that hook."""
        return self._object.program(self.names[hook])

    def attach(self, cgroup: Path, hook: AttachType, flags: int = 0) -> int:
        """Attach it and return its id."""
        with open_cgroup(cgroup) as fd:
            check(lib.bpf_prog_attach(self.program(hook), fd, hook, flags), "attaching")
            return attached_programs(fd, hook).programs[-1]

    def detach(self, cgroup: Path, hook: AttachType) -> None:
        """Undo that."""
        with open_cgroup(cgroup) as fd:
            check(lib.bpf_prog_detach2(self.program(hook), fd, hook), "detaching")

    @staticmethod
    def forbids() -> bool:
        """Whether the program at connect4 runs for this process."""
        with socket.socket() as client:
            try:
                client.connect(("127.0.0.1", 6666))
            except PermissionError:
                return True
            except ConnectionRefusedError:
                return False
        raise AssertionError("somebody serves port 6666")

    def close(self) -> None:
        self._object.close()


# --- processes ----------------------------------------------------------------------------------


class _Prefixed:
    """A sandbox whose commands run under another program."""

    def __init__(self, sandbox: Sandbox, prefix: tuple[str, ...]) -> None:
        self._sandbox = sandbox
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sandbox, name)

    def inside(self, *command: str) -> list[str]:
        return self._sandbox.inside(*self._prefix, *command)


@contextmanager
def running_agent(
    sandbox: Sandbox, manifest: Path, *arguments: str, prefix: tuple[str, ...] = ()
) -> Iterator[Agent]:
    """Run an agent under the command *prefix* while the body runs."""
    agent = Agent(_Prefixed(sandbox, prefix), ("-f", str(manifest), *arguments))  # type: ignore[arg-type]
    sandbox._agents.append(agent)
    try:
        yield agent.wait_ready()
    finally:
        agent.stop()
