"""With which axis or precision a departure goes away: what is tried, and what is said of it."""

import pytest

from mcore_sft import config
from nightly import narrow

FULL = (
    *("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual=2"),
    *("parallel.context=2", "parallel.distributed_optimizer=true", "parallel.overlap=true"),
)
EVERY = [
    "sequence parallelism",
    "tensor parallelism",
    "interleaving",
    "pipeline parallelism",
    "context parallelism",
    "overlap",
    "the distributed optimizer",
    "data parallelism",
]


def departed(*overrides, processes=1):
    overrides = ("train.precision=fp32", "parallel.tensor=1", "parallel.sequence=false", *overrides)
    loaded = config.load("configs/demo.yaml", overrides)
    return narrow.Departed(config=loaded, processes=processes)


def narrowed(run, *faults, crashes=()):
    """What is said where a run departs as long as each of `faults` is on, and what was tried."""
    tried = []

    def departs(trial):
        tried.append(trial.name)
        loaded = config.load("configs/demo.yaml", [*overrides_of(run), *trial.overrides])
        if trial.name in crashes:
            return "exit code 1"
        return all(is_on(fault, loaded, trial.processes) for fault in faults)

    return narrow.narrowed(run, departs), tried


def overrides_of(run):
    sections = {"parallel": run.config.parallel, "train": run.config.train}
    return [
        f"{name}.{key}={str(value).lower()}"
        for name, section in sections.items()
        for key, value in section.model_dump().items()
        if value is not None
    ]


def is_on(fault, loaded, processes):
    parallel, train = loaded.parallel, loaded.train
    return {
        "sequence": parallel.sequence,
        "tensor": parallel.tensor > 1,
        "interleaving": parallel.virtual > 1,
        "pipeline": parallel.pipeline > 1,
        "context": parallel.context > 1,
        "overlap": parallel.overlap,
        "distributed optimizer": parallel.distributed_optimizer,
        "data": processes > parallel.model_size,
        "bf16": train.precision == "bf16",
        "fp8": train.fp8 != "none",
    }[fault]


def test_each_axis_is_off_alone_and_takes_the_same_packs():
    run = departed(*FULL, processes=16)
    assert [trial.name for trial in run.axes] == [f"without {axis}" for axis in EVERY]
    for trial in (*run.axes, run.alone):
        loaded = config.load("configs/demo.yaml", [*overrides_of(run), *trial.overrides])
        loaded.parallel.require_split(trial.processes, "processes", "")
        assert loaded.train.micro_batch == run.config.train.micro_batch
        assert loaded.train.global_batch == run.config.train.global_batch
    assert [trial.processes for trial in run.axes] == [16, 8, 16, 8, 8, 16, 16, 8]
    assert run.alone.processes == 1


@pytest.mark.parametrize(
    ("fault", "off"),
    [
        ("sequence", "without sequence parallelism, without tensor parallelism"),
        ("tensor", "without tensor parallelism"),
        ("interleaving", "without interleaving, without pipeline parallelism"),
        ("pipeline", "without pipeline parallelism"),
        ("context", "without context parallelism"),
        ("overlap", "without overlap"),
        ("distributed optimizer", "without the distributed optimizer"),
        ("data", "without data parallelism"),
    ],
)
def test_the_axis_at_fault_is_named(fault, off):
    told, _ = narrowed(departed(*FULL, processes=16), fault)
    away, stays = told.split("; ")
    assert away == f"goes away in one process, {off}"
    assert len(away.split(", ")) + len(stays.split(", ")) == 1 + len(EVERY)


def test_axes_that_are_at_fault_together_are_both_named():
    told, _ = narrowed(departed(*FULL, processes=16), "sequence", "context")
    assert told.startswith(
        "goes away in one process, without sequence parallelism, without tensor parallelism, "
        "without context parallelism; stays"
    )


def test_a_layout_is_not_taken_apart_where_one_process_departs_too():
    assert narrowed(departed(*FULL, processes=16)) == ("stays in one process", ["in one process"])


def test_a_layout_is_taken_apart_where_one_process_is_too_few():
    run = departed("parallel.tensor=2", processes=4)
    assert narrowed(run, "tensor", crashes=("in one process",))[0] == (
        "goes away without tensor parallelism; stays without data parallelism; crashes in one "
        "process (exit code 1)"
    )


def test_of_one_axis_nothing_is_to_be_taken_apart():
    run = departed(processes=2)
    assert narrowed(run, "data") == (
        "goes away without data parallelism",
        ["without data parallelism"],
    )


def test_the_precision_at_fault_is_named():
    rough = ("train.precision=bf16", "train.fp8=tensorwise", "train.fp8_bf16_ends=1")
    assert narrowed(departed(*rough), "fp8")[0] == "goes away in bf16, in fp32"
    assert narrowed(departed(*rough), "bf16")[0] == "goes away in fp32; stays in bf16"
    told = narrowed(departed("train.precision=bf16", processes=2), "bf16")[0]
    assert told == "goes away in fp32; stays without data parallelism"


def test_layout_and_precision_are_tried_together_where_neither_is_at_fault_alone():
    run = departed("train.precision=bf16", processes=2)
    assert narrowed(run)[0] == "stays without data parallelism, in fp32, in one process and fp32"


def test_one_process_in_fp32_has_nothing_to_be_without():
    assert narrowed(departed()) == ("it runs in one process and in fp32 already", [])
