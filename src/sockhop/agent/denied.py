"""What policies have denied lately: to which socket, by which policy and which of its rules."""

import ipaddress
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sockhop.agent.find_socket import cookie_at, cookie_of, endpoint_in
from sockhop.agent.policy_installer import InstalledPolicy, read_policies
from sockhop.agent.state import PolicyState
from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.policies import DenialRecord, PolicyMaps
from sockhop.kernel.procfs import boot_time, command_of, started_at
from sockhop.model import PolicyAction, Protocol, Rule, endpoint, unpack_address

__all__ = ["Denied", "DeniedLately"]

_PROTOCOLS = {protocol.number: protocol for protocol in Protocol}


class Denied(msgspec.Struct):
    """A connect() or datagram that a policy denied, the last of its socket.

    `policy` and `action` are "" where the hooks had found no rules, `action` also where the policy
    is gone. `rules`: of one that denies those that name the destination, of one that allows all of
    its rules; known to a running agent only, and as they are now. `at`: RFC 3339, `age`: seconds.
    `process`: command/pid of who called, or the pid alone where that has ended.
    """

    policy: str
    action: str
    what: str
    destination: str
    rules: list[str]
    at: str
    age: float
    process: str
    cookie: int

    @property
    def reason(self) -> str:
        """Who denied what, and by which rule, for people."""
        if not self.policy:
            return f"its {self.what} to {self.destination} was denied since no rules were found"
        text = f"policy {self.policy} denied its {self.what} to {self.destination}"
        rules = ", ".join(self.rules)
        if self.action == PolicyAction.ALLOW:
            return f"{text}: it allows only {rules}" if rules else f"{text}: it does not allow it"
        return f"{text}: it denies {rules}" if rules else text


class DeniedLately:
    """Reads what the hooks have noted. Use as a context manager."""

    def __init__(self, pins: Path, policies: Sequence[PolicyState] = ()) -> None:
        """*policies*: what a running agent says. NotInstalled where there are no maps."""
        self._pins = pins
        self._maps = PolicyMaps(pins)
        self._names = {each.id: each for each in read_policies(self._maps)}
        self._rules = {each.name: each.rules for each in policies}

    def __enter__(self) -> "DeniedLately":
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.close()

    def of(self, cookie: int) -> Denied | None:
        """Return what the socket was denied last, as long as that is remembered."""
        found = self._maps.denials.get(cookie)
        return self._told(cookie, found) if found else None

    def at(self, text: str) -> list[Denied]:
        """Return what a name that :func:`find_socket` takes leads to, the latest first.

        Also of sockets that are closed: by cookie, and by the address that they dialled or, of a
        service, one of its backends. PID:FD: of a TCP socket, too, that is not connected.
        """
        if (number := cookie_of(text) or cookie_at(text)) is not None:
            only = self.of(number)
            return [only] if only else []
        end = endpoint_in(text)
        meant = {end, *self._behind(end)} if end else set()
        found = [
            (cookie, record)
            for cookie, record in self._maps.denials.items()
            if (record.address, record.port) in meant
        ]
        found.sort(key=lambda each: -each[1].when)
        return [self._told(*each) for each in found]

    def _behind(self, end: tuple[bytes, int]) -> Iterator[tuple[bytes, int]]:
        """Yield the backends of the services that have *end* as a frontend."""
        with BalanceMaps(self._pins) as maps:
            services = {
                found.service for key, found in maps.frontends.items() if (key[0], key[2]) == end
            }
            for _, backend in maps.backends.items() if services else ():
                if backend.service in services:
                    yield backend.address, backend.port

    def _told(self, cookie: int, found: DenialRecord) -> Denied:
        policy = self._names.get(found.policy)
        protocol = _PROTOCOLS.get(found.protocol)
        to = endpoint(unpack_address(found.address), found.port)
        at = boot_time() + found.when / 1e9
        return Denied(
            policy=policy.name if policy else "one that is gone" if found.policy else "",
            action=policy.action if policy else "",
            what="datagram" if found.datagram else "connect",
            destination=f"{to}/{protocol.lower() if protocol else found.protocol}",
            rules=self._that_count(policy, found) if policy else [],
            at=datetime.fromtimestamp(at, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            age=time.clock_gettime(time.CLOCK_BOOTTIME) - found.when / 1e9,
            process=_process(found.pid, at),
            cookie=cookie,
        )

    def _that_count(self, policy: InstalledPolicy, found: DenialRecord) -> list[str]:
        rules = self._rules.get(policy.name, [])
        if policy.action is PolicyAction.DENY:
            rules = [rule for rule in rules if _names(rule, found)]
        return list(map(str, rules))


def _names(rule: Rule, found: DenialRecord) -> bool:
    address = ipaddress.ip_address(unpack_address(found.address))
    if address not in ipaddress.ip_network(rule.cidr):
        return False
    if any(address in ipaddress.ip_network(text) for text in rule.excluded):
        return False
    protocol = _PROTOCOLS.get(found.protocol)
    return not rule.ports or any(
        protocol and each.protocol in (None, protocol) and each.first <= found.port <= each.last
        for each in rule.ports
    )


def _process(pid: int, at: float) -> str:
    with suppress(OSError):
        if started_at(pid) <= at:
            return f"{command_of(pid)}/{pid}"
    return str(pid)
