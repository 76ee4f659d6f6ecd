"""Kubernetes Services and EndpointSlices: the join, and what is ignored or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sockhop.model import Backend, BackendState, FrontendType, Protocol, Service
from tests.sources.manifests import (
    endpoint_slice,
    kubernetes_list,
    load_text,
    refusal,
    service,
)

pytestmark = pytest.mark.unit


def load_objects(
    tmp_path: Path, *objects: dict[str, Any], node_name: str = ""
) -> tuple[tuple[Service, ...], list[str]]:
    """Services and warnings, the same from a JSON List and from YAML documents."""
    loaded = load_text(tmp_path, kubernetes_list(*objects), "m.json", node_name=node_name)
    documents = load_text(tmp_path, yaml.dump_all(objects), "m.yaml", node_name=node_name)
    assert documents.desired == loaded.desired
    warnings = [warning.removeprefix(f"{tmp_path}/m.json: ") for warning in loaded.warnings]
    assert [w.removeprefix(f"{tmp_path}/m.yaml: ") for w in documents.warnings] == warnings
    return loaded.desired.services, warnings


def addresses(found: Service, frontend: int = 0) -> list[str]:
    return [str(backend) for backend in found.frontends[frontend].backends]


def test_the_shape_that_render_prints(tmp_path: Path) -> None:
    (found,), warnings = load_objects(
        tmp_path,
        service(
            type="LoadBalancer", clusterIP="", ports=[{"name": "http", "port": 80}]
        ) | {"status": {"loadBalancer": {"ingress": [{"ip": "172.16.1.1"}]}}},
        endpoint_slice("2.2.2.2", ports=[{"name": "http", "port": 80}]),
    )  # fmt: skip
    (frontend,) = found.frontends
    assert (found.name, frontend.address, frontend.port) == ("test/echo", "172.16.1.1", 80)
    assert (frontend.protocol, frontend.type) == (Protocol.TCP, FrontendType.LOAD_BALANCER)
    assert frontend.port_name == "http"
    assert frontend.backends == (Backend("2.2.2.2", 80, BackendState.ACTIVE, 1),)
    assert warnings == []


def test_addresses_of_all_kinds(tmp_path: Path) -> None:
    echo = service(
        type="LoadBalancer",
        clusterIPs=["10.96.0.1", "fd00::1"],
        externalIPs=["192.0.2.1"],
        ports=[{"name": "http", "port": 80, "nodePort": 30080}, {"name": "s", "port": 443}],
    )
    echo["status"] = {
        "loadBalancer": {
            "ingress": [
                {"ip": "198.51.100.1"},
                {"hostname": "lb.example"},
                {"ip": "198.51.100.2", "ipMode": "Proxy"},
                {"ip": "198.51.100.3", "ipMode": "VIP"},
            ]
        }
    }
    (found,), warnings = load_objects(tmp_path, echo)
    assert [(str(f), f.type.value) for f in found.frontends] == [
        (f"{address}:{port}/tcp", kind)
        for address, kind in (
            ("10.96.0.1", "ClusterIP"),
            ("[fd00::1]", "ClusterIP"),
            ("192.0.2.1", "ExternalIP"),
            ("198.51.100.1", "LoadBalancer"),
            ("198.51.100.3", "LoadBalancer"),
        )
        for port in (80, 443)
    ]
    assert warnings == [
        "Service test/echo: node port 30080 is ignored: sockhop serves no node ports",
        "Service test/echo: load balancer 'lb.example' is ignored: it has a name and no address",
        "Service test/echo: load balancer address '198.51.100.2' is ignored: its ipMode is Proxy",
    ]


def test_ports_join_by_name_and_protocol(tmp_path: Path) -> None:
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
        {"name": "sig", "port": 5000, "protocol": "SCTP"},
    ]
    slice_ports = [
        {"name": "dns", "port": 1053, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 2053, "protocol": "TCP"},
        {"name": "sig", "port": 5000, "protocol": "SCTP"},
        {"name": "any", "port": None},
    ]
    (found,), warnings = load_objects(
        tmp_path, service(ports=ports), endpoint_slice("10.0.0.1", ports=slice_ports)
    )
    assert [str(f) for f in found.frontends] == ["10.96.0.1:53/udp", "10.96.0.1:53/tcp"]
    assert addresses(found, 0) == ["10.0.0.1:1053"]
    assert addresses(found, 1) == ["10.0.0.1:2053"]
    assert warnings == [
        "Service test/echo: port 5000/SCTP is ignored: sockhop balances TCP and UDP"
    ]


def test_an_unnamed_port_joins_an_unnamed_one(tmp_path: Path) -> None:
    for slice_port in ({"port": 8080}, {"name": "", "port": 8080}, {"name": None, "port": 8080}):
        (found,), _ = load_objects(
            tmp_path,
            service(ports=[{"port": 80}]),
            endpoint_slice("10.0.0.1", ports=[slice_port]),
        )
        assert addresses(found) == ["10.0.0.1:8080"]
        assert found.frontends[0].port_name == ""


def test_a_port_that_no_slice_has_is_said(tmp_path: Path) -> None:
    (found,), warnings = load_objects(
        tmp_path, service(), endpoint_slice("10.0.0.1", ports=[{"name": "web", "port": 1}])
    )
    assert addresses(found) == []
    assert warnings == [
        "Service test/echo: port 80 has no backend: "
        "no EndpointSlice has a port 'http' TCP, only 'web' TCP"
    ]


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        (None, "active"),
        ({}, "active"),
        ({"ready": None}, "active"),
        ({"ready": True}, "active"),
        ({"ready": True, "serving": False}, "active"),
        ({"ready": True, "terminating": True}, "active"),
        ({"ready": False}, None),
        ({"ready": False, "terminating": True}, None),
        ({"ready": False, "serving": None, "terminating": True}, None),
        ({"ready": False, "serving": True}, None),
        ({"ready": False, "serving": True, "terminating": False}, None),
        ({"ready": False, "serving": False, "terminating": True}, None),
        ({"ready": False, "serving": True, "terminating": True}, "terminating"),
    ],
)
def test_conditions(tmp_path: Path, conditions: dict[str, Any] | None, state: str | None) -> None:
    endpoint = {"addresses": ["10.0.0.1"], "conditions": conditions}
    (found,), _ = load_objects(tmp_path, service(), endpoint_slice(endpoint))
    assert [b.state for b in found.frontends[0].backends] == ([state] if state else [])


def test_an_endpoint_in_two_slices_counts_once_and_active_wins(tmp_path: Path) -> None:
    going = {
        "addresses": ["10.0.0.1"],
        "conditions": {"ready": False, "serving": True, "terminating": True},
    }
    for first, second in ((going, "10.0.0.1"), ("10.0.0.1", going)):
        (found,), _ = load_objects(
            tmp_path,
            service(),
            endpoint_slice(first, "10.0.0.2"),
            endpoint_slice(second, name="echo-2"),
        )
        assert addresses(found) == ["10.0.0.1:8080", "10.0.0.2:8080"]
        assert {b.state for b in found.frontends[0].backends} == {BackendState.ACTIVE}


def test_only_the_first_address_of_an_endpoint_counts(tmp_path: Path) -> None:
    endpoint = {"addresses": ["10.0.0.1", "10.0.0.2"]}
    (found,), _ = load_objects(tmp_path, service(), endpoint_slice(endpoint))
    assert addresses(found) == ["10.0.0.1:8080"]


def test_families_stay_apart(tmp_path: Path) -> None:
    dual = service(clusterIPs=["10.96.0.1", "fd00::1"])
    ipv6 = endpoint_slice("fd00::8", name="six", addressType="IPv6")
    (found,), warnings = load_objects(tmp_path, dual, endpoint_slice("10.0.0.1"), ipv6)
    assert addresses(found, 0) == ["10.0.0.1:8080"]
    assert addresses(found, 1) == ["[fd00::8]:8080"]
    assert warnings == []
    (found,), warnings = load_objects(tmp_path, dual, endpoint_slice("10.0.0.1"))
    assert addresses(found, 1) == []
    assert warnings == [
        "Service test/echo: frontend [fd00::1]:80/tcp has no backend: "
        "its endpoints are IPv4, not IPv6"
    ]


@pytest.mark.parametrize(
    ("spec", "labels", "reason"),
    [
        ({"clusterIP": "None"}, {}, "it is headless (clusterIP None)"),
        ({"clusterIPs": ["None"]}, {}, "it is headless (clusterIP None)"),
        (
            {"type": "ExternalName", "externalName": "x.example"},
            {},
            "its type is ExternalName, a matter for DNS",
        ),
        (
            {},
            {"service.kubernetes.io/service-proxy-name": "other"},
            "its label service.kubernetes.io/service-proxy-name gives it to another proxy",
        ),
        (
            {},
            {"service.kubernetes.io/headless": ""},
            "its label service.kubernetes.io/headless says that no proxy serves it",
        ),
        ({"clusterIP": ""}, {}, "it has no address that clients could dial, or no port"),
        ({"ports": []}, {}, "it has no address that clients could dial, or no port"),
        ({"ports": None}, {}, "it has no address that clients could dial, or no port"),
    ],
)
def test_services_that_are_ignored(
    tmp_path: Path, spec: dict[str, Any], labels: dict[str, str], reason: str
) -> None:
    echo = service(**spec)
    echo["metadata"]["labels"] = labels
    found, warnings = load_objects(tmp_path, echo, endpoint_slice("10.0.0.1"))
    assert found == ()
    assert warnings[-1] == f"Service test/echo is ignored: {reason}"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"owner": "other"}, "there is no Service 'test/other'"),
        ({"owner": ""}, "it has no label kubernetes.io/service-name"),
        ({"addressType": "FQDN"}, "its addressType is FQDN and a backend needs an address"),
    ],
)
def test_slices_that_are_ignored(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    (found,), warnings = load_objects(tmp_path, service(), endpoint_slice("10.0.0.1", **fields))
    assert addresses(found) == []
    assert warnings == [f"EndpointSlice 'test/echo-1' is ignored: {reason}"]


def test_a_slice_without_labels_is_ignored(tmp_path: Path) -> None:
    slice_ = endpoint_slice("10.0.0.1")
    del slice_["metadata"]["labels"]
    _, warnings = load_objects(tmp_path, service(), slice_)
    assert "no label kubernetes.io/service-name" in warnings[0]


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({}, 0),
        ({"sessionAffinity": "None"}, 0),
        ({"sessionAffinity": "ClientIP"}, 10800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": None}}, 10800),
        (
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            },
            60,
        ),
    ],
)
def test_affinity(tmp_path: Path, spec: dict[str, Any], seconds: int) -> None:
    (found,), _ = load_objects(tmp_path, service(**spec))
    assert found.affinity_seconds == seconds


def test_local_traffic_policy(tmp_path: Path) -> None:
    here = {"addresses": ["10.0.0.1"], "nodeName": "a"}
    there = {"addresses": ["10.0.0.2"], "nodeName": "b"}
    nowhere = {"addresses": ["10.0.0.3"]}
    objects = (
        service(internalTrafficPolicy="Local", externalIPs=["192.0.2.1"]),
        endpoint_slice(here, there, nowhere),
    )
    everyone = ["10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"]
    (found,), warnings = load_objects(tmp_path, *objects, node_name="a")
    assert addresses(found, 0) == ["10.0.0.1:8080"]
    assert addresses(found, 1) == everyone
    assert warnings == []
    (found,), _ = load_objects(tmp_path, *objects, node_name="c")
    assert addresses(found, 0) == []
    (found,), warnings = load_objects(tmp_path, *objects)
    assert addresses(found, 0) == everyone
    assert warnings == [
        "Service test/echo: internalTrafficPolicy Local is ignored: "
        "no node name is given (--node-name)"
    ]


def test_what_of_a_service_has_no_effect(tmp_path: Path) -> None:
    _, warnings = load_objects(
        tmp_path,
        service(
            type="NodePort",
            trafficDistribution="PreferClose",
            loadBalancerSourceRanges=["10.0.0.0/8"],
            ports=[{"port": 80, "nodePort": 1}, {"port": 81, "name": "b", "nodePort": 2}],
        ),
    )
    assert [warning.split(": ")[1] for warning in warnings] == [
        "node ports 1, 2 are ignored",
        "loadBalancerSourceRanges is ignored",
        "trafficDistribution is ignored",
    ]


def test_the_default_namespace(tmp_path: Path) -> None:
    for namespace in ({}, {"namespace": None}, {"namespace": ""}):
        echo, slice_ = service(), endpoint_slice("10.0.0.1")
        for manifest in (echo, slice_):
            del manifest["metadata"]["namespace"]
            manifest["metadata"].update(namespace)
        (found,), _ = load_objects(tmp_path, echo, slice_)
        assert found.name == "default/echo"
        assert addresses(found) == ["10.0.0.1:8080"]


def test_namespaces_do_not_mix(tmp_path: Path) -> None:
    other = service(namespace="other", clusterIP="10.96.0.2")
    found, _ = load_objects(tmp_path, service(), other, endpoint_slice("10.0.0.1"))
    assert [(s.name, addresses(s)) for s in found] == [
        ("other/echo", []),
        ("test/echo", ["10.0.0.1:8080"]),
    ]


def test_the_older_service_keeps_a_frontend(tmp_path: Path) -> None:
    old, new = service("zulu"), service("alpha")
    old["metadata"]["creationTimestamp"] = "2024-01-01T00:00:00Z"
    new["metadata"]["creationTimestamp"] = "2024-01-01T00:00:00.5Z"
    for objects in ((old, new), (new, old)):
        found, warnings = load_objects(tmp_path, *objects)
        assert [s.name for s in found] == ["test/zulu"]
        assert warnings == [
            "Service test/alpha: frontend 10.96.0.1:80/tcp (ClusterIP) is ignored: "
            "the older Service test/zulu has it"
        ]
    new["metadata"]["creationTimestamp"] = None
    old["metadata"]["creationTimestamp"] = None
    found, _ = load_objects(tmp_path, old, new)
    assert [s.name for s in found] == ["test/alpha"]


def test_a_service_loses_only_the_frontend_that_another_has(tmp_path: Path) -> None:
    both = service("two", ports=[{"name": "a", "port": 80}, {"name": "b", "port": 81}])
    found, warnings = load_objects(tmp_path, service("one"), both)
    assert [[str(f) for f in s.frontends] for s in found] == [
        ["10.96.0.1:80/tcp"],
        ["10.96.0.1:81/tcp"],
    ]
    assert len(warnings) == 1


def test_a_frontend_twice_in_one_service(tmp_path: Path) -> None:
    (found,), warnings = load_objects(tmp_path, service(externalIPs=["10.96.0.1"]))
    assert [f.type.value for f in found.frontends] == ["ClusterIP"]
    assert warnings[0].endswith("(ExternalIP) is ignored: it is there twice")


def test_other_kinds_are_counted_and_ignored(tmp_path: Path) -> None:
    maps = [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": 5, "items": "x"}] * 3
    other = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "spec": []}
    found, warnings = load_objects(tmp_path, service(), *maps, other)
    assert len(found) == 1
    reads = (
        "sockhop reads v1 Service and Pod, discovery.k8s.io/v1 EndpointSlice, "
        "networking.k8s.io/v1 NetworkPolicy and sockhop.io/v1alpha1 LocalRedirectPolicy"
    )
    assert warnings == [
        f"3 objects of kind 'ConfigMap' ('v1') are ignored: {reads}",
        f"1 object of kind 'Service' ('serving.knative.dev/v1') is ignored: {reads}",
    ]


def with_metadata(manifest: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {**manifest, "metadata": {**manifest["metadata"], **metadata}}


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (service(clusterIP="10.96.0"), "spec.clusterIP: found '10.96.0', "
         "expected an IPv4 or IPv6 address"),
        (service(clusterIPs=["10.96.0.1", "x"]), "spec.clusterIPs[1]: found 'x'"),
        (service(externalIPs=["0.0.0.0"]), "spec.externalIPs[0]: found '0.0.0.0'"),
        (service() | {"status": {"loadBalancer": {"ingress": [{"ip": "a"}]}}},
         "status.loadBalancer.ingress[0].ip: found 'a'"),
        (service(ports=[{"port": 0}]), "spec.ports[0].port: found 0, "
         "expected a port from 1 to 65535"),
        (service(ports=[{"port": "80"}]), "spec.ports[0].port: found '80'"),
        (service(ports=[{"name": "x"}]), "spec.ports[0].port: found nothing"),
        (service(ports=[{"port": 1, "protocol": "tcp"}]),
         "spec.ports[0].protocol: found 'tcp', expected one of TCP, UDP, SCTP"),
        (service(type="Headless"), "spec.type: found 'Headless', expected one of ClusterIP, "),
        (service(sessionAffinity="ClientIP",
                 sessionAffinityConfig={"clientIP": {"timeoutSeconds": 86401}}),
         "spec.sessionAffinityConfig.clientIP.timeoutSeconds: found 86401, "
         "expected whole seconds, from 1 to 86400"),
        (with_metadata(service(), name="Echo"), "metadata.name: found 'Echo', expected a name of"),
        (with_metadata(service(), name="x" * 64), "metadata.name: found 'xxx"),
        (with_metadata(service(), namespace="a/b"), "metadata.namespace: found 'a/b'"),
        (with_metadata(service(), creationTimestamp="2024-01-01"),
         "metadata.creationTimestamp: found '2024-01-01', expected a time such as"),
        (with_metadata(service(), creationTimestamp="2024-01-01T00:00:00"),
         "metadata.creationTimestamp: found '2024-01-01T00:00:00', expected a time such as"),
        (with_metadata(service(), labels={"service.kubernetes.io/headless": True}),
         "metadata.labels['service.kubernetes.io/headless']: found true, expected a string"),
        ({"apiVersion": "v1", "kind": "Service"}, "metadata: found nothing, expected a mapping"),
        ({"kind": "Service"}, "apiVersion: found nothing, expected the object's apiVersion"),
        ({"apiVersion": "v1"}, "kind: found nothing, expected the object's kind"),
        ({"apiVersion": 1, "kind": "Service"}, "apiVersion: found 1, expected a string"),
        (endpoint_slice("10.0.0.256"), "endpoints[0].addresses[0]: found '10.0.0.256', "
         "expected an IPv4 address"),
        (endpoint_slice("fd00::1"), "endpoints[0].addresses[0]: found 'fd00::1', "
         "expected an IPv4 address"),
        (endpoint_slice("10.0.0.1", addressType="IPv6"), "endpoints[0].addresses[0]: "
         "found '10.0.0.1', expected an IPv6 address"),
        (endpoint_slice({"addresses": []}), "endpoints[0].addresses: found an empty list, "
         "expected a list of one or more addresses"),
        (endpoint_slice({"addresses": None}), "endpoints[0].addresses: found null"),
        (endpoint_slice({"addresses": ["10.0.0.1"], "conditions": {"ready": "true"}}),
         "endpoints[0].conditions.ready: found 'true', expected true or false"),
        (endpoint_slice(addressType="IPv5"), "addressType: found 'IPv5', "
         "expected one of IPv4, IPv6, FQDN"),
        (endpoint_slice(ports=[{"port": 70000}]), "ports[0].port: found 70000"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, manifest: dict[str, Any], said: str) -> None:
    partner = service() if manifest.get("kind") == "EndpointSlice" else endpoint_slice("10.0.0.1")
    text = kubernetes_list(partner, manifest)
    line, _, rest = refusal(tmp_path, text, "m.json").removeprefix("m.json:").partition(": ")
    assert int(line) > 1
    assert rest.startswith(f"items[1].{said}")
    several = "\n---\n".join(json.dumps(o, indent=1) for o in (partner, manifest))
    assert f"document 2: {said}" in refusal(tmp_path, several, "m.yaml")


def test_an_object_twice(tmp_path: Path) -> None:
    one = yaml.dump(service())
    line = len(one.splitlines()) + 1 + 4
    assert refusal(tmp_path, f"{one}---\n{one}", "b.yaml") == (
        f"b.yaml:{line}: document 2: metadata.name: found Service test/echo, which is at "
        "b.yaml:1: document 1 too, expected each object once"
    )


def test_nulls_are_as_good_as_nothing(tmp_path: Path) -> None:
    echo = service(
        clusterIPs=None, externalIPs=None, sessionAffinity=None, sessionAffinityConfig=None
    ) | {"status": None}  # fmt: skip
    echo["metadata"] |= {"labels": None, "creationTimestamp": None, "annotations": None}
    empty = endpoint_slice(endpoints=None, ports=None)
    (found,), warnings = load_objects(tmp_path, echo, empty)
    assert found.frontends[0].backends == ()
    assert warnings == []
