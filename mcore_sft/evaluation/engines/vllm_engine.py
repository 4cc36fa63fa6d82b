"""The engine for whole benchmarks: vLLM, as a process under the interpreter of its environment.

    Requests  ->  JSON lines  ->  vllm_process.py  ->  JSON lines  ->  Completions

vLLM pins its own torch, so it is never imported here. The process loads the model when the first
request comes and serves until the engine is closed; it ends with this process in any case.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mcore_sft.base.dtypes import DTYPES
from mcore_sft.base.terminal import say
from mcore_sft.config import EvaluationConfig
from mcore_sft.evaluation.engines.engine import (
    Completion,
    Decode,
    Engine,
    Request,
    check_weights,
    completion,
)
from mcore_sft.evaluation.errors import EvaluationError

_SCRIPT = Path(__file__).with_name("vllm_process.py")
# What the environment says already stays. On a CPU vLLM would take nine tenths of all memory for
# keys and values (here GiB), want a NUMA node for each tensor-parallel rank, and spin where it
# waits; on a GPU the first three decide nothing.
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
}
_MEND = (
    "name the Python of an environment that holds vLLM (evaluation.vllm.python=PATH); "
    "`make vllm-cpu` makes one for CPUs, .venv-vllm/bin/python"
)
_END_SECONDS = 20.0
_FOLLOWERS_SECONDS = 2.0
_LAST_LINES = 20
_VERSIONS_SECONDS = 60.0
_SHOWN_CHARACTERS = 100


class VllmEngine(Engine):
    """A Hugging Face folder that vLLM answers for."""

    def __init__(
        self,
        folder: Path,
        config: EvaluationConfig,
        *,
        stop_ids: Collection[int],
        decode: Decode,
        log: Path | None = None,
    ) -> None:
        super().__init__(folder, config, stop_ids=stop_ids, decode=decode)
        check_weights(folder)
        self._log = log
        self._longest = 0
        self._python, self._versions = interpreter(config.vllm.python)
        self._process: _Process | None = None

    def close(self) -> None:
        """End vLLM, if it was started."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def check(self, requests: Sequence[Request]) -> None:
        """As every engine; the longest prompt that was checked decides vLLM's room."""
        super().check(requests)
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        self._longest = max(self._longest, longest)

    def _limits(self) -> Mapping[str, int | None]:
        return {"evaluation.vllm.max_model_len": self._config.vllm.max_model_len}

    def describe(self) -> dict[str, str]:
        """Versions in vLLM's environment."""
        return {"engine": "vllm", **self._versions}

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Answer all `requests`; what vLLM finishes in one step comes together."""
        self.check(requests)
        if not requests:
            return
        process = self._started()
        waiting = len(requests)
        try:
            process.ask(requests)
            while waiting:
                done = [self._completion(*answer) for answer in process.answers()]
                waiting -= len(done)
                yield done
        finally:
            if waiting:  # what is still being answered would be taken for the next call's
                self.close()

    def _started(self) -> "_Process":
        """The process, with room for the longest prompt and its answer."""
        room = self._config.vllm.max_model_len or self._longest + self._config.max_new_tokens
        if self._process is not None and self._process.room < room:
            self.close()
        if self._process is None:
            settings = {
                "model": str(self._folder.absolute()),
                "dtype": DTYPES[self._config.precision].torch,
                "tensor_parallel_size": self._config.vllm.tensor_parallel,
                "gpu_memory_utilization": self._config.vllm.gpu_memory_utilization,
                "max_model_len": room,
                "max_tokens": self._config.max_new_tokens,
                "stop_ids": sorted(self._stop_ids),
            }
            self._process = _Process(self._python, settings, self._log)
            say(
                f"vllm {self._versions['vllm']} loads {self._folder}; "
                f"its log is {self._process.log}",
                error=True,
            )
        return self._process

    def _completion(self, index: int, tokens: list[int], reason: str) -> Completion:
        if reason not in ("stop", "length"):
            raise EvaluationError(
                f"vllm ended an answer with {reason!r}, expected 'stop' or 'length'; "
                f"see its log: {self._process.log if self._process else ''}"
            )
        return completion(
            index,
            tokens,
            "stop" if reason == "stop" else "length",
            stop_ids=self._stop_ids,
            decode=self._decode,
        )


class _Process:
    """One run of vllm_process.py, the first of a process group of its own."""

    def __init__(self, python: Path, settings: Mapping[str, Any], log: Path | None) -> None:
        self.room: int = settings["max_model_len"]
        self._keep_log = log is not None
        if log is None:
            handle, name = tempfile.mkstemp(prefix="mcore_sft_vllm_", suffix=".log")
            os.close(handle)
            log = Path(name)
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                _command(python),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=_ENVIRONMENT | os.environ,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._say([settings])

    def ask(self, requests: Sequence[Request]) -> None:
        """Send `requests`, all at once: the process reads them while it loads and answers."""
        self._say([[r.index, r.prompt_ids, r.temperature, r.top_p, r.seed] for r in requests])

    def answers(self) -> list[Any]:
        """The next [index, tokens, finish reason] that are done; waits for one at least."""
        line = self._out.readline()
        if not line.endswith("\n"):
            self._fail()
        answers: list[Any] = json.loads(line)
        return answers

    def end(self) -> None:
        """End the process and all that it has started."""
        with suppress(BrokenPipeError):
            self._in.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
                self._wait_for_followers()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._out.close()
        if not self._keep_log:
            self.log.unlink(missing_ok=True)

    def _wait_for_followers(self) -> None:
        """Leave what the process has started a moment to free shared memory."""
        end = time.monotonic() + _FOLLOWERS_SECONDS
        with suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(self._process.pid, 0)
                time.sleep(0.02)

    def _say(self, what: Sequence[Any]) -> None:
        try:
            self._in.writelines(json.dumps(one) + "\n" for one in what)
            self._in.flush()
        except BrokenPipeError:
            self._fail()

    def _fail(self) -> NoReturn:
        self._keep_log = True
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        code = self._process.returncode
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise EvaluationError(
            f"vllm ended early ({how}); its log is {self.log}, which ends:\n"
            + "\n".join(lines[-_LAST_LINES:])
        )


def interpreter(python: Path | None) -> tuple[Path, dict[str, str]]:
    """The interpreter with vLLM, and the versions that it has."""
    if python is None:
        raise EvaluationError(f"evaluation.engine is vllm, but not whose Python runs it; {_MEND}")
    where = f"evaluation.vllm.python {python}"
    try:
        # not resolved: where a link lies is what tells Python its environment
        run = subprocess.run(
            [*_command(python), "--versions"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_VERSIONS_SECONDS,
        )
    except OSError as error:
        raise EvaluationError(f"{where}: {error.strerror or error}; {_MEND}") from None
    except subprocess.TimeoutExpired:
        raise EvaluationError(
            f"{where}: it did not say its versions within {_VERSIONS_SECONDS:g} s; {_MEND}"
        ) from None
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise EvaluationError(f"{where}: {reason}; {_MEND}")
    try:
        versions = json.loads(run.stdout)
        if not isinstance(versions, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise EvaluationError(
            f"{where}: it is no Python, or says more than it is asked "
            f"({run.stdout[:_SHOWN_CHARACTERS]!r}); {_MEND}"
        ) from None
    if "vllm" not in versions:
        raise EvaluationError(f"{where}: has no vLLM; {_MEND}")
    return python, versions


def _command(python: Path) -> list[str]:
    """Isolated, so that neither PYTHONPATH nor the folder of the script hides a module of vLLM's
    environment."""
    return [str(python.absolute()), "-I", str(_SCRIPT)]
