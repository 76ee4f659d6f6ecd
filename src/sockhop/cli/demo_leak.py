"""The server of `sockhop demo stuck`: a program with a common fault, run by its path.

It answers every request, but keeps the sockets of clients that went away without one: open,
though their connections are over. Arguments: the port on 127.0.0.1.
"""

import socket
import sys
import threading

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"
_LOST: list[socket.socket] = []


def _serve(client: socket.socket) -> None:
    try:
        if client.recv(65536):
            client.sendall(_ANSWER)
        client.close()
    except OSError:
        _LOST.append(client)


def _main() -> None:
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024) as listener:
        while True:
            client = listener.accept()[0]
            threading.Thread(target=_serve, args=(client,), daemon=True).start()


if __name__ == "__main__":
    _main()
