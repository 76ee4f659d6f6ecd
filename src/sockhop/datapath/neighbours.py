"""Programs of others at the hooks of ours: where they are, when they run, what that means."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from sockhop.datapath.attachment import Owner
from sockhop.kernel.cgroups import (
    GROUPS_MAX,
    Attached,
    AttachType,
    attached_programs,
    effective_programs,
    groups_above,
    groups_below,
    open_cgroup,
)
from sockhop.kernel.objects import identify_program
from sockhop.kernel.syscall import KernelError

__all__ = ["Neighbour", "Neighbourhood", "Order", "Place", "find_neighbours"]

# They see packets: of interest is what addresses those carry (systemd's IPAddressDeny=).
_FILTERS = (AttachType.INGRESS, AttachType.EGRESS)
_FORWARD = (AttachType.CONNECT4, AttachType.CONNECT6, AttachType.SENDMSG4, AttachType.SENDMSG6)


class Place(StrEnum):
    """Where a program is attached, seen from our cgroup."""

    HERE = "here"
    BELOW = "below"
    ABOVE = "above"


class Order(StrEnum):
    """When a program runs, seen from ours at the same hook.

    HIDDEN: it does not, since ours is below it and it lets programs below run instead.
    BESIDE: at a hook where none of ours is.
    """

    BEFORE = "before"
    AFTER = "after"
    INSTEAD = "instead"
    HIDDEN = "hidden"
    BESIDE = "beside"


# What a program's place in the order means, by the job of ours at that hook.
_MEANINGS: dict[str, dict[Order, str]] = {
    "forward": {
        Order.BEFORE: "runs before ours, which sees the address that it has put there",
        Order.AFTER: "runs after ours and sees the backend's address, not the frontend's",
        Order.INSTEAD: "runs instead of ours: the processes there are not balanced",
    },
    "reverse": {
        Order.BEFORE: "runs before ours and sees the backend's address, not the frontend's",
        Order.AFTER: "runs after ours and sees the frontend's address",
        Order.INSTEAD: "runs instead of ours: the processes there see backends as their peers",
    },
    "bind": {
        Order.BEFORE: "judges bind() before ours does; balancing is not touched",
        Order.AFTER: "judges bind() after ours; balancing is not touched",
        Order.INSTEAD: "runs instead of ours: the processes there may bind to reserved ports",
    },
    "close": {
        Order.BEFORE: "runs at close(), before ours; balancing is not touched",
        Order.AFTER: "runs at close(), after ours; balancing is not touched",
        Order.INSTEAD: "runs instead of ours: closed sockets stay in the live counts",
    },
}
_JOBS = {
    "connect": "forward",
    "sendmsg": "forward",
    "getpeername": "reverse",
    "recvmsg": "reverse",
    "bind": "bind",
    "post_bind": "bind",
    "sock_release": "close",
}


class Neighbour(NamedTuple):
    """A program of somebody else's. `name` and `tag` are empty where they cannot be read."""

    hook: AttachType
    id: int
    name: str
    tag: str
    cgroup: Path
    place: Place
    order: Order

    @property
    def is_rival(self) -> bool:
        """Whether it may rewrite what clients dial before we see it."""
        return self.hook in _FORWARD and self.place is not Place.ABOVE

    @property
    def meaning(self) -> str:
        """What its being there means for balancing, without a full stop."""
        if self.order is Order.BESIDE:
            return "filters packets, which carry the backend's address and not the frontend's"
        if self.order is Order.HIDDEN:
            return "does not run for our processes: it lets programs below, ours, run instead"
        return _MEANINGS[_JOBS[self.hook.hook.rstrip("46")]][self.order]

    def __str__(self) -> str:
        named = f"'{self.name}' (tag {self.tag})" if self.tag else "(name needs CAP_SYS_ADMIN)"
        return f"{self.hook.hook} program {self.id} {named} at {self.cgroup}"


class Neighbourhood(NamedTuple):
    """All that were found; `is_complete` is false where there are too many cgroups to look at."""

    programs: tuple[Neighbour, ...]
    is_complete: bool


def find_neighbours(
    cgroup: Path, hooks: Iterable[AttachType], ours: Mapping[AttachType, int], owner: Owner
) -> Neighbourhood:
    """Look at *cgroup*, all above and at most 10,000 below for programs that are not ours.

    *ours*: the programs of ours in force. Needs CAP_NET_ADMIN, and CAP_SYS_ADMIN for names.
    """
    known = set(ours.values())
    hooks = (*hooks, *_FILTERS)
    found: list[Neighbour] = []

    def look(place: Place, group: Path, fd: int, lower: int) -> None:
        for hook in hooks:
            present = attached_programs(fd, hook)
            for number in present.programs:
                if number in known or _is_ours(owner, number):
                    continue
                order = _order(hook, number, ours.get(hook), lower, place, present)
                found.append(_named(hook, number, group, place, order))

    seen = 0
    with open_cgroup(cgroup) as here:
        for group in groups_above(cgroup):
            with open_cgroup(group) as fd:
                look(Place.ABOVE, group, fd, here)
        for group, fd in groups_below(cgroup):
            seen += 1
            look(Place.BELOW if group != cgroup else Place.HERE, group, fd, fd)
    return Neighbourhood(tuple(found), seen < GROUPS_MAX)


def _order(
    hook: AttachType, number: int, ours: int | None, lower: int, place: Place, present: Attached
) -> Order:
    """When it runs. *lower*: the cgroup, its own or ours, that is below the other."""
    if hook in _FILTERS:
        return Order.BESIDE
    if ours is None:  # as it would be with a link of ours
        if place is Place.ABOVE:
            return Order.AFTER if present.is_shared else Order.HIDDEN
        return Order.BEFORE
    running = effective_programs(lower, hook)
    if ours not in running:
        return Order.INSTEAD
    if number not in running:
        return Order.HIDDEN
    return Order.BEFORE if running.index(number) < running.index(ours) else Order.AFTER


def _is_ours(owner: Owner, number: int) -> bool:
    try:
        return owner(number)
    except KernelError:  # no CAP_SYS_ADMIN
        return False


def _named(hook: AttachType, number: int, group: Path, place: Place, order: Order) -> Neighbour:
    try:
        program = identify_program(number)
    except (FileNotFoundError, KernelError):
        return Neighbour(hook, number, "", "", group, place, order)
    return Neighbour(hook, number, program.name, program.tag, group, place, order)
