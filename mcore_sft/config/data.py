"""What is read, which of it is kept, and how it becomes text and packs."""

import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from mcore_sft.config.section import (
    Count,
    CountOrZero,
    Fraction,
    Name,
    Place,
    PlaceOrName,
    Section,
    Seed,
)


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
    variables: dict[str, JsonValue] = {}  # noqa: RUF012 (pydantic copies it)
    """What a chat template asks for by name, such as `enable_thinking: false`; an exported model
    keeps it."""
    date: datetime.date | None = None
    """Date that a chat template gets when it asks for today's; an exported model keeps it. Without
    it, a template that needs no date gets none."""

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
    r"""Drop solutions with two `\boxed{...}`; `balanced` pairs braces and skips empty boxes."""
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
