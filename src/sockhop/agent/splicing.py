"""Splicing as the agent runs it: which ends are opted in, and what is done every second."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from sockhop.agent.state import SplicingState
from sockhop.agent.target import service_port
from sockhop.datapath.splice_records import (
    OwnerKind,
    SpliceMode,
    SpliceOwner,
    SplicePlace,
    SplicePolicy,
    SpliceSetting,
)
from sockhop.datapath.splicecheck import check_splicing
from sockhop.datapath.splicer import (
    Splicer,
    Sweeper,
    no_counters,
    splice_program,
    stop_splicing,
)
from sockhop.errors import InputError, SockhopError
from sockhop.kernel import netns
from sockhop.kernel.advisories import known_faults
from sockhop.kernel.cgroups import cgroup_id, cgroup_root, open_cgroup
from sockhop.model import (
    Desired,
    Protocol,
    Splice,
    SpliceLimits,
    is_loopback,
    pack_address,
    parse_address,
)

__all__ = ["SpliceOptions", "Splicing", "parse_splice_address"]

_LOG = logging.getLogger(__name__)
_MODES = {
    Splice.OFF: SpliceMode.NEVER,
    Splice.ON: SpliceMode.ON,
    Splice.AUTO: SpliceMode.AUTO,
}
_ENOUGH = 1000
"""Answers of each kind before `auto` compares them."""
_MUST_WIN = 0.9
"""Spliced answers take at most so much of the time of those by the stack, or `auto` gives up. The
ones by the stack are of sockets in the sockhash, which is slower than plain TCP."""


class SpliceOptions(msgspec.Struct, frozen=True):
    """What is opted in beside services; `addresses` as `address` or `address:port`."""

    namespaces: tuple[Path, ...] = ()
    cgroups: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    force: bool = False

    def __bool__(self) -> bool:
        return bool(self.namespaces or self.cgroups or self.addresses)


class _Wanted(NamedTuple):
    services: dict[int, SplicePolicy]
    places: dict[SplicePlace, SplicePolicy]
    owners: dict[SpliceOwner, SplicePolicy]

    @property
    def splices(self) -> bool:
        """Whether any end is opted in: a veto alone splices nothing."""
        return bool(self.places or self.owners)


def parse_splice_address(text: str) -> tuple[str, int]:
    """Return address and port, 0 for all, of `address`, `address:port` or `[address]:port`."""
    host, _, port = text.rpartition(":")
    if not (host and port.isdecimal()) or ("]" not in host and ":" in host):
        host, port = text, "0"
    try:
        number = int(port)
        if number > 65535:
            raise ValueError
        return parse_address(host.strip("[]")), number
    except ValueError:
        raise InputError(
            f"{text}: expected an address, or address:port", hint="such as 10.1.0.5 or [fd00::5]:80"
        ) from None


def _policy(service: int, limits: SpliceLimits, mode: SpliceMode) -> SplicePolicy:
    return SplicePolicy(service, limits.budget, limits.leave_after, mode, 0)


class Splicing:
    """Keeps the splice maps in line with what is desired, and loads the programs when needed."""

    def __init__(
        self,
        pins: Path,
        cgroup: Path,
        state: SplicingState,
        *,
        options: SpliceOptions,
        home: int,
    ) -> None:
        """*home*: cookie of the network namespace in which loopback holds."""
        self._pins, self._cgroup, self._options, self._home = pins, cgroup, options, home
        self._state = state
        self._splicer: Splicer | None = None
        self._sweeper: Sweeper | None = None
        self._given_up: dict[str, Splice] = {}
        self._names: dict[int, str] = {}
        self._again: Callable[[], None] | None = None
        self._stopped = False
        self._complaint = ""
        for text in options.addresses:
            parse_splice_address(text)

    def close(self) -> None:
        """Close descriptors; what is spliced stays so."""
        for each in (self._sweeper, self._splicer):
            if each is not None:
                each.close()
        self._splicer = self._sweeper = None

    def apply(self, desired: Desired, ids: Mapping[str, int]) -> None:
        """Splice what *desired* and the options opt in; *ids* are those of service ports.

        Where the kernel cannot, that is logged and shown, and everything else goes on.
        """
        try:
            wanted = self._wanted(desired, ids)
            if wanted.splices and not self._start():
                return
            if self._splicer is None:
                self._leave_off()
                return
            self._write(wanted)
        except SockhopError as error:
            self._state.state, self._state.reason = "unavailable", error.message
            _LOG.warning("nothing is spliced: %s", error)
            stop_splicing(self._pins, self._cgroup)
        else:
            self._again = lambda: self.apply(desired, ids)

    def tick(self) -> None:
        """Take out sockets that are done with splicing; end what does not help."""
        if self._sweeper is None or self._splicer is None:
            return
        try:
            self._sweeper.sweep()
            if self._judge() and self._again:
                self._again()
        except SockhopError as error:
            if str(error) != self._complaint:
                _LOG.warning("sockets that are done with splicing stay as they are: %s", error)
            self._complaint = str(error)

    # --- parts --------------------------------------------------------------------------------

    def _start(self) -> bool:
        if self._splicer is not None:
            return True
        faults = known_faults()
        self._state.faults = [f"{fault.name}: {fault.title}" for fault in faults]
        for fault in faults:
            _LOG.info("this kernel may have %s: %s", fault.name, fault.title)
        # What is attached was tried on this kernel, and would take the sockets of the trial.
        broken = "" if splice_program(self._pins, self._cgroup) else check_splicing()
        serious = [fault.name for fault in faults if fault.serious]
        reason = broken or (f"this kernel has {', '.join(serious)}" if serious else "")
        if reason and not self._options.force:
            self._state.state, self._state.reason = "faulty", reason
            _LOG.warning("nothing is spliced: %s (--force-splice splices all the same)", reason)
            stop_splicing(self._pins, self._cgroup)
            return False
        self._splicer = Splicer(self._pins)
        try:
            self._sweeper = Sweeper(self._pins)
            with open_cgroup(self._cgroup) as cgroup:
                self._splicer.attach(cgroup)
        except BaseException:
            self.close()
            raise
        return True

    def _leave_off(self) -> None:
        if not self._stopped:
            stop_splicing(self._pins, self._cgroup)  # what an agent of before has left
        self._stopped = True
        self._state.state, self._state.reason = "off", "nothing is opted in"

    def _wanted(self, desired: Desired, ids: Mapping[str, int]) -> _Wanted:
        wanted = _Wanted({}, {}, {})
        self._names = {number: name for name, number in ids.items()}
        named = []
        asked = (service for service in desired.services if service.splice)
        for service, frontend in Desired(tuple(asked)).frontends():
            choice, name = service.splice, service_port(service, frontend)
            if choice is None or frontend.protocol is not Protocol.TCP or name not in ids:
                continue
            if self._given_up.get(name) is choice is Splice.AUTO:
                choice = Splice.OFF
            else:
                self._given_up.pop(name, None)
            policy = _policy(ids[name], service.splice_limits, _MODES[choice])
            wanted.services[ids[name]] = policy
            if choice is Splice.OFF:
                continue
            named.append(name)
            for backend in frontend.backends:
                wanted.places[self._place(backend.address, backend.port)] = policy
        self._state.services = sorted(set(named))
        self._state.given_up = sorted(self._given_up)
        self._add_options(wanted)
        return wanted

    def _place(self, address: str, port: int) -> SplicePlace:
        return SplicePlace(pack_address(address), self._home if is_loopback(address) else 0, port)

    def _add_options(self, wanted: _Wanted) -> None:
        policy = _policy(0, SpliceLimits(), SpliceMode.ON)
        for text in self._options.addresses:
            wanted.places[self._place(*parse_splice_address(text))] = policy._replace(dialled=1)
        for path in self._options.namespaces:
            with netns.entered(path):
                wanted.owners[SpliceOwner(netns.current_cookie(), OwnerKind.NETNS)] = policy
        for group in self._options.cgroups:
            found = cgroup_id(cgroup_root() / group.lstrip("/"))
            wanted.owners[SpliceOwner(found, OwnerKind.CGROUP)] = policy

    def _write(self, wanted: _Wanted) -> None:
        assert self._splicer is not None
        maps = self._splicer.maps
        if not wanted.splices:
            maps.set(SpliceSetting.OFF, 1)
        for number in {policy.service for policy in wanted.services.values()} | {0}:
            if maps.counters.get(number) is None:
                maps.counters.set(number, no_counters())
        for target, rows in (
            (maps.services, wanted.services),
            (maps.places, wanted.places),
            (maps.owners, wanted.owners),
        ):
            target.update_many(rows.items())
            target.delete_many(set(target.keys()) - rows.keys())
        groups = any(owner.kind == OwnerKind.CGROUP for owner in wanted.owners)
        maps.set(SpliceSetting.CGROUPS, int(groups))
        maps.set(SpliceSetting.OFF, int(not wanted.splices))
        state = ("on", "") if wanted.splices else ("off", "nothing is opted in")
        self._state.state, self._state.reason = state

    def _judge(self) -> bool:
        """Give up `auto` services whose answers are not quicker; True if there are new ones."""
        assert self._splicer is not None
        maps, worse = self._splicer.maps, []
        for number, policy in maps.services.items():
            counted = maps.counters.get(number) if policy.mode == SpliceMode.AUTO else None
            if counted is None or min(counted.answers, counted.control_answers) < _ENOUGH:
                continue
            spliced = counted.answer_time / counted.answers
            control = counted.control_time / counted.control_answers
            if spliced > _MUST_WIN * control and number in self._names:
                worse.append(self._names[number])
                _LOG.warning(
                    "%s is not spliced any more: an answer took %.1f us, by the stack %.1f us",
                    self._names[number],
                    spliced / 1e3,
                    control / 1e3,
                )
        self._given_up.update(dict.fromkeys(worse, Splice.AUTO))
        return bool(worse)
