"""Two nodes side by side: what their kernels can do, how they are set, how they were built."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sockhop.errors import InputError, SystemLackError
from sockhop.kernel.bpf_header import macro_use, parse_macros, probe_macros
from sockhop.kernel.btf_file import BtfFile, is_btf
from sockhop.kernel.features import Feature
from sockhop.kernel.traits import (
    FUNCTIONS,
    OPTIONS,
    STRUCTS,
    SYSCTLS,
    Structs,
    own_types,
    read_functions,
    read_options,
    read_structs,
    read_sysctls,
)

__all__ = ["Comparison", "Difference", "Node", "compare", "complete", "own_node", "read_node"]

_NONE = "-"


class Node(msgspec.Struct, frozen=True):
    """What is known of a node; `features -o json` prints it. What is empty is not known.

    `missing`: required features that are not there, `unknown`: those that need root to tell;
    `config`: options of the kernel's configuration; `structs`: C types of members, by struct and
    member; `macros`: what a bpf_features.h tells.
    """

    host: dict[str, str] = {}
    missing: list[str] = []
    unknown: list[str] = []
    features: list[Feature] = []
    sysctls: dict[str, str] = {}
    config: dict[str, str] = {}
    structs: Structs = {}
    functions: list[str] = []
    macros: dict[str, bool] = {}


class Difference(msgspec.Struct, frozen=True):
    """Something that two nodes differ in, and what it is used for; - for what one lacks."""

    kind: str
    name: str
    here: str
    there: str
    used_for: str


class Comparison(msgspec.Struct, frozen=True):
    """The differences, and which kinds could not be compared since one side does not tell."""

    differences: list[Difference]
    not_compared: list[str]


def own_node(host: Mapping[str, str], features: list[Feature]) -> Node:
    """Return what is known of this node, given its facts and features."""
    types = own_types()
    return Node(
        host=dict(host),
        missing=[each.name for each in features if each.required and each.available is False],
        unknown=[each.name for each in features if each.required and each.available is None],
        features=features,
        sysctls=read_sysctls(),
        config=read_options(),
        structs=read_structs(types) if types else {},
        functions=read_functions(types) if types else [],
    )


def read_node(path: Path) -> Node:
    """Read what a file tells of a node.

    That is the output of `features -o json` (or yaml), a bpf_features.h, or raw BTF. InputError
    where it is none of them.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if is_btf(data):
        types = BtfFile(data, str(path))
        return Node(structs=read_structs(types), functions=read_functions(types))
    text = data.decode(errors="replace")
    if "#define" in text or "# define" in text:
        return Node(macros=parse_macros(text, str(path)))
    return _parse_report(text, path)


def _parse_report(text: str, path: Path) -> Node:
    import yaml  # noqa: PLC0415 (slow to import)

    wrong = InputError(
        f"{path}: this is no output of `sockhop features -o json`, no bpf_features.h and no BTF",
        hint="make it on the other node with `sockhop features -o json > node.json`",
    )
    try:
        # Quicker than YAML, which JSON is a part of.
        value: Any = msgspec.json.decode(text) if text.startswith("{") else yaml.safe_load(text)
        found = msgspec.convert(value, Node)
    except (msgspec.DecodeError, msgspec.ValidationError, yaml.YAMLError, ValueError):
        raise wrong from None
    if found == Node():
        raise wrong
    return found


def complete(here: Node, there: Node) -> Node:
    """Return this node *here* with answers to the macros that *there* has, if it has any.

    SystemLackError where they cannot be probed.
    """
    if not there.macros or here.macros:
        return here
    types = own_types()
    macros = probe_macros(there.macros, types) if types else {}
    if not macros:
        raise SystemLackError(
            "this kernel's answers to a bpf_features.h cannot be probed",
            hint="run as root; compare two such files with --diff FILE --diff FILE",
        )
    return msgspec.structs.replace(here, macros=macros)


class _Kind(NamedTuple):
    """A kind of differences: its name, the values of a node by name, what each is used for."""

    name: str
    values: Callable[[Node], dict[str, str]]
    use: Callable[[str], str]


def compare(here: Node, there: Node) -> Comparison:
    """Compare two nodes, in what both tell."""
    found: list[Difference] = []
    not_compared = []
    uses = {each.name: each.used_for for each in (*here.features, *there.features)}
    for kind in _kinds(uses):
        left, right = kind.values(here), kind.values(there)
        if left and right:
            found += _differences(kind, left, right)
        elif left or right:
            not_compared.append(kind.name)
    return Comparison(found, not_compared)


def _differences(kind: _Kind, left: dict[str, str], right: dict[str, str]) -> Iterator[Difference]:
    # libbpf cannot probe every macro: what one side does not tell is not compared there.
    names = left.keys() & right.keys() if kind.name == "macro" else left.keys() | right.keys()
    for name in sorted(names):
        values = left.get(name, _NONE), right.get(name, _NONE)
        if values[0] != values[1]:
            yield Difference(kind.name, name, *values, kind.use(name))


def _kinds(uses: Mapping[str, str]) -> tuple[_Kind, ...]:
    return (
        _Kind("host", lambda node: node.host, lambda name: _HOST.get(name, "")),
        _Kind("feature", _features, lambda name: uses.get(name, "")),
        _Kind("sysctl", lambda node: node.sysctls, lambda name: SYSCTLS.get(name, "")),
        _Kind("config", lambda node: node.config, lambda name: OPTIONS.get(name, "")),
        _Kind("member", _members, lambda name: STRUCTS.get(name.partition(".")[0], "")),
        _Kind("function", lambda node: dict.fromkeys(node.functions, "yes"), _use_of_function),
        _Kind("macro", _macros, macro_use),
    )


_HOST = {
    "kernel": "everything",
    "architecture": "everything",
    "capabilities": "what sockhop may do",
    "ending sockets": "severing",
    "RLIMIT_MEMLOCK": "BPF maps",
}


def _features(node: Node) -> dict[str, str]:
    said = {True: "yes", False: "no", None: "unknown"}
    return {
        each.name: said[each.available] + (f": {each.reason}" if each.reason else "")
        for each in node.features
    }


def _members(node: Node) -> dict[str, str]:
    return {
        f"{struct}.{member}": text
        for struct, members in node.structs.items()
        for member, text in members.items()
    }


def _macros(node: Node) -> dict[str, str]:
    return {name: "yes" if answer else "no" for name, answer in node.macros.items()}


def _use_of_function(name: str) -> str:
    return next((use for prefix, use in FUNCTIONS.items() if name.startswith(prefix)), "")
