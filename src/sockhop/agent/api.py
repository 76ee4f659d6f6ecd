"""The agent's HTTP API on a Unix socket: for root only, by SO_PEERCRED (unix(7))."""

import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec
from aiohttp import web

from sockhop.agent.state import AgentState, BackendRequest, HeldChange, Override
from sockhop.errors import SystemLackError

__all__ = ["Approval", "api_application", "serve"]

_PATIENCE = 1.0
"""Seconds that a client may keep a server from ending; aiohttp takes them twice."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Approve = Callable[[Sequence[int] | None], Sequence[HeldChange]]
SetBackend = Callable[[BackendRequest], Sequence[Override]]


class Approval(msgspec.Struct):
    """The body of POST /v1/approve: which changes; None for all that are held."""

    changes: list[int] | None = None


def api_application(
    state: Callable[[], AgentState], approve: Approve, set_backend: SetBackend
) -> web.Application:
    """Return the application.

    GET /v1/status gives *state* as JSON; POST /v1/approve takes an :class:`Approval` to *approve*
    and gives what it let go, a list of :class:`sockhop.agent.state.HeldChange`; POST /v1/backend
    takes a :class:`sockhop.agent.state.BackendRequest` to *set_backend* and gives the list of
    :class:`sockhop.agent.state.Override` that it made, or ended.
    """

    async def get_status(_: web.Request) -> web.Response:
        return web.json_response(body=msgspec.json.encode(state()))

    async def post_approve(request: web.Request) -> web.Response:
        try:
            approval = msgspec.json.decode(await request.read(), type=Approval)
        except msgspec.DecodeError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(body=msgspec.json.encode(approve(approval.changes)))

    async def post_backend(request: web.Request) -> web.Response:
        try:
            asked = msgspec.json.decode(await request.read(), type=BackendRequest)
        except msgspec.DecodeError as error:
            return web.json_response({"error": str(error)}, status=400)
        try:
            return web.json_response(body=msgspec.json.encode(set_backend(asked)))
        except SystemLackError as error:
            return web.json_response({"error": str(error)}, status=500)

    application = web.Application(middlewares=[_root_only])
    application.router.add_get("/v1/status", get_status)
    application.router.add_post("/v1/approve", post_approve)
    application.router.add_post("/v1/backend", post_backend)
    return application


async def serve(application: web.Application, listeners: Iterable[socket.socket]) -> web.AppRunner:
    """Serve *application* on these sockets, until the runner is cleaned up."""
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=_PATIENCE)
    await runner.setup()
    for listener in listeners:
        await web.SockSite(runner, listener).start()
    return runner


@web.middleware
async def _root_only(request: web.Request, handler: Handler) -> web.StreamResponse:
    transport = request.transport
    peer = transport.get_extra_info("socket") if transport else None
    if peer is None or _uid(peer) != 0:
        return web.json_response({"error": "this API is for root"}, status=403)
    return await handler(request)


def _uid(peer: socket.socket) -> int:
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=iII"))
    return int(struct.unpack("=iII", credentials)[1])
