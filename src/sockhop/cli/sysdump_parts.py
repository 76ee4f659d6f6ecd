"""The parts of a sysdump: each what a command prints, or what only a bug report wants."""

import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sockhop import __version__
from sockhop.cli.options import api_path, bpffs_path
from sockhop.cli.scrub import scrub, scrub_log

__all__ = ["PARTS", "Part"]

MAP_ENTRIES_MAX = 1000
"""Entries of each map that are shown; how many there are is always told."""
EVENTS_MAX = 2000
LOG_LINES_MAX = 2000
_UNIT = "sockhop.service"
_SECONDS = 10
"""How long another program may take."""


class Part(NamedTuple):
    """A file of the archive: its name, what it is, and how its bytes are made, scrubbed."""

    name: str
    about: str
    collect: Callable[[], bytes]


def _json(make: Callable[[], Any]) -> Callable[[], bytes]:
    def collect() -> bytes:
        value = scrub(msgspec.to_builtins(make(), str_keys=True))
        return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"

    return collect


def _versions() -> dict[str, Any]:
    system = platform.uname()
    release = {}
    with suppress(OSError):
        release = platform.freedesktop_os_release()
    return {
        "sockhop": __version__,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": system.release,
        "kernel_version": system.version,
        "machine": system.machine,
        "system": {name: release.get(name, "") for name in ("ID", "VERSION_ID", "PRETTY_NAME")},
        "python": platform.python_version(),
    }


def _status() -> Any:
    from sockhop.cli.status import read_status  # noqa: PLC0415 (each part imports its own)

    return read_status(bpffs_path(), api_path())


def _features() -> Any:
    from sockhop.cli.features import this_node  # noqa: PLC0415

    return this_node(bpffs_path())


def _advisories() -> Any:
    from sockhop.cli.advisories import report_on  # noqa: PLC0415

    return report_on(None)


def _services() -> Any:
    from sockhop.agent.inventory import list_services  # noqa: PLC0415
    from sockhop.datapath.balancer import BalanceMaps  # noqa: PLC0415

    with BalanceMaps(bpffs_path()) as maps:
        return list_services(maps)


def _backends() -> Any:
    from sockhop.agent.inventory import list_backends  # noqa: PLC0415
    from sockhop.datapath.balancer import BalanceMaps  # noqa: PLC0415

    with BalanceMaps(bpffs_path()) as maps:
        return list_backends(maps)


def _policies() -> Any:
    from sockhop.agent.policy_rows import list_policies  # noqa: PLC0415

    return list_policies(bpffs_path(), api_path())


def _splices() -> Any:
    from sockhop.agent.splices import list_splices  # noqa: PLC0415
    from sockhop.datapath.balancer import BalanceMaps  # noqa: PLC0415

    with BalanceMaps(bpffs_path()) as maps:
        return list_splices(maps, bpffs_path())


def _maps() -> Any:
    from sockhop.datapath.balancer import BalanceMaps  # noqa: PLC0415
    from sockhop.datapath.pins import NotInstalled  # noqa: PLC0415
    from sockhop.datapath.policies import PolicyMaps  # noqa: PLC0415
    from sockhop.datapath.splicer import SpliceMaps  # noqa: PLC0415

    found: dict[str, Any] = {}
    with ExitStack() as stack:
        opened: list[object] = [stack.enter_context(BalanceMaps(bpffs_path()))]
        opened.append(stack.enter_context(PolicyMaps(bpffs_path())))
        with suppress(NotInstalled):  # nothing was ever spliced
            opened.append(stack.enter_context(SpliceMaps(bpffs_path())))
        for maps in opened:
            found |= dict(_each_map(maps))
    return found


def _each_map(maps: object) -> Iterator[tuple[str, Any]]:
    from sockhop.kernel.maps import Map  # noqa: PLC0415

    for each in vars(maps).values():
        if not isinstance(each, Map):
            continue
        # Arrays have an entry for every index: those in use are not 0.
        entries = [(key, value) for key, value in each.items() if value and value != _zero(value)]
        shown = [{"key": _plain(k), "value": _plain(v)} for k, v in entries[:MAP_ENTRIES_MAX]]
        yield each.name, {"size": each.max_entries, "used": len(entries), "entries": shown}


def _zero(value: Any) -> Any:
    return type(value)._make([0] * len(value)) if hasattr(value, "_asdict") else 0


def _plain(value: Any) -> Any:
    """Records as objects, addresses and names as text, other bytes as hex."""
    from sockhop.model import unpack_address  # noqa: PLC0415

    if isinstance(value, bytes) and len(value) == 16:
        return unpack_address(value)
    if isinstance(value, bytes):
        text = value.rstrip(b"\0").decode(errors="replace")
        return text if text.isprintable() else value.hex()
    if hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    return value


def _sockets() -> Any:
    """How many sockets there are of each kind; no addresses."""
    from sockhop.agent.live_sockets import balanced_and_unmanaged, socket_rows  # noqa: PLC0415
    from sockhop.datapath.pins import NotInstalled  # noqa: PLC0415

    try:
        rows = socket_rows(balanced_and_unmanaged(bpffs_path()))
    except NotInstalled:
        return {"sockstat": _sockstat()}
    kinds = Counter((row.protocol, row.state, row.shown_service, row.reason) for row in rows)
    names = ("protocol", "state", "service", "reason")
    counted = [
        dict(zip(names, kind, strict=True)) | {"sockets": n} for kind, n in kinds.most_common()
    ]
    return {"sockets": len(rows), "of": counted, "sockstat": _sockstat()}


def _sockstat() -> list[str]:
    lines = []
    for name in ("sockstat", "sockstat6"):
        with suppress(OSError):
            lines += Path("/proc/net", name).read_text().splitlines()
    return lines


def _audit() -> Any:
    from sockhop.diagnose.pairs import examine  # noqa: PLC0415
    from sockhop.diagnose.visit import Visitor, open_sockmaps  # noqa: PLC0415

    with ExitStack() as stack:
        maps = open_sockmaps(stack)
        audits, pairs = examine(stack.enter_context(Visitor()), maps)
        return {"maps": [audit.result for audit in audits], "pairs": pairs}


def _events() -> bytes:
    from sockhop.agent.events import EventLog, events_path  # noqa: PLC0415

    last = list(EventLog(events_path(api_path())).read())[-EVENTS_MAX:]
    lines = [msgspec.json.encode(scrub(msgspec.to_builtins(event))) for event in last]
    return b"".join(line + b"\n" for line in lines)


def _orders() -> Any:
    from sockhop.agent.orders import orders_path  # noqa: PLC0415

    try:
        return msgspec.json.decode(orders_path(api_path()).read_bytes())
    except FileNotFoundError:
        return {}


def _configuration() -> bytes:
    from sockhop.kernel.traits import configuration  # noqa: PLC0415

    return configuration().encode()


def _log() -> bytes:
    """The agent's, from the journal; nothing where systemd does not keep it."""
    command = ("journalctl", f"--unit={_UNIT}", "--output=short-iso", "--no-pager", "--quiet")
    try:
        done = subprocess.run(
            [*command, f"--lines={LOG_LINES_MAX}"],
            capture_output=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        return b""
    return scrub_log(done.stdout.decode(errors="replace")).encode()


PARTS = (
    Part("versions.json", "of sockhop, the kernel, the system", _json(_versions)),
    Part("status.json", "`sockhop status`", _json(_status)),
    Part("features.json", "`sockhop features`: also settings, build options, structures",
         _json(_features)),
    Part("advisories.json", "`sockhop advisories`", _json(_advisories)),
    Part("services.json", "`sockhop get services`", _json(_services)),
    Part("backends.json", "`sockhop get backends`", _json(_backends)),
    Part("policies.json", "`sockhop get policies`", _json(_policies)),
    Part("splices.json", "`sockhop get splices`", _json(_splices)),
    Part("maps.json", f"our maps, at most {MAP_ENTRIES_MAX:,} entries of each", _json(_maps)),
    Part("sockets.json", "how many sockets there are of each kind", _json(_sockets)),
    Part("audit.json", "`sockhop audit`", _json(_audit)),
    Part("orders.json", "what waits for live sockets: drains, parked sockets", _json(_orders)),
    Part("kernel.config", "what the kernel was built with", _configuration),
    Part("events.jsonl", f"`sockhop events`, the last {EVENTS_MAX:,}", _events),
    Part("agent.log", f"the journal of {_UNIT}, its last {LOG_LINES_MAX:,} lines", _log),
)  # fmt: skip
