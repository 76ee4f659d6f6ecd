"""Why a socket is not balanced, as far as that can be known afterwards."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sockhop.agent.find_socket import FoundSocket
from sockhop.agent.installed import read_services
from sockhop.datapath.balancer import (
    BalanceMaps,
    attached_hooks,
    balanced_cgroup,
    link_directory,
)
from sockhop.datapath.records import (
    Client,
    ClientKey,
    FrontendFlag,
    FrontendKey,
    FrontendRecord,
    Layer,
    Provenance,
    Setting,
)
from sockhop.datapath.sockets import TCP_STATES
from sockhop.kernel.cgroups import (
    AttachType,
    cgroup_path,
    cgroup_root,
    cgroups_above,
    open_cgroup,
)
from sockhop.kernel.procfs import started_at
from sockhop.kernel.syscall import KernelError
from sockhop.model import Protocol, endpoint, unpack_address

__all__ = ["Case", "reasons_against", "socket_cgroup"]


class Case(NamedTuple):
    """A socket that is not balanced.

    `cgroup`: where the hooks are if they have no links; `looked`: whether what datagrams have left
    at the socket could be read.
    """

    maps: BalanceMaps
    pins: Path
    cgroup: Path
    found: FoundSocket
    provenance: Provenance | None
    looked: bool


def socket_cgroup(found: FoundSocket) -> Path | None:
    """Return the cgroup in which the socket was made; None where that cannot be told."""
    if found.socket.cgroup:
        with suppress(KernelError), open_cgroup(cgroup_root()) as fd:
            return cgroup_path(fd, found.socket.cgroup)
    return None


def reasons_against(case: Case) -> Iterator[str]:
    """Yield what kept the socket from being balanced: the sure things first."""
    socket, origin = case.found.socket, case.provenance
    state = TCP_STATES[socket.state - 1]
    if state == "LISTEN":
        yield "it listens; balanced are sockets that connect or send"
        return
    if origin is None and state in ("TIME-WAIT", "FIN-WAIT-2") and not socket.inode:
        yield "it is closed, and what was remembered of it is gone"
        return
    if origin is not None:
        dialled = endpoint(unpack_address(origin.frontend_address), origin.frontend_port)
        yield f"it has left the backend that it was given for {dialled}"
    if not socket.remote_port:
        if origin is None:
            yield (
                "it is not connected, and has sent to no frontend since it was made"
                if case.looked
                else "it is not connected; to which frontends it has sent cannot be seen from here"
            )
        yield from _circumstances(case)
        return
    yield from _of_its_peer(case)


def _of_its_peer(case: Case) -> Iterator[str]:
    """What its peer is instead of a backend that it was given."""
    socket = case.found.socket
    peer = FrontendKey(socket.remote_address, 0, socket.remote_port, socket.protocol)
    text = endpoint(unpack_address(peer.address), peer.port)
    frontend = case.maps.find_for(peer, case.found.netns_cookie, cgroups_above(socket.cgroup))
    if frontend is not None:
        name = read_services(case.maps).get(frontend[1].service, "?")
        yield f"its peer is {text} itself, a frontend of {name}: the connect was not translated"
        yield from _refusals(case, frontend[1])
        yield from _circumstances(case)
        return
    if redirect := case.maps.find_frontend(
        peer._replace(layer=Layer.REDIRECTS), case.found.netns_cookie
    ):
        name = read_services(case.maps).get(redirect[1].service, "?")
        yield f"its peer is {text} itself, and {name} is not for it"
        yield from _refusals(case, redirect[1])
    elif any(case.maps.frontends.get(peer._replace(layer=layer)) for layer in Layer):
        yield f"its peer {text} is a frontend in other network namespaces only"
    elif services := sorted(_services_of(case.maps, peer)):
        yield f"its peer {text} is no frontend but a backend of {', '.join(services)}"
        if case.provenance is None:
            yield from _circumstances(case)
    else:
        yield f"its peer {text} is no frontend"


def _services_of(maps: BalanceMaps, peer: FrontendKey) -> set[str]:
    """The services that have *peer* as a backend."""
    names = read_services(maps)
    return {
        names.get(record.service, "?")
        for _, record in maps.backends.items()
        if (record.address, record.port, record.protocol)
        == (peer.address, peer.port, peer.protocol)
    }


def _refusals(case: Case, frontend: FrontendRecord) -> Iterator[str]:
    """Whom the service, or the redirect, does not serve."""
    if not frontend.flags & FrontendFlag.CLIENTS:
        return
    group = socket_cgroup(case.found)
    for above in (group, *group.parents) if group else ():
        said = case.maps.clients.get(ClientKey(above.stat().st_ino, frontend.id))
        if said == Client.SERVED:
            return
        if said == Client.EXCLUDED:
            yield f"the service excludes the cgroup {above}, and it was made in {group}"
            return
    if frontend.flags & FrontendFlag.LISTED_ONLY:
        yield f"the service is for some cgroups only; it was made in {group or 'another'}"


def _circumstances(case: Case) -> Iterator[str]:
    """What keeps the hooks from a socket, or did so when it connected."""
    socket = case.found.socket
    if case.maps.setting(Setting.BYPASS):
        yield "bypass is on: every connect passes untouched"
    hooks_at = balanced_cgroup(case.pins) or case.cgroup
    group = socket_cgroup(case.found)
    if group is not None and not group.is_relative_to(hooks_at):
        yield f"it was made in the cgroup {group}, and balanced is what is made in {hooks_at}"
    hooks = attached_hooks(case.pins, hooks_at if hooks_at.is_dir() else None)
    protocol = Protocol.TCP if socket.protocol == Protocol.TCP.number else Protocol.UDP
    needed = [AttachType.CONNECT4, AttachType.CONNECT6]
    if protocol is Protocol.UDP:
        needed += [AttachType.SENDMSG4, AttachType.SENDMSG6]
    if missing := [hook.hook for hook in needed if hook not in hooks]:
        yield f"no program of ours is attached at {', '.join(missing)}"
    if _may_be_older(case):
        yield "it may be older than balancing here, as its process is"


def _may_be_older(case: Case) -> bool:
    links = link_directory(case.pins)
    began = [pin.stat().st_ctime for pin in links.iterdir()] if links.is_dir() else []
    for holder in case.found.holders:
        with suppress(OSError):
            if began and started_at(holder.pid) < min(began):
                return True
    return False
