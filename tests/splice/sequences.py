"""Ways to end a connection. Each is run as it is and spliced; what the ends see must be equal."""

import ctypes
import signal
import socket
import struct

from tests.splice.runs import PATIENCE, Run
from tests.splice.tcpinfo import SYN_DATA, tcp_info

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


def _resets_behind_unread(run: Run, one: str, other: str) -> None:
    ends = {"server": run.talk(), "client": run.client}
    ends[one].sendall(b"last words")
    _reset(ends[one])
    run.settle()
    run.kept[other] = ends[other]
    run.drain(other, ends[other])
    run.write(other, ends[other], b"too late")


def _client_resets_behind_unread(run: Run) -> None:
    _resets_behind_unread(run, "client", "server")


def _server_resets_behind_unread(run: Run) -> None:
    _resets_behind_unread(run, "server", "client")


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


def _shut_to_write(run: Run, one: str, other: str) -> None:
    ends = {"server": run.talk(), "client": run.client}
    ends[one].shutdown(socket.SHUT_WR)
    run.write(one, ends[one], b"impossible")
    run.drain(other, ends[other])
    run.write(other, ends[other], b"possible")
    run.read(one, ends[one])
    ends[one].close()
    if other == "server":  # a client that is kept would keep the tuple
        run.kept[other] = ends[other]
    else:
        ends[other].close()


def _client_writes_after_shutdown(run: Run) -> None:
    _shut_to_write(run, "client", "server")


def _server_writes_after_shutdown(run: Run) -> None:
    _shut_to_write(run, "server", "client")


def _shut_to_read(run: Run, one: str, other: str) -> None:
    ends = {"server": run.talk(), "client": run.client}
    ends[other].sendall(b"queued")
    run.settle()
    ends[one].shutdown(socket.SHUT_RD)
    run.drain(one, ends[one])
    run.write(one, ends[one], b"still possible")
    run.read(other, ends[other])
    run.client.close()
    ends["server"].close()


def _client_reads_after_shutdown(run: Run) -> None:
    _shut_to_read(run, "client", "server")


def _server_reads_after_shutdown(run: Run) -> None:
    _shut_to_read(run, "server", "client")


def _waits_at_close(run: Run, one: str, other: str) -> None:
    ends = {"server": run.talk(), "client": run.client}
    ends[one].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1))
    ends[one].sendall(b"x" * 3000)
    ends[one].close()
    run.drain(other, ends[other])
    ends[other].close()


def _client_lingers(run: Run) -> None:
    _waits_at_close(run, "client", "server")


def _server_lingers(run: Run) -> None:
    _waits_at_close(run, "server", "client")


def _moves(run: Run, one: str, other: str, target: str) -> None:
    """Unread bytes on both sides; then the socket of *one* gets another peer."""
    ends = {"server": run.talk(), "client": run.client}
    ends[other].sendall(b"of the old peer")
    ends[one].sendall(b"for the old peer")
    run.settle()
    with run.stage.listen(run.place) as listener:
        disconnect(ends[one])
        ends[one].connect((target, listener.getsockname()[1]))
        peer = listener.accept()[0]
        with peer:
            peer.settimeout(PATIENCE)
            peer.sendall(b"of the new peer")
            run.read(one, ends[one])
            ends[one].sendall(b"for the new peer")
            run.read("new peer", peer)
            run.drain(other, ends[other])
            run.write(other, ends[other], b"to nobody")
            ends[one].settimeout(0.1)
            run.read(one, ends[one])
    for each in ends.values():
        each.close()


def _client_goes_elsewhere(run: Run) -> None:
    _moves(run, "client", "server", run.place.target)


def _server_goes_elsewhere(run: Run) -> None:
    _moves(run, "server", "client", run.place.server)


def _fast_open(run: Run) -> None:
    """Bytes in the SYN, and more right behind them."""
    run.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 8)
    run.talk().close()
    for _ in range(2):  # the first connection only asks for the cookie
        _reset(run.client)
        run.settle()
        run.client = run.stage.client(run.place, run.port + 1)
        run.client.sendto(b"in the SYN, ", socket.MSG_FASTOPEN, (run.place.target, run.port))
        run.client.settimeout(PATIENCE)
        run.client.sendall(b"after it")
        server = run.accept()
        data = b""
        while len(data) < 20:
            data += server.recv(20)
        run.note(f"server reads {data!r}")
        server.sendall(b"answer")
        run.read("client", run.client)
        server.close()
    if tcp_info(run.client).options & SYN_DATA:
        run.note("there were bytes in the SYN")
    _reset(run.client)


def _forked(run: Run) -> None:
    """Another process has the server's socket, too, and ends."""
    server = run.talk()
    process = run.share(server)
    run.client.sendall(b"for either")
    run.read("server", server)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run.settle()
    for name, one, other in (("server", run.client, server), ("client", server, run.client)):
        one.sendall(b"still there")
        run.read(name, other)
    run.client.close()
    run.drain("server", server)
    server.close()


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
    _server_resets_behind_unread,
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
    _client_writes_after_shutdown,
    _server_writes_after_shutdown,
    _client_reads_after_shutdown,
    _server_reads_after_shutdown,
    _client_lingers,
    _server_lingers,
    _client_goes_elsewhere,
    _server_goes_elsewhere,
    _fast_open,
    _forked,
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
