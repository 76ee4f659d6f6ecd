"""What tells where a fault lies: an echo, and dialling from other places."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from sockhop.diagnose.dial import Dialling, Question, Result, dialled
from sockhop.diagnose.ping import ping
from sockhop.diagnose.topology import name_of
from sockhop.kernel.namespaces import Namespace, NamespaceGone
from sockhop.model import unpack_address

__all__ = ["Origin", "compare", "evidence"]

_OTHERS = 3
"""So many further namespaces are dialled from, beside the one that has the address."""
_FEW = 3
_CONNECTED = (Result.ANSWERED, Result.CONNECTED, Result.SILENT, Result.CLOSED)


class Origin(NamedTuple):
    """A place to dial from, and how people call it."""

    name: str
    place: Namespace | None


def compare(
    question: Question, owners: Sequence[Namespace], others: Sequence[Namespace]
) -> list[Dialling]:
    """Dial from the namespaces that have the address, and from some others, all at once."""
    places = [*owners, *others[:_OTHERS]]
    few = replace(question, count=min(question.count, _FEW))
    with ThreadPoolExecutor(max(1, len(places))) as pool:
        found = pool.map(lambda place: _dial(place, few, inside=place in owners), places)
        return [each for each in found if each]


def _dial(place: Namespace, question: Question, *, inside: bool) -> Dialling | None:
    with suppress(NamespaceGone), dialled(place, question) as attempts:
        name = name_of(place) + (", which has the address" if inside else "")
        return Dialling.of(name, Counter(each.result for each in attempts), compared=True)
    return None


def evidence(
    question: Question,
    asked: Sequence[tuple[Origin, Dialling]],
    others: Sequence[Dialling],
    *,
    balanced: bool,
) -> list[str]:
    """Return what else was seen of what fails, and what that rules out, in sentences.

    *balanced*: the target is a frontend, and not an address that anything has.
    """
    found = []
    for origin, row in asked:
        if not row.failed:
            found.append(_all_good(row))
            continue
        if all(result in _CONNECTED for result in row.results):
            found.append(
                f"from {row.origin} TCP connects every time: addresses, routes, and filters of the "
                "handshake are in order"
            )
        elif not balanced:
            found.append(_echo(origin, question))
        if row.failed < row.attempts and not balanced:
            found.append(
                f"from {row.origin} {row.attempts - row.failed} of {row.attempts} connections "
                "succeed: it depends on the connection, not on the way"
            )
    found += [_all_good(each) if not each.failed else _fails_too(each) for each in others]
    return found


def _echo(origin: Origin, question: Question) -> str:
    seconds = ping(origin.place, question.address)
    address = unpack_address(question.address)
    if seconds is None:
        return f"{address} does not answer to ping from {origin.name}, which may be filtered"
    return (
        f"{address} answers to ping from {origin.name}, in {seconds * 1000:.2f} ms: neighbours and "
        "routes (layers 2 and 3) are in order"
    )


def _all_good(row: Dialling) -> str:
    what = "all succeed" if row.attempts > 1 else "it succeeds"
    return f"from {row.origin} {what}: the server, and the way from there, are in order"


def _fails_too(row: Dialling) -> str:
    return f"from {row.origin} {row.failed} of {row.attempts} fail, too"
