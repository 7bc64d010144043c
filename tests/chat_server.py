"""A scripted OpenAI-compatible endpoint in this process: replies by a rule, faults on demand, and a count of all calls.

with ChatServer(rule) as server:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Rule = Callable[[dict[str, Any]], str]
"""The text of the reply to a request's JSON body."""


@dataclass
class Fault:
    """What goes wrong with a call, which is not counted: another status, a pause first, or a body that ends early."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    cut: bool = False
    text: str = ""
    """A body in place of the server's own."""


class ChatServer:
    """The server; its counters may be read at any time.

    Attributes:
        calls: by the text of the last message, only those that got a whole reply.
        requests: all bodies that came, in order.
        keys: the Authorization headers that came.
        prompt_tokens, answer_tokens: words, as the server reports them in `usage`.
        most_at_once: the most calls that were open at the same time.
        faults: taken from the front, one for each call, before calls succeed.
    """

    def __init__(self, rule: Rule, *, faults: Sequence[Fault] = (), pause_s: float = 0.0) -> None:
        self.rule = rule
        self.faults = list(faults)
        self.pause_s = pause_s
        self.calls: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.prompt_tokens = self.answer_tokens = self.most_at_once = 0
        self.hold = threading.Event()
        self.hold.set()
        self._open = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """For OPENAI_BASE_URL."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def n_calls(self) -> int:
        """Calls that got a whole reply."""
        return sum(self.calls.values())

    def begin(self, body: dict[str, Any], key: str) -> Fault:
        """Count a call that has come, and say what goes wrong with it."""
        with self._lock:
            self.requests.append(body)
            self.keys.add(key)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            return self.faults.pop(0) if self.faults else Fault()

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """The chat completion, which is counted as paid for."""
        text = self.rule(body)
        n_prompt = sum(len(message["content"].split()) for message in body["messages"])
        words = text.split()
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        cut = len(words) > limit
        text = " ".join(words[:limit]) if cut else text
        with self._lock:
            self.calls[body["messages"][-1]["content"]] += 1
            self.prompt_tokens += n_prompt
            self.answer_tokens += min(len(words), limit)
        return {
            "id": "reply",
            "object": "chat.completion",
            "model": f"{body['model']}-served",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "length" if cut else "stop",
                }
            ],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": min(len(words), limit)},
        }

    def end(self) -> None:
        """A call is over."""
        with self._lock:
            self._open -= 1


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            fault = server.begin(body, self.headers.get("authorization", ""))
            try:
                server.hold.wait()
                time.sleep(fault.pause_s or server.pause_s)
                if self.path != "/v1/chat/completions":
                    self._send(404, b'{"error": "no such path"}')
                elif fault.status != 200:
                    self._send(fault.status, (fault.text or '{"error": "scripted"}').encode(), fault.headers)
                elif fault.cut or fault.text:
                    self._send(200, fault.text.encode() or b'{"choices": [{"message": {"content": "all is')
                else:
                    self._send(200, json.dumps(server.reply(body)).encode())
            except (BrokenPipeError, ConnectionResetError):  # the client has given up
                self.close_connection = True
            finally:
                server.end()

        def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    return Handler
