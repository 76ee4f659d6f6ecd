"""What files tell of other nodes is read, whatever they hold; and only what differs is shown."""

import json
import random
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sockhop.diagnose.nodes import Node, compare, complete, read_node
from sockhop.errors import InputError
from sockhop.kernel.bpf_header import parse_macros
from sockhop.kernel.btf_file import BtfFile, Kind
from sockhop.kernel.features import Feature
from sockhop.kernel.traits import FUNCTIONS, STRUCTS, own_types, parse_options
from tests.sandbox import SOCKHOP, Sandbox

FEW = settings(max_examples=40, deadline=None)
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True)
OPTIONS = st.from_regex(r"[A-Z][A-Z0-9_]{0,12}", fullmatch=True)
VALUES = st.sampled_from(["y", "m", "n", "250", '"text # = y"'])
MACROS = st.one_of(
    st.builds("HAVE_{}_MAP_TYPE".format, OPTIONS),
    st.builds("BPF__PROG_TYPE_{}__HELPER_bpf_{}".format, NAMES, NAMES),
)
PLAIN = st.text(st.characters(categories=["L", "N"], include_characters=" .:-"), max_size=12)
TEXTS = st.dictionaries(PLAIN, PLAIN, max_size=4)
FEATURES = st.builds(
    Feature, PLAIN, st.sampled_from([True, False, None]), PLAIN, st.booleans(), PLAIN, PLAIN, PLAIN
)
NODES = st.builds(
    Node,
    host=TEXTS,
    features=st.lists(FEATURES, max_size=4, unique_by=lambda each: each.name),
    sysctls=TEXTS,
    config=TEXTS,
    structs=st.dictionaries(NAMES, st.dictionaries(NAMES, PLAIN, max_size=4), max_size=3),
    functions=st.lists(NAMES, max_size=4, unique=True),
    macros=st.dictionaries(MACROS, st.booleans(), max_size=4),
)
# C types of members, and how many BTF types they take.
TYPES = ("int", "struct node *", "const int", "int [7]", "function *", "void *", "int:3")


class Builder:
    """Writes BTF, as Documentation/bpf/btf.rst has it."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"
        self.count = 0
        self.int = self.add("int", Kind.INT, 4, struct.pack("=I", 1 << 24 | 32))
        self.node = self.add("node", Kind.FWD, 0)
        pointer = self.add("", Kind.PTR, self.node)
        constant = self.add("", Kind.CONST, self.int)
        array = self.add("", Kind.ARRAY, 0, struct.pack("=III", self.int, self.int, 7))
        prototype = self.add("", Kind.FUNC_PROTO, 0)
        to_function = self.add("", Kind.PTR, prototype)
        to_void = self.add("", Kind.PTR, 0)
        members = (self.int, pointer, constant, array, to_function, to_void, self.int)
        self.of = dict(zip(TYPES, members, strict=True))

    def add(self, name: str, kind: Kind, size: int, tail: bytes = b"", vlen: int = 0) -> int:
        info = vlen | kind << 24 | (1 << 31 if kind is Kind.STRUCT else 0)
        self.types += struct.pack("=III", self.name(name), info, size) + tail
        self.count += 1
        return self.count

    def name(self, text: str) -> int:
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text.encode()) - 1

    def struct(self, name: str, members: dict[str, str], inner: int = 0) -> int:
        tail = b"".join(
            struct.pack("=III", self.name(member), self.of[text], (3 << 24) * (":" in text))
            for member, text in members.items()
        )
        if inner:
            tail += struct.pack("=III", 0, inner, 0)
        return self.add(name, Kind.STRUCT, 8, tail, len(members) + bool(inner))

    def data(self) -> bytes:
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.strings


MEMBERS = st.dictionaries(NAMES, st.sampled_from(TYPES), min_size=1, max_size=6)


def run(*arguments: Any) -> tuple[int, str, str]:
    done = subprocess.run(
        [SOCKHOP, "features", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def written(data: bytes | str, suffix: str = "json") -> Path:
    path = Path(tempfile.mkstemp(suffix=f".{suffix}")[1])
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# --- parsers -----------------------------------------------------------------------------------


@pytest.mark.unit
@FEW
@given(st.dictionaries(OPTIONS, VALUES))
def test_a_kernel_configuration(options: dict[str, str]) -> None:
    lines = ["# Automatically generated file", "", "# CONFIG_LOOKS is like one"]
    for name, value in options.items():
        lines.append(f"# CONFIG_{name} is not set" if value == "n" else f"CONFIG_{name}={value}")
    assert parse_options("\n".join(lines)) == options


@pytest.mark.unit
@FEW
@given(st.text())
def test_whatever_is_a_configuration_or_not(text: str) -> None:
    parse_options(text)


@pytest.mark.unit
@FEW
@given(st.dictionaries(MACROS, st.booleans(), min_size=1))
def test_a_features_header(macros: dict[str, bool]) -> None:
    lines = ["/*** eBPF map types ***/", "#define CONFIG_HZ 250",
             "#define HAVE_PROG_TYPE_HELPER(prog_type, helper) \\"]  # fmt: skip
    for name, answer in macros.items():
        if name.startswith("HAVE"):
            lines.append(f"#define {'' if answer else 'NO_'}{name}")
        else:
            lines.append(f"# define {name} {int(answer)}")
    assert parse_macros("\n".join(lines), "it") == macros


@pytest.mark.unit
@FEW
@given(st.text())
def test_whatever_is_a_header_or_refused(text: str) -> None:
    try:
        assert parse_macros(text, "it")
    except InputError as error:
        assert error.message.startswith("it: this is no bpf_features.h")


@pytest.mark.unit
@FEW
@given(MEMBERS, MEMBERS, st.lists(NAMES, max_size=5, unique=True))
def test_types(outer: dict[str, str], inner: dict[str, str], functions: list[str]) -> None:
    made = Builder()
    inner = {name: text for name, text in inner.items() if name not in outer}
    made.struct("sock", outer, made.struct("", inner) if inner else 0)
    for name in functions:
        made.add(name, Kind.FUNC, 6)
    read = BtfFile(made.data(), "it")
    assert read.structs(["proto", "sock"]) == {"sock": outer | inner}
    assert list(read.structs(["sock"])["sock"]) == [*outer, *inner]
    assert read.functions(("",)) == sorted(functions)


@pytest.mark.unit
@FEW
@given(MEMBERS, st.integers(0), st.integers(0, 255), st.integers(0))
def test_damaged_types(members: dict[str, str], at: int, byte: int, end: int) -> None:
    made = Builder()
    made.struct("sock", members)
    data = bytearray(made.data())
    data[at % len(data)] = byte
    for damaged in (bytes(data), bytes(data)[: end % len(data)]):
        try:
            read = BtfFile(damaged, "it")
            read.structs(["sock"])
            read.functions(("",))
            read.enum("sock")
        except InputError as error:
            assert error.message.startswith("it: this ")


@pytest.mark.unit
def test_types_that_name_each_other_without_end() -> None:
    made = Builder()
    made.of["int"] = made.count + 1
    made.add("", Kind.CONST, made.count + 1)
    made.struct("sock", {"a": "int"})
    with pytest.raises(InputError, match="without end"):
        BtfFile(made.data(), "it").structs(["sock"])


@pytest.mark.unit
@FEW
@given(NODES, st.booleans())
def test_the_output_of_another_node(node: Node, as_yaml: bool) -> None:
    import yaml

    value = msgspec.to_builtins(node)
    path = written(yaml.safe_dump(value) if as_yaml else json.dumps(value))
    try:
        if node == Node():
            with pytest.raises(InputError, match="no output of `sockhop features"):
                read_node(path)
        else:
            assert read_node(path) == node
    finally:
        path.unlink()


@pytest.mark.unit
@FEW
@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_whatever_is_told_of_another_node_or_refused(data: bytes) -> None:
    path = written(data)
    try:
        read_node(path)
    except InputError as error:
        assert error.message.startswith(str(path))
    finally:
        path.unlink()


# --- comparing ---------------------------------------------------------------------------------


@pytest.mark.unit
@FEW
@given(NODES, NODES)
def test_what_differs_differs_the_other_way_round(one: Node, other: Node) -> None:
    assert compare(one, one).differences == []
    there = [(d.kind, d.name, d.here, d.there) for d in compare(one, other).differences]
    back = [(d.kind, d.name, d.there, d.here) for d in compare(other, one).differences]
    assert there == back
    assert compare(one, other).not_compared == compare(other, one).not_compared


@pytest.mark.unit
def test_the_header_of_the_incident() -> None:
    """Of what the two nodes differ in, sockhop uses nothing; the text found no relation either."""
    ours = (
        "#define NO_HAVE_XSKMAP_MAP_TYPE\n#define NO_HAVE_TASK_STORAGE_MAP_TYPE\n"
        "#define HAVE_SOCKHASH_MAP_TYPE\n"
        "#define BPF__PROG_TYPE_socket_filter__HELPER_bpf_ktime_get_coarse_ns 0\n"
    )
    theirs = ours.replace("NO_", "").replace("_ns 0", "_ns 1")
    paths = written(ours, "h"), written(theirs, "h")
    try:
        status, told, _ = run("--diff", paths[0], "--diff", paths[1], "-o", "json")
    finally:
        for path in paths:
            path.unlink()
    rows = json.loads(told)["differences"]
    assert status == 1
    assert [(row["name"], row["here"], row["there"]) for row in rows] == [
        ("BPF__PROG_TYPE_socket_filter__HELPER_bpf_ktime_get_coarse_ns", "no", "yes"),
        ("HAVE_TASK_STORAGE_MAP_TYPE", "no", "yes"),
        ("HAVE_XSKMAP_MAP_TYPE", "no", "yes"),
    ]
    assert {row["used_for"] for row in rows} == {"nothing in sockhop"}


@pytest.mark.kernel
def test_a_header_needs_root(sandbox: Sandbox) -> None:
    sandbox.directory.chmod(0o755)
    header = sandbox.directory / "bpf_features.h"
    header.write_text("#define NO_HAVE_ARRAY_MAP_TYPE\n")
    assert run("--diff", header)[0] == 1
    nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    done = sandbox.run(*nobody, str(SOCKHOP), "features", "--diff", str(header), check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "answers to a bpf_features.h cannot be probed" in done.stderr


@pytest.mark.kernel
def test_a_vendors_kernel_beside_ours(sandbox: Sandbox) -> None:
    """The vendor of the incident added a field `pid` to struct sock."""
    status, told, _ = run("-o", "json")
    assert status == 0
    node = json.loads(told)
    same = sandbox.directory / "same.json"
    same.write_text(told)
    assert run("--diff", same) == (0, "0 differences\n", "")
    node["structs"]["sock"]["pid"] = "pid_t"
    del node["structs"]["proto"]
    node["functions"].append("sock_map_of_the_vendor")
    node["sysctls"]["net.core.optmem_max"] = "1"
    node["features"][0] |= {"available": False, "reason": "ENOENT"}
    other = sandbox.directory / "other.json"
    other.write_text(json.dumps(node))
    status, told, _ = run("--diff", same, "--diff", other)
    assert status == 1
    lines = {tuple(line.split()[:2]): line for line in told.splitlines() if line}
    assert lines["member", "sock.pid"].split()[2:4] == ["-", "pid_t"]
    assert "handlers of a protocol, which a sockmap replaces (-o wide" in lines["member", "proto.…"]
    assert "sockmaps: inserting" in lines["function", "sock_map_of_the_vendor"]
    assert lines["sysctl", "net.core.optmem_max"].endswith("socket storage: provenance")
    assert "no: ENOENT" in lines["feature", node["features"][0]["name"]]
    wide = run("--diff", same, "--diff", other, "-o", "wide")[1]
    assert wide.count("member    proto.") > 20
    status, _, error = run("--diff", other, "--diff", same, "--diff", same)
    assert (status, error.splitlines()[0]) == (2, "sockhop: --diff compares two nodes")


@pytest.mark.kernel
def test_the_kernels_own_types_as_bpftool_reads_them() -> None:
    types = own_types()
    assert types
    done = subprocess.run(
        ["bpftool", "-j", "btf", "dump", "file", "/sys/kernel/btf/vmlinux"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    listed = json.loads(done.stdout)["types"]
    functions = {each["name"] for each in listed if each["kind"] == "FUNC"}
    prefixes = tuple(FUNCTIONS)
    assert set(types.functions(prefixes)) == {n for n in functions if n.startswith(prefixes)}
    for name, members in types.structs(STRUCTS).items():
        found = [each for each in listed if (each["kind"], each["name"]) == ("STRUCT", name)]
        named = [each["name"] for each in found[0]["members"] if each["name"] != "(anon)"]
        assert [member for member in members if member in named] == named, name
    ids = {e["name"]: e["val"] for each in listed if each["name"] == "bpf_map_type"
           for e in each["values"]}  # fmt: skip
    assert types.enum("bpf_map_type") == ids


@pytest.mark.kernel
def test_the_macros_of_this_kernel_as_bpftool_finds_them() -> None:
    done = subprocess.run(
        ["bpftool", "feature", "probe", "kernel", "macros"],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    theirs = parse_macros(done.stdout, "bpftool")
    wanted = random.Random(1).sample(sorted(theirs), 1500)
    ours = complete(Node(), Node(macros=dict.fromkeys(wanted, True))).macros
    assert len(ours) > 1000
    assert {name: theirs[name] for name in ours} == ours
