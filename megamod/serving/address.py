"""The address of a server."""

import socket

from megamod.errors import UserError


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a TCP socket to an address without listening, so clients are refused until a server
    does.

    Args:
        host: name or address of this machine, of --host.
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
