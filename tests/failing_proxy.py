"""An HTTP proxy before a server on this machine that now and then answers 503 in its place, or late."""

import http.client
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def failing_proxy(
    port: int, *, share: float, late_s: float = 0.0, late_share: float | None = None, seed: int = 0
) -> Iterator[tuple[int, list[str]]]:
    """The proxy's port, and the requests that it refused so far.

    Args:
        port: Of the server.
        share: Of requests that get a 503.
        late_s: Seconds by which others are answered late.
        late_share: Of requests that are; None: as many as get a 503.
        seed: Of the draw.
    """
    rng, lock, refused = random.Random(seed), threading.Lock(), []
    late_share = share if late_share is None else late_share

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                drawn = rng.random()
                if drawn < share:
                    refused.append(f"{self.command} {self.path}")
            if drawn < share:
                self._answer(503, [("Content-Type", "text/plain")], b"Slow down")
                return
            if drawn > 1 - late_share:
                time.sleep(late_s)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            # What is signed must arrive as it was sent, the host's name among it.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _OWN]
            length = response.getheader("Content-Length")
            self._answer(response.status, headers, content, length=length if self.command == "HEAD" else None)
            connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, length: str | None = None) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], refused
    finally:
        server.shutdown()
        server.server_close()


_OWN = ("connection", "transfer-encoding", "content-length", "keep-alive", "date", "server")
