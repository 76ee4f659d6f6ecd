"""Builds the datapath with a safety taken out, to show that a test would notice."""

import platform
import subprocess
from pathlib import Path

__all__ = ["mutant"]

_BPF = Path(__file__).parent.parent / "bpf"
_ARCH = {"x86_64": "x86", "aarch64": "arm64"}


def mutant(directory: Path, name: str, *changes: tuple[str, str]) -> Path:
    """Compile bpf/NAME.bpf.c with each text of *changes* replaced.

    Each must occur exactly once, in the program or in the headers that are ours.
    """
    sources = {path.name: path.read_text() for path in _BPF.glob("*.[ch]")}
    for before, after in changes:
        found = [file for file, text in sources.items() if before in text]
        assert len(found) == 1, f"{before!r} is in {found}"
        assert sources[found[0]].count(before) == 1, before
        sources[found[0]] = sources[found[0]].replace(before, after)
    for file, text in sources.items():
        (directory / file).write_text(text)
    path = directory / f"{name}.bpf.c"
    target = f"-D__TARGET_ARCH_{_ARCH[platform.machine()]}"
    subprocess.run(
        ["clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", target, f"-I{directory}", "-c", path,
         "-o", path.with_suffix(".o")],
        check=True,
    )  # fmt: skip
    return path.with_suffix(".o")
