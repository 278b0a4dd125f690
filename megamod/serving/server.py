"""The server of an application, and a shutdown that answers what is accepted."""

import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

LONGEST_CLOSE = 10
"""Seconds in which clients must read their last responses at the end."""


class DrainingServer(uvicorn.Server):
    """Server that ends by SIGTERM or Ctrl-C once everything accepted is answered.

    Until then new requests get status 503. A second signal ends it at once.

    Args:
        app: the application, see `make_app`.
        greeting: printed once the server listens.
    """

    def __init__(self, app: FastAPI, greeting: str):
        """Configure uvicorn without its access log; see the class for the arguments."""
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
        """Start to listen, then print the greeting; overrides the method of uvicorn."""
        await super().startup(sockets)
        print(self.greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain; at the second signal, exit. uvicorn calls it in the signal handler."""
        if self.queue.draining:
            super().handle_exit(sig, frame)
        self.queue.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Return True when the server is to end; uvicorn calls it ten times a second."""
        self.should_exit |= self.queue.draining and self.queue.idle
        return await super().on_tick(counter)
