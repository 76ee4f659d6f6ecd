"""`sockhop verify` notices policies that are not in force as the manifests say."""

from collections.abc import Callable

import pytest

from sockhop.datapath.policies import PolicyMaps, PolicySetting
from tests.agent.test_policies import deny, manifest
from tests.datapath.rules import verdict
from tests.sandbox import Sandbox

pytestmark = pytest.mark.kernel


def a_network_is_gone(maps: PolicyMaps) -> None:
    maps.networks.delete(max(maps.networks.keys()))


def a_verdict_is_another(maps: PolicyMaps) -> None:
    key, found = next((k, v) for k, v in maps.ports.items() if v.denied)
    maps.ports.set(key, found._replace(denied=0))


def clients_are_gone(maps: PolicyMaps) -> None:
    maps.clients.delete(maps.clients.keys()[0])


def the_word_is_zero(maps: PolicyMaps) -> None:
    maps.settings.set(PolicySetting.WORD, 0)


def the_flags_are_wrong(maps: PolicyMaps) -> None:
    maps.settings.set(PolicySetting.WORD, maps.setting(PolicySetting.WORD) | 1)


DAMAGES: tuple[Callable[[PolicyMaps], None], ...] = (
    a_network_is_gone,
    a_verdict_is_another,
    clients_are_gone,
    the_word_is_zero,
    the_flags_are_wrong,
)


def test_damaged_policies_are_noticed(sandbox: Sandbox) -> None:
    path = sandbox.manifest(manifest(deny("127.0.9.0/24")))
    for damage in DAMAGES:
        with sandbox.agent(path):
            assert "all as it should be" in sandbox.sockhop("verify").stdout
            assert verdict("127.0.9.1")
            with PolicyMaps(sandbox.pins) as maps:
                damage(maps)
            found = sandbox.sockhop("verify", check=False)
            assert found.returncode == 1, damage
            assert "policies: " in found.stdout
        # The next agent mends it.
