"""A Python whose vllm is not vLLM: it counts on from the last token of a prompt.

The engine's process, its pipes and its end are the real ones. A prompt that begins with `FAIL`
breaks it, one that begins with `HANG` is never answered, and `BLOCK` stops all that it does.
"""

import sys
from pathlib import Path

FAIL, HANG, BLOCK = 299, 298, 297

_VLLM = '''
import subprocess, sys, time
from types import SimpleNamespace as Some

def EngineArgs(**settings):
    print(sorted(settings.items()), file=sys.stderr)
    print("this is not an answer")
    return settings

def SamplingParams(**params):
    return params

class LLMEngine:
    def __init__(self):
        self.child = subprocess.Popen(["sleep", "600"])
        self.waiting = []
        self.engine_core = self

    @classmethod
    def from_engine_args(cls, settings):
        return cls()

    def shutdown(self):
        print("shut down", file=sys.stderr)

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def add_request(self, name, prompt, params):
        assert params["ignore_eos"] and not params["detokenize"]
        self.waiting.append((name, prompt["prompt_token_ids"], params))

    def step(self):
        """Answer the newest that waits."""
        name, ids, params = self.waiting[-1]
        if ids[0] == FAIL:
            raise RuntimeError("no memory is left")
        if ids[0] == HANG:
            time.sleep(0.01)
            return []
        if ids[0] == BLOCK:
            time.sleep(600)
        del self.waiting[-1]
        written = []
        while len(written) < params["max_tokens"]:
            written.append(ids[-1] + 1 + len(written))
            if written[-1] in params["stop_token_ids"]:
                break
        stopped = written[-1] in params["stop_token_ids"]
        answer = Some(token_ids=written, finish_reason="stop" if stopped else "length")
        return [Some(request_id=name, finished=True, outputs=[answer])]
'''

_BOOT = """
import runpy, sys
isolated, script = sys.argv.pop(1), sys.argv.pop(1)
assert isolated == "-I"
sys.path[0] = {packages!r}
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def make_python(folder: Path) -> Path:
    """An interpreter that finds this vllm, version 9.9."""
    packages = folder / "packages"
    files = {
        "vllm/__init__.py": f"FAIL, HANG, BLOCK = {FAIL}, {HANG}, {BLOCK}\n{_VLLM}",
        "vllm/platforms.py": "class current_platform:\n    is_cpu = staticmethod(lambda: True)\n",
        "vllm/sampling_params.py": "class RequestOutputKind:\n    FINAL_ONLY = 2\n",
        "vllm-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n",
    }
    for name, text in files.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)
    boot = folder / "boot.py"
    boot.write_text(_BOOT.format(packages=str(packages)))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{boot}" "$@"\n')
    python.chmod(0o755)
    return python
