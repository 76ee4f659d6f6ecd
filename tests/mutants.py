"""Builds the datapath with a safety taken out, to show that a test would notice."""

import platform
import subprocess
from pathlib import Path

__all__ = ["mutant"]

_BPF = Path(__file__).parent.parent / "bpf"
_ARCH = {"x86_64": "x86", "aarch64": "arm64"}


def mutant(directory: Path, name: str, *changes: tuple[str, str]) -> Path:
    """Compile bpf/NAME.bpf.c with each text of *changes* replaced; each must occur exactly once."""
    source = (_BPF / f"{name}.bpf.c").read_text()
    for before, after in changes:
        assert source.count(before) == 1, f"{before!r} occurs {source.count(before)} times"
        source = source.replace(before, after)
    path = directory / f"{name}.bpf.c"
    path.write_text(source)
    target = f"-D__TARGET_ARCH_{_ARCH[platform.machine()]}"
    subprocess.run(
        ["clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", target, f"-I{_BPF}", "-c", path,
         "-o", path.with_suffix(".o")],
        check=True,
    )  # fmt: skip
    return path.with_suffix(".o")
