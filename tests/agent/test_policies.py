"""An agent enforces the policies of its manifests, and says what it does not enforce."""

import json
import socket
from typing import Any

import pytest

from sockhop.kernel.cgroups import cgroup_root
from tests.datapath.rules import verdict
from tests.sandbox import Agent, Sandbox, publish, wait_until

pytestmark = pytest.mark.kernel


def manifest(*policies: Any, services: Any = ()) -> str:
    return json.dumps({"version": 1, "services": list(services), "policies": list(policies)})


def deny(cidr: str, **fields: Any) -> dict[str, Any]:
    return {"name": "no", "deny": [{"cidr": cidr}], **fields}


def rows(sandbox: Sandbox, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        sandbox.sockhop("get", "policies", "-o", "json", *options).stdout
    )
    return found


def test_a_policy_comes_changes_and_goes(sandbox: Sandbox) -> None:
    path = sandbox.manifest(manifest(deny("127.0.9.0/24")))
    with sandbox.agent(path) as agent:
        assert verdict("127.0.9.1", kind="tcp")
        publish(path, manifest(deny("127.0.8.0/24")))
        wait_until(lambda: verdict("127.0.8.1"), "the new policy")
        assert not verdict("127.0.9.1")
        (row,) = rows(sandbox)
        assert (row["policy"], row["action"], row["enforced"]) == ("no", "deny", "yes")
        assert row["targets"] == ["127.0.8.0/24"]
        assert row["denied"] >= 2
        wait_until(lambda: "policy no: denied with EPERM" in agent.log.read_text(), "a log line")
        publish(path, manifest())
        wait_until(lambda: not verdict("127.0.8.1"), "no policy")
        assert rows(sandbox) == []
        assert "+ policy no: deny 1 rule" in agent.log.read_text()
        assert "~ policy no: deny 1 rule" in agent.log.read_text()
        assert '"- policy no"' in agent.log.read_text()


def test_the_kernel_goes_on_without_an_agent(sandbox: Sandbox) -> None:
    path = sandbox.manifest(manifest(deny("127.0.9.0/24")))
    with sandbox.agent(path):
        pass
    assert verdict("127.0.9.1")
    (row,) = rows(sandbox)
    assert (row["policy"], row["enforced"], row["denied"]) == ("no", "yes", 1)
    with sandbox.agent(path):
        assert verdict("127.0.9.1")
        assert rows(sandbox)[0]["denied"] == 2
    table = sandbox.sockhop("get", "policies").stdout
    assert table.splitlines()[0].split("  ")[0] == "POLICY"
    assert (
        "raw and packet sockets, and SCTP"
        in sandbox.sockhop("get", "policies", "-o", "wide").stdout
    )


def egress(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "test"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "a"}},
            "policyTypes": ["Egress"],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
            **spec,
        },
    }


def pod(cgroup: str | None, uid: str = "1-2", *, name: str = "a") -> dict[str, Any]:
    annotations = {"sockhop.io/cgroup": cgroup} if cgroup else {}
    labels = {"app": "a"}
    metadata = {"name": name, "namespace": "test", "uid": uid}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**metadata, "labels": labels, "annotations": annotations},
    }


def objects(*found: Any) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(found)})


def in_group(sandbox: Sandbox, group: str, host: str) -> bool:
    """Whether a process of a cgroup below the sandbox's is denied *host*."""
    code = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "try: s.connect((sys.argv[1], 9))\n"
        "except PermissionError: print('denied')\n"
        "except OSError: pass"
    )
    join = f'echo $$ > {sandbox.cgroup}/{group}/cgroup.procs && exec "$@"'
    result = sandbox.run("sh", "-c", join, "sh", "python3", "-c", code, host)
    return bool(result.stdout == "denied\n")


def test_a_network_policy_isolates_the_pods_that_it_selects(sandbox: Sandbox) -> None:
    """By the cgroup that they name, or where the kubelet has put them, with either driver."""
    groups = {name: sandbox.cgroup / name for name in ("named", "pod1-2", "x-pod1_3.slice")}
    for group in groups.values():
        group.mkdir()
    named = f"/{groups['named'].relative_to(cgroup_root())}"
    pods = [pod(named, name="a"), pod(None, "1-2", name="b"), pod(None, "1-3", name="c")]
    with sandbox.agent(sandbox.manifest(objects(egress(), *pods))):
        for name in groups:
            assert in_group(sandbox, name, "192.0.2.1")
            assert not in_group(sandbox, name, "10.1.1.1")
            assert not in_group(sandbox, name, "127.0.0.1")
        assert not verdict("192.0.2.1")
        (row,) = rows(sandbox)
        assert (row["policy"], row["action"], row["enforced"]) == ("test/p", "allow", "yes")
        assert row["reasons"] == []
    for group in groups.values():
        wait_until(lambda g=group: not (g / "cgroup.procs").read_text(), "an empty cgroup")  # type: ignore[misc]
        group.rmdir()


def test_a_refused_policy_is_not_enforced_in_part(sandbox: Sandbox) -> None:
    name = f"/{sandbox.cgroup.relative_to(cgroup_root())}"
    mixed = egress(egress=[{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}, {"podSelector": {}}]}])
    with sandbox.agent(sandbox.manifest(objects(mixed, pod(name)))) as agent:
        assert not verdict("192.0.2.1")
        (row,) = rows(sandbox)
        assert row["enforced"] == "no"
        assert "egress[0].to[1].podSelector" in row["reasons"][0]
        assert "policy test/p is refused" in agent.log.read_text()


def test_a_place_that_is_not_there_is_nobodys(sandbox: Sandbox) -> None:
    path = sandbox.manifest(manifest(deny("127.0.9.0/24", clients={"cgroups": ["/nowhere"]})))
    with sandbox.agent(path):
        assert not verdict("127.0.9.1")
        assert rows(sandbox)[0]["reasons"] == ["/nowhere is not there"]


def metrics_of(agent: Agent, address: tuple[str, int]) -> str:
    with socket.create_connection(address) as client:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()


def test_denials_are_counted(sandbox: Sandbox) -> None:
    path = sandbox.manifest(manifest(deny("127.0.9.0/24")))
    with sandbox.agent(path, "--metrics", "127.0.0.1:9464") as agent:
        assert verdict("127.0.9.1")
        text = metrics_of(agent, ("127.0.0.1", 9464))
        assert 'sockhop_policy_denied_total{policy="no"} 1.0' in text
        assert "sockhop_policy_lost_total 0.0" in text
