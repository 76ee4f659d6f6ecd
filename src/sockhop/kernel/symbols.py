"""Names of kernel functions by address (/proc/kallsyms, kernel/kallsyms.c)."""

import bisect
from pathlib import Path

from sockhop.errors import SystemLackError

__all__ = ["Symbols"]

_PATH = Path("/proc/kallsyms")
_CODE = b"tTwW"


class Symbols:
    """The functions of the kernel, its modules and its BPF programs, as they are now.

    SystemLackError where the kernel hides the addresses (kernel.kptr_restrict=2, or no CAP_SYSLOG).
    """

    def __init__(self) -> None:
        found = []
        try:
            for line in _PATH.read_bytes().splitlines():
                address, kind, name = line.split(maxsplit=2)
                if kind in _CODE:
                    found.append((int(address, 16), name))
        except FileNotFoundError:
            raise SystemLackError(
                f"{_PATH}: there is none", hint="the kernel needs CONFIG_KALLSYMS"
            ) from None
        found.sort()
        if not found or not found[-1][0]:
            raise SystemLackError(
                f"{_PATH} hides where functions are",
                hint="run as root with CAP_SYSLOG, and with kernel.kptr_restrict at 0 or 1",
            )
        self._addresses = [address for address, _ in found]
        self._names = [name for _, name in found]

    def name(self, address: int) -> str:
        """Return the function in which *address* lies, without the suffixes that compilers add.

        Of a module's function or a BPF program nothing but its name; "" before the first function.
        """
        at = bisect.bisect_right(self._addresses, address) - 1
        if at < 0:
            return ""
        return self._names[at].split(b"\t")[0].split(b".")[0].decode(errors="replace")
