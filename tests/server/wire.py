"""A wire to a real Prefect server that can be cut: for who uses it the server then hangs, or is gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal
from urllib.parse import urlsplit

_BYTES = 65536


class Wire:
    """Forwards TCP connections to a server from a port of its own."""

    def __init__(self, api_url: str) -> None:
        address = urlsplit(api_url)
        assert address.hostname is not None and address.port is not None
        self._server = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._port = self._listener.getsockname()[1]
        self.api_url = f"http://127.0.0.1:{self._port}/api"
        self._whole = threading.Event()
        self._whole.set()
        self._ends: list[socket.socket] = []
        self._begin(self._listener)

    def hang(self) -> None:
        """From now on nothing comes through, as from a process that is stopped; connections stay."""
        self._whole.clear()

    def refuse(self) -> None:
        """From now on nobody listens and all connections are gone, as when a process was killed."""
        self._listener.close()
        # Its thread waits in accept() and would take one more.
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        self._close_ends()

    def mend(self, after: Literal["hang", "refuse"]) -> None:
        """The server is there again; what waited comes through."""
        if after == "refuse":
            self._listener = socket.create_server(("127.0.0.1", self._port), backlog=512)
            self._begin(self._listener)
        self._whole.set()

    def close(self) -> None:
        self._listener.close()
        self._whole.set()
        self._close_ends()

    def _close_ends(self) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def _begin(self, listener: socket.socket) -> None:
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                if listener.fileno() < 0:
                    near.close()
                    return
                far = socket.create_connection(self._server)
            except OSError:
                return
            self._ends += [near, far]
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_BYTES):
                self._whole.wait()
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def wire_to(api_url: str) -> Iterator[Wire]:
    """A wire for one test."""
    wire = Wire(api_url)
    try:
        yield wire
    finally:
        wire.close()
