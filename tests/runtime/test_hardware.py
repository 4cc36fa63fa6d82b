from pathlib import Path

import pytest
import torch

from mcore_sft.runtime import hardware
from tests import runs


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_the_peak_of_a_device(
    monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = hardware.peak_flops(torch.device("cuda", 0))
    assert peak == (tflops and 1e12 * tflops)
    assert hardware.peak_flops(torch.device("cpu")) is None


def test_a_deterministic_run_has_the_bits_of_any_on_a_cpu(
    model: Path, reference_run: list[dict[str, float]], tmp_path: Path
) -> None:
    changes = {"train__steps": 2, "train__deterministic": True}
    lines = runs.train(runs.experiment(tmp_path / "run", model, **changes))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == [line[key] for line in reference_run[:2]]
