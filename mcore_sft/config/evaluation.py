"""How a model is asked and graded."""

from typing import Annotated, Literal

from pydantic import Field

from mcore_sft.config.section import Count, CountOrZero, Place, PlaceOrName, Positive, Section, Seed

Policy = Literal["last_box", "nemo_skills", "nemo_rl", "gsm8k", "final_answer"]
"""Which part of a response counts as its answer; evaluation/grading/extract says how."""


class BenchmarkConfig(Section):
    """Problems with known answers."""

    name: str
    """A shipped benchmark, or any name if `path` is given."""
    path: PlaceOrName | None = None
    """JSON lines that hold it; without it, the shipped benchmark's own dataset."""
    problem: str | None = None
    """Column that holds the problem; without it, the benchmark's own."""
    answer: str | None = None
    """Column that holds the right answer; without it, the benchmark's own."""
    limit: Count | None = None
    """Ask the first so many problems and no more."""
    samples: CountOrZero = 0
    """Sampled answers of each problem, beside the greedy one: `math:8` of NeMo-Skills is 8."""


class VllmConfig(Section):
    """vLLM, which runs under an interpreter of its own: it pins its torch."""

    python: Place | None = None
    """Interpreter of an environment that holds vLLM, such as .venv-vllm/bin/python, which
    `make vllm-cpu` makes for CPUs."""
    tensor_parallel: Count = 1
    """GPUs that share the model."""
    max_model_len: Count | None = None
    """Longest prompt and answer together, in tokens; without it, what the problems asked need."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that weights and the cache of keys and values may take."""


class ServerConfig(Section):
    """A running server that speaks the OpenAI completions API, such as `vllm serve`."""

    url: Annotated[str, Field(pattern="^https?://")] | None = None
    """Its address, such as http://127.0.0.1:8000."""
    model: str | None = None
    """What it calls the model; without it, the only one it serves."""
    concurrency: Count = 64
    """Requests that wait for it at the same time."""
    api_key_variable: str | None = None
    """Environment variable that holds the API key, where it wants one."""


class EvaluationConfig(Section):
    """How a model is asked and graded."""

    engine: Literal["transformers", "vllm", "server"] = "transformers"
    """What generates the answers; never anything else in its place."""
    vllm: VllmConfig = VllmConfig()
    """Settings of the vllm engine."""
    server: ServerConfig = ServerConfig()
    """Settings of the server engine."""
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """What is asked."""
    max_new_tokens: Count = 2048
    """Longest answer, in tokens."""
    greedy: bool = True
    """Ask each problem once without chance; false leaves the sampled answers alone."""
    temperature: Positive = 0.7
    """Temperature of the sampled answers."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus of the sampled answers; 1 is all."""
    seed: Seed = 42
    """Seed of the sampled answers."""
    few_shot: CountOrZero = 0
    """Solved examples that stand before each problem."""
    few_shot_examples: PlaceOrName = "math"
    """Where they come from: a shipped name, or a YAML file."""
    batch_size: Count = 32
    """Problems generated side by side."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Weights while generating."""
    policy: Policy = "last_box"
    """Which part of a response counts as its answer."""
    timeout: Positive = 10.0
    """Seconds of processor time that grading one answer may take."""
    second_opinion: bool = True
    """Ask math-verify by itself too, and list the answers that it would count otherwise."""
