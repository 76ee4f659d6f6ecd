"""Compares the entries of a map with the sockets that they really hold."""

import struct
from collections import Counter
from itertools import compress
from typing import Any, NamedTuple

from sockhop.diagnose._compare import ffi, lib
from sockhop.diagnose.keys import KeyLayout
from sockhop.diagnose.visit import Entries
from sockhop.kernel.btf import Layouts

__all__ = ["Comparison", "Scanner", "count_addresses"]

_SOCKET_FIELDS = {
    "sip": (lib.ADDRESS, "local_address"),
    "dip": (lib.ADDRESS, "remote_address"),
    "sport": (lib.PORT, "local_port"),
    "dport": (lib.PORT, "remote_port"),
    "cookie": (lib.COOKIE, "cookie"),
}
_IS_ODD = bytes(each != lib.LIVE for each in range(256))


class Comparison(NamedTuple):
    """How many keys name the socket that they hold, how many of those sockets are open (`live`),
    and the numbers of the entries that are not so."""

    fitting: int
    live: int
    odd: list[int]


class Scanner:
    """Knows where in a struct audit_socket the fields stand that keys speak of."""

    def __init__(self, layouts: Layouts) -> None:
        self._at = {each.name: each.offset for each in layouts.members("audit_socket")}
        self._size = layouts.size("audit_socket")

    def compare(self, entries: Entries, layout: KeyLayout) -> Comparison:
        """Compare all entries with their sockets."""
        rows = []
        for at, field in layout.placed:
            what, name = _SOCKET_FIELDS[field.name]
            rows.append((what, at, field.size, field.order == "le", self._at[name]))
        fields = ffi.new("struct key_field[]", rows)
        count = len(entries)
        states = bytearray(count)
        lib.compare_keys(
            *(entries.data, count, entries.size, self._size, fields, len(rows)),
            *(self._at["protocol"], self._at["state"], ffi.from_buffer(states)),
        )
        live = states.count(lib.LIVE)
        odd = list(compress(range(count), states.translate(_IS_ODD)))
        return Comparison(live + states.count(lib.FITS_CLOSED), live, odd)


def count_addresses(entries: Entries, layout: KeyLayout) -> Counter[bytes]:
    """Return how many keys name each address (packed)."""
    form = f"={entries.sockets.size}x" + layout.raw.format.removeprefix("=")
    columns: list[Any] = list(zip(*struct.iter_unpack(form, entries.data), strict=True))
    addresses = [
        column
        for (_, field), column in zip(layout.placed, columns, strict=False)
        if field.name in ("sip", "dip")
    ]
    found: Counter[bytes] = Counter()
    for ends, count in Counter(zip(*addresses, strict=True)).items():
        for address in set(map(layout.address, ends)):
            found[address] += count
    return found
