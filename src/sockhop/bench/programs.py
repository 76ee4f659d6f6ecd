"""Real programs under their own clients' load, for `sockhop bench splice`."""

import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sockhop.bench.rooms import Room
from sockhop.errors import SockhopError
from sockhop.kernel import netns

__all__ = ["LOADS", "Load", "missing", "prepare", "run_load", "serve"]

_REDIS, _NGINX, _IPERF, _POSTGRES = 7100, 7101, 7102, 7103
_SECONDS = 1
_PATIENCE = 20.0
"""Seconds until a server answers."""

_NGINX_CONF = """
daemon off; master_process off; error_log stderr; pid nginx.pid;
events { worker_connections 256; }
http {
  access_log off; keepalive_requests 1000000;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  server { listen 127.0.0.1:%d; root .; }
}
"""
_PAGE = 1000


class Load(NamedTuple):
    """A client's command; `read` finds in its output how much it got done, and in what time (s).

    What is counted is requests, for iperf3 blocks of 128 KiB.
    """

    name: str
    server: str
    command: tuple[str, ...]
    read: Callable[[str], tuple[float, float]]


def _find(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    if not found or re.search("Socket errors|Non-2xx|aborted", said):
        raise SockhopError("a client saw errors, or said no rate", hint=said[-500:])
    return float(found[1])


def _wrk(said: str) -> tuple[float, float]:
    count = _find(r"(\d+) requests in", said)
    return count, count / _find(r"Requests/sec:\s+([0-9.]+)", said)


def _pgbench(said: str) -> tuple[float, float]:
    count = _find(r"transactions actually processed: (\d+)", said)
    return count, count / _find(r"tps = ([0-9.]+)", said)


def _iperf(said: str) -> tuple[float, float]:
    end = json.loads(said)["end"]["sum_received"]
    return end["bytes"] / (128 << 10), end["seconds"]


def _redis(name: str, count: int, *options: str) -> Load:
    return Load(
        name,
        "redis",
        ("redis-benchmark", "-p", str(_REDIS), "--csv", "-t", "get", "-n", str(count), *options),
        lambda said: (count, count / _find(r'"GET","([0-9.]+)"', said)),
    )


_WRK = ("wrk", "-t1", "-c8", f"-d{_SECONDS}", f"http://127.0.0.1:{_NGINX}/page")
_IPERF_CLIENT = ("iperf3", "-J", "-t", str(_SECONDS), "-c", "127.0.0.1", "-p", str(_IPERF))
_PGBENCH = ("pgbench", "-S", "-n", "-c", "4", "-T", str(_SECONDS), "-h", "127.0.0.1",
            "-p", str(_POSTGRES), "-U", "postgres", "postgres")  # fmt: skip

LOADS = (
    _redis("redis-benchmark -c 20", 20_000, "-c", "20"),
    _redis("redis-benchmark -c 1", 10_000, "-c", "1"),
    _redis("redis-benchmark -P 16", 100_000, "-c", "20", "-P", "16"),
    Load("pgbench -S -c 4", "postgres", _PGBENCH, _pgbench),
    Load("wrk to nginx, keep-alive", "nginx", _WRK, _wrk),
    Load("wrk to nginx, short", "nginx", (*_WRK, "-H", "Connection: close"), _wrk),
    Load("iperf3", "iperf3", _IPERF_CLIENT, _iperf),
    Load("iperf3 -R", "iperf3", (*_IPERF_CLIENT, "-R"), _iperf),
)

_PACKAGES = {
    "redis": {"redis-server": "redis-server", "redis-benchmark": "redis-tools"},
    "postgres": {"pgbench": "postgresql"},
    "nginx": {"nginx": "nginx-light", "wrk": "wrk"},
    "iperf3": {"iperf3": "iperf3"},
}


def missing(server: str) -> str:
    """Return what of a server or its client is not installed, and how to; "" if nothing."""
    packages = [package for tool, package in _PACKAGES[server].items() if not shutil.which(tool)]
    if server == "postgres" and not packages and not _postgres_directory():
        packages = ["postgresql"]
    return f"not installed: apt-get install {' '.join(packages)}" if packages else ""


def _postgres_directory() -> Path | None:
    found = list(Path("/usr/lib/postgresql").glob("*/bin"))
    return max(found, key=lambda path: int(path.parts[-2])) if found else None


def prepare(server: str, directory: Path) -> None:
    """Make below *directory* what every server of this kind starts from."""
    if server == "nginx":
        (directory / "page").write_bytes(b"x" * _PAGE)
        (directory / "nginx.conf").write_text(_NGINX_CONF % _NGINX)
    if server == "postgres":
        binaries = _postgres_directory()
        assert binaries is not None
        directory.chmod(0o711)  # it refuses to run as root
        made = directory / "postgres"
        made.mkdir()
        shutil.chown(made, "postgres")
        _run(*_as_postgres(), str(binaries / "initdb"), "--pgdata", str(made / "data"),
             "--no-sync", "--auth=trust", "--username=postgres", "--no-locale")  # fmt: skip


def _as_postgres() -> tuple[str, ...]:
    user = pwd.getpwnam("postgres")
    return ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--")


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise SockhopError(f"`{command[0]} ...` failed", hint=done.stderr[-500:])


def serve(server: str, room: Room, directory: Path) -> None:
    """Start a server of this kind in the room and wait until it answers."""
    own = directory / f"{server}-{room.cgroup.name}"
    own.mkdir()
    match server:
        case "redis":
            _start(room, own, "redis-server", "--port", str(_REDIS), "--bind", "127.0.0.1",
                   "--save", "", "--appendonly", "no", "--dir", str(own))  # fmt: skip
            _await(room, _REDIS)
        case "nginx":
            for name in ("page", "nginx.conf"):
                shutil.copy(directory / name, own)
            _start(room, own, "nginx", "-p", f"{own}/", "-e", "stderr", "-c", "nginx.conf")
            _await(room, _NGINX)
        case "iperf3":
            _start(room, own, "iperf3", "-s", "-p", str(_IPERF))
            _await(room, _IPERF)
        case "postgres":
            _serve_postgres(room, directory, own)


def _serve_postgres(room: Room, directory: Path, own: Path) -> None:
    binaries = _postgres_directory()
    shutil.chown(own, "postgres")
    _run(*_as_postgres(), "cp", "-r", str(directory / "postgres" / "data"), str(own))
    settings = {"port": _POSTGRES, "listen_addresses": "127.0.0.1", "fsync": "off",
                "unix_socket_directories": own, "autovacuum": "off"}  # fmt: skip
    options = [f"-c{key}={value}" for key, value in settings.items()]
    _start(room, own, *_as_postgres(), f"{binaries}/postgres", "-D", f"{own}/data", *options)
    _await(room, _POSTGRES)
    end = time.monotonic() + _PATIENCE
    while True:  # it listens before it serves
        try:
            room.run("pgbench", "-i", "-q", "-h", "127.0.0.1", "-p", str(_POSTGRES), "-U",
                     "postgres", "postgres")  # fmt: skip
            return
        except SockhopError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _start(room: Room, own: Path, *command: str) -> None:
    with (own / "log").open("wb") as log:
        process = room.start(*command, stdout=log, stderr=log)
    os.sched_setaffinity(process.pid, {room.cpus.server})


def _await(room: Room, port: int) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            with netns.entered(room.netns), socket.create_connection(("127.0.0.1", port), 1):
                return
        except OSError:
            if time.monotonic() > end:
                raise SockhopError(f"the server at port {port} does not answer") from None
            time.sleep(0.05)


def run_load(load: Load, room: Room) -> tuple[float, float]:
    """Run a client; return nanoseconds by the clock and of CPU time (the room's) per request."""
    before = _cpu_time(room.cgroup)
    said = room.run("taskset", "-c", str(room.cpus.client), *load.command)
    spent = _cpu_time(room.cgroup) - before
    count, seconds = load.read(said)
    return seconds / count * 1e9, spent / count * 1e9


def _cpu_time(cgroup: Path) -> float:
    """Return the seconds of CPU time that a cgroup's processes have used."""
    text = (cgroup / "cpu.stat").read_text()
    return int(text.split("usage_usec ", 1)[1].split()[0]) / 1e6
