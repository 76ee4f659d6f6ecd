"""Compares sockmaps and sockhashes with the sockets that they really hold.

An entry lives until its socket is closed by close(), not until the connection is over. A new
connection with the same ends then finds the key taken: programs that insert with BPF_NOEXIST leave
its socket out, and what is sent to it goes to the old one.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import msgspec

from sockhop.diagnose.infer import choose_layout, plausible_layout
from sockhop.diagnose.keys import Ends, Field, KeyLayout, known_layouts
from sockhop.diagnose.records import AuditFlag, AuditSocket
from sockhop.diagnose.scan import Scanner, count_addresses
from sockhop.diagnose.visit import Entries, OpenMap, Visitor
from sockhop.errors import InputError
from sockhop.model import endpoint, unpack_address

__all__ = [
    "AddressCount",
    "Audit",
    "AuditedMap",
    "Entry",
    "EntryState",
    "Held",
    "Look",
    "audit",
    "decode_dump",
    "judge",
    "look",
]

_NOTHING = Ends(None, None, None, None)


class EntryState(StrEnum):
    """What an entry is worth."""

    LIVE = "live"
    OTHER = "stale: another socket"
    CLOSED = "stale: closed"
    UNKNOWN = "unknown"


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An entry: what its key says, and the socket that it holds.

    `unread` are spliced bytes that nobody has read, and that go with the entry; `unread_more`:
    there are more. `netns` is an inode; `inode` that of the socket, 0 if no process holds it.
    """

    key: str
    state: EntryState
    local: str = ""
    remote: str = ""
    socket_local: str = ""
    socket_remote: str = ""
    socket_state: str = ""
    handler: str = ""
    cookie: int = 0
    netns: int = 0
    inode: int = 0
    unread: int = 0
    unread_more: bool = False


class AddressCount(msgspec.Struct, frozen=True):
    """How many keys name an address, and how many of those are of stale entries."""

    address: str
    entries: int
    stale: int


class AuditedMap(msgspec.Struct, frozen=True):
    """A map and what is in it. `in_the_way`: its stale entries can catch other connections' bytes.

    `stale_entries` were so at both looks, unchanged; `changing` counts those that were not.
    """

    id: int
    name: str
    type: str
    max_entries: int
    keys: str
    layout: str
    entries: int
    live: int
    stale_other: int
    stale_closed: int
    unknown: int
    changing: int
    in_the_way: bool
    addresses: list[AddressCount]
    stale_entries: list[Entry]

    @property
    def findings(self) -> int:
        """How many entries are stale and in the way."""
        return len(self.stale_entries) if self.in_the_way else 0


class Held(NamedTuple):
    """An entry as it was found: its key, what that says, and the socket that it holds."""

    key: bytes
    ends: Ends
    socket: AuditSocket
    state: EntryState

    def described(self) -> Entry:
        """Return it as people read it."""
        held = self.socket
        return Entry(
            key=self.key.hex(" "),
            state=self.state,
            local=_end(self.ends.local_address, self.ends.local_port),
            remote=_end(self.ends.remote_address, self.ends.remote_port),
            socket_local=held.local if held.is_internet else "",
            socket_remote=held.remote if held.is_internet else "",
            socket_state=held.state_name,
            handler=held.handler,
            cookie=held.cookie,
            netns=held.netns,
            inode=held.inode,
            unread=held.spliced,
            unread_more=bool(held.flags & AuditFlag.MORE),
        )


class Look:
    """What one look at a map has found. Without a layout, `live` are those that are open."""

    def __init__(
        self, of: OpenMap, entries: Entries, layout: KeyLayout | None, scanner: Scanner
    ) -> None:
        self.map = of
        self.entries = entries
        self.layout = layout
        whole = layout or KeyLayout("unknown", (Field("any", of.info.key_size),))
        found = scanner.compare(entries, whole)
        self.live = found.live
        self.odd = [self._held(number, live=False) for number in found.odd]
        self.stale = {each.key: each for each in self.odd if each.state is not EntryState.UNKNOWN}

    def all(self) -> Iterator[Held]:
        """Yield every entry."""
        odd = {each.key: each for each in self.odd}
        for number in range(len(self.entries)):
            yield odd.get(self.entries.key(number)) or self._held(number, live=True)

    def _held(self, number: int, *, live: bool) -> Held:
        held, key = self.entries.socket(number), self.entries.key(number)
        layout = self.layout
        says = layout.placed if layout else ()
        ends = layout.ends(key) if layout and says else _NOTHING
        if held.is_closed:
            state = EntryState.CLOSED
        elif not says or not held.is_internet or (not live and not held.remote_port):
            state = EntryState.UNKNOWN
        else:
            state = EntryState.LIVE if live else EntryState.OTHER
        return Held(key, ends, held, state)


class Audit(NamedTuple):
    """The result for a map, the last look at it, and what was stale at both looks, by key."""

    result: AuditedMap
    look: Look
    stale: dict[bytes, Held]


def look(visitor: Visitor, of: OpenMap, given: KeyLayout | None = None) -> Look:
    """Look at a map once. InputError where *given* does not have the size of its keys."""
    if given:
        _check_size(given, of.info.key_size, f"map {of.info.id} ({of.info.name})")
    entries = visitor.entries(of)
    layout = given or choose_layout(visitor.layouts, of, entries)
    return Look(of, entries, layout, Scanner(visitor.layouts))


def audit(
    visitor: Visitor, maps: Sequence[OpenMap], given: KeyLayout | None = None, wait: float = 1
) -> list[Audit]:
    """Look at *maps* twice, *wait* seconds apart (0: once)."""
    last = first = [look(visitor, of, given) for of in maps]
    if wait:
        time.sleep(wait)
        last = [
            look(visitor, of, before.layout if len(before.entries) else given)
            for of, before in zip(maps, first, strict=True)
        ]
    return [judge(before.stale, after) for before, after in zip(first, last, strict=True)]


def decode_dump(keys: Sequence[bytes], given: KeyLayout | None = None) -> list[Entry]:
    """Return what the keys of a dump say; nothing is known of their sockets.

    InputError where no layout is given and none that is known fits.
    """
    size = len(keys[0])
    if given:
        _check_size(given, size, "the dump")
    layout = given or plausible_layout(
        keys, [each for each in known_layouts("", size) if each.placed]
    )
    if layout is None:
        raise InputError(
            f"the dump has keys of {size} bytes whose layout is not known",
            hint="describe it with --key, for example: --key 'sip:4 dip:4 sport:2be dport:2be'",
        )
    found = []
    for key in keys:
        ends = layout.ends(key)
        found.append(
            Entry(
                key=key.hex(" "),
                state=EntryState.UNKNOWN,
                local=_end(ends.local_address, ends.local_port),
                remote=_end(ends.remote_address, ends.remote_port),
            )
        )
    return found


def judge(before: Mapping[bytes, Held], last: Look) -> Audit:
    """Return what two looks at a map say; *before*: what was stale at the first, by key."""
    now, info = last.stale, last.map.info
    both = {
        key: each
        for key, each in now.items()
        if key in before and before[key].socket.identity == each.socket.identity
    }
    states = Counter(each.state for each in both.values())
    layout = last.layout
    says = bool(layout and layout.placed)
    unknown = len(last.odd) - len(now)
    result = AuditedMap(
        id=info.id,
        name=info.name,
        type="sockhash" if last.map.is_hash else "sockmap",
        max_entries=info.max_entries,
        keys=layout.name if layout else "unknown",
        layout=str(layout or ""),
        entries=len(last.entries),
        live=last.live if says else 0,
        stale_other=states[EntryState.OTHER],
        stale_closed=states[EntryState.CLOSED],
        unknown=unknown if says else unknown + last.live,
        changing=len(now) - len(both),
        in_the_way=layout is not None and layout.is_tuple,
        addresses=_addresses(last, both),
        stale_entries=[each.described() for each in both.values()],
    )
    return Audit(result, last, both)


def _addresses(of: Look, stale: dict[bytes, Held]) -> list[AddressCount]:
    if of.layout is None:
        return []
    odd: Counter[bytes | None] = Counter()
    for each in stale.values():
        odd.update({each.ends.local_address, each.ends.remote_address})
    rows = [
        AddressCount(unpack_address(address), count, odd[address])
        for address, count in count_addresses(of.entries, of.layout).items()
    ]
    return sorted(rows, key=lambda row: (-row.stale, -row.entries, row.address))


def _check_size(layout: KeyLayout, size: int, name: str) -> None:
    if layout.size != size:
        raise InputError(
            f"--key: this layout has {layout.size} bytes, the keys of {name} have {size}",
            hint="fill up with pad:N (zero) or any:N",
        )


def _end(address: bytes | None, port: int | None) -> str:
    if address is None:
        return "" if port is None else f"*:{port}"
    text = unpack_address(address)
    return text if port is None else endpoint(text, port)
