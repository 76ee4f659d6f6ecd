"""Policies and redirects as manifests say them: what is understood, refused, or an error."""

import json
from pathlib import Path
from typing import Any

import pytest

from sockhop.model import Backend, Clients, FrontendType, PolicyAction, Ports, Protocol, Rule
from sockhop.sources.files import Loaded
from tests.sources.manifests import (
    Json,
    endpoint_slice,
    kubernetes_list,
    load_text,
    refusal,
    service,
)

pytestmark = pytest.mark.unit

LOOPBACK = (Rule("127.0.0.0/8"), Rule("::1/128"))
TCP, UDP = Protocol.TCP, Protocol.UDP


def compact(*policies: Json) -> str:
    return json.dumps({"version": 1, "policies": list(policies)})


def deny(*rules: Json, **fields: Any) -> str:
    return compact({"name": "p", "deny": list(rules), **fields})


def network_policy(name: str = "p", **spec: Any) -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "test"},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"], **spec},
    }


def pod(name: str, labels: Json | None = None, *, node: str = "here", **status: Any) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "test", "labels": labels, "uid": f"u-{name}"},
        "spec": {"nodeName": node},
        "status": status,
    }


def redirect(name: str = "r", **changes: Any) -> Json:
    spec = {
        "redirectFrontend": {
            "addressMatcher": {"ip": "10.96.0.10", "toPorts": [{"port": 53, "protocol": "UDP"}]}
        },
        "redirectBackend": {
            "addresses": ["169.254.20.10"],
            "cgroups": ["/dns"],
            "toPorts": [{"port": 5353, "protocol": "UDP"}],
        },
    }
    return {
        "apiVersion": "sockhop.io/v1alpha1",
        "kind": "LocalRedirectPolicy",
        "metadata": {"name": name, "namespace": "test"},
        "spec": spec | changes,
    }


def objects(tmp_path: Path, *found: Json, **options: Any) -> Loaded:
    return load_text(tmp_path, kubernetes_list(*found), "m.json", **options)


def complaint(tmp_path: Path, *found: Json) -> str:
    return refusal(tmp_path, kubernetes_list(*found), "m.json")


# --- the compact form ------------------------------------------------------------------------


def test_the_compact_form(tmp_path: Path) -> None:
    text = """
version: 1
policies:
  - name: no-metadata
    clients: {namespaces: all, cgroups: [/user.slice], exclude: [/user.slice/root]}
    deny: [{cidr: 169.254.169.254/32, ports: [80, 8000-8999], protocol: tcp}]
  - name: inside
    allow: [{cidr: 10.0.0.0/8, except: [10.9.0.0/16]}, {cidr: "fd00::/8", protocol: udp}]
"""
    inside, no_metadata = load_text(tmp_path, text).desired.policies
    assert no_metadata.action is PolicyAction.DENY
    assert no_metadata.clients == Clients("all", ("/user.slice",), ("/user.slice/root",))
    assert no_metadata.rules == (
        Rule("169.254.169.254/32", (), (Ports(TCP, 80, 80), Ports(TCP, 8000, 8999))),
    )
    assert (inside.action, inside.clients) == (PolicyAction.ALLOW, None)
    assert inside.rules == (
        Rule("10.0.0.0/8", ("10.9.0.0/16",)),
        Rule("fd00::/8", (), (Ports(UDP),)),
    )


def test_mapped_networks_are_ipv4(tmp_path: Path) -> None:
    (policy,) = load_text(tmp_path, deny({"cidr": "::ffff:10.0.0.0/104"})).desired.policies
    assert policy.rules == (Rule("10.0.0.0/8"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (compact({"name": "p"}), "policies[0]: found neither deny nor allow"),
        (deny(allow=[]), "policies[0]: found both deny and allow"),
        (deny({"cidr": "10.0.0.1"}), "deny[0].cidr: found '10.0.0.1', expected an IPv4 or IPv6"),
        (deny({"cidr": "10.0.0.1/8"}), "did you mean 10.0.0.0/8?"),
        (deny({"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}),
         "deny[0].except[0]: found '11.0.0.0/9', expected a network in 10.0.0.0/8"),
        (deny({"cidr": "::/0", "except": ["10.0.0.0/8"]}), "expected a network in ::/0"),
        (deny({"cidr": "::/0", "ports": ["9-8"]}), "deny[0].ports[0]: found '9-8', expected"),
        (deny({"cidr": "::/0", "ports": [0]}), "deny[0].ports[0]: found 0"),
        (deny({"cidr": "::/0", "ports": []}), "deny[0].ports: found an empty list"),
        (deny({"cidr": "::/0", "protocol": "sctp"}), "protocol: found 'sctp'"),
        (compact({"name": "p", "deny": []}, {"name": "p", "deny": []}),
         "policies[1].name: found 'p', which is in m.json too, expected a name of its own"),
    ],
)  # fmt: skip
def test_what_the_compact_form_may_not_say(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text, "m.json")


# --- NetworkPolicy ---------------------------------------------------------------------------


def test_egress_of_a_network_policy(tmp_path: Path) -> None:
    egress = [
        {
            "to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}],
            "ports": [{"port": 80}, {"port": 8000, "endPort": 8100, "protocol": "UDP"}],
        },
        {"ports": [{"protocol": "UDP"}]},
    ]
    loaded = objects(
        tmp_path,
        network_policy(podSelector={"matchLabels": {"app": "a"}}, egress=egress),
        pod("one", {"app": "a"}),
        pod("two", {"app": "b"}),
        pod("three", {"app": "a"}, node="there"),
        pod("four", {"app": "a"}, phase="Succeeded"),
        node_name="here",
    )
    (policy,) = loaded.desired.policies
    assert (policy.name, policy.action, policy.refused) == ("test/p", PolicyAction.ALLOW, ())
    assert policy.clients == Clients("all", ("pod:u-one",))
    udp = (Ports(UDP),)
    assert policy.rules == (
        *LOOPBACK,
        Rule("10.0.0.0/8", ("10.1.0.0/16",), (Ports(TCP, 80, 80), Ports(UDP, 8000, 8100))),
        Rule("0.0.0.0/0", (), udp),
        Rule("::/0", (), udp),
    )


def test_a_pod_may_name_its_cgroup(tmp_path: Path) -> None:
    named = pod("one")
    named["metadata"]["annotations"] = {"sockhop.io/cgroup": "/pods/one"}
    (policy,) = objects(tmp_path, network_policy(egress=[]), named).desired.policies
    assert policy.clients == Clients("all", ("/pods/one",))
    named["metadata"]["annotations"] = {"sockhop.io/cgroup": "pods"}
    assert "found 'pods', expected a path" in complaint(tmp_path, named)


@pytest.mark.parametrize(
    ("expression", "selected"),
    [
        ({"operator": "In", "values": ["a", "b"]}, {"one"}),
        ({"operator": "NotIn", "values": ["a"]}, {"two", "three"}),
        ({"operator": "Exists"}, {"one", "two"}),
        ({"operator": "DoesNotExist"}, {"three"}),
    ],
)
def test_selectors(tmp_path: Path, expression: Json, selected: set[str]) -> None:
    selector = {"matchExpressions": [{"key": "app", **expression}]}
    pods = [pod("one", {"app": "a"}), pod("two", {"app": "c"}), pod("three")]
    (policy,) = objects(tmp_path, network_policy(podSelector=selector), *pods).desired.policies
    assert policy.clients
    assert set(policy.clients.cgroups) == {f"pod:u-{name}" for name in selected}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"policyTypes": ["Ingress", "Egress"]}, "ingress: sockhop sees who connects"),
        ({"policyTypes": None}, "ingress (without policyTypes it is meant)"),
        ({"egress": [{"to": [{"podSelector": {}}]}]}, "egress[0].to[0].podSelector"),
        ({"egress": [{"to": [{"namespaceSelector": {}}]}]}, "egress[0].to[0].namespaceSelector"),
        ({"egress": [{"ports": [{"port": 9, "protocol": "SCTP"}]}]}, "egress[0].ports[0]: SCTP"),
        ({"egress": [{"ports": [{"port": "http"}]}]}, "egress[0].ports[0]: the port name 'http'"),
        ({"podSelector": {"matchLabels": {"a": "b"}}}, "podSelector: it selects no Pod"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    tmp_path: Path, spec: Json, reason: str
) -> None:
    loaded = objects(tmp_path, network_policy(**spec), pod("one"))
    (policy,) = loaded.desired.policies
    assert any(reason in each for each in policy.refused), policy.refused
    assert any(f"policy test/p is refused: {reason}" in text for text in loaded.warnings)


def test_a_pod_without_a_cgroup_refuses_what_selects_it(tmp_path: Path) -> None:
    unknown = pod("one")
    del unknown["metadata"]["uid"]
    (policy,) = objects(tmp_path, network_policy(), unknown).desired.policies
    assert policy.refused == ("the cgroup of Pod test/one is not known",)


@pytest.mark.parametrize(
    ("egress", "said"),
    [
        ({"to": [{"ipBlock": {"cidr": "10.0.0.0"}}]}, "egress[0].to[0].ipBlock.cidr: found"),
        ({"ports": [{"port": 9, "endPort": 8}]}, "egress[0].ports[0].endPort: found 8"),
        ({"ports": [{"endPort": 8}]}, "no endPort without a port"),
    ],
)
def test_what_the_api_server_would_refuse(tmp_path: Path, egress: Json, said: str) -> None:
    assert said in complaint(tmp_path, network_policy(egress=[egress]))


def test_a_policy_is_there_once(tmp_path: Path) -> None:
    assert "NetworkPolicy test/p, which is at" in complaint(
        tmp_path, network_policy(), network_policy()
    )


# --- LocalRedirectPolicy ---------------------------------------------------------------------


def test_an_address_is_redirected(tmp_path: Path) -> None:
    (found,) = objects(tmp_path, redirect()).desired.redirects
    (frontend,) = found.frontends
    assert (found.name, found.exempt, found.refused) == ("test/r", ("/dns",), ())
    assert frontend.key == ("10.96.0.10", 53, UDP)
    assert frontend.type is FrontendType.LOCAL_REDIRECT
    assert frontend.backends == (Backend("169.254.20.10", 5353),)


def dns_service() -> tuple[Json, Json]:
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
        {"name": "metrics", "port": 9153, "protocol": "TCP"},
    ]
    return service("dns", ports=ports), endpoint_slice("10.1.0.9", owner="dns", ports=ports)


BY_SERVICE = {
    "serviceMatcher": {
        "serviceName": "dns",
        "toPorts": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}],
    }
}
TO_PODS = {
    "localEndpointSelector": {"matchLabels": {"app": "cache"}},
    "toPorts": [
        {"port": 5300, "name": "dns", "protocol": "UDP"},
        {"port": 5301, "name": "dns-tcp", "protocol": "TCP"},
    ],
}


def test_a_service_is_redirected_to_the_pods_of_this_node(tmp_path: Path) -> None:
    loaded = objects(
        tmp_path,
        *dns_service(),
        redirect(redirectFrontend=BY_SERVICE, redirectBackend=TO_PODS),
        pod("here", {"app": "cache"}, podIPs=[{"ip": "10.1.0.2"}, {"ip": "fd00::2"}]),
        pod("there", {"app": "cache"}, node="there", podIP="10.1.1.2"),
        node_name="here",
    )
    (found,) = loaded.desired.redirects
    assert found.exempt == ("pod:u-here",)
    assert [(each.key, each.backends) for each in found.frontends] == [
        (("10.96.0.1", 53, UDP), (Backend("10.1.0.2", 5300),)),
        (("10.96.0.1", 53, TCP), (Backend("10.1.0.2", 5301),)),
    ]
    assert len(loaded.desired.services) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"redirectFrontend": {"serviceMatcher": {"serviceName": "x"}}},
         "there is no Service test/x"),
        ({"redirectBackend": TO_PODS}, "it selects no Pod with an address"),
        ({"redirectFrontend": {"addressMatcher": {"ip": "10.0.0.1", "toPorts": [{"port": 1}]}}},
         "0 ports are TCP"),
        ({"redirectBackend": {"addresses": ["fd00::1"], "cgroups": [],
                              "toPorts": [{"port": 1, "protocol": "UDP"}]}},
         "no local backend has an IPv4 address"),
    ],
)  # fmt: skip
def test_a_redirect_to_what_is_not_there_is_refused(
    tmp_path: Path, changes: Json, reason: str
) -> None:
    loaded = objects(tmp_path, redirect(**changes))
    (found,) = loaded.desired.redirects
    assert reason in found.refused[0]
    assert not found.frontends
    assert any("redirect test/r is refused: " in text for text in loaded.warnings)


def test_a_frontend_is_redirected_once(tmp_path: Path) -> None:
    first, second = objects(tmp_path, redirect("b"), redirect("a")).desired.redirects
    assert (first.name, first.refused) == ("test/a", ())
    assert second.refused == ("10.96.0.10:53/udp: test/a redirects it already",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"redirectFrontend": {}}, "spec.redirectFrontend: found neither or both"),
        ({"redirectBackend": {"toPorts": [{"port": 1}]}}, "spec.redirectBackend: found neither"),
        ({"redirectBackend": {"toPorts": [{"port": 1}], "addresses": ["10.0.0.1"]}},
         "redirectBackend.cgroups: found nothing, expected the cgroups"),
        ({"redirectBackend": {"toPorts": [{"port": 1}], "addresses": ["x"], "cgroups": []}},
         "redirectBackend.addresses[0]: found 'x'"),
        ({"redirectBackend": {"toPorts": [{"port": 1}], "addresses": [], "cgroups": ["a"]}},
         "redirectBackend.cgroups[0]: found 'a'"),
        ({"redirectFrontend": {"addressMatcher": {"ip": "::", "toPorts": [{"port": 1}]}}},
         "addressMatcher.ip: found '::'"),
        ({"x": 1}, "found unknown key 'x'"),
    ],
)  # fmt: skip
def test_what_a_redirect_may_not_say(tmp_path: Path, changes: Json, said: str) -> None:
    assert said in complaint(tmp_path, redirect(**changes))
