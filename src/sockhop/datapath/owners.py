"""Which processes have a descriptor of a socket, by the socket's cookie."""

import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sockhop.datapath.records import OWNER_BOUND, OwnerRecord
from sockhop.datapath.sockets import read_iterator
from sockhop.kernel._libbpf import lib
from sockhop.kernel.maps import U32, U64, Map
from sockhop.kernel.objects import BpfObject, object_path
from sockhop.kernel.procfs import Holder, command_name
from sockhop.kernel.syscall import check

__all__ = ["Owner", "Owners"]


class Owner(NamedTuple):
    """A process with a descriptor of a socket, one of those that it has.

    `bound`: the program has bound the socket to its local address.
    """

    holder: Holder
    bound: bool


class Owners:
    """The loaded program that visits the descriptors of all processes. Use as a context manager.

    It sees the processes of this process' namespace of process ids and those below.
    """

    def __init__(self) -> None:
        """Load it; KernelError where the kernel lacks bpf_sock_from_file() (before Linux 5.11)."""
        self._object = BpfObject(object_path("owners"))
        self._records = self._object.layouts.codec(OwnerRecord, "owner_record")
        self._wanted = Map(os.dup(self._object.map_fd("wanted")), U64, U32)
        self.reader = threading.get_native_id()
        """What the first namespace of process ids calls the thread that last found something."""

    def close(self) -> None:
        """Unload the program."""
        self._wanted.close()
        self._object.close()

    def __enter__(self) -> "Owners":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(self, cookies: Iterable[int]) -> dict[int, list[Owner]]:
        """Return the owners of each socket that has some, one descriptor of each process."""
        wanted, size = sorted(set(cookies)), self._wanted.max_entries
        found: defaultdict[int, list[Owner]] = defaultdict(list)
        for first in range(0, len(wanted), size):
            for record in self._visit(wanted[first : first + size]):
                self.reader = record.reader
                own = record.thread if record.thread != record.pid else 0
                command = command_name(record.command)
                owners = found[record.cookie]
                if not any(each.holder[1::2] == (record.pid, own) for each in owners):
                    holder = Holder(command, record.pid, record.fd, own)
                    owners.append(Owner(holder, bool(record.userlocks & OWNER_BOUND)))
        return found

    def _visit(self, cookies: list[int]) -> list[OwnerRecord]:
        with self._marked(cookies):
            name = "sockhop_owners"
            link = check(lib.sockhop_iter_link(self._object.program(name), -1), f"linking {name}")
            try:
                data = read_iterator(link, name)
            finally:
                os.close(link)
        return self._records.decode_many(data)

    @contextmanager
    def _marked(self, cookies: list[int]) -> Iterator[None]:
        try:
            self._wanted.update_many((cookie, 1) for cookie in cookies)
            yield
        finally:
            self._wanted.delete_many(cookies)
