"""What `sockhop bench` generates, computes and draws, without root."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sockhop.bench.manifests import FormName, Manifests
from sockhop.bench.report import spread_of
from sockhop.bench.services import (
    desired,
    dialled,
    haproxy_configuration,
    nftables_transactions,
    service_ports,
)
from sockhop.model import Desired, Protocol
from sockhop.sources.files import load

pytestmark = pytest.mark.unit


def test_quartiles() -> None:
    spread = spread_of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.lower, spread.median, spread.upper) == (2, 3, 4)


@pytest.mark.parametrize("services", [1, 2, 1000, 70_000])
def test_every_peer_gets_the_same_services(services: int) -> None:
    ports = service_ports(services)
    assert len({port.name for port in ports}) == services
    assert {port.protocol for port in ports} == set(Protocol)
    assert len(set(ports)) == len({(port.address, port.protocol) for port in ports}) == len(ports)

    frontends = [frontend for _, frontend in desired(ports).frontends()]
    assert Counter(len(frontend.backends) for frontend in frontends) == {2: len(ports)}
    ruleset = "".join(nftables_transactions(ports))
    assert ruleset.count(" : goto service-") == len(frontends)
    assert ruleset.count("dnat to") == 2 * len(frontends)
    tcp = sum(frontend.protocol is Protocol.TCP for frontend in frontends)
    assert haproxy_configuration(ports).count("\n    bind ") == tcp


def test_what_is_dialled_follows_from_the_seed() -> None:
    ports = service_ports(1000)
    first = dialled(ports, Protocol.TCP, 100, 1).places
    assert first == dialled(ports, Protocol.TCP, 100, 1).places
    assert first != dialled(ports, Protocol.TCP, 100, 2).places
    assert len(set(first)) == 100
    assert len(dialled(ports, Protocol.UDP, 10_000, 1).places) == 500


def _loaded(path: Path) -> Desired:
    loaded = load([path])
    assert not loaded.warnings
    return loaded.desired


def test_every_form_says_the_same(tmp_path: Path) -> None:
    made = {}
    for form in FormName:
        directory = tmp_path / form.name
        directory.mkdir()
        made[form] = Manifests(directory, form, 50, 10)
    found = {form: _loaded(manifests.path) for form, manifests in made.items()}
    assert len(set(found.values())) == 1
    before = found[FormName.JSON]
    assert len(before.services) == 50
    backends = [b for service in before.services for b in service.frontends[0].backends]
    assert len(set(backends)) == 500

    for form, manifests in made.items():
        change = manifests.change(1)
        assert _loaded(manifests.path) == before, "not before it is renamed"
        change.source.rename(change.target)
        after = _loaded(manifests.path)
        assert after.services[:-1] == before.services[:-1]
        frontend = after.services[-1].frontends[0]
        assert frontend.address == manifests.watched
        assert {backend.address[:7] for backend in frontend.backends} == {"10.201."}, form


def test_generated_text_is_what_it_claims_to_be(tmp_path: Path) -> None:
    text = Manifests(tmp_path, FormName.YAML, 3, 2).path.read_text()
    assert yaml.safe_load(text) == json.loads(
        Manifests(tmp_path, FormName.JSON, 3, 2).path.read_text()
    )
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
