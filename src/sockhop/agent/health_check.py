"""One look at a backend's health: an HTTP request, or a TCP connection."""

import asyncio
import os
from errno import EACCES, EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from sockhop import __version__
from sockhop.model import HealthCheck, endpoint

__all__ = ["Prober", "UnaskedError"]

_LATE = 0.1
"""Seconds by which the agent itself may be late to see a timeout."""

_OUR_OWN = {EACCES, EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM}
"""What connect(2) and socket(2) say before anything is sent: too few descriptors, ports or memory
here, or a firewall or policy that forbids the agent to ask."""


class UnaskedError(Exception):
    """A backend could not be asked, for a reason that is none of its own."""


class Prober:
    """Asks backends, all in one event loop; an async context manager."""

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # A connection for each check: whether a new one is taken is what is asked.
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"sockhop/{__version__}"},
            auto_decompress=False,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def ask(self, address: str, port: int, check: HealthCheck) -> str | None:
        """Return "" if the backend at *address*, *port* is healthy, else what is wrong.

        None if nothing was learnt, since the agent itself was late. As a kubelet's probe, an
        answer of 200 to 399 is good; redirects are not followed. UnaskedError says why nothing
        was sent.
        """
        port = check.port or port
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(check.timeout):
                if check.path:
                    return await self._get(f"http://{endpoint(address, port)}{check.path}", check)
                return await _connect(address, port)
        except TimeoutError:
            if loop.time() - began > check.timeout + _LATE:
                return None
            return f"{check}: no answer within {check.timeout:g} s"
        except OSError as error:
            if error.errno in _OUR_OWN:
                raise UnaskedError(os.strerror(error.errno)) from None
            return f"{check}: {os.strerror(error.errno) if error.errno else error}"
        except aiohttp.ServerDisconnectedError:
            return f"{check}: closed without a whole answer"
        except (aiohttp.ClientError, ValueError) as error:
            text = getattr(error, "message", "") or str(error) or type(error).__name__
            return f"{check}: no HTTP answer: {text.splitlines()[0].rstrip(':')}"

    async def _get(self, url: str, check: HealthCheck) -> str:
        async with self._session.get(URL(url, encoded=True), allow_redirects=False) as answer:
            return "" if 200 <= answer.status < 400 else f"{check}: {answer.status}"


async def _connect(address: str, port: int) -> str:
    _, writer = await asyncio.open_connection(address, port)
    writer.close()
    return ""
