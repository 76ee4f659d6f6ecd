"""Probes agree with bpftool and the kernel's configuration, say no where that is the answer, and
leave nothing behind."""

import gzip
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sockhop.datapath.balancer import HOOKS, BalanceMaps
from sockhop.datapath.records import Setting
from sockhop.kernel._libbpf import lib
from sockhop.kernel.features import Feature, probe_features
from sockhop.kernel.probe import Lack, Prober, call
from tests.kernel.feature_page import PAGE, with_tables
from tests.sandbox import SOCKHOP, Sandbox, wait_until

PINS = Path("/sys/fs/bpf/sockhop")
CONFIGURATION = Path("/proc/config.gz")
NO_CAPABILITIES = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
SINCE = re.compile(r'Linux kernel commit [0-9a-f]{12} \("[^"]+"\) \(in v\d+\.\d+\)')

SINCE_ONLY = ("Linux v4.3", "Linux v5.15")

# What each of them needs, as bpftool reports it.
BPFTOOL = {
    "bpf(2)": "syscall_config have_bpf_syscall",
    "JIT": "system_config bpf_jit_enable",
    "32-bit jumps": "misc have_v3_isa_extension",
    "netns cookie in sock_ops": "program_types have_sock_ops_prog_type",
    "bounded loops": "misc have_bounded_loops",
    "hook connect4": "program_types have_cgroup_sock_addr_prog_type",
    "hook recvmsg6": "program_types have_cgroup_sock_addr_prog_type",
    "hook sock_release": "program_types have_cgroup_sock_prog_type",
    "sk_storage": "map_types have_sk_storage_map_type",
    "LRU hash": "map_types have_lru_hash_map_type",
    "sockhash": "map_types have_sockhash_map_type",
    "ring buffer": "map_types have_ringbuf_map_type",
    "sk_msg": "program_types have_sk_msg_prog_type",
    "sock_ops": "program_types have_sock_ops_prog_type",
    "fentry": "program_types have_tracing_prog_type",
}
HELPERS = {
    "sk_storage in connect hooks": "bpf_sk_storage_get",
    "socket cookie in connect hooks": "bpf_get_socket_cookie",
    "netns cookie in connect hooks": "bpf_get_netns_cookie",
    "bpf_ktime_get_boot_ns": "bpf_ktime_get_boot_ns",
    "bpf_set_retval": "bpf_set_retval",
}
OPTIONS = {
    "hook connect6": "CGROUP_BPF",
    "hook post_bind4": "CGROUP_BPF",
    "kernel BTF": "DEBUG_INFO_BTF",
    "SOCK_DESTROY for TCP": "INET_DIAG_DESTROY",
    "SOCK_DESTROY for UDP": "INET_DIAG_DESTROY",
    "SOCK_DESTROY for raw": "INET_RAW_DIAG",
    "kprobe": "KPROBES",
}
FUNCTIONS = {
    "iter/bpf_sk_storage_map": "bpf_iter_bpf_sk_storage_map",
    "iter/task_file": "bpf_iter_task_file",
    "iter/tcp": "bpf_iter_tcp",
    "iter/udp": "bpf_iter_udp",
    "bpf_sock_destroy": "bpf_sock_destroy",
}


@pytest.fixture(scope="module")
def found() -> dict[str, Feature]:
    return {feature.name: feature for feature in probe_features(PINS)}


def bpftool(*arguments: str) -> Any:
    done = subprocess.run(["bpftool", "-j", *arguments], check=True, capture_output=True)
    return json.loads(done.stdout)


@pytest.mark.kernel
def test_bpftool_finds_the_same(found: dict[str, Feature]) -> None:
    report = bpftool("feature", "probe", "kernel")
    for name, path in BPFTOOL.items():
        section, key = path.split()
        assert found[name].available == bool(report[section][key]), (found[name], path)
    usable = report["helpers"]["cgroup_sock_addr_available_helpers"]
    for name, helper in HELPERS.items():
        assert found[name].available == (helper in usable), found[name]


@pytest.mark.kernel
def test_the_kernels_own_types_have_the_iterators_and_kfuncs(found: dict[str, Feature]) -> None:
    types = bpftool("btf", "dump", "file", "/sys/kernel/btf/vmlinux")["types"]
    functions = {entry["name"] for entry in types if entry["kind"] == "FUNC"}
    for name, function in FUNCTIONS.items():
        assert found[name].available == (function in functions), found[name]


@pytest.mark.kernel
@pytest.mark.skipif(not CONFIGURATION.exists(), reason="the kernel was built without /proc/config")
def test_the_kernels_configuration_agrees(found: dict[str, Feature]) -> None:
    lines = gzip.decompress(CONFIGURATION.read_bytes()).decode().splitlines()
    for name, option in OPTIONS.items():
        assert found[name].available == (f"CONFIG_{option}=y" in lines), (found[name], option)


@pytest.mark.kernel
def test_what_this_kernel_lacks_is_refused_with_a_reason() -> None:
    with Prober() as prober:
        with pytest.raises(Lack, match=r"^EINVAL$"):
            prober.hook(255)
        with pytest.raises(Lack, match="invalid func"):
            prober.hook(lib.BPF_CGROUP_INET4_CONNECT, call(9999))
        # libbpf 1.1's own probe takes this one for usable.
        with pytest.raises(Lack, match="cannot use helper|unknown func"):
            prober.hook(lib.BPF_CGROUP_INET4_CONNECT, call(lib.BPF_FUNC_msg_redirect_hash))
        with pytest.raises(Lack, match=r"^ENOENT: bpf_iter_sockhop is not in the kernel's BTF$"):
            prober.iterator("sockhop")
        with pytest.raises(Lack, match="EINVAL"):
            prober.map(9999, 4, 4)


@pytest.mark.kernel
def test_without_capabilities_it_says_that_root_is_needed(sandbox: Sandbox) -> None:
    for drop in (NO_CAPABILITIES, NOBODY):
        done = sandbox.run(*drop, str(SOCKHOP), "features", "-o", "json", check=False)
        assert done.returncode == 3, done.stderr
        assert "could not be tried" in done.stderr
        report = json.loads(done.stdout)
        answers = {feature["name"]: feature for feature in report["features"]}
        for name in ("bpf(2)", "hook connect4", "iter/tcp", "SOCK_DESTROY for TCP", "fentry"):
            assert answers[name]["available"] is None, answers[name]
            assert answers[name]["reason"] == "needs root"
        assert answers["cgroup2"]["available"] is True
        assert report["missing"] == []
        assert "hook connect4" in report["unknown"]
        assert "no CAP_BPF" in report["host"]["capabilities"]


@pytest.mark.kernel
def test_what_balancing_needs_and_is_missing_is_named(sandbox: Sandbox) -> None:
    hide = "mount -t tmpfs none /sys/kernel/btf && umount /sys/fs/bpf && exec $0 features"
    done = sandbox.run("unshare", "--mount", "sh", "-c", hide, str(SOCKHOP), check=False)
    assert done.returncode == 3, done.stdout
    assert done.stderr.startswith(
        "sockhop: balancing needs what is missing here: bpffs, kernel BTF"
    )
    assert re.search(r"^bpffs +no: /sys/fs/bpf/\S+ is on sysfs", done.stdout, re.MULTILINE)
    assert re.search(r"^kernel BTF +no: \w+: no /sys/kernel/btf", done.stdout, re.MULTILINE)
    assert re.search(r"^hook connect4 +yes", done.stdout, re.MULTILINE)


@pytest.mark.kernel
def test_a_run_is_quick_and_leaves_nothing(sandbox: Sandbox) -> None:
    def ours() -> list[Any]:
        everything = [*bpftool("prog", "list"), *bpftool("map", "list")]
        return [thing for thing in everything if thing.get("name", "").startswith("sockhop_prob")]

    def sockets() -> str:
        return str(sandbox.run("ss", "-Hatun").stdout)

    open_files = len(os.listdir("/proc/self/fd"))
    before = sockets()
    begin = time.monotonic()
    probe_features(sandbox.pins)
    assert time.monotonic() - begin < 1
    assert len(os.listdir("/proc/self/fd")) == open_files
    # A link would hold its program.
    wait_until(lambda: not ours(), "no program or map of a probe is left")
    assert sockets() == before
    assert not sandbox.pins.exists()


@pytest.mark.kernel
def test_every_hook_that_is_attached_is_required(found: dict[str, Feature]) -> None:
    for hook in HOOKS:
        assert found[f"hook {hook.hook}"].required


@pytest.mark.kernel
def test_the_tables(sandbox: Sandbox) -> None:
    table = sandbox.sockhop("features").stdout.splitlines()
    assert table[0].split() == ["FEATURE", "AVAILABLE", "USED", "FOR"]
    wide = sandbox.sockhop("features", "-o", "wide").stdout
    assert wide.split("\n")[0].split()[4:] == ["SINCE", "WITHOUT", "IT"]
    assert 'commit d74bad4e74ee ("bpf: Hooks for sys_connect") (in v4.17)' in wide
    assert "connects without a backend fail with EPERM instead of EHOSTUNREACH" in wide
    facts = {line.split()[0] for line in table[table.index("") + 1 :]}
    assert {"kernel", "architecture", "capabilities", "provenance"} <= facts
    assert f"kernel               {os.uname().release}" in table


@pytest.mark.kernel
def test_every_feature_names_its_commit_and_version(found: dict[str, Feature]) -> None:
    for feature in found.values():
        assert SINCE.fullmatch(feature.since) or feature.since in SINCE_ONLY, feature
        assert feature.used_for
        assert feature.without
        assert bool(feature.reason) == (feature.available is not True), feature


@pytest.mark.kernel
def test_provenance_that_fell_back_is_told(sandbox: Sandbox) -> None:
    def told() -> str:
        report = json.loads(sandbox.sockhop("features", "-o", "json").stdout)
        return str(report["host"]["provenance"])

    assert told() == "nothing is installed"
    with sandbox.agent(sandbox.manifest('{"version": 1, "services": []}')):
        assert told() == "in sk_storage"
        with BalanceMaps(sandbox.pins) as maps:
            maps.settings.set(Setting.FALLBACK, 1)
        assert "in a map" in told()


@pytest.mark.unit
def test_the_page_has_every_feature_and_fault() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text()), (
        "docs/features.md is old: python -m tests.kernel.feature_page"
    )
