"""`sockhop explain` names the policy and the rule that denied a socket, and knows redirects."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from sockhop.kernel.cgroups import cgroup_root
from tests.agent.test_enforce import DNS, dns_service, other_objects, redirect
from tests.agent.test_forbidden import cookie
from tests.agent.test_policies import manifest, objects
from tests.datapath.rules import joined
from tests.sandbox import Sandbox, ServerThread, publish, wait_until

pytestmark = pytest.mark.kernel

VIP, DENIED = "10.96.0.10", "127.0.9.1"
NO = {"name": "no", "deny": [{"cidr": "127.0.8.0/24"}, {"cidr": "127.0.9.0/24", "ports": [53, 80]}]}
ONLY = {
    "name": "only",
    "allow": [{"cidr": "127.0.0.0/8"}, {"cidr": "10.0.0.0/8"}],
}
WEB = {
    "name": "web",
    "frontends": [f"{VIP}:80/tcp+udp"],
    "backends": [f"{DENIED}:80"],
}


@pytest.fixture(scope="module")
def policed() -> Iterator[Sandbox]:
    with Sandbox() as made, made.agent(made.manifest(manifest(NO, ONLY, services=[WEB]))):
        yield made


def explain(sandbox: Sandbox, what: object) -> tuple[int, dict[str, Any]]:
    result = sandbox.sockhop("explain", str(what), "-o", "json", check=False)
    assert not result.stderr
    return result.returncode, json.loads(result.stdout)


def descriptor(client: socket.socket) -> str:
    return f"{os.getpid()}:{client.fileno()}"


@contextlib.contextmanager
def denied(host: str, port: int, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """Yield a socket that has just been denied *host*."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as client:
        assert client.connect_ex((host, port)) == errno.EPERM
        yield client


def test_a_denied_connect_names_the_policy_and_the_rule(policed: Sandbox) -> None:
    """The kernel lists no socket that is not connected; it may be closed, too."""
    for kind, protocol in ((socket.SOCK_DGRAM, "udp"), (socket.SOCK_STREAM, "tcp")):
        told = []
        with denied(DENIED, 80, kind) as client:
            number = cookie(client)
            for name in (descriptor(client), number):
                status, found = explain(policed, name)
                assert status == 1
                told += found["denied"]
        status, found = explain(policed, f"{DENIED}:80")
        assert status == 1
        told.append(found["denied"][0])
        for each in told:
            assert each["age"] >= 0
            assert each["cookie"] == number
            assert each["process"].endswith(f"/{os.getpid()}")
            assert (each["policy"], each["action"], each["what"], each["rules"]) == (
                "no", "deny", "connect", ["127.0.9.0/24 53/tcp+udp 80/tcp+udp"],
            )  # fmt: skip
            assert each["destination"] == f"{DENIED}:80/{protocol}"
    shown = policed.sockhop("explain", f"{DENIED}:80", check=False).stdout
    assert f"policy no denied its connect to {DENIED}:80/tcp: it denies 127.0.9.0/24" in shown


def test_where_a_server_listens_at_that_address(policed: Sandbox) -> None:
    """The address names the server's socket, which nobody has asked about."""
    with ServerThread("denied", DENIED, 80), denied(DENIED, 80):
        status, found = explain(policed, f"{DENIED}:80")
    assert (status, found["state"]) == (1, "LISTEN")
    assert (found["denied"]["policy"], found["denied"]["what"]) == ("no", "connect")


def test_what_an_allowance_leaves_out(policed: Sandbox) -> None:
    with denied("192.0.2.1", 443), denied("2001:db8::1", 443):
        for host in ("192.0.2.1:443", "[2001:db8::1]:443"):
            shown = policed.sockhop("explain", host, check=False).stdout
            assert (
                f"policy only denied its connect to {host}/tcp: "
                "it allows only 127.0.0.0/8, 10.0.0.0/8"
            ) in shown


def test_behind_a_service(policed: Sandbox) -> None:
    """What is denied is the backend; who asks may know the service only."""
    with denied(VIP, 80):
        status, found = explain(policed, f"{VIP}:80")
    assert (status, found["denied"][0]["destination"]) == (1, f"{DENIED}:80/tcp")


def test_a_denied_datagram(policed: Sandbox) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
        with pytest.raises(PermissionError):
            client.sendto(b"?", (f"::ffff:{DENIED}", 53))
        status, found = explain(policed, descriptor(client))
        assert (status, found["denied"]["what"]) == (1, "datagram")
        assert found["reasons"][0].startswith(
            f"policy no denied its datagram to {DENIED}:53/udp: it denies 127.0.9.0/24"
        )


def test_who_went_elsewhere_afterwards(policed: Sandbox) -> None:
    with denied(DENIED, 80, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.7.1", 80))
        status, found = explain(policed, descriptor(client))
        assert (status, found["reasons"]) == (1, ["its peer 127.0.7.1:80 is no frontend"])
        assert found["denied"]["policy"] == "no"


def test_without_an_agent_the_rule_is_not_known(sandbox: Sandbox) -> None:
    with sandbox.agent(sandbox.manifest(manifest(NO))):
        pass
    with denied(DENIED, 80):
        status, found = explain(sandbox, f"{DENIED}:80")
        assert (status, found["denied"][0]["policy"], found["denied"][0]["rules"]) == (1, "no", [])
    result = sandbox.sockhop("explain", f"{DENIED}:81", check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "there is no such TCP or UDP socket" in result.stderr


def test_a_redirected_socket(sandbox: Sandbox) -> None:
    """And one that is exempt, which is at the address itself or with the service behind it."""
    group = sandbox.cgroup / "cache"
    group.mkdir()
    cgroup = f"/{group.relative_to(cgroup_root())}"
    path = sandbox.manifest(objects(redirect(cgroup), *other_objects()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(sandbox.agent(path))
        for name, host in (("upstream", DNS), ("behind", "127.0.1.1"), ("local", "127.0.1.2")):
            stack.enter_context(ServerThread(name, host, 53, udp=True))

        def client(*, connected: bool = True) -> socket.socket:
            made = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            made.connect((DNS, 53)) if connected else made.sendto(b"?", (DNS, 53))
            return made

        status, found = explain(sandbox, descriptor(client()))
        origin = found["origin"]
        assert (status, origin["service"]) == (0, "kube-system/dns@redirect")
        assert origin["generation"] == origin["generation_now"] > 0
        status, found = explain(sandbox, descriptor(client(connected=False)))
        assert (status, found["datagrams"][0]["service"]) == (0, "kube-system/dns@redirect")
        with joined(cgroup):
            status, found = explain(sandbox, descriptor(client()))
            assert status == 1
            assert found["reasons"][:2] == [
                f"its peer is {DNS}:53 itself, and kube-system/dns@redirect is not for it",
                f"the service excludes the cgroup {group}, and it was made in {group}",
            ]
            publish(path, objects(*dns_service(), redirect(cgroup), *other_objects()))
            made = wait_until(lambda: served(sandbox, client), "the service")
            assert made["service"] == "kube-system/kube-dns"
    group.rmdir()


def served(sandbox: Sandbox, client: Any) -> Any:
    """How a new socket is served, once it is."""
    return explain(sandbox, descriptor(client()))[1]["origin"]
