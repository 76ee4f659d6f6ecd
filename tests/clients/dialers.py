"""Ordinary clients. Each asks the server at an address for its name, once, on a new connection.

`Unserved` is for what a client says where nobody serves the address; anything else that goes wrong
is an error of its own.
"""

import asyncio
import errno
import os
import re
import select
import socket
import struct
import subprocess

import dns.message
import dns.query

from tests.clients.quic import ask_for_name

__all__ = [
    "Unserved",
    "ask_asyncio",
    "ask_blocking",
    "ask_curl",
    "ask_dig",
    "ask_dig_tcp",
    "ask_dnspython",
    "ask_nonblocking",
    "ask_psql",
    "ask_quic",
    "ask_redis_cli",
    "family_of",
]

SECONDS = 2
"""How long a client may take to say no."""

_NOBODY = re.compile(r"unreachable|refused|no route|could ?n[o']t connect", re.IGNORECASE)
# No proxy, password file or start-up file of the user's may change what the clients do.
_ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": "/nonexistent"}


class Unserved(Exception):
    """Nobody serves the address."""


def _run(*command: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=False, env=_ENVIRONMENT
    )
    if result.returncode == 0:
        return result.stdout.strip()
    said = result.stdout + result.stderr
    assert _NOBODY.search(said), f"{command}: exit {result.returncode}\n{said}"
    raise Unserved(said.strip())


def ask_curl(host: str, port: int) -> str:
    """Return the body that curl prints."""
    host = f"[{host}]" if ":" in host else host
    return _run("curl", "-qsS", "--max-time", str(SECONDS), f"http://{host}:{port}/")


def ask_redis_cli(host: str, port: int) -> str:
    """Return the value of the key `name`."""
    return _run("redis-cli", "-h", host, "-p", str(port), "GET", "name")


def ask_psql(host: str, port: int) -> str:
    """Return the server's cluster_name."""
    conninfo = f"host={host} port={port} user=postgres connect_timeout={SECONDS}"
    return _run("psql", "-XAt", "--no-password", "-c", "show cluster_name", conninfo)


def ask_dig(host: str, port: int) -> str:
    """Return the TXT record of who.test. dig connects its UDP socket."""
    how = ("+short", "+notcp", "+tries=1", f"+time={SECONDS}")
    return _run("dig", f"@{host}", "-p", str(port), *how, "TXT", "who.test").strip('"')


def ask_dig_tcp(host: str, port: int) -> str:
    """Return the TXT record of who.test, over TCP."""
    how = ("+short", "+tcp", "+tries=1", f"+time={SECONDS}")
    return _run("dig", f"@{host}", "-p", str(port), *how, "TXT", "who.test").strip('"')


def ask_dnspython(host: str, port: int) -> str:
    """Return the TXT record of who.test.

    dnspython, as systemd-resolved, does not connect its UDP socket: it compares the source of the
    answer with the address that it asked, and raises UnexpectedSource where that is another one.
    """
    query = dns.message.make_query("who.test", "TXT")
    try:
        answer = dns.query.udp(query, host, timeout=SECONDS, port=port)
    except OSError as error:
        raise Unserved(error) from None
    return str(answer.answer[0][0]).strip('"')


def ask_quic(host: str, port: int) -> str:
    """Return what a QUIC server says."""
    try:
        return asyncio.run(ask_for_name(host, port, SECONDS / 2))
    except OSError as error:
        raise Unserved(error) from None


def family_of(host: str) -> socket.AddressFamily:
    """Return the family of a numeric address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def ask_blocking(host: str, port: int, kind: socket.SocketKind) -> str:
    """Connect, send and receive, each blocking."""
    with socket.socket(family_of(host), kind) as client:
        # Timeouts of Python's make a socket non-blocking; these are the kernel's.
        limit = struct.pack("@ll", SECONDS, 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            client.connect((host, port))
        except OSError as error:
            raise Unserved(error) from None
        assert client.getpeername()[:2] == (host, port)
        if kind is socket.SOCK_DGRAM:  # over TCP the server speaks first
            client.send(b"who?")
        return client.recv(100).decode()


def ask_nonblocking(host: str, port: int, kind: socket.SocketKind) -> str:
    """connect_ex(), then poll() until the socket may be written to, then until it may be read."""
    with socket.socket(family_of(host), kind) as client:
        client.setblocking(False)
        poller = select.poll()
        number = client.connect_ex((host, port))
        if number == errno.EINPROGRESS:
            poller.register(client, select.POLLOUT)
            assert poller.poll(SECONDS * 1000), "connect() neither succeeds nor fails"
            number = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise Unserved(OSError(number, os.strerror(number)))
        assert client.getpeername()[:2] == (host, port)
        if kind is socket.SOCK_DGRAM:  # over TCP the server speaks first
            client.send(b"who?")
        poller.register(client, select.POLLIN)
        assert poller.poll(SECONDS * 1000), "no answer"
        return client.recv(100).decode()


class _Answer(asyncio.DatagramProtocol):
    """Completes `first` with the first datagram."""

    def __init__(self) -> None:
        self.first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:
        if not self.first.done():
            self.first.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.first.done():
            self.first.set_exception(exc)


async def _ask_stream(host: str, port: int) -> str:
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        raise Unserved(error) from None
    try:
        assert writer.get_extra_info("peername")[:2] == (host, port)
        return (await reader.read(100)).decode()
    finally:
        writer.close()
        await writer.wait_closed()


async def _ask_datagram(host: str, port: int) -> str:
    loop = asyncio.get_running_loop()
    try:
        transport, protocol = await loop.create_datagram_endpoint(_Answer, remote_addr=(host, port))
    except OSError as error:
        raise Unserved(error) from None
    try:
        assert transport.get_extra_info("peername")[:2] == (host, port)
        transport.sendto(b"who?")
        return (await protocol.first).decode()
    finally:
        transport.close()
        await asyncio.sleep(0)  # the loop closes the socket in its next round


def ask_asyncio(host: str, port: int, kind: socket.SocketKind) -> str:
    """A stream, or a datagram endpoint with a remote address."""
    ask = _ask_stream if kind is socket.SOCK_STREAM else _ask_datagram

    async def bounded() -> str:
        return await asyncio.wait_for(ask(host, port), SECONDS)

    return asyncio.run(bounded())
