"""Manifests to read, written by the tests of `sources`."""

import json
from pathlib import Path
from typing import Any

import pytest

from sockhop.errors import InputError
from sockhop.sources.files import Loaded, load

__all__ = ["compact", "endpoint_slice", "kubernetes_list", "load_text", "refusal", "service"]

Json = dict[str, Any]


def load_text(tmp_path: Path, text: str | bytes, name: str = "m.yaml", **options: Any) -> Loaded:
    """Write *text* to a file and load it."""
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load([path], **options)


def refusal(tmp_path: Path, text: str | bytes, name: str = "m.yaml") -> str:
    """Return what the InputError says, without the directory."""
    with pytest.raises(InputError) as caught:
        load_text(tmp_path, text, name)
    return str(caught.value).replace(f"{tmp_path}/", "")


def compact(**fields: Any) -> Json:
    """Return a compact document with one service: a good one, changed by *fields*."""
    base = {"name": "web", "frontends": ["10.0.0.1:80"], "backends": ["10.1.0.1:8080"]}
    return {"version": 1, "services": [{**base, **fields}]}


def service(name: str = "echo", *, namespace: str = "test", **spec: Any) -> Json:
    """Return a v1 Service with port 80 named http, changed by *spec*."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "10.96.0.1",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            **spec,
        },
    }


def endpoint_slice(
    *endpoints: Json | str, name: str = "echo-1", owner: str = "echo", **fields: Any
) -> Json:
    """Return an EndpointSlice; an endpoint that is a string is its address."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "test",
            "labels": {"kubernetes.io/service-name": owner},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [e]} if isinstance(e, str) else e for e in endpoints],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        **fields,
    }


def kubernetes_list(*objects: Json) -> str:
    """Return a v1 List as JSON."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}, indent=1)
