"""Says which modules have more than 500 lines and which functions more than 60.

Usage: check_sizes.py DIRECTORY...   Exit status 1 if there is any. In C only modules are measured.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MODULE_LINES = 500
FUNCTION_LINES = 60
GENERATED = {"vmlinux.h"}


def oversized(path: Path) -> Iterator[str]:
    """One line for each thing in *path* that is too long, as FILE:LINE: what."""
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > MODULE_LINES:
        yield f"{path}:1: module of {lines} lines, over {MODULE_LINES}"
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                what = f"function {node.name} of {lines} lines, over {FUNCTION_LINES}"
                yield f"{path}:{node.lineno}: {what}"


def main(directories: list[str]) -> int:
    paths = [
        path
        for directory in directories
        for path in sorted(Path(directory).rglob("*"))
        if path.suffix in {".py", ".c", ".h"} and path.name not in GENERATED
    ]
    findings = [finding for path in paths for finding in oversized(path)]
    for finding in findings:
        print(finding)
    return 1 if findings or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
