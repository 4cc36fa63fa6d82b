import json
from pathlib import Path

import pytest
import yaml

from mcore_sft import config
from mcore_sft.config import ConfigError

TREE = {"name": "x", "model": {"path": "base"}, "data": {"train": [{"path": "a.jsonl"}]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1", "unknown key optim; did you mean optimizer?"),
        ("optimizer.lrr=1", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
        (
            "data.filters.remove_code_errors=true",
            "unknown key data.filters.remove_code_errors; use filters.drop_if_contains",
        ),
        ("data.train.0.pth=b", "unknown key data.train.0.pth; did you mean data.train.path?"),
        ("train.steps=true", "train.steps: input should be a valid integer, given True"),
        ("train.steps=1.5", "train.steps: input should be a valid integer, given 1.5"),
        ("train.steps='10'", "train.steps: input should be a valid integer, given '10'"),
        ("train.steps=0", "train.steps: input should be greater than or equal to 1, given 0"),
        (
            "optimizer.schedule=cos",
            "schedule: input should be 'constant', 'linear', 'cosine' or 'wsd', given 'cos'",
        ),
        ("parallel.sequence=true", "sequence: true needs tensor of at least 2, given 1"),
        ("parallel.virtual=2", "virtual: 2 needs pipeline of at least 2, given 1"),
        ("train.fp8_bf16_ends=1", "needs fp8: tensorwise or blockwise, given none"),
        (
            "train={fp8: delayed, recompute: full}",
            "takes new scales for each layer that it computes again (got both, expected one",
        ),
        ("data.seed=-1", "data.seed: input should be greater than or equal to 0, given -1"),
        (f"data.holdout.seed={2**63}", "data.holdout.seed: input should be less than 92233"),
        ("data.filters.random_seed=-1", "data.filters.random_seed: input should be greater"),
        (f"train.seed={10**30}", "train.seed: input should be less than 9223372036854775808"),
        (
            "data.sequence_length=16777217",
            "data.sequence_length: input should be less than or equal to 16777216",
        ),
        ("data.workers=1025", "data.workers: input should be less than or equal to 1024"),
        ("optimizer.warmup_steps=1001", "optimizer.warmup_steps 1001 is more than train.steps"),
        ("optimizer.min_lr=1", "min_lr 1.0 is above lr 2e-05"),
        ("optimizer.min_lr=1e-6", "min_lr: 1e-06 has no effect without schedule: linear, cosine"),
        ("optimizer.decay_ratio=0.2", "decay_ratio: 0.2 has no effect without schedule: wsd"),
        ("optimizer={warmup_steps: 3, warmup_ratio: 0.1}", "are two lengths of the warmup"),
        (
            "optimizer={schedule: wsd, warmup_ratio: 0.5, decay_ratio: 0.6}",
            "optimizer.decay_ratio 0.6 of train.steps 1000 begins within the warmup of 500 steps",
        ),
        ("data.filters.max_problem_length=9", "no effect without remove_len_outlier_problems"),
        ("data.filters.min_solution_length=9", "no effect without remove_len_outlier_solutions"),
        ("data.filters.use_chars_for_min_length=true", "without remove_len_outlier_solutions"),
        ("data.filters.min_majority_votes=3", "3 has no effect without majority_filter"),
        ("data.filters.contamination_file=a", "a has no effect without remove_contaminated"),
        ("data.contamination.threshold=0.5", "threshold: 0.5 has no effect without against"),
        ("data.max_bad_rows=5", "max_bad_rows: 5 has no effect without on_bad_row: skip"),
        ("data.train.0={path: a, messages: m, problem: p}", "messages, or problem and solution"),
        ("data.train.0.problem=''", "data.train.0.problem: string should have at least 1 charac"),
        ("a." * 600 + "b=1", "a key of 601 levels is not known"),
        ("prompt=" + "[" * 900 + "]" * 900, "nested too deeply"),
        ("prompt=&a [*a]", "nested too deeply"),
        ("train.steps=" + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("train.validate_every=5", "data.validation names no source"),
        ("checkpoint.keep_every=5", "keep_every 5 is no multiple of checkpoint.every 0, and only"),
        ("checkpoint={every: 2, keep_every: 5}", "keep_every 5 is no multiple of checkpoint.every"),
        ("checkpoint.best=3", "checkpoint.every 0 is no multiple of train.validate_every 0"),
        ("train.evaluate_every=5", "5 is no multiple of checkpoint.every 0, and only checkpoints"),
        ("log.profile=[3, 2]", "profile [3, 2]: the first step is after the last"),
        ("log.profile=[1001, 1002]", "begins after the last step, train.steps 1000"),
        ("data.train.1.path=b", "expected an index below 1, given '1'"),
        ("steps", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(TREE, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.evaluate_every=30"], "evaluate_every 30 is no multiple of checkpoint.every 20"),
        (["evaluation.engine=server"], "given server, which answers with the model that it serves"),
        (["evaluation.benchmarks=[]"], "needs a benchmark among evaluation.benchmarks, given none"),
        (
            ["train.evaluate_benchmark=gsm"],
            "needs gsm among evaluation.benchmarks, given math, gsm8k",
        ),
        (
            ["train.evaluate_every=0", "checkpoint.best=2", "checkpoint.metric=accuracy"],
            "checkpoint.metric accuracy needs train.evaluate_every, given 0",
        ),
        (["checkpoint.best=2"], "checkpoint.every 20 is no multiple of train.validate_every 0"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(TREE, [*EVALUATED, *overrides])
    assert message in str(error.value)


EVALUATED = [
    "train.evaluate_every=40",
    "checkpoint.every=20",
    "evaluation.benchmarks=[{name: math}, {name: gsm8k}]",
]


def test_what_is_evaluated() -> None:
    assert config.parse(TREE, EVALUATED).watched.name == "math"
    named = config.parse(TREE, [*EVALUATED, "train.evaluate_benchmark=gsm8k"])
    assert named.watched.name == "gsm8k"


def test_overrides_are_typed() -> None:
    changes = ["optimizer.lr=1e-5", "data.train.0.limit=5", "prompt.instruction=null"]
    parsed = config.parse(TREE, changes)
    assert parsed.optimizer.lr == 1e-5
    assert parsed.data.train[0].limit == 5
    assert parsed.prompt.instruction is None
    assert parsed.packed == Path("results/x/data")


def test_a_dump_is_read_back() -> None:
    parsed = config.parse(TREE, ["optimizer.betas=[0.8, 0.99]", "output=/elsewhere"])
    assert config.parse(yaml.safe_load(config.dump(parsed))) == parsed


def test_a_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: required, but not given"):
        config.parse({"name": "x", "model": {}})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        config.load(tmp_path / "nowhere.yaml")


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("name: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: x\nname: y\nmodel: {path: m}\n", "line 1: the key name stands twice"),
        ("name: caf\xe9\n".encode("latin-1"), "not UTF-8 text"),
        (b"", "expected keys and values"),
    ],
)
def test_a_file_that_says_something_else_than_it_seems_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        config.load(file)


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_experiments_are_valid(file: Path) -> None:
    config.load(file)


def test_the_shipped_schema_is_current() -> None:
    shipped = json.loads(Path("configs/schema.json").read_text(encoding="utf-8"))
    assert shipped == config.schema(), "run: python -m mcore_sft.config > configs/schema.json"


def test_the_schema_describes_every_key() -> None:
    schema = config.schema()
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        for name, field in section.get("properties", {}).items():
            section_of_its_own = "$ref" in field or name in config.RunConfig.model_fields
            assert "description" in field or section_of_its_own, name


def test_a_file_that_is_nested_without_end_is_one_sentence(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("name: " + "{a: " * 600 + "1" + "}" * 600)
    with pytest.raises(ConfigError, match=r"x\.yaml: nested too deeply"):
        config.load(file)


def test_nothing_stands_around_a_problem_that_is_not_asked_for():
    prompt = config.parse(TREE).prompt
    assert (prompt.template, prompt.instruction, prompt.system) == (None, None, None)
