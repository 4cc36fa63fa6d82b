"""The engine's own work, with a stand-in for the server; test_vllm.py has vLLM's own."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.config import ConfigError, EvaluationConfig, ServerConfig, parse_section
from mcore_sft.evaluation import server_engine
from mcore_sft.evaluation.engine import Completion, Engine, Request, open_engine
from mcore_sft.evaluation.errors import EvaluationError
from tests.evaluation.asked import spell

Answer = tuple[int, Any]


def counting(body: dict[str, Any]) -> Answer:
    """Counts on from the last token of the prompt, as vLLM says it."""
    last = body["prompt"][-1]
    written = [last + 1 + step for step in range(body["max_tokens"])]
    reason = "length"
    for place, token in enumerate(written):
        if token in body["stop_token_ids"]:
            written, reason = written[: place + 1], "stop"
            break
    choice = {
        "text": "as the server spells it",
        "finish_reason": reason,
        "token_ids": written,
        "prompt_token_ids": body["prompt"],
    }
    return 200, {"choices": [choice]}


@dataclass
class Server:
    """An OpenAI-compatible server of a few lines."""

    url: str
    answer: Callable[[dict[str, Any]], Answer] = counting
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "tiny"}])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/v1/models": {"data": it.models}, "/version": {"version": "9.9"}}
            self.reply(200 if self.path in known else 404, known.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            it.keys.add(self.headers["Authorization"])
            it.bodies.append(body)
            self.reply(*it.answer(body))

        def reply(self, status: int, content: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        it = Server(url=f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield it
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_engine, "_DELAYS", (0.01, 0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def opened(folder: Path, url: str | None, **settings: Any) -> Engine:
    config = EvaluationConfig.model_validate(
        {"engine": "server", "max_new_tokens": 3, "server": {"url": url, **settings}}
    )
    return open_engine(config, folder, stop_ids=(20,), decode=spell)


def asked(*prompts: tuple[int, ...]) -> list[Request]:
    return [Request(index=n, prompt_ids=prompt, seed=2**62 + n) for n, prompt in enumerate(prompts)]


def answers(folder: Path, url: str, *prompts: tuple[int, ...], **settings: Any) -> list[Completion]:
    with opened(folder, url, **settings) as engine:
        done = [one for many in engine.generate(asked(*prompts)) for one in many]
    return sorted(done, key=lambda one: one.index)


def test_ids_go_there_and_back(llama: Path, server: Server) -> None:
    done = answers(llama, server.url, (1, 30), (2, 18), (5, 6))
    assert [one.tokens for one in done] == [(31, 32, 33), (19, 20), (7,)]
    assert [one.text for one in done] == ["31 32 33", "19", ""]
    assert [one.finish_reason for one in done] == ["length", "stop", "stop"]
    body = next(body for body in server.bodies if body["prompt"] == [2, 18])
    assert body == {
        "model": "tiny",
        "prompt": [2, 18],
        "max_tokens": 3,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 2**62 + 1,
        "stop_token_ids": [7, 20],
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "return_token_ids": True,
    }


def test_text_where_it_tells_no_ids(llama: Path, server: Server) -> None:
    server.answer = lambda body: (200, {"choices": [{"text": "x = 5", "finish_reason": "stop"}]})
    assert answers(llama, server.url + "/v1/", (1,)) == [
        Completion(index=0, tokens=(), text="x = 5", finish_reason="stop")
    ]


def test_what_passes_is_tried_again(llama: Path, server: Server) -> None:
    tries = iter([(503, "starting"), (429, "busy"), None])
    server.answer = lambda body: next(tries) or counting(body)
    assert [one.tokens for one in answers(llama, server.url, (1,))] == [(2, 3, 4)]
    server.answer = lambda body: (500, "no memory is left")
    with pytest.raises(EvaluationError, match=r"3 tries failed \(HTTP 500: .no memory is left"):
        answers(llama, server.url, (1,))


def test_a_refusal_is_shown_and_ends_the_run(llama: Path, server: Server) -> None:
    server.answer = lambda body: (400, {"error": "seed must be small"})
    with pytest.raises(EvaluationError, match=r"completions: HTTP 400: .*seed must be small"):
        answers(llama, server.url, *[(1,)] * 50, concurrency=1)
    assert len(server.bodies) == 1


def test_answers_before_a_failure_are_kept(llama: Path, server: Server) -> None:
    server.answer = lambda body: (404, "gone") if body["prompt"] == [9] else counting(body)
    done: list[Completion] = []
    engine = opened(llama, server.url, concurrency=1)
    with pytest.raises(EvaluationError, match="HTTP 404"):
        done.extend(one for many in engine.generate(asked((1,), (2,), (9,))) for one in many)
    assert [one.index for one in done] == [0, 1]


def test_so_many_wait_at_once_and_no_more(llama: Path, server: Server) -> None:
    together = threading.Barrier(4)
    most, now, lock = 0, 0, threading.Lock()

    def counted(body: dict[str, Any]) -> Answer:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        together.wait(timeout=10)
        time.sleep(0.05)  # others would come in now
        with lock:
            now -= 1
        return counting(body)

    server.answer = counted
    assert len(answers(llama, server.url, *[(n + 1,) for n in range(16)], concurrency=4)) == 16
    assert most == 4


def test_a_server_that_is_not_there(llama: Path) -> None:
    with pytest.raises(EvaluationError, match=r"127\.0\.0\.1:9: no answer \(.*refused"):
        opened(llama, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"url: string should match.*given 'localhost:8000'"):
        parse_section(ServerConfig, {"url": "localhost:8000"})
    with pytest.raises(EvaluationError, match=r"evaluation\.server\.url=http"):
        opened(llama, None)


def test_the_model_it_serves(llama: Path, server: Server) -> None:
    with pytest.raises(EvaluationError, match="serves no model 'big', but tiny"):
        opened(llama, server.url, model="big")
    server.models.append({"id": "other", "max_model_len": 6, "owned_by": "vllm"})
    with pytest.raises(EvaluationError, match=r"serves 2 models \(tiny, other\)"):
        opened(llama, server.url)
    engine = opened(llama, server.url, model="other")
    assert engine.describe() == {
        "engine": "server",
        "url": server.url,
        "model": "other",
        "owned_by": "vllm",
        "served": json.dumps({"id": "other", "max_model_len": 6, "owned_by": "vllm"}),
        "version": "9.9",
    }
    engine.check(asked((1, 2, 3)))
    with pytest.raises(EvaluationError, match="above the server's max_model_len 6"):
        engine.check(asked((1, 2, 3, 4)))
    server.models.clear()
    with pytest.raises(EvaluationError, match=r"serves 0 models \(none\)"):
        opened(llama, server.url)


def test_the_key_comes_from_the_environment(
    llama: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(llama, server.url, (1,))
    assert server.keys == {None}
    with pytest.raises(EvaluationError, match="MY_KEY, which the environment does not hold"):
        opened(llama, server.url, api_key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret")
    answers(llama, server.url, (1,), api_key_variable="MY_KEY")
    assert server.keys == {None, "Bearer secret"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_token_ids": [0, 1]}, "continued a prompt of 2 tokens where 1 were sent"),
        ({"finish_reason": "abort"}, "ended an answer with 'abort'"),
    ],
)
def test_other_answers_are_refused(
    llama: Path, server: Server, change: dict[str, Any], reason: str
) -> None:
    def changed(body: dict[str, Any]) -> Answer:
        status, content = counting(body)
        content["choices"][0] |= change
        return status, content

    server.answer = changed
    with pytest.raises(EvaluationError, match=reason):
        answers(llama, server.url, (1,))


def test_an_answer_of_another_kind(llama: Path, server: Server) -> None:
    server.answer = lambda body: (200, {"content": "hello"})
    with pytest.raises(EvaluationError, match=r"not an answer of the OpenAI API \(KeyError"):
        answers(llama, server.url, (1,))
