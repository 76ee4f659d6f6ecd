"""Programs that ask a DNS service over and over: nginx, dnsmasq and unbound, each in front of it.

They run in the foreground where the calling thread is, and end when the context does.
"""

import contextlib
import http.client
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sockhop.kernel.procfs import socket_inode
from tests.clients.servers import own_directory, running

__all__ = ["Front", "ask_dns", "ask_nginx", "dnsmasq_front", "nginx_front", "unbound_front"]

NGINX_CONF = """
daemon off; worker_processes 1; user root; error_log stderr; pid nginx.pid;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  resolver {dns} ipv6=off; resolver_timeout 10s;
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://$arg_name:{behind}; }} }}
  server {{ listen 127.0.0.1:{behind}; return 200 "behind"; }}
}}
"""

UNBOUND_CONF = """
server:
  directory: "{directory}"
  username: ""
  chroot: ""
  pidfile: ""
  use-syslog: no
  do-daemonize: no
  num-threads: 1
  interface: 127.0.0.1@{port}
  do-not-query-localhost: no
  module-config: "iterator"
  cache-max-ttl: 0
  local-zone: "test." nodefault
forward-zone:
  name: "."
  forward-addr: {dns}@53
"""


class Front(NamedTuple):
    """A program that asks a DNS service; `port`: where clients ask it, in turn."""

    process: int
    port: int

    def udp_sockets(self) -> dict[int, int]:
        """Return the ports of the UDP sockets that it and its children have, by their inodes."""
        held = set()
        for pid in (self.process, *_children(self.process)):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    held.add(socket_inode(os.readlink(f"/proc/{pid}/fd/{name}")))
        return {inode: port for inode, port in _udp_table() if inode in held}


def _children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _udp_table() -> Iterator[tuple[int, int]]:
    """Yield inode and local port of the IPv4 UDP sockets of this namespace (proc_net(5))."""
    for line in Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]:
        fields = line.split()
        yield int(fields[9]), int(fields[1].rpartition(":")[2], 16)


def ask_nginx(port: int, name: str) -> bool:
    """Whether nginx finds the server called *name*."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", f"/?name={name}")
        answer = connection.getresponse()
        return answer.status == 200 and answer.read() == b"behind"


def ask_dns(port: int, name: str) -> bool:
    """Whether the resolver there finds an address of *name* (RFC 1035, 4.1)."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!xHH", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(20)
        client.connect(("127.0.0.1", port))
        client.send(query)
        _, flags, _, answers, *_ = struct.unpack_from("!6H", client.recv(512))
    return bool(flags & 0xF == 0 and answers == 1)


def _answers_dns(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask_dns(port, "ready.any.test")
    return False


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def nginx_front(dns: str, port: int) -> Iterator[Front]:
    """nginx with one worker, which looks up the server of each request."""
    with own_directory() as directory:
        text = NGINX_CONF.format(dns=dns, port=port, behind=port + 1)
        (directory / "nginx.conf").write_text(text)
        command = ["nginx", "-p", f"{directory}/", "-e", "stderr", "-c", "nginx.conf"]
        with running(command, lambda: _listens(port)) as process:
            yield Front(process, port)


@contextlib.contextmanager
def dnsmasq_front(dns: str, port: int) -> Iterator[Front]:
    """dnsmasq that asks from one port, hence from one socket."""
    with own_directory() as directory:
        command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root",
                   "--no-resolv", "--no-hosts", "--bind-interfaces", "--log-facility=-",
                   "--listen-address=127.0.0.1", f"--port={port}", f"--query-port={port + 1}",
                   "--cache-size=0", f"--server={dns}",
                   f"--pid-file={directory}/pid"]  # fmt: skip
        with running(command, lambda: _answers_dns(port)) as process:
            yield Front(process, port)


@contextlib.contextmanager
def unbound_front(dns: str, port: int) -> Iterator[Front]:
    """unbound, which connects a socket for each question."""
    with own_directory() as directory:
        text = UNBOUND_CONF.format(dns=dns, port=port, directory=directory)
        (directory / "unbound.conf").write_text(text)
        command = ["unbound", "-d", "-c", str(directory / "unbound.conf")]
        with running(command, lambda: _answers_dns(port)) as process:
            yield Front(process, port)
