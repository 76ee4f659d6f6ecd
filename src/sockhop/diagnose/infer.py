"""Chooses the layout of a map's keys: the one by which most entries name the socket they hold."""

from collections import Counter
from collections.abc import Iterator, Sequence

from sockhop.diagnose.keys import Field, KeyLayout, known_layouts
from sockhop.diagnose.records import AuditSocket
from sockhop.diagnose.scan import Scanner
from sockhop.diagnose.visit import Entries, OpenMap
from sockhop.kernel.btf import Layouts
from sockhop.model import is_mapped

__all__ = ["choose_layout", "infer_layout", "plausible_layout"]

_SAMPLE = 512
"""Entries by which a layout is chosen."""
_ENOUGH = 2
"""So many different sockets have to agree on a layout that nobody knows."""


def choose_layout(layouts: Layouts, of: OpenMap, entries: Entries) -> KeyLayout | None:
    """Return the layout of a map's keys, None where neither names nor sockets tell it."""
    known = known_layouts(of.info.name, of.info.key_size)
    sample = entries.head(_SAMPLE)
    scanner = Scanner(layouts)
    live = {
        layout.name: scanner.compare(sample, layout).fitting for layout in known if layout.placed
    }
    best = max(known, key=lambda layout: live.get(layout.name, 0), default=None)
    if best and live.get(best.name):
        return best
    rows = [(sample.key(n), sample.socket(n)) for n in range(len(sample))]
    for layout in known:
        if sum(_agrees(layout, *row) for row in rows) > len(rows) // 2:
            return layout
    if found := infer_layout(rows):
        return found
    return plausible_layout([key for key, _ in rows], known, of.info.name)


def plausible_layout(
    keys: Sequence[bytes], known: Sequence[KeyLayout], name: str = ""
) -> KeyLayout | None:
    """Return the first of *known* that all *keys* may have; without keys, that of a known name."""
    for layout in known:
        named = name in (wanted[:15] for wanted in layout.maps)
        if all(map(layout.is_plausible, keys)) and (keys or named):
            return layout
    return None


def _agrees(layout: KeyLayout, key: bytes, held: AuditSocket) -> bool:
    """Tell whether a key names what its socket still has: a closed one has lost its local port."""
    says = layout.ends(key)
    has = (held.local_address, held.remote_address, held.local_port, held.remote_port)
    return bool(
        held.is_internet
        and held.remote_port
        and says.remote_port
        and all(
            said in (None, kept)
            for said, kept in zip(says, has, strict=True)
            if kept and kept != bytes(16)
        )
    )


def infer_layout(rows: Sequence[tuple[bytes, AuditSocket]]) -> KeyLayout | None:
    """Return where in the keys the ends of their sockets stand, if most of *rows* agree."""
    rows = [(key, held) for key, held in rows if held.is_internet and held.remote_port]
    if len({held.identity for _, held in rows}) < _ENOUGH:
        return None
    places: Counter[tuple[int, Field]] = Counter()
    for key, held in rows:
        places.update(set(_found(key, held)))
    size = len(rows[0][0])
    chosen: dict[int, Field] = {}
    for name in ("sport", "dport", "sip", "dip"):
        for (at, field), count in sorted(places.items(), key=lambda item: (-item[1], item[0][0])):
            free = not any(at < b + f.size and b < at + field.size for b, f in chosen.items())
            if field.name == name and free and count > len(rows) // 2:
                chosen[at] = field
                break
    if not any(field.name in ("sport", "dport") for field in chosen.values()):
        return None
    return KeyLayout("inferred", tuple(_filled(chosen, size)))


def _found(key: bytes, held: AuditSocket) -> Iterator[tuple[int, Field]]:
    """Yield where the ends of *held* stand in *key*."""
    for name, address in (("sip", held.local_address), ("dip", held.remote_address)):
        raw = address[12:] if is_mapped(address) else address
        for at in _places(key, raw) if any(raw) else ():
            yield at, Field(name, len(raw))
    for name, port in (("sport", held.local_port), ("dport", held.remote_port)):
        for order, word in (("be", "big"), ("le", "little")):
            raw = port.to_bytes(2, word)  # type: ignore[arg-type]
            for at in _places(key, raw) if port else ():
                yield at, Field(name, 2, order)


def _places(key: bytes, part: bytes) -> Iterator[int]:
    at = key.find(part)
    while at >= 0:
        yield at
        at = key.find(part, at + 1)


def _filled(chosen: dict[int, Field], size: int) -> Iterator[Field]:
    end = 0
    for at, field in sorted(chosen.items()):
        if at > end:
            yield Field("any", at - end)
        yield field
        end = at + field.size
    if size > end:
        yield Field("any", size - end)
