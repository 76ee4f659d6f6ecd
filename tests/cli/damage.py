"""Ways in which the pinned maps can be wrong, each as a function that makes them so."""

from typing import Any

from sockhop.datapath.balancer import BalanceMaps
from sockhop.datapath.records import (
    BackendRecord,
    Client,
    ClientKey,
    FrontendFlag,
    FrontendKey,
    FrontendRecord,
    SlotKey,
    SlotRecord,
    word,
)
from sockhop.kernel.maps import Map
from sockhop.model import (
    Algorithm,
    unpack_address,
)

WEB, SPREAD, LEAST, LOCAL = "10.96.0.10", "10.96.0.11", "fd00::10", "127.96.0.1"


# --- handles on what the agent has installed ------------------------------------------------------


def frontend(maps: BalanceMaps, address: str) -> tuple[FrontendKey, FrontendRecord]:
    """The frontend at *address* that is followed first: that of everywhere."""
    return next(
        (key, record) for key, record in sorted(maps.frontends.items())
        if unpack_address(key.address) == address
    )  # fmt: skip


def slot(maps: BalanceMaps, address: str, position: int = 0) -> tuple[SlotKey, SlotRecord]:
    number = frontend(maps, address)[1].id
    return next(
        (key, record) for key, record in maps.slots.items()
        if (key.frontend, key.position) == (number, position)
    )  # fmt: skip


def backend(maps: BalanceMaps, address: str) -> tuple[int, BackendRecord]:
    return next(
        (number, record) for number, record in maps.backends.items()
        if unpack_address(record.address) == address
    )  # fmt: skip


def change(target: Map[Any, Any], at: Any, **fields: Any) -> None:
    before: Any = target.get(at)
    target.set(at, before._replace(**fields))


# --- what can be wrong ----------------------------------------------------------------------------


def a_slot_is_gone(maps: BalanceMaps) -> None:
    maps.slots.delete(slot(maps, WEB, 1)[0])


def a_slot_of_a_table_is_gone(maps: BalanceMaps) -> None:
    maps.slots.delete(slot(maps, SPREAD, 0)[0])


def a_slot_has_another_backend(maps: BalanceMaps) -> None:
    change(maps.slots, slot(maps, WEB)[0], backend=backend(maps, "10.1.0.4")[0])


def a_slot_has_another_address(maps: BalanceMaps) -> None:
    change(maps.slots, slot(maps, WEB)[0], address=slot(maps, WEB, 1)[1].address)


def a_slot_has_another_key(maps: BalanceMaps) -> None:
    change(maps.slots, slot(maps, WEB)[0], key=slot(maps, WEB, 1)[1].key)


def a_slot_is_taken_too_often(maps: BalanceMaps) -> None:
    change(maps.slots, slot(maps, WEB)[0], keep=0xFFFFFFFF)


def a_slot_has_no_weight(maps: BalanceMaps) -> None:
    change(maps.slots, slot(maps, WEB)[0], weight=0)


def the_word_counts_one_more(maps: BalanceMaps) -> None:
    number = frontend(maps, WEB)[1].id
    maps.words.set(number, (maps.words.get(number) or 0) + 1)


def the_word_counts_one_less(maps: BalanceMaps) -> None:
    number = frontend(maps, WEB)[1].id
    maps.words.set(number, (maps.words.get(number) or 0) - 1)


def the_word_is_of_another_generation(maps: BalanceMaps) -> None:
    maps.words.set(frontend(maps, WEB)[1].id, word(77, Algorithm.RANDOM, 2))


def the_word_is_empty(maps: BalanceMaps) -> None:
    maps.words.set(frontend(maps, WEB)[1].id, 0)


def the_word_has_another_algorithm(maps: BalanceMaps) -> None:
    maps.words.set(frontend(maps, WEB)[1].id, word(1, Algorithm.ROUND_ROBIN, 2))


def the_word_has_no_known_algorithm(maps: BalanceMaps) -> None:
    maps.words.set(frontend(maps, WEB)[1].id, 1 << 32 | 9 << 28 | 2)


def a_block_of_the_table_is_gone(maps: BalanceMaps) -> None:
    maps.tables.delete(SlotKey(frontend(maps, SPREAD)[1].id, 1, 3))


def a_block_of_the_table_is_wrong(maps: BalanceMaps) -> None:
    key = SlotKey(frontend(maps, SPREAD)[1].id, 1, 3)
    change(maps.tables, key, entries=bytes(256))


def a_block_has_another_key(maps: BalanceMaps) -> None:
    key = SlotKey(frontend(maps, SPREAD)[1].id, 1, 3)
    change(maps.tables, key, key=maps.slot_key.encode(key._replace(position=2)))


def a_load_is_gone(maps: BalanceMaps) -> None:
    maps.loads.delete(backend(maps, "fd00::2")[0])


def a_frontend_is_gone(maps: BalanceMaps) -> None:
    maps.frontends.delete(frontend(maps, WEB)[0])


def a_frontend_is_too_much(maps: BalanceMaps) -> None:
    key, record = frontend(maps, WEB)
    other = key._replace(port=81)
    encoded = maps.frontend_key.encode(other)
    maps.frontends.set(other, record._replace(key=encoded))


def a_frontend_has_another_key(maps: BalanceMaps) -> None:
    key = frontend(maps, WEB)[0]
    change(maps.frontends, key, key=maps.frontend_key.encode(key._replace(port=81)))


def a_frontend_has_no_service(maps: BalanceMaps) -> None:
    change(maps.frontends, frontend(maps, WEB)[0], service=99)


def a_frontend_has_another_service(maps: BalanceMaps) -> None:
    other = frontend(maps, SPREAD)[1].service
    change(maps.frontends, frontend(maps, WEB)[0], service=other)


def a_frontend_has_no_known_type(maps: BalanceMaps) -> None:
    change(maps.frontends, frontend(maps, WEB)[0], type=200)


def a_frontend_has_unknown_flags(maps: BalanceMaps) -> None:
    change(maps.frontends, frontend(maps, WEB)[0], flags=0x80)


def a_frontend_is_reserved(maps: BalanceMaps) -> None:
    change(maps.frontends, frontend(maps, WEB)[0], flags=FrontendFlag.RESERVED)


def a_frontend_remembers_clients(maps: BalanceMaps) -> None:
    change(maps.frontends, frontend(maps, WEB)[0], affinity=60)


def nothing_leads_to_the_namespace(maps: BalanceMaps) -> None:
    change(maps.frontends, frontend(maps, LOCAL)[0], flags=0)


def a_frontend_excludes_a_cgroup(maps: BalanceMaps) -> None:
    maps.clients.set(ClientKey(1, frontend(maps, WEB)[1].id), Client.EXCLUDED)


def a_cgroup_is_neither_served_nor_excluded(maps: BalanceMaps) -> None:
    key, record = frontend(maps, WEB)
    change(maps.frontends, key, flags=FrontendFlag.CLIENTS)
    maps.clients.set(ClientKey(1, record.id), 9)


def a_backend_is_gone(maps: BalanceMaps) -> None:
    maps.backends.delete(backend(maps, "10.1.0.3")[0])


def a_backend_has_another_state(maps: BalanceMaps) -> None:
    change(maps.backends, backend(maps, "10.1.0.3")[0], state=2)


def a_backend_has_no_known_state(maps: BalanceMaps) -> None:
    change(maps.backends, backend(maps, "10.1.0.3")[0], state=99)


def a_backend_has_no_known_protocol(maps: BalanceMaps) -> None:
    change(maps.backends, backend(maps, "10.1.0.3")[0], protocol=99)


def a_backend_has_another_id(maps: BalanceMaps) -> None:
    change(maps.backends, backend(maps, "10.1.0.3")[0], id=99)


def a_backend_is_there_twice(maps: BalanceMaps) -> None:
    number, record = backend(maps, "10.1.0.3")
    maps.backends.set(number + 50, record._replace(id=number + 50))


def a_service_is_gone(maps: BalanceMaps) -> None:
    maps.services.delete(frontend(maps, WEB)[1].service)
