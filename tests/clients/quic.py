"""A QUIC server that tells its name, and a client that asks for it (aioquic).

aioquic sends from one unconnected socket, IPv6 for IPv4 peers too, and a datagram from another
address than it has sent to is for it a peer that moves, to be put to the proof (RFC 9000, 9).

As a program: `python -m tests.clients.quic NAME PORT`.
"""

import asyncio
import datetime
import ssl
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["ask_for_name"]

_PROTOCOL = ["name"]


def _configuration() -> QuicConfiguration:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sockhop-test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return QuicConfiguration(
        is_client=False, alpn_protocols=_PROTOCOL, certificate=certificate, private_key=key
    )


async def _tell(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.write(name.encode())
    writer.write_eof()


async def _serve(name: str, port: int) -> None:
    def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.ensure_future(_tell(name, reader, writer)))

    tasks: list[asyncio.Future[None]] = []
    for address in ("127.0.0.1", "::1"):
        await serve(address, port, configuration=_configuration(), stream_handler=answer)
    await asyncio.Event().wait()


async def ask_for_name(host: str, port: int, seconds: float) -> str:
    """Return the name of the server there; ConnectionError where none answers in so many seconds.

    Nothing else tells: a client goes on sending where a datagram was refused (RFC 9002, 6.2).
    """
    settings = QuicConfiguration(
        alpn_protocols=_PROTOCOL, verify_mode=ssl.CERT_NONE, idle_timeout=seconds
    )
    async with connect(host, port, configuration=settings) as client:
        reader, writer = await client.create_stream()
        writer.write_eof()
        return (await reader.read()).decode()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
