"""Paths, encodings, syntax, and what several files say together."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sockhop.errors import InputError
from sockhop.sources import paths
from sockhop.sources.files import load
from tests.sources.manifests import (
    compact,
    endpoint_slice,
    kubernetes_list,
    load_text,
    refusal,
    service,
)

pytestmark = pytest.mark.unit


def named(name: str, frontend: str = "10.0.0.1:80") -> str:
    return json.dumps(compact(name=name, frontends=[frontend]))


def said_of(tmp_path: Path, *paths: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(paths)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_directory_by_name_and_without_what_is_hidden(tmp_path: Path) -> None:
    for number, name in enumerate(("b.yaml", "a.yml", "c.json", ".d.yaml", "e.txt", "f.yaml~")):
        (tmp_path / name).write_text(named(f"s{number}", f"10.0.0.{number + 1}:80"))
    (tmp_path / "..data").mkdir()
    (tmp_path / "g.yaml").mkdir()
    (tmp_path / "h.yaml").symlink_to("e.txt")
    assert [s.name for s in load([tmp_path]).desired.services] == ["s0", "s1", "s2", "s4"]


def test_services_are_sorted_whatever_the_order_of_files(tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    first.write_text(named("b"))
    second.write_text(named("a", "10.0.0.2:80"))
    assert load([first, second]) == load([second, first]) == load([tmp_path])
    assert [s.name for s in load([tmp_path]).desired.services] == ["a", "b"]


@pytest.mark.parametrize("name", ["m.yaml", "m.json", "m", "m.conf"])
@pytest.mark.parametrize("text", ["", "\n", " \n", "\ufeff", "null", "null\n"])
def test_a_file_without_a_document(tmp_path: Path, name: str, text: str) -> None:
    assert refusal(tmp_path, text, name) == (
        f"{name}: found no document, expected services\n"
        '  to ask for no services at all, write "version: 1" and "services: []"'
    )


@pytest.mark.parametrize("text", ["---\n", "---\n---\n", "# nothing\n", "---\nnull\n---\n~\n"])
def test_yaml_without_a_document(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text).startswith("m.yaml: found no document, expected services")


def test_empty_documents_between_others_do_not_count(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, f"---\n---\n{named('a')}\n---\n---\n")
    assert [s.name for s in loaded.desired.services] == ["a"]


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    (tmp_path / "file.yaml").write_text(named("a"))
    for name, reason in (
        ("missing.yaml", "No such file or directory"),
        ("dangling.yaml", "No such file or directory"),
        ("loop.yaml", "Too many levels of symbolic links"),
        ("file.yaml/x.yaml", "Not a directory"),
    ):
        assert said_of(tmp_path, tmp_path / name) == f"{name}: cannot be read: {reason}"
    assert "cannot be read: embedded null byte" in said_of(tmp_path, Path("a\0b"))
    assert said_of(tmp_path) == "no file or directory of manifests is given"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(named("a"))
    path.chmod(0)
    script = (
        "import os, sys, pathlib\n"
        "from sockhop.sources.files import load\n"
        "from sockhop.errors import InputError\n"
        "os.chdir(sys.argv[1]); os.setuid(65534)\n"
        "try: load([pathlib.Path('m.yaml')])\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "m.yaml: cannot be read: Permission denied\n"


def test_a_directory_without_manifests(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("x")
    assert said_of(tmp_path, tmp_path) == (
        f"{tmp_path}: found no manifest in the directory, "
        "expected files named *.yaml, *.yml or *.json"
    )


def test_a_directory_with_a_file_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(named("a"))
    (tmp_path / "b.yaml").symlink_to("gone")
    assert "b.yaml: cannot be read" in said_of(tmp_path, tmp_path)


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "FILE_MAX", 1 << 20)
    size = 1 << 20
    text = named("a")
    assert load_text(tmp_path, text.ljust(size)).desired.services
    assert refusal(tmp_path, text.ljust(size + 1)) == (
        "m.yaml: found more than 1 MiB, expected a smaller file"
    )


@pytest.mark.parametrize("name", ["m.yaml", "m.json"])
def test_what_is_not_utf_8(tmp_path: Path, name: str) -> None:
    good = named("a").encode()
    for bad, found in ((b"\xff", "0xff"), (b"\xc3", "0xc3"), (b"\xed\xa0\x80", "0xed")):
        assert refusal(tmp_path, b"\n\n" + good.replace(b'"a"', b'"' + bad + b'"'), name) == (
            f"{name}:3: found the byte {found}, expected UTF-8 text"
        )
    utf_16 = good.decode().encode("utf-16")
    assert refusal(tmp_path, utf_16, name).endswith("expected UTF-8 text")


@pytest.mark.parametrize("name", ["m.yaml", "m.json"])
def test_a_byte_order_mark_is_no_matter(tmp_path: Path, name: str) -> None:
    assert load_text(tmp_path, b"\xef\xbb\xbf" + named("a").encode(), name).desired.services


def test_a_file_without_a_suffix_is_what_it_looks_like(tmp_path: Path) -> None:
    assert load_text(tmp_path, " " + named("a"), "m").desired.services
    assert load_text(tmp_path, "version: 1\nservices: []", "m").desired.services == ()
    assert ": not JSON: " in refusal(tmp_path, "{version: 1}", "m")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"version": 1,\n"services": [}', "m.json:2: not JSON: Expecting value"),
        ('{"version": 1,\n\n"services": []', "m.json:3: not JSON: Expecting ',' delimiter"),
        ('{"version": 1, "services": []} x', "m.json:1: not JSON: Extra data"),
        ('{"version": 1, "services": [],}', "m.json:1: not JSON: "),
        ("{'version': 1}", "m.json:1: not JSON: Expecting property name enclosed in double quotes"),
        ('{"version": 1, "x": "\\ud800"}', "m.json: not JSON: "),
        ('{"version": 1, "services": NaN}', "m.json: not JSON: "),
        ("[" * 100_000, "m.json: not JSON: nested too deep"),
        ('{"x":' * 100_000, "m.json: not JSON: nested too deep"),
        ('{"kind": "List", "apiVersion": "v1", "items": [' + "[" * 100_000, "m.json: not JSON: "),
    ],
)
def test_what_is_not_json(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text, "m.json").startswith(said)


def test_names_and_frontends_are_unique_in_the_compact_form(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"---\n{named('a')}\n---\n{named('b', '10.0.0.2:80')}\n")
    (tmp_path / "b.json").write_text(named("a", "10.0.0.3:80"))
    assert said_of(tmp_path, tmp_path) == (
        "b.json:1: services[0].name: found 'a', which is at "
        "a.yaml:2: document 1: services[0].name too, expected a name of its own"
    )
    (tmp_path / "b.json").write_text(named("c", "10.0.0.2:80/tcp+udp"))
    assert said_of(tmp_path, tmp_path) == (
        "b.json:1: services[0].frontends[0]: found 10.0.0.2:80/tcp, which b has too "
        "(a.yaml:4: document 2: services[0].frontends[0]), expected a frontend of its own"
    )
    (tmp_path / "b.json").write_text(named("c", "10.0.0.2:80/udp"))
    assert len(load([tmp_path]).desired.services) == 3


def test_a_frontend_twice_in_one_compact_service(tmp_path: Path) -> None:
    frontends = ["10.0.0.1:80/tcp+udp", "[::ffff:10.0.0.1]:80/udp"]
    assert refusal(tmp_path, json.dumps(compact(frontends=frontends))) == (
        "m.yaml:1: services[0].frontends[1]: found 10.0.0.1:80/udp, which web has too "
        "(m.yaml:1: services[0].frontends[0]), expected a frontend of its own"
    )


def test_the_compact_form_and_kubernetes_together(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(kubernetes_list(service(), endpoint_slice("10.1.0.1")))
    (tmp_path / "b.yaml").write_text(named("web"))
    assert [s.name for s in load([tmp_path]).desired.services] == ["test/echo", "web"]
    (tmp_path / "b.yaml").write_text(named("web", "10.96.0.1:80"))
    assert said_of(tmp_path, tmp_path) == (
        "b.yaml:1: services[0].frontends[0]: found 10.96.0.1:80/tcp, which test/echo has too "
        "(a.json:5: items[0]), expected a frontend of its own"
    )
    (tmp_path / "b.yaml").write_text(named("test/echo"))
    assert said_of(tmp_path, tmp_path).startswith(
        "b.yaml:1: services[0].name: found 'test/echo', which is at a.json:"
    )


def test_objects_twice_in_two_files(tmp_path: Path) -> None:
    for kind, manifest in (
        ("Service", service()),
        ("EndpointSlice", endpoint_slice("10.0.0.1", name="echo")),
    ):
        for name in ("a.json", "b.json"):
            (tmp_path / name).write_text(json.dumps(manifest))
        assert said_of(tmp_path, tmp_path) == (
            f"b.json:1: metadata.name: found {kind} test/echo, which is at a.json:1 too, "
            "expected each object once"
        )


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ("{}", "items: found an empty mapping, expected a list"),
        ("[null]", "items[0]: found null, expected a mapping"),
        ("[{}]", "items[0].apiVersion: found nothing, expected the object's apiVersion"),
        ("null", "items: found null, expected a list"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, items: str, said: str) -> None:
    text = f'{{"apiVersion": "v1", "kind": "List", "items": {items}}}'
    for name in ("m.json", "m.yaml"):
        assert refusal(tmp_path, text, name) == f"{name}:1: {said}"


def test_a_list_in_yaml(tmp_path: Path) -> None:
    text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {}\n"
    assert refusal(tmp_path, text) == (
        "m.yaml:6: items[0].metadata.name: found nothing, expected a name of 1 to 63 lower-case "
        "letters, digits and -, with a letter or digit at each end"
    )


def test_a_list_of_nothing_says_so(tmp_path: Path) -> None:
    for name in ("m.json", "m.yaml"):
        said = refusal(tmp_path, kubernetes_list(), name)
        assert said.startswith(f"{name}:4: items: found an empty list, expected objects\n")


def test_a_name_that_cannot_be_printed(tmp_path: Path) -> None:
    said = refusal(tmp_path, "version: 3", "a\nb.yaml")
    assert said.count("\n") == 0
    assert "a\\nb.yaml" in said


def test_the_garbage_collector_is_on_again(tmp_path: Path) -> None:
    assert gc.isenabled()
    load_text(tmp_path, named("a"))
    assert gc.isenabled()
    refusal(tmp_path, "x")
    assert gc.isenabled()
