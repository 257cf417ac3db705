"""The verb ``serve``: models opened, engine proven and started, a socket bound, and the application run on it."""

from __future__ import annotations

import socket
from typing import Any

from luthier.errors import ConfigError


def run(app: Any, listener: socket.socket) -> None:
    """Until interrupted; replies in progress get five seconds to end."""
    import uvicorn  # of the extra

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        raise ConfigError(
            f"{host}:{port}: cannot be listened on ({e.strerror or e})", "choose another --port, or another --host"
        ) from None
