"""A TCP proxy on the loopback that can hold its breath: connections stay open, nothing passes."""

from __future__ import annotations

import contextlib
import socket
import threading

_CHUNK_BYTES = 65536


class FreezableProxy:
    """Passes bytes between whoever connects to `address` and the target, unless frozen. A network that is cut."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._flows = threading.Event()
        self._flows.set()
        self._closed = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._server]
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def freeze(self) -> None:
        """From now on nothing passes, in neither direction."""
        self._flows.clear()

    def thaw(self) -> None:
        """What was held passes, and all that follows."""
        self._flows.set()

    def close(self) -> None:
        """Break all connections."""
        self._closed = True
        self._flows.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):  # its other side closed it first
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._server.accept()
            except OSError:
                return  # closed
            try:
                far = socket.create_connection(self._target, timeout=5.0)
            except OSError:
                near.close()  # the target is away: so says this
                continue
            far.settimeout(None)
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), name="proxy-pass", daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one side is gone, so the other goes too
            while data := source.recv(_CHUNK_BYTES):
                self._flows.wait()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)
