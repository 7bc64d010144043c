"""A proxy in front of an S3 server that fails, delays or cuts a share of the requests, like an unreliable store."""

import http.client
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

# Error responses: status, code and message of S3.
_ERRORS = {
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "conflict": (409, "OperationAborted", "A conflicting conditional operation is in progress. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
TRANSIENT = ("error", "slow_down", "conflict", "reset", "lost", "false_error", "delay", "cut")
"""Transient faults: three error responses, a reset before the server sees the request, a reset or an error in place of
the server's response, a late response, and half a response. `denied` is not transient."""


class FaultyS3:
    """The proxy, running while its context is open; `done` counts requests by outcome.

    These attributes may change at any time: the `share` of requests that fail, the `kinds` of faults, a regular
    expression `pattern` that "METHOD /path" must match, `max_faults`, the number of faults left, and `clock_s`, by how
    much the store's clock is ahead. The same seed gives the same faults if the client sends its requests in the same
    order.
    """

    def __init__(self, upstream: str, seed: int, share: float = 0.0, kinds: Sequence[str] = TRANSIENT) -> None:
        self.share, self.kinds = share, kinds
        self.pattern, self.max_faults, self.delay_s = "", float("inf"), 0.3
        self.clock_s = 0.0
        self.done: Counter[str] = Counter()
        self.asked: list[str] = []  # "METHOD /path" of every request
        self.read: Counter[str] = Counter()  # bytes sent to clients, by path
        self.upstream = urlsplit(upstream).netloc
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def faults(self) -> int:
        """The number of requests that met a fault."""
        return sum(n for kind, n in self.done.items() if kind != "passed")

    def draw(self, method: str, path: str) -> str:
        """The outcome of the next request."""
        with self._lock:
            hit, kind = self._random.random() < self.share, self._random.choice(self.kinds)
            if kind == "conflict" and method in ("GET", "HEAD"):
                kind = "error"  # reads cannot conflict
            if not hit or self.max_faults < 1 or not re.search(self.pattern, f"{method} {path}"):
                kind = "passed"
            self.max_faults -= kind != "passed"
            self.done[kind] += 1
            self.asked.append(f"{method} {path}")
            return kind

    def wait(self) -> None:
        """Delay a response, at most until the proxy stops."""
        self._stopped.wait(self.delay_s)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultyS3

    def shutdown_request(self, request):
        self.close_request(request)  # without shutdown(): with SO_LINGER at 0 this resets the connection

    def handle_error(self, request, client_address):
        """Silent: clients that give up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self):
        proxy = self.server.proxy
        body = self._body()
        kind = proxy.draw(self.command, self.path)
        if kind == "false_error":
            self._forward(body)
            kind = "error"
        if kind in _ERRORS:
            status, code, text = _ERRORS[kind]
            xml = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{text}</Message></Error>'
            self._respond(status, [("Content-Type", "application/xml")], xml.encode())
        elif kind == "reset":
            self._reset()
        else:
            if kind == "delay":
                proxy.wait()
            status, headers, response = self._forward(body)
            if kind == "lost":
                self._reset()
            else:
                if self.command == "GET":
                    proxy.read[self.path.split("?")[0]] += len(response)
                self._respond(status, headers, response, cut=kind == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "content-length", "expect", "transfer-encoding"):
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.putheader("Connection", "close")
            upstream.endheaders(body)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            upstream.close()

    def _respond(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        bare = self.command == "HEAD" or status in (204, 304)  # no body
        self.send_response_only(status)
        for name, value in self._with_clock(headers):
            if name.lower() not in ("connection", "transfer-encoding") and (bare or name.lower() != "content-length"):
                self.send_header(name, value)
        if not bare:
            self.send_header("Content-Length", str(len(body)))
        if cut and (bare or not body):
            self._reset()  # before the headers end
            return
        self.end_headers()
        if not bare:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def _with_clock(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        ahead = timedelta(seconds=self.server.proxy.clock_s)
        return [
            (
                name,
                format_datetime(parsedate_to_datetime(value) + ahead, usegmt=True) if name.lower() == "date" else value,
            )
            for name, value in headers
        ]

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Silent."""
