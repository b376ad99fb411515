"""The process of `flows.server.temporary_server`; run by path, it imports nothing of ours."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time

_WATCH_SECONDS = 1.0
_STOP_SECONDS = 5.0


def serve(command_id: int, listener: socket.socket) -> None:
    """Serve on a socket until the command with this process id has ended, or a signal says so."""
    threading.Thread(
        target=_end_with_command, args=(command_id,), name="end-with-command", daemon=True
    ).start()
    gc.disable()  # until it serves: a fifth of the start would be searches for garbage that there is not
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            gc.freeze()
            gc.enable()

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True, log_level="error", lifespan="on", timeout_graceful_shutdown=1,
    )  # fmt: skip
    Server(config).run(sockets=[listener])
    gc.freeze()  # nothing is left to do: the last collection would only take time


def _end_with_command(command_id: int) -> None:
    """A command that was killed cannot end its server; the system then gives the server another parent."""
    while os.getppid() == command_id:
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
