"""Bind a socket, and run the HTTP application on it with uvicorn."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from luthier.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve until interrupted; replies in progress get five seconds to finish."""
    import uvicorn  # part of the extra ``serve``

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 chooses a free port. Raises ConfigError if the address cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        raise ConfigError(
            f"{host}:{port}: cannot listen on this address ({e.strerror or e})",
            "choose another --port, or another --host",
        ) from None
