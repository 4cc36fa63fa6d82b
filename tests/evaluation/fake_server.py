"""An OpenAI-compatible server of a few lines, with every fault that one has been seen to have."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Sent:
    """A reply: `content` as JSON, or bytes as they are, of which all but `cut` are sent."""

    status: int
    content: Any
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0


def counting(body: dict[str, Any]) -> Sent:
    """Counts on from the last token of the prompt, as vLLM says it."""
    last = body["prompt"][-1]
    written = [last + 1 + step for step in range(body["max_tokens"])]
    reason = "length"
    for place, token in enumerate(written):
        if token in body["stop_token_ids"]:
            written, reason = written[: place + 1], "stop"
            break
    choice = {
        "index": 0,
        "text": "as the server spells it",
        "finish_reason": reason,
        "token_ids": written,
        "prompt_token_ids": body["prompt"],
    }
    return Sent(200, {"choices": [choice]})


@dataclass
class Server:
    """What it answers, which a test changes, and what it was asked."""

    url: str
    answer: Callable[[dict[str, Any]], Sent] = counting
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "tiny"}])
    greeting: Callable[[], Sent] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            it.paths.append(self.path)
            known = {"/v1/models": {"data": it.models}, "/version": {"version": "9.9"}}
            if it.greeting and self.path == "/v1/models":
                self.send(it.greeting())
            else:
                self.send(Sent(200 if self.path in known else 404, known.get(self.path)))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            it.keys.add(self.headers["Authorization"])
            it.bodies.append(body)
            self.send(it.answer(body))

        def send(self, sent: Sent) -> None:
            content = sent.content
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            self.send_response(sent.status)
            for name, value in sent.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) - sent.cut])

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        it = Server(url=f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield it
        finally:
            http.shutdown()
            thread.join()
