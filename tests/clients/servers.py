"""Real servers, two of a kind, each with a name that its answers tell.

They run in the foreground where the calling thread is (namespace and cgroup), listen on 127.0.0.1
and ::1 at the same port, and end, with their directory, when the context does.
"""

import contextlib
import errno
import functools
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.sandbox import ServerThread, wait_until

__all__ = [
    "Pair",
    "dnsmasqs",
    "echoes",
    "nginxes",
    "own_directory",
    "postgreses",
    "quics",
    "redises",
    "running",
]

NAMES = ("one", "two")

NGINX_CONF = """
daemon off; master_process off; error_log stderr; pid nginx.pid;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  server {{ listen 127.0.0.1:{port}; listen [::1]:{port}; return 200 "{name}\\n"; }}
}}
"""


class Pair:
    """Two servers of a kind: `ports` by name."""

    def __init__(self, ports: dict[str, int]) -> None:
        self.ports = ports

    def backends(self, *names: str) -> list[str]:
        """Return the IPv4 and IPv6 endpoints of the servers with these names."""
        hosts = ("127.0.0.1", "[::1]")
        return [f"{host}:{self.ports[name]}" for name in names for host in hosts]


@contextlib.contextmanager
def own_directory(owner: str = "root") -> Iterator[Path]:
    """Make a directory that goes with the body."""
    path = Path(tempfile.mkdtemp(prefix="sockhop-test-server-"))
    try:
        shutil.chown(path, owner)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def running(command: list[str], answers: Callable[[], bool]) -> Iterator[int]:
    """Run *command* while the body does, which begins when it answers; yield its process id."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(lambda: process.poll() is not None or answers(), f"{command} answers", 30)
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(f"{command}: exit {process.returncode}\n{log.read().decode()}")
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("::1", port), timeout=1):
        return True
    return False


def _answers(*command: str) -> bool:
    result = subprocess.run(command, capture_output=True, timeout=20, check=False)
    return result.returncode == 0 and bool(result.stdout.strip())


@contextlib.contextmanager
def nginxes(first_port: int) -> Iterator[Pair]:
    """Two nginx, each with its name as body."""
    pair = Pair({name: first_port + i for i, name in enumerate(NAMES)})
    with contextlib.ExitStack() as stack:
        for name, port in pair.ports.items():
            directory = stack.enter_context(own_directory())
            (directory / "nginx.conf").write_text(NGINX_CONF.format(name=name, port=port))
            command = ["nginx", "-p", f"{directory}/", "-e", "stderr", "-c", "nginx.conf"]
            stack.enter_context(running(command, lambda port=port: _listens(port)))  # type: ignore[misc]
        yield pair


@contextlib.contextmanager
def redises(first_port: int) -> Iterator[Pair]:
    """Two Redis servers, each with its name under the key `name`."""
    pair = Pair({name: first_port + i for i, name in enumerate(NAMES)})
    with contextlib.ExitStack() as stack:
        for name, port in pair.ports.items():
            directory = stack.enter_context(own_directory())
            command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "::1",
                       "--save", "", "--appendonly", "no", "--dir", str(directory)]  # fmt: skip
            stack.enter_context(running(command, lambda port=port: _listens(port)))  # type: ignore[misc]
            subprocess.run(
                ["redis-cli", "-p", str(port), "SET", "name", name],
                check=True, capture_output=True, timeout=20,
            )  # fmt: skip
        yield pair


@contextlib.contextmanager
def dnsmasqs(first_port: int) -> Iterator[Pair]:
    """Two dnsmasq, each with its name as TXT record of who.test; any.test and below is here."""
    pair = Pair({name: first_port + i for i, name in enumerate(NAMES)})
    with contextlib.ExitStack() as stack:
        for name, port in pair.ports.items():
            directory = stack.enter_context(own_directory())
            command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root",
                       "--no-resolv", "--no-hosts", "--bind-interfaces", "--log-facility=-",
                       "--listen-address=127.0.0.1,::1", f"--port={port}",
                       f"--txt-record=who.test,{name}", "--address=/any.test/127.0.0.1",
                       f"--pid-file={directory}/pid"]  # fmt: skip
            asks = ("dig", "@127.0.0.1", "-p", str(port), "+short", "+tries=1", "TXT", "who.test")
            stack.enter_context(running(command, lambda asks=asks: _answers(*asks)))  # type: ignore[misc]
        yield pair


@contextlib.contextmanager
def quics(first_port: int) -> Iterator[Pair]:
    """Two QUIC servers, each of which tells its name."""
    pair = Pair({name: first_port + i for i, name in enumerate(NAMES)})
    with contextlib.ExitStack() as stack:
        for name, port in pair.ports.items():
            command = [sys.executable, "-m", "tests.clients.quic", name, str(port)]
            stack.enter_context(running(command, functools.partial(_is_bound, "::1", port)))
        yield pair


def _is_bound(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


@contextlib.contextmanager
def postgreses(first_port: int) -> Iterator[Pair]:
    """Two PostgreSQL servers, each with its name as cluster_name."""
    pair = Pair({name: first_port + i for i, name in enumerate(NAMES)})
    newest = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[-2]))
    # The servers refuse to run as root.
    user = pwd.getpwnam("postgres")
    drop = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(own_directory("postgres")) / "data"
        subprocess.run(
            [*drop, newest / "initdb", "--pgdata", made, "--no-sync", "--auth=trust",
             "--username=postgres", "--encoding=UTF8", "--no-locale"],
            check=True, capture_output=True, timeout=60, cwd="/",
        )  # fmt: skip
        for name, port in pair.ports.items():
            directory = stack.enter_context(own_directory("postgres"))
            subprocess.run([*drop, "cp", "-r", made, directory / "data"], check=True, cwd="/")
            settings = {
                "port": port, "cluster_name": name, "listen_addresses": "127.0.0.1,::1",
                "unix_socket_directories": directory, "fsync": "off", "shared_buffers": "1MB",
                "max_connections": 20, "autovacuum": "off", "max_wal_senders": 0,
                "wal_level": "minimal",
            }  # fmt: skip
            options = [f"-c{key}={value}" for key, value in settings.items()]
            command = [*drop, str(newest / "postgres"), "-D", str(directory / "data"), *options]
            asks = (str(newest / "psql"), "-XAt", "-h", "127.0.0.1", "-p", str(port), "-U",
                    "postgres", "-c", "select 1")  # fmt: skip
            stack.enter_context(running(command, lambda asks=asks: _answers(*asks)))  # type: ignore[misc]
        yield pair


@contextlib.contextmanager
def echoes(first_port: int, *, udp: bool) -> Iterator[Pair]:
    """Two servers of the test's own, TCP or UDP."""
    pair = Pair({name: first_port + i for i, name in enumerate(NAMES)})
    with contextlib.ExitStack() as stack:
        for name, port in pair.ports.items():
            for address in ("127.0.0.1", "::1"):
                stack.enter_context(ServerThread(name, address, port, udp=udp))
        yield pair
