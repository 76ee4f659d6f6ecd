"""Policies in force on a node, without an agent, and what sockets say of them."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sockhop.agent.policy_installer import PolicyInstaller
from sockhop.agent.policy_table import Place, PolicyTable, compile_policies
from sockhop.datapath.policies import PolicyMaps
from sockhop.kernel.cgroups import cgroup_id, cgroup_root
from sockhop.kernel.netns import current_cookie, entered
from sockhop.model import Clients, Policy, PolicyAction, Ports, Protocol, Rule
from tests.clients.dialers import family_of
from tests.datapath.node import Node

__all__ = ["Policed", "allow", "deny", "joined", "rule", "text", "verdict"]


def rule(
    cidr: str,
    *excluded: str,
    ports: tuple[int, int] | None = None,
    protocol: Protocol | None = None,
) -> Rule:
    """Return a rule; *ports*: from and to."""
    if ports is None and protocol is None:
        return Rule(cidr, excluded)
    return Rule(cidr, excluded, (Ports(protocol, *(ports or (1, 65535))),))


def deny(*rules: Rule, name: str = "deny", clients: Clients | None = None) -> Policy:
    """Return a policy that denies."""
    return Policy(name, PolicyAction.DENY, rules, clients)


def allow(*rules: Rule, name: str = "allow", clients: Clients | None = None) -> Policy:
    """Return a policy that allows."""
    return Policy(name, PolicyAction.ALLOW, rules, clients)


class Policed:
    """A node with policies. Use as a context manager, inside that of the node."""

    def __init__(self, node: Node) -> None:
        self.maps = PolicyMaps(node.sandbox.pins)
        self.installer = PolicyInstaller(self.maps)
        self.cgroup = node.sandbox.cgroup
        self.home = current_cookie()
        self.spaces: dict[str, int] = {}

    def __enter__(self) -> "Policed":
        return self

    def __exit__(self, *_: object) -> None:
        self.apply()
        self.maps.close()

    def table(self, *policies: Policy) -> PolicyTable:
        """Return what *policies* mean here; they may name all cgroups below the node's."""
        groups = [self.cgroup, *(path for path in self.cgroup.rglob("*") if path.is_dir())]
        places = {text(path): Place(cgroup_id(path), PurePosixPath(text(path))) for path in groups}
        return compile_policies(policies, self.home, self.spaces, places)

    def apply(self, *policies: Policy) -> bool:
        """Make *policies* all that there is."""
        return self.installer.apply(self.table(*policies), policies)

    @contextlib.contextmanager
    def group(self, name: str) -> Iterator[str]:
        """Make a cgroup below the node's, in a parent that is there; yield its path for clients."""
        path = self.cgroup / name
        path.mkdir()
        try:
            yield text(path)
        finally:
            path.rmdir()

    @contextlib.contextmanager
    def namespace(self, path: Path) -> Iterator[None]:
        """Let policies name the network namespace at *path*, and run the body inside."""
        with entered(path):
            self.spaces[str(path)] = current_cookie()
            yield


def text(cgroup: Path) -> str:
    """Return a cgroup's path from the root of the hierarchy."""
    return f"/{cgroup.relative_to(cgroup_root())}"


@contextlib.contextmanager
def joined(path: str) -> Iterator[None]:
    """Run the body in a cgroup: all threads of this process."""
    before = Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    root = cgroup_root()
    (root / path.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (root / before / "cgroup.procs").write_text(str(os.getpid()))


def verdict(
    host: str, port: int = 9, *, kind: str = "udp", client: socket.socket | None = None
) -> bool:
    """Whether a new socket (or *client*) is denied *host*: EPERM, and not what routes say.

    *kind*: udp and tcp connect, sendto sends.
    """
    type_ = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    made = client or socket.socket(family_of(host), type_)
    made.setblocking(False)
    try:
        if kind == "sendto":
            made.sendto(b"x", (host, port))
        else:
            made.connect((host, port))
    except OSError as error:
        if error.errno == errno.EPERM:
            return True
        assert error.errno in (errno.EINPROGRESS, errno.ENETUNREACH, errno.ECONNREFUSED), error
    finally:
        if client is None:
            made.close()
    return False
