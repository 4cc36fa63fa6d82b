"""A Hugging Face folder in, solutions, a score and a report out.

python tools/evaluate.py --model DIR --benchmark math            one greedy answer a problem
python tools/evaluate.py --model DIR --benchmark math:8          and 8 sampled ones
python tools/evaluate.py --model DIR --benchmark math --benchmark gsm8k
python tools/evaluate.py --model DIR --config configs/X.yaml evaluation.max_new_tokens=512
"""

import argparse
import datetime
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from mcore_sft import command
from mcore_sft import config as configuration
from mcore_sft.base.terminal import say
from mcore_sft.config import BenchmarkConfig, EvaluationConfig, PlaceOrName, Section
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.evaluation import benchmarks
from mcore_sft.evaluation.engines.engine import model_shape
from mcore_sft.evaluation.errors import EvaluationError
from mcore_sft.evaluation.run import PAGE, Evaluation, evaluate
from mcore_sft.evaluation.trained_prompt import Asked, choose


class PromptChange(Section):
    """What overrides say of the prompt; what they leave unsaid is the model's own."""

    template: PlaceOrName | None = None
    instruction: PlaceOrName | None = None
    system: str | None = None
    variables: dict[str, JsonValue] | None = None
    date: datetime.date | None = None


class Alone(Section):
    """What can be told without an experiment file."""

    evaluation: EvaluationConfig = EvaluationConfig()
    prompt: PromptChange | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked, how, and where relative paths of benchmarks start."""

    evaluation: EvaluationConfig
    prompt: Asked
    root: Path


def main() -> None:
    """Evaluate as the command line says."""
    arguments = _arguments()
    plan = _plan(arguments)
    asked = _benchmarks(arguments, plan)
    model_shape(arguments.model)  # a folder that holds no model is said before anything is loaded
    tokenizer = load_tokenizer(arguments.model, option="copy those of the model's tokenizer there")
    chosen = choose(arguments.model, tokenizer, plan.prompt)
    say(chosen.why)
    evaluations = [
        Evaluation(
            model=arguments.model,
            benchmark=benchmarks.load(entry, plan.root),
            prompt=chosen.prompt,
            tokenizer=tokenizer,
            config=plan.evaluation,
            output=_output(arguments, entry.name, len(asked)),
            samples=entry.samples,
        )
        for entry in asked
    ]
    evaluate(evaluations, _tell)


def _tell(evaluation: Evaluation, report: dict[str, Any]) -> None:
    output = evaluation.output
    say(report["text"])
    say(f"answers, verdicts and report are in {output}; look at {output / PAGE}")


def _arguments() -> argparse.Namespace:
    parser = command.parser("Grade a Hugging Face folder.", config_required=False)
    parser.add_argument("--model", type=command.path, metavar="DIR", help="what is graded (needed)")
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="NAME",
        help="math, math-500, gsm8k, ...; math:8 for 8 samples; may be given several times",
    )
    parser.add_argument(
        "--data", type=command.path, metavar="FILE", help="JSON lines that hold the benchmark"
    )
    parser.add_argument(
        "--output",
        type=command.path,
        metavar="DIR",
        help="default MODEL/evaluation/NAME; where several are asked, DIR/NAME",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N problems only")
    arguments = parser.parse_intermixed_args()
    if not (arguments.model or arguments.print_config):
        parser.error("the following arguments are required: --model")
    return arguments


def _plan(arguments: argparse.Namespace) -> Plan:
    configured, root = None, Path(".")
    if arguments.config:
        run = command.experiment(arguments)
        of_prompt = [said for said in arguments.overrides if re.match(r"prompt[.=]", said)]
        given = configuration.parse_section(Alone, {}, of_prompt)
        evaluation, root, configured = run.evaluation, run.data.root, run.prompt
    else:
        given = configuration.parse_section(Alone, {}, arguments.overrides)
        if arguments.print_config:
            say(configuration.dump(given), end="")
            raise SystemExit(0)
        assert isinstance(given, Alone)
        evaluation = given.evaluation
    keys = given.model_dump(exclude_unset=True).get("prompt") or {}
    return Plan(evaluation=evaluation, prompt=Asked(keys=keys, configured=configured), root=root)


def _benchmarks(arguments: argparse.Namespace, plan: Plan) -> tuple[BenchmarkConfig, ...]:
    configured = plan.evaluation.benchmarks
    if arguments.benchmark:
        configured = tuple(_entry(named, configured) for named in arguments.benchmark)
    if not configured:
        known = ", ".join(benchmarks.shipped())
        raise EvaluationError(f"no benchmark is named; give --benchmark NAME, such as {known}")
    names = [entry.name for entry in configured]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EvaluationError(
            f"benchmark {twice} is named {names.count(twice)} times, and its answers have one "
            f"folder; name it once (--benchmark {twice}:8), or give other problems another name"
        )
    changes: dict[str, str | int] = {}
    if arguments.data:
        if len(configured) > 1:
            raise EvaluationError("--data holds one benchmark; say which with --benchmark NAME")
        # relative to where the command runs, as every path on a command line is
        changes["path"] = str(arguments.data.absolute())
    if arguments.limit is not None:
        if arguments.limit < 1:
            raise EvaluationError(f"--limit {arguments.limit}: expected at least 1")
        changes["limit"] = arguments.limit
    return tuple(entry.model_copy(update=changes) for entry in configured)


def _entry(named: str, configured: tuple[BenchmarkConfig, ...]) -> BenchmarkConfig:
    """What the configuration says of the benchmark that --benchmark names."""
    name, samples = _named(named)
    entry = next((entry for entry in configured if entry.name == name), BenchmarkConfig(name=name))
    return entry if samples is None else entry.model_copy(update={"samples": samples})


def _named(benchmark: str) -> tuple[str, int | None]:
    """`math:8` is 8 samples beside the greedy answer, `math:0` none; `math` leaves it open."""
    name, colon, samples = benchmark.partition(":")
    if not colon:
        return name, None
    if not re.fullmatch(r"\d{1,6}", samples):
        raise EvaluationError(
            f"--benchmark {benchmark}: expected NAME or NAME:SAMPLES, such as math:8"
        )
    return name, int(samples)


def _output(arguments: argparse.Namespace, benchmark: str, count: int) -> Path:
    if arguments.output is None:
        folder: Path = arguments.model / "evaluation" / benchmark
        return folder
    given: Path = arguments.output
    return given if count == 1 else given / benchmark


if __name__ == "__main__":
    command.run(main)
