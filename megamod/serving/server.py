"""The server of an application: its address, and a shutdown that answers what is accepted."""

import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from megamod.errors import UserError

LONGEST_CLOSE = 10
"""Seconds in which clients must read their last responses at the end."""


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a socket to an address; it does not listen yet, so clients are refused until it does.

    Args:
        port: 0 for any free port.
    Raises:
        UserError: if the address is unknown or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give others") from error
    return bound


class DrainingServer(uvicorn.Server):
    """Server that ends by SIGTERM or Ctrl-C once everything accepted is answered.

    Until then new requests get status 503. A second signal ends it at once.

    Args:
        app: the application, see `make_app`.
        greeting: printed once the server listens.
    """

    def __init__(self, app: FastAPI, greeting: str):
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=LONGEST_CLOSE,
            )
        )
        self.queue, self.greeting = app.state.queue, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        print(self.greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain; at the second signal, exit. Runs in the handler of the signal."""
        if self.queue.draining:
            super().handle_exit(sig, frame)
        self.queue.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return True when the server is to end; called ten times a second."""
        self.should_exit |= self.queue.draining and self.queue.idle
        return await super().on_tick(counter)
