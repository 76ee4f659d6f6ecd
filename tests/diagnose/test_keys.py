"""Layouts of keys and dumps of them, without a kernel."""

import json
import socket

import pytest

from sockhop.diagnose.audit import decode_dump
from sockhop.diagnose.dumps import parse_dump
from sockhop.diagnose.keys import KNOWN, known_layouts, parse_key
from sockhop.diagnose.records import AuditFlag, AuditSocket, Handler
from sockhop.errors import InputError
from sockhop.model import pack_address

pytestmark = pytest.mark.unit

# What `bpftool map dump` of an incident printed, as grep -C 2 left it.
GREPPED = """
0a 0a 86 30 00 00 00 00  00 00 00 00 00 00 00 00
0a 0a 65 f9 00 00 00 00  00 00 00 00 00 00 00 00
01 00 00 00 1f 90 00 00  db 78 00 00
--
key:
--
0a 0a 65 f9 00 00 00 00  00 00 00 00 00 00 00 00
0a 0a 86 30 00 00 00 00  00 00 00 00 00 00 00 00
01 00 00 00 db 78 00 00  1f 90 00 00
"""
POD, NODE = "10.10.134.48:8080", "10.10.101.249:56184"
KEYS = [
    bytes.fromhex(part.replace("key:", ""))
    for part in GREPPED.replace("--\nkey:\n--", "|").split("|")
]


def ends(text: str) -> list[tuple[str, str]]:
    return [(each.local, each.remote) for each in decode_dump(parse_dump(text))]


def whole_dump() -> str:
    lines = []
    for key in KEYS:
        rows = [key[at : at + 16].hex(" ") for at in range(0, len(key), 16)]
        lines += ["key:", *rows, "value:", "No such file or directory"]
    return "\n".join([*lines, f"Found {len(KEYS)} elements"])


def test_the_dump_of_the_incident() -> None:
    assert ends(GREPPED) == [(POD, NODE), (NODE, POD)]


@pytest.mark.parametrize(
    "text",
    [
        whole_dump(),
        json.dumps([{"key": [f"{b:#04x}" for b in key], "value": {"error": "x"}} for key in KEYS]),
        "".join(f"key: {key.hex(' ')}  value: 01 00 00 00\n" for key in KEYS),
        "\r\n".join(whole_dump().splitlines()),
    ],
    ids=["plain", "json", "one line", "carriage returns"],
)
def test_forms_of_a_dump(text: str) -> None:
    assert ends(text) == [(POD, NODE), (NODE, POD)]


def test_values_are_no_keys() -> None:
    assert parse_dump("key:\n01 02 03 04\nvalue:\n05 06 07 08\n") == [b"\1\2\3\4"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are no keys"),
        ("Found 0 elements", "there are no keys"),
        ("[]", "there are no keys"),
        ("[{", "no JSON"),
        ('[{"key": "x"}]', "no key of bytes"),
        ("key:\n01 02\nkey:\n01 02 03\n", "keys of 2 and of 3 bytes"),
        ("key:\n01 02 03\n", "3 bytes whose layout is not known"),
    ],
)
def test_bad_dumps(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ends(text)


def test_addresses_and_ports_in_all_their_forms() -> None:
    four = socket.inet_aton("10.1.2.3")
    layout = parse_key("sip:16 dip:16 sport:4be dport:4le")
    for sixteen in (four + bytes(12), bytes(12) + four, pack_address("10.1.2.3")):
        for port in (b"\0\0\x1f\x90", b"\x1f\x90\0\0"):
            found = layout.ends(sixteen + pack_address("::1") + port + b"\x90\x1f\0\0")
            assert found == (pack_address("10.1.2.3"), pack_address("::1"), 8080, 8080)
    found = layout.ends(pack_address("2001:db8::1") + pack_address("fd00::") + bytes(8))
    assert found.local_address == pack_address("2001:db8::1")


def test_what_a_key_does_not_say() -> None:
    assert parse_key("any:4 sport:2le").ends(b"abcd\x50\0") == (None, None, 80, None)
    assert parse_key("cookie:8").ends(bytes(8)) == (None,) * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no field says anything"),
        ("pad:8", "no field says anything"),
        ("sip", "'sip' is no field"),
        ("sip:0", "'sip:0' is no field"),
        ("sip:8", "sip has 4 or 16 bytes"),
        ("sport:3", "sport has 2 or 4 bytes"),
        ("address:4", "there is no field 'address'"),
        ("sip:4be", "only ports have a byte order"),
        ("sip:4 sip:4", "sip is there twice"),
    ],
)
def test_bad_layouts(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_key(text)


def test_known_layouts_are_written_as_they_are_read() -> None:
    for layout in KNOWN:
        assert parse_key(str(layout)).fields == layout.fields
    assert known_layouts("sock_ops_map", 20)[0].name == "tutorial"
    assert known_layouts("cilium_sock_op", 44)[0].name == "cilium"


@pytest.mark.parametrize(
    ("ulp", "flags", "handler"),
    [
        (b"", 0, Handler.TCP),
        (b"", AuditFlag.PSOCK, Handler.TCP),
        (b"", AuditFlag.PSOCK | AuditFlag.HANDLERS, Handler.TCP_BPF),
        (b"tls", 0, Handler.KTLS),
        (b"tls", AuditFlag.PSOCK | AuditFlag.HANDLERS, Handler.KTLS),
        (b"mptcp", 0, Handler.MPTCP),
        (b"smc", 0, Handler.OTHER),
    ],
)
def test_whose_functions_serve_a_socket(ulp: bytes, flags: int, handler: Handler) -> None:
    plain = AuditSocket._make([0] * len(AuditSocket._fields))
    assert plain._replace(flags=flags, ulp=ulp.ljust(16, b"\0")).handler is handler
