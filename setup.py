"""Builds what setuptools alone cannot: the BPF objects, with clang. pyproject.toml has the rest.

`bpf/X.bpf.c` becomes `sockhop/bpf/X.bpf.o`, in the wheel or, for an editable install, in `src/`.
Some become `X.plain.bpf.o`, too, for kernels that lack instructions (see sockhop.kernel.objects).
"""

import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.errors import ExecError

SOURCES = Path("bpf")
TARGET_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
"""What libbpf's bpf_tracing.h calls the machine, by `uname -m`."""
PLAIN = ("balance", "sockets")
"""Built a second time, without atomic instructions that fetch (macro PLAIN)."""
DEBIAN_PACKAGES = {"clang": "clang", "llvm-strip": "llvm"}


def find_tool(name: str) -> str:
    """The path of a compiler tool, or an error that names Debian's package of it."""
    path = shutil.which(name)
    if path is None:
        raise ExecError(
            f"{name} is needed to compile sockhop's BPF programs and is not on PATH: "
            f"apt-get install {DEBIAN_PACKAGES[name]} (script/setup does that), "
            "or install a wheel made by script/wheel, which needs no compiler"
        )
    return path


def compile_bpf(source: Path, target: Path) -> None:
    """Compile one BPF object; strip DWARF but keep BTF, which libbpf needs."""
    machine = platform.machine()
    if machine not in TARGET_ARCHITECTURES:
        raise ExecError(f"sockhop has no BPF build for {machine}, only for x86_64 and aarch64")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under a name that is no package data, then renamed: whoever loads objects meanwhile sees
    # the old one or the new one.
    partial = target.with_suffix(".partial")
    clang = [find_tool("clang"), "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror"]
    macros = [f"-D__TARGET_ARCH_{TARGET_ARCHITECTURES[machine]}"]
    if target.name.endswith(".plain.bpf.o"):
        macros.append("-DPLAIN")
    paths = [f"-I{SOURCES}", "-c", str(source), "-o", str(partial)]
    for command in ([*clang, *macros, *paths], [find_tool("llvm-strip"), "-g", str(partial)]):
        if subprocess.run(command, check=False).returncode != 0:
            partial.unlink(missing_ok=True)
            raise ExecError(f"{source}: this failed: {' '.join(command)}")
    partial.replace(target)


class BuildBpf(Command):
    """A sub-command of `build`, in the protocol of setuptools.command.build.SubCommand."""

    description = "compile the BPF programs"
    user_options = [("build-lib=", "d", "directory to compile to")]

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        for target, source in self._targets().items():
            compile_bpf(source, target)
        for stale in set(self._directory().glob("*.bpf.o")) - set(self._targets()):
            stale.unlink()

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted(SOURCES.glob("*.[ch]"))]

    def get_outputs(self) -> list[str]:
        return [str(target) for target in self._targets()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _directory(self) -> Path:
        root = Path("src") if self.editable_mode else Path(self.build_lib or "build/lib")
        return root / "sockhop" / "bpf"

    def _targets(self) -> dict[Path, Path]:
        targets = {}
        for source in sorted(SOURCES.glob("*.bpf.c")):
            name = source.name.removesuffix(".bpf.c")
            for kind in ("", ".plain") if name in PLAIN else ("",):
                targets[self._directory() / f"{name}{kind}.bpf.o"] = source
        return targets


class Build(build):
    sub_commands = [*build.sub_commands, ("build_bpf", None)]


setup(
    cmdclass={"build": Build, "build_bpf": BuildBpf},
    # One wheel for every Python >= 3.11: cffi's extension uses the stable ABI.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    cffi_modules=[
        "src/sockhop/kernel/_libbpf_build.py:ffibuilder",
        "src/sockhop/bench/_loops_build.py:ffibuilder",
        "src/sockhop/diagnose/_compare_build.py:ffibuilder",
    ],
)
