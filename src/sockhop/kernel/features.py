"""What this kernel can do for sockhop, found by trying it, never by its version."""

import errno
from dataclasses import dataclass
from pathlib import Path

from sockhop.errors import SystemLackError
from sockhop.kernel.cgroups import cgroup_root
from sockhop.kernel.feature_table import BPFFS, CGROUP2, PROBES, Probe
from sockhop.kernel.host import missing_capabilities
from sockhop.kernel.mounts import filesystem_type
from sockhop.kernel.probe import Lack, Prober

__all__ = ["Feature", "probe_features"]

_TO_PROBE = ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON")


@dataclass(frozen=True)
class Feature:
    """What a probe found.

    `available` is None where only root could tell; `reason` says why it is not available.
    Without a `required` one nothing can be balanced.
    """

    name: str
    available: bool | None
    reason: str
    required: bool
    used_for: str
    without: str
    since: str


def probe_features(bpffs: Path) -> list[Feature]:
    """Try everything. *bpffs* is the directory for pins, which need not exist yet."""
    with Prober() as prober:
        mounts = [Probe(*CGROUP2, _cgroup2), Probe(*BPFFS, lambda _: _bpffs(bpffs))]
        return [_feature(probe, prober) for probe in [*mounts, *PROBES]]


def _feature(probe: Probe, prober: Prober) -> Feature:
    available: bool | None = True
    reason = ""
    try:
        probe.attempt(prober)
    except Lack as lack:
        available, reason = False, lack.reason
        if lack.errno in (errno.EPERM, errno.EACCES) and missing_capabilities(_TO_PROBE):
            available, reason = None, "needs root"
    return Feature(
        probe.name,
        available,
        reason,
        probe.required,
        probe.used_for,
        probe.without,
        str(probe.since),
    )


def _cgroup2(_: Prober) -> None:
    try:
        cgroup_root()
    except SystemLackError as error:
        raise Lack(0, error.message) from None


def _bpffs(directory: Path) -> None:
    kind = filesystem_type(directory)
    if kind != "bpf":
        raise Lack(0, f"{directory} is on {kind} (mount -t bpf bpf /sys/fs/bpf)")
