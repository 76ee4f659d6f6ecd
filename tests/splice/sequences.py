"""Ways to end a connection. Each is run as it is and spliced; what the ends see must be equal."""

import ctypes
import signal
import socket
import struct

from tests.splice.runs import PATIENCE, Run

__all__ = ["SEQUENCES", "UNREAD", "disconnect"]

_NO_LINGER = struct.pack("ii", 1, 0)


def _reset(of: socket.socket) -> None:
    of.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    of.close()


def disconnect(of: socket.socket) -> None:
    """Take a socket from its peer: connect(AF_UNSPEC), which Python's own connect() cannot say."""
    assert ctypes.CDLL(None).connect(of.fileno(), struct.pack("=H14x", 0), 16) == 0


def _client_first(run: Run) -> None:
    server = run.talk()
    run.client.close()
    run.drain("server", server)
    server.close()


def _server_first(run: Run) -> None:
    server = run.talk()
    server.close()
    run.drain("client", run.client)
    run.client.close()


def _client_resets(run: Run) -> None:
    server = run.talk()
    _reset(run.client)
    run.settle()
    run.kept["server"] = server
    run.drain("server", server)


def _server_resets(run: Run) -> None:
    server = run.talk()
    _reset(server)
    run.settle()
    run.kept["client"] = run.client
    run.drain("client", run.client)


def _client_resets_behind_unread(run: Run) -> None:
    server = run.talk()
    run.client.sendall(b"last words")
    _reset(run.client)
    run.settle()
    run.kept["server"] = server
    run.drain("server", server)
    run.write("server", server, b"too late")


def _client_closes_unread(run: Run) -> None:
    server = run.talk()
    server.sendall(b"never read")
    run.settle()
    run.client.close()
    run.settle()
    run.kept["server"] = server


def _server_closes_unread(run: Run) -> None:
    server = run.talk()
    run.client.sendall(b"never read")
    run.settle()
    server.close()
    run.settle()
    run.kept["client"] = run.client


def _listener_closes_over_unaccepted(run: Run) -> None:
    run.client.sendall(b"to nobody")
    run.settle()
    run.listener.close()
    run.settle()
    run.kept["client"] = run.client
    run.drain("client", run.client)


def _client_then_listener(run: Run) -> None:
    run.client.close()
    run.listener.close()


def _listener_shuts_down(run: Run) -> None:
    run.listener.shutdown(socket.SHUT_RDWR)
    run.settle()
    run.drain("client", run.client)
    run.client.close()
    run.listener.close()


def _client_resets_unaccepted(run: Run) -> None:
    run.client.sendall(b"early")
    _reset(run.client)
    run.settle()
    server = run.accept()
    run.drain("server", server)
    server.close()


def _both_shut_down(run: Run) -> None:
    server = run.talk()
    run.client.shutdown(socket.SHUT_RDWR)
    run.settle()
    server.shutdown(socket.SHUT_RDWR)
    run.settle()
    run.kept |= {"client": run.client, "server": server}


def _client_half_then_server(run: Run) -> None:
    server = run.talk()
    run.client.sendall(b"the end")
    run.client.shutdown(socket.SHUT_WR)
    run.drain("server", server)
    server.sendall(b"understood")
    server.close()
    run.drain("client", run.client)
    run.kept["client"] = run.client


def _server_half_then_client(run: Run) -> None:
    server = run.talk()
    server.sendall(b"the end")
    server.shutdown(socket.SHUT_WR)
    run.drain("client", run.client)
    run.client.sendall(b"understood")
    run.client.close()
    run.drain("server", server)
    run.kept["server"] = server


def _client_unconnects(run: Run) -> None:
    server = run.talk()
    run.client.sendall(b"before")
    disconnect(run.client)
    run.settle()
    run.drain("server", server)
    server.close()
    run.kept["client"] = run.client


def _server_unconnects(run: Run) -> None:
    server = run.talk()
    server.sendall(b"before")
    disconnect(server)
    run.settle()
    run.drain("client", run.client)
    run.client.close()
    run.kept["server"] = server


def _client_destroyed(run: Run) -> None:
    server = run.talk()
    server.sendall(b"unread")
    run.client.sendall(b"unread")
    run.settle()
    run.destroy(run.client)
    run.settle()
    run.drain("client", run.client)
    run.drain("server", server)
    run.kept |= {"client": run.client, "server": server}


def _server_destroyed(run: Run) -> None:
    server = run.talk()
    server.sendall(b"unread")
    run.client.sendall(b"unread")
    run.settle()
    run.destroy(server)
    run.settle()
    run.drain("client", run.client)
    run.drain("server", server)
    run.kept |= {"client": run.client, "server": server}


def _client_destroyed_then_closed(run: Run) -> None:
    server = run.talk()
    run.destroy(run.client)
    run.client.close()
    run.drain("server", server)
    server.close()


def _client_killed(run: Run) -> None:
    server = run.talk()
    server.sendall(b"never read")
    process = run.hand_over(run.client)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run.settle()
    server.close()


def _server_killed_unaccepted(run: Run) -> None:
    process = run.hand_over(run.listener)
    run.client.sendall(b"to nobody")
    process.send_signal(signal.SIGKILL)
    process.wait()
    run.settle()
    run.drain("client", run.client)
    run.client.close()


def _writes_after_shutdown(run: Run) -> None:
    server = run.talk()
    run.client.shutdown(socket.SHUT_WR)
    run.write("client", run.client, b"impossible")
    run.drain("server", server)
    run.write("server", server, b"possible")
    run.read("client", run.client)
    run.kept |= {"server": server}
    run.client.close()


def _reads_after_shutdown(run: Run) -> None:
    server = run.talk()
    server.sendall(b"queued")
    run.settle()
    run.client.shutdown(socket.SHUT_RD)
    run.drain("client", run.client)
    run.write("client", run.client, b"still possible")
    run.read("server", server)
    run.client.close()
    server.close()


def _lingers(run: Run) -> None:
    server = run.talk()
    run.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
    run.client.sendall(b"x" * 3000)
    run.client.close()
    run.drain("server", server)
    server.close()


def _goes_elsewhere(run: Run) -> None:
    """Unread bytes on both sides; then the client's socket gets another peer."""
    server = run.talk()
    server.sendall(b"of the old server")
    run.client.sendall(b"for the old server")
    run.settle()
    with run.stage.listen(run.place) as other:
        disconnect(run.client)
        run.client.connect((run.place.target, other.getsockname()[1]))
        peer = other.accept()[0]
        with peer:
            peer.settimeout(PATIENCE)
            peer.sendall(b"of the new server")
            run.read("client", run.client)
            run.client.sendall(b"for the new server")
            run.read("new server", peer)
            run.drain("server", server)
            run.write("server", server, b"to nobody")
            run.client.settimeout(0.1)
            run.read("client", run.client)
    server.close()
    run.client.close()


def _passed_on(run: Run) -> None:
    """The server's socket goes to another process, the one that accepted it closes its own."""
    server = run.talk()
    copy = server.dup()
    server.close()
    copy.settimeout(PATIENCE)
    run.client.sendall(b"for the copy")
    run.read("server", copy)
    copy.sendall(b"of the copy")
    run.read("client", run.client)
    copy.close()
    run.drain("client", run.client)
    run.client.close()


def _accepted_late(run: Run) -> None:
    run.client.sendall(b"early")
    run.client.close()
    run.settle()
    server = run.accept()
    run.drain("server", server)
    run.write("server", server, b"late")
    run.settle()
    run.write("server", server, b"later")
    server.close()


SEQUENCES = (
    _client_first,
    _server_first,
    _client_resets,
    _server_resets,
    _client_resets_behind_unread,
    _client_closes_unread,
    _server_closes_unread,
    _listener_closes_over_unaccepted,
    _client_then_listener,
    _listener_shuts_down,
    _client_resets_unaccepted,
    _both_shut_down,
    _client_half_then_server,
    _server_half_then_client,
    _client_unconnects,
    _server_unconnects,
    _client_destroyed,
    _server_destroyed,
    _client_destroyed_then_closed,
    _client_killed,
    _server_killed_unaccepted,
    _writes_after_shutdown,
    _reads_after_shutdown,
    _lingers,
    _goes_elsewhere,
    _passed_on,
    _accepted_late,
)

UNREAD = {
    "client_closes_unread": (
        *("server reads b'ping'", "client reads b'pong'", "new server reads b'new to server'"),
        *("new client reads b'new to client'", "old server reads b''"),
    ),
    "server_closes_unread": (
        "server reads b'ping'",
        "client reads b'pong'",
        "again: EADDRNOTAVAIL",
    ),
}
"""What is seen where a spliced socket is closed with unread bytes: its peer gets a FIN, not an
RST, and so still has its half of the connection."""
