"""Another process, in this one's namespace and cgroup, that does to a socket what a test says."""

import ast
import contextlib
import subprocess
import sys
from typing import Any

__all__ = ["Program"]

_LOOP = """
import array, ctypes, errno, os, select, socket, struct, sys
own = None
for line in sys.stdin:
    try:
        try:
            value = eval(line)
        except SyntaxError:
            value = exec(line)
        print(repr((0, value if isinstance(value, (int, str, bytes, tuple)) else None)), flush=True)
    except OSError as error:
        print(repr((error.errno or -1, str(error))), flush=True)
"""


class Program:
    """Has a socket, `own`. Use as a context manager: it ends with the body."""

    def __init__(self, *wrapper: str) -> None:
        """*wrapper*: a command that runs it, as `ip netns exec NAME`."""
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-SEc", _LOOP],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def do(self, text: str) -> Any:
        """Run a line of Python there, return its value; OSError as there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        number, value = ast.literal_eval(self.process.stdout.readline())
        if number:
            raise OSError(number, value)
        return value

    def dial(self, host: str, port: int = 53, *, source: str = "") -> int:
        """Connect a new UDP socket; return its cookie."""
        family = "AF_INET6" if ":" in host else "AF_INET"
        self.do(f"own = socket.socket(socket.{family}, socket.SOCK_DGRAM)")
        self.do("own.settimeout(5)")
        if source:
            self.do(f"own.bind(({source!r}, 0))")
        self.do(f"own.connect(({host!r}, {port}))")
        return self.cookie

    @property
    def cookie(self) -> int:
        return int.from_bytes(self.do("own.getsockopt(socket.SOL_SOCKET, 57, 8)"), "little")

    @property
    def inode(self) -> int:
        return int(self.do("os.fstat(own.fileno()).st_ino"))

    @property
    def peer(self) -> tuple[str, int]:
        """What getpeername() says."""
        host, port = self.do("own.getpeername()")[:2]
        return host, port

    def receive(self) -> tuple[bytes, tuple[str, int]]:
        """Receive a datagram; return it and where it comes from."""
        data, source = self.do("own.recvfrom(100)")
        return data, source[:2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
