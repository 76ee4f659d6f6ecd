"""`sockhop plan` says what becomes of policies, and of the live sockets that they forbid."""

import json
import os

import pytest

from tests.agent.test_enforce import connected_udp
from tests.agent.test_policies import deny, manifest
from tests.sandbox import Sandbox

pytestmark = pytest.mark.kernel


def test_policies_and_their_sockets(sandbox: Sandbox) -> None:
    path = sandbox.manifest(manifest(deny("127.0.8.0/24")))
    new = sandbox.manifest(manifest({**deny("127.0.9.0/24"), "name": "other"}), name="new.yaml")
    changed = sandbox.manifest(manifest(deny("127.0.7.0/24")), name="changed.yaml")
    netns = (sandbox.netns).stat().st_ino
    with sandbox.agent(path), connected_udp("127.0.9.1"), connected_udp("127.0.6.1"):
        assert "nothing to do" in sandbox.sockhop("plan", "-f", str(path)).stdout
        found = sandbox.sockhop("plan", "-f", str(new), "-o", "json", check=False)
        assert found.returncode == 1
        shown = json.loads(found.stdout)
        assert [(each["action"], each["policy"]) for each in shown["policies"]] == [
            ("add", "other"),
            ("remove", "no"),
        ]
        (group,) = shown["sockets"]["groups"]
        assert (group["action"], group["trigger"]) == ("sever", "policy other")
        assert (group["backend"], group["netns"], group["sockets"]) == ("127.0.9.1:53", netns, 1)
        assert group["processes"][0].endswith(f"/{os.getpid()}")
        text = sandbox.sockhop("plan", "-f", str(new), check=False).stdout
        assert "+ policy other: deny, rules: 1" in text
        assert "- policy no: deny" in text
        assert "live sockets: sever 1" in text
        text = sandbox.sockhop("plan", "-f", str(changed), check=False).stdout
        assert "~ policies: clients or rules of some policies" in text
