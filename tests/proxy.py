"""A proxy in front of a real server: it can speak TLS to the clients, and cut them off."""

import random
import socket
import ssl
import threading
from contextlib import suppress
from types import TracebackType
from urllib.parse import urlsplit

import trustme

DEFAULT_PORTS = {"amqp": 5672, "redis": 6379}
PORTS = range(20_000, 30_000)  # none that the system gives to a connection that goes out, while the proxy is cut


def listen() -> socket.socket:
    """Listen on a free local port."""
    while True:
        try:
            return socket.create_server(("127.0.0.1", random.choice(PORTS)))
        except OSError:  # it is taken
            continue


class Proxy:
    """Passes connections to a free local port on to a server that speaks plain TCP."""

    def __init__(self, server_url: str, certificate: trustme.LeafCert | None = None) -> None:
        self.server = urlsplit(server_url)
        self.context: ssl.SSLContext | None = None
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(self.context)
        self.accepted = 0
        self.port = 0
        self.open: set[socket.socket] = set()
        self.cut_at: tuple[bytes, str] | None = None
        self.keep_answer = False
        self.flowing = threading.Event()
        self.flowing.set()
        self.restore()

    def url(self, host: str = "127.0.0.1") -> str:
        """Return the server's URL through this proxy."""
        login, _, _ = self.server.netloc.rpartition("@")
        scheme = f"{self.server.scheme}s" if self.context else self.server.scheme
        return self.server._replace(scheme=scheme, netloc=f"{login}@{host}:{self.port}").geturl()

    def cut(self) -> None:
        """Close every connection and refuse new ones, as a server that is down does."""
        with suppress(OSError):  # it is cut already
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for end in list(self.open):
            self._end(end)

    def cut_once(self, command: bytes, when: str) -> None:
        """Cut everything off when a client sends this command: before the server gets it, or after it has answered."""
        self.cut_at = (command, when)

    def lose_once(self, command: bytes) -> None:
        """Do not pass on what a client sends with this command: it waits for an answer."""
        self.cut_at = (command, "lost")

    def freeze(self) -> None:
        """Keep the connections, accept new ones, and pass nothing on, as a server that is frozen does."""
        self.flowing.clear()

    def thaw(self) -> None:
        """Pass on what has come since freeze(), and go on."""
        self.flowing.set()

    def restore(self) -> None:
        """Accept connections (again), on the same port."""
        self.listener = socket.create_server(("127.0.0.1", self.port)) if self.port else listen()
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut()
        self.thaw()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:  # cut
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        client = raw
        try:
            if self.context:
                client = self.context.wrap_socket(raw, server_side=True)
            host, port = self.server.hostname or "", self.server.port or DEFAULT_PORTS[self.server.scheme]
            server = socket.create_connection((host, port), timeout=10)
        except (ssl.SSLError, OSError):  # the client speaks no TLS, or does not trust the certificate
            raw.close()
            return
        server.settimeout(None)
        self.accepted += 1
        self.open |= {client, server}
        for source, target in ((client, server), (server, client)):
            threading.Thread(target=self._pipe, args=(source, target), daemon=True).start()

    def _pipe(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.flowing.wait()
                if self.cut_at and self.cut_at[0] in data:
                    (_, when), self.cut_at = self.cut_at, None
                    if when == "before":
                        self.cut()
                    self.keep_answer = when == "after"
                    if when == "lost":
                        continue
                elif self.keep_answer:
                    self.keep_answer = False
                    self.cut()
                target.sendall(data)
        except OSError:
            pass
        finally:
            self._end(source)
            self._end(target)

    def _end(self, end: socket.socket) -> None:
        """Shut down first: a close alone does not wake a thread that reads from the socket."""
        self.open.discard(end)
        with suppress(OSError):  # it is closed already
            end.shutdown(socket.SHUT_RDWR)
        end.close()
