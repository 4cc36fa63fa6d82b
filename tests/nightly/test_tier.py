"""The tiers that we ship load, and one that cannot be run is an error before anything runs."""

import json

import pytest

from mcore_sft import config
from mcore_sft.config import ConfigError
from mcore_sft.training.beside.metrics import FILE
from nightly import curve, golden, tier

SHIPPED = sorted(path.stem for path in tier.FOLDER.glob("*.yaml"))


def write(tmp_path, **changes):
    benchmark = {
        "name": "short",
        "inputs": "demo",
        "config": "configs/demo.yaml",
        "against": "plain",
        "gates": {"loss": {"1": 1e-6, "20": 1e-4}},
    }
    tree = {
        "name": "night",
        "minutes": 5,
        "inputs": {"demo": {"commands": ["true"]}},
        "benchmarks": [benchmark | changes],
    }
    path = tmp_path / "night.yaml"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_every_experiment_of_a_shipped_tier_loads(name):
    shipped = tier.named(name)
    assert shipped.name == name
    for benchmark in shipped.benchmarks:
        overrides = [x.format(work="/work", data="/data") for x in benchmark.overrides]
        loaded = config.load(benchmark.config, overrides)
        loaded.parallel.require_split(benchmark.processes, "processes", "change the tier")
        gates = benchmark.gates
        measured = loaded.train.validate_every
        assert measured or (gates.validation_loss is None and gates.validation_below is None)
        assert loaded.checkpoint.every or not gates.resume
        assert loaded.evaluation.benchmarks or not benchmark.evaluate
        kept = golden.FOLDER / f"{benchmark.name}.json"
        assert kept.exists() or benchmark.against != tier.GOLDEN
        last = loaded.train.steps
        for steps in (gates.loss, gates.grad_norm, gates.loss_below):
            assert all(step <= last for step in steps or {})


def test_tiers_are_those_of_the_issue():
    assert SHIPPED == ["cluster", "cpu", "gpu1"]


def test_the_cluster_is_held_to_what_is_published_of_the_experiment():
    cluster = tier.named("cluster")
    asked = {}
    for benchmark in cluster.benchmarks:
        loaded = config.load(benchmark.config, benchmark.overrides)
        asked[benchmark.name] = (
            loaded.train.steps,
            loaded.evaluation.benchmarks[0].name,
            benchmark.gates.accuracy,
            benchmark.gates.loss_below,
            benchmark.gates.step_seconds,
        )
    million = (1855, "math-500", 0.502, {1: 0.6, 250: 0.36}, 6)
    assert asked == {
        "openmathinstruct2_1m": million,
        "openmathinstruct2_1m_fp8": million,
        "openmathinstruct2": (16000, "math", 0.59, {}, None),
    }


def test_steps_of_a_gate_are_numbers_in_the_order_of_the_file(tmp_path):
    gates = tier.read(write(tmp_path)).benchmarks[0].gates
    assert list(gates.loss.items()) == [(1, 1e-6), (20, 1e-4)]
    assert gates.grad_norm is None
    assert gates.loss_below == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gate": {}}, r"night\.yaml: unknown key benchmarks\.0\.gate; did you mean .*gates"),
        ({"gates": {"lost": {}}}, "unknown key benchmarks.0.gates.lost; did you mean .*loss"),
        ({"gates": {"loss": {}}}, "expected steps and tolerances"),
        ({"gates": {"loss": {"20": 0.1, "1": 0.1}}}, "expected rising steps, given 20, 1"),
        ({"gates": {"loss": {"0": 0.1}}}, "greater than or equal to 1"),
        ({"against": None}, "need against, given none"),
        ({"against": "shorter"}, "short: against shorter, expected one of plain, golden"),
        ({"against": "short"}, "against short, expected one of plain, golden$"),
        ({"inputs": "math"}, "short: inputs math, expected one of demo"),
        ({"name": "plain"}, "the name is taken"),
        ({"name": "two words"}, "string should match pattern"),
        ({"gates": {"accuracy": 0.5}}, "accuracy needs evaluate: true"),
        ({"against": None, "gates": {"speed": 2}}, "speed needs peer_steps or against: plain"),
        (
            {"gates": {"loss": {"1": float("nan")}}},
            "should be a valid number, given 'NaN'$",
        ),
    ],
)
def test_a_tier_that_cannot_be_run_is_an_error(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        tier.read(write(tmp_path, **changes))


def test_speed_needs_a_peer_that_either_way_brings(tmp_path):
    for changes in ({}, {"against": None, "peer_steps": 5}):
        tier.read(write(tmp_path, gates={"speed": 2}, **changes))


def test_an_unknown_tier_or_benchmark_names_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"no tier gpu .* expected one of cluster, cpu, gpu1"):
        tier.named("gpu")
    with pytest.raises(ConfigError, match="no benchmark long; expected one of short"):
        tier.read(write(tmp_path)).benchmark("long")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        tier.read(tmp_path / "none.yaml")
    (tmp_path / "night.yaml").write_text("{name: night, minutes: 1, benchmarks: []}")
    with pytest.raises(ConfigError, match="expected at least one"):
        tier.read(tmp_path / "night.yaml")


def test_curves_are_read_from_where_training_writes_them():
    assert curve.METRICS == FILE
