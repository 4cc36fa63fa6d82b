"""The engine's own work, with a stand-in for the server; test_vllm.py has vLLM's own."""

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcore_sft.config import ConfigError, EvaluationConfig, ServerConfig, parse_section
from mcore_sft.evaluation.engines import server_engine
from mcore_sft.evaluation.engines.engine import Completion, Engine, Request
from mcore_sft.evaluation.engines.open import open_engine
from mcore_sft.evaluation.errors import EvaluationError
from tests.evaluation.asked import spell
from tests.evaluation.fake_server import Sent, Server, counting, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as it:
        yield it


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_engine, "_DELAYS", (0.01, 0.01))


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
    server.answer = lambda body: Sent(
        200, {"choices": [{"text": "x = 5", "finish_reason": "stop"}]}
    )
    assert answers(llama, server.url + "/v1/", (1,)) == [
        Completion(index=0, tokens=(), text="x = 5", finish_reason="stop")
    ]


def test_what_passes_is_tried_again(llama: Path, server: Server) -> None:
    tries = iter([Sent(503, "starting"), Sent(429, "busy"), None])
    server.answer = lambda body: next(tries) or counting(body)
    assert [one.tokens for one in answers(llama, server.url, (1,))] == [(2, 3, 4)]
    server.answer = lambda body: Sent(500, "no memory is left")
    with pytest.raises(EvaluationError, match=r"3 tries failed \(HTTP 500: .no memory is left"):
        answers(llama, server.url, (1,))


def test_a_refusal_is_shown_and_ends_the_run(llama: Path, server: Server) -> None:
    server.answer = lambda body: Sent(400, {"error": "seed must be small"})
    with pytest.raises(EvaluationError, match=r"completions: HTTP 400: .*seed must be small"):
        answers(llama, server.url, *[(1,)] * 50, concurrency=1)
    assert len(server.bodies) == 1


def test_answers_before_a_failure_are_kept(llama: Path, server: Server) -> None:
    server.answer = lambda body: Sent(404, "gone") if body["prompt"] == [9] else counting(body)
    done: list[Completion] = []
    engine = opened(llama, server.url, concurrency=1)
    with pytest.raises(EvaluationError, match="HTTP 404"):
        done.extend(one for many in engine.generate(asked((1,), (2,), (9,))) for one in many)
    assert [one.index for one in done] == [0, 1]


def test_so_many_wait_at_once_and_no_more(llama: Path, server: Server) -> None:
    together = threading.Barrier(4)
    most, now, lock = 0, 0, threading.Lock()

    def counted(body: dict[str, Any]) -> Sent:
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
    def changed(body: dict[str, Any]) -> Sent:
        sent = counting(body)
        sent.content["choices"][0] |= change
        return sent

    server.answer = changed
    with pytest.raises(EvaluationError, match=reason):
        answers(llama, server.url, (1,))


# --- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        *(Sent(status, {"error": "busy"}) for status in (408, 425, 429, 500, 502, 503, 504)),
        Sent(503, {"error": {"message": "it starts"}}, cut=9),
        Sent(200, {"choices": []}, cut=5),
        Sent(200, {"choices": [{"index": 0, "text": "5", "finish_reason": "stop"}]}, cut=9),
        Sent(200, b'{"choices": [{"index": 0, "te'),
        Sent(200, b'{"choices": [{"index": 0, "text": "\xe2\x82'),
        Sent(200, b""),
        Sent(200, b"\n"),
        Sent(200, gzip.compress(b'{"choices": []}', mtime=0)[:-4], {"Content-Encoding": "gzip"}),
        Sent(200, b"\x1f\x8bbroken", {"Content-Encoding": "gzip"}),
    ],
    ids=repr,
)
def test_what_passes_is_asked_again(llama: Path, server: Server, fault: Sent) -> None:
    tries = iter([fault, fault])
    server.answer = lambda body: next(tries, None) or counting(body)
    assert [one.tokens for one in answers(llama, server.url, (1,))] == [(2, 3, 4)]
    assert len(server.bodies) == 3
    greetings = iter([fault])
    server.greeting = lambda: next(greetings, Sent(200, {"data": server.models}))
    with opened(llama, server.url) as engine:
        assert engine.served == {"id": "tiny"}


def test_a_server_is_not_asked_before_it_wants_to_be(
    llama: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(server_engine.anyio, "sleep", sleep)
    in_an_hour = "Wed, 21 Oct 2015 07:28:00 GMT"  # a date that is past asks for no wait
    wants = iter(["7", in_an_hour, "soon", None])
    server.answer = lambda body: (
        Sent(503, "busy", {"Retry-After": want}, cut=3) if (want := next(wants)) else counting(body)
    )
    monkeypatch.setattr(server_engine, "_DELAYS", (0.01,) * 4)
    assert [one.tokens for one in answers(llama, server.url, (1,))] == [(2, 3, 4)]
    assert slept[0] == 7
    assert all(0 < each < 0.1 for each in slept[1:])
    server.answer = lambda body: Sent(429, {"message": "busy"}, {"Retry-After": "86400"})
    with pytest.raises(EvaluationError, match=r"HTTP 429: busy; it wants .* in 86400 s"):
        answers(llama, server.url, (1,))


def test_a_gzip_that_nobody_asked_for_is_unpacked(
    llama: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {"Content-Encoding": "gzip"}
    server.answer = lambda body: Sent(
        200, gzip.compress(json.dumps(counting(body).content).encode()), packed
    )
    assert [one.tokens for one in answers(llama, server.url, (1,))] == [(2, 3, 4)]
    monkeypatch.setattr(server_engine, "_REPLY_BYTES", 10_000)
    server.answer = lambda body: Sent(200, gzip.compress(b" " * 10_001), packed)
    with pytest.raises(EvaluationError, match="longer than 10,000 bytes"):
        answers(llama, server.url, (1,))


@pytest.mark.parametrize("limit", [True, -1, 0, "5", None])
def test_a_limit_that_is_no_number_of_tokens_is_none(
    llama: Path, server: Server, limit: Any
) -> None:
    server.models[0]["max_model_len"] = limit
    assert answers(llama, server.url, (1,))


def test_a_choice_is_taken_by_its_index(llama: Path, server: Server) -> None:
    def shuffled(body: dict[str, Any]) -> Sent:
        (choice,) = counting(body).content["choices"]
        other = choice | {"index": 1, "token_ids": [9, 9]}
        return Sent(200, {"choices": [other, choice]})

    server.answer = shuffled
    assert [one.tokens for one in answers(llama, server.url, (1,))] == [(2, 3, 4)]


CHOICE = {"index": 0, "text": "5", "finish_reason": "stop"}
NO_CHOICE = "expected one choice of index 0, given "


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"choices": []}, NO_CHOICE + '{"choices": []}'),
        ({"choices": None}, NO_CHOICE + '{"choices": null}'),
        ({"choices": {"index": 0}}, NO_CHOICE),
        ({"choices": [None]}, NO_CHOICE),
        ({"choices": ["5"]}, NO_CHOICE),
        ({"choices": [CHOICE, CHOICE]}, NO_CHOICE),
        ({"choices": [CHOICE | {"index": 1}]}, NO_CHOICE),
        ({"content": "hello"}, NO_CHOICE + '{"content": "hello"}'),
        ({"choices": [{"index": 0, "text": "5"}]}, "ended an answer with None"),
        ({"choices": [CHOICE | {"finish_reason": "abort"}]}, "ended an answer with 'abort'"),
        ({"choices": [CHOICE | {"text": None}]}, "neither text nor token ids"),
        ({"choices": [CHOICE | {"text": 5}]}, "neither text nor token ids"),
        ({"choices": [{"finish_reason": "stop"}]}, "neither text nor token ids"),
        *(
            ({"choices": [CHOICE | {"token_ids": ids}]}, "neither text nor token ids")
            for ids in (["5"], [5.0], [True], [-1], [301], [10**30], [None], "5", {"0": 5}, 5)
        ),
        ({"choices": [CHOICE | {"prompt_token_ids": [0, 1]}]}, "a prompt of 2 tokens where 1 were"),
        (
            {"choices": [{"index": 0, "message": {"content": "5"}, "finish_reason": "stop"}]},
            "it answered as in a chat, expected the text of a completion",
        ),
        ({"error": {"message": "out of memory", "code": 5}}, "completions: out of memory$"),
        ({"error": "out of memory"}, "completions: out of memory$"),
        ({"object": "error", "message": "out of memory"}, "completions: out of memory$"),
        ([], "not an answer of the OpenAI API (its JSON is no object, but list"),
        (b"<html>Sign in</html>", "not an answer of the OpenAI API"),
        (b"[" * 100_000, "not an answer of the OpenAI API"),
        (b'{"choices":' * 100_000, "not an answer of the OpenAI API"),
        *(
            (b'{"choices":' + b"[" * depth + b"]" * depth + b"}", said)
            for depth, said in ((2, NO_CHOICE), (60, "nested too deep"), (985, "OpenAI API"))
        ),
    ],
    ids=lambda x: repr(x)[:60],
)
def test_any_other_answer_is_one_sentence(
    llama: Path, server: Server, reply: Any, said: str
) -> None:
    server.answer = lambda body: Sent(200, reply)
    with pytest.raises(EvaluationError, match=said if "$" in said else re.escape(said)) as caught:
        answers(llama, server.url, (1,))
    assert server.url in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"error": {"message": "no such model"}}, "HTTP 404: no such model"),
        ({"message": "no such model", "object": "error"}, "HTTP 404: no such model"),
        ({"detail": "no such model"}, "HTTP 404: no such model"),
        ({"detail": [{"loc": ["body"]}]}, 'HTTP 404: {"detail": [{"loc": ["body"]}]}'),
        (b"<h1>no\nsuch model</h1>", "HTTP 404: <h1>no such model</h1>"),
        ({"error": "\x1b[31mno \u202e\ud800"}, "HTTP 404: \ufffd[31mno \ufffd\ufffd"),
        (b"[" * 100_000, "HTTP 404: [[["),
        (b"", "HTTP 404: "),
    ],
    ids=lambda x: repr(x)[:60],
)
def test_a_refusal_is_shown_in_the_servers_own_words(
    llama: Path, server: Server, content: Any, said: str
) -> None:
    server.answer = lambda body: Sent(404, content)
    with pytest.raises(EvaluationError, match=re.escape(said)):
        answers(llama, server.url, (1,))


@pytest.mark.parametrize("models", [None, [None], [{}], [{"id": None}], [{"name": "tiny"}], "tiny"])
def test_models_without_an_id_are_one_sentence(llama: Path, server: Server, models: Any) -> None:
    server.models = models
    with pytest.raises(EvaluationError, match="expected a list of models, each with an id, given"):
        opened(llama, server.url)


def test_a_proxy_is_named_and_this_machine_is_reached_without_it(
    llama: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    for host in ("127.0.0.1", "localhost"):
        assert answers(llama, server.url.replace("127.0.0.1", host), (1,))
    with pytest.raises(EvaluationError, match=r"through the proxy http://127\.0\.0\.1:9\)") as said:
        opened(llama, "http://models.invalid:8000")
    assert "secret" not in str(said.value)
    monkeypatch.setenv("http_proxy", server.url)  # which answers as a proxy that refuses
    with pytest.raises(EvaluationError, match=rf"HTTP 404 through the proxy {server.url}: "):
        opened(llama, "http://models.invalid:8000")
    assert server.paths[-1].startswith("http://models.invalid:8000/")
    monkeypatch.setenv("http_proxy", "socks9://127.0.0.1:9")
    with pytest.raises(EvaluationError, match="the proxy cannot be used"):
        opened(llama, "http://models.invalid:8000")
    monkeypatch.setenv("no_proxy", "models.invalid")
    with pytest.raises(EvaluationError, match=r"no answer \((?!.*proxy)"):
        opened(llama, "http://models.invalid:8000")
