"""Debian's cloud kernels, by apt: downloaded and unpacked, not installed.

A private apt configuration reads the suites that have them; the system's sources stay as they are.
"""

import lzma
import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["SUITES", "Kernel", "cache_directory", "fetch", "newest_of", "unpacked"]

_META = "linux-image-cloud-amd64"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITES = ("bullseye-security", "bookworm", "bookworm-backports", "trixie-backports", "sid")
# What the tests need and a cloud kernel has as a module; from tls on: kTLS with AES-GCM.
_MODULES = ("inet_diag", "tcp_diag", "udp_diag", "raw_diag", "veth", "dummy", "nf_tables",
            "tls", "gcm", "ghash-generic", "ctr")  # fmt: skip


class Kernel(NamedTuple):
    """An unpacked kernel: its release (uname -r), its image, and modules in loading order.

    `version` is that of its package, which says more than the release of a Debian kernel.
    """

    version: str
    release: str
    image: Path
    modules: tuple[Path, ...]


def cache_directory() -> Path:
    """Return where kernels and package lists are kept: $SOCKHOP_VM_CACHE, else the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SOCKHOP_VM_CACHE") or Path(home) / "sockhop-vm")


def _archive_of(suite: str) -> str:
    """Return where the system's own apt gets such suites from."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    listed = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout
    wanted = "debian-security" if suite.endswith("-security") else "debian"
    for address in listed.split():
        if address.rstrip("/").endswith(f"/{wanted}"):
            return address
    raise LookupError(f"apt knows no archive {wanted}: {sorted(set(listed.split()))}")


@cache
def _apt_options() -> tuple[str, ...]:
    """Return the options of a private apt, whose lists are up to date."""
    base = cache_directory()
    for name in ("lists/partial", "archives/partial"):
        (base / name).mkdir(parents=True, exist_ok=True)
    sources = base / "sources.list"
    lines = [f"deb [signed-by={_KEYRING}] {_archive_of(suite)} {suite} main" for suite in SUITES]
    sources.write_text("\n".join(lines) + "\n")
    options = (
        f"-oDir::Etc::sourcelist={sources}",
        "-oDir::Etc::sourceparts=-",
        f"-oDir::State::Lists={base / 'lists'}",
        f"-oDir::Cache={base}",
        "-oAPT::Sandbox::User=root",
    )
    subprocess.run(["apt-get", "-qq", *options, "update"], check=True, timeout=300)
    return options


def _ask(*arguments: str) -> str:
    command = ["apt-cache", *_apt_options(), *arguments]
    return subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout


def newest_of(series: str) -> str:
    """Return the newest package version of a series such as 6.1; `newest`: of all."""
    versions = [line.split("|")[1].strip() for line in _ask("madison", _META).splitlines()]
    if series == "newest":
        return max(versions, key=lambda version: [int(n) for n in re.findall(r"\d+", version)[:3]])
    for version in versions:
        if version.startswith(f"{series}."):
            return version
    raise LookupError(f"no suite of {', '.join(SUITES)} has a kernel {series}: {versions}")


def _packages(package: str, version: str) -> Iterator[tuple[str, str]]:
    """Yield the packages with the files of a kernel: since 7.x it is split into three."""
    shown = _ask("show", f"{package}={version}")
    depends = re.search(r"^Depends: (.*)$", shown, re.MULTILINE)
    wanted = r"(linux-(?:image|binary|modules)-\S+) \(= ([^)]+)\)"
    for name, number in re.findall(wanted, depends[1] if depends else ""):
        yield name, number
        yield from _packages(name, number)


def fetch(series: str) -> Kernel:
    """Return the newest kernel of *series*, downloaded where it is not there yet."""
    version = newest_of(series)
    target = cache_directory() / "kernels" / version.replace("~", "-")
    if not (target / "complete").exists():
        target.mkdir(parents=True, exist_ok=True)
        for package, number in dict.fromkeys(_packages(_META, version)):
            subprocess.run(
                ["apt-get", "-qq", *_apt_options(), "download", f"{package}={number}"],
                check=True, timeout=600, cwd=target,
            )  # fmt: skip
        for archive in target.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, target], check=True, timeout=300)
            archive.unlink()
        (target / "complete").touch()
    # Since 7.x the image lies among the modules.
    (image,) = (*target.glob("boot/vmlinuz-*"), *target.glob("**/lib/modules/*/vmlinuz"))
    release = image.name.removeprefix("vmlinuz-")
    if release == image.name:
        release = image.parent.name
    return Kernel(version, release, image, tuple(_modules(target, release)))


def _modules(target: Path, release: str) -> Iterator[Path]:
    """Yield the modules, those first that others need; what is built in has no file."""
    (top,) = (path for path in target.glob(f"**/lib/modules/{release}") if path.is_dir())
    files = {path.name.split(".")[0]: path for path in top.rglob("*.ko*")}
    seen: set[str] = set()
    pending = [name for name in reversed(_MODULES) if name in files]
    while pending:
        name = pending[-1]
        data = unpacked(files[name])
        needs = re.search(rb"\0depends=([^\0]*)\0", data)
        wanted = needs[1].decode().replace("-", "_").split(",") if needs else []
        missing = [need for need in wanted if need in files and need not in seen]
        if missing:
            pending += missing
            continue
        pending.pop()
        if name not in seen:
            seen.add(name)
            yield files[name]


def unpacked(path: Path) -> bytes:
    """Return a module as the kernel takes it, compressed in its package or not."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
