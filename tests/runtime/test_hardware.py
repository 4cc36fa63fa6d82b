import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from mcore_sft.config import ConfigError, ModelConfig, TrainConfig
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


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("fp8", "capability", "cuda", "refusal"),
    [
        ("none", (8, 0), "13.0", None),
        ("delayed", (8, 0), "13.0", "train.fp8: delayed needs compute capability 8.9 or newer"),
        ("tensorwise", (8, 6), "13.0", "the GPU has compute capability 8.6"),
        ("tensorwise", (8, 9), "12.6", None),
        ("delayed", (9, 0), "12.6", None),
        ("blockwise", (8, 9), "13.0", "needs compute capability 9.0 or newer"),
        ("blockwise", (9, 0), "12.8", "blockwise needs CUDA 12.9 or newer"),
        ("blockwise", (9, 0), "12.9", None),
        ("blockwise", (10, 0), "13.0", None),
    ],
)
def test_eight_bits_take_a_gpu_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
    fp8: str,
    capability: tuple[int, int],
    cuda: str,
    refusal: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(hardware, "check_transformer_engine", lambda: None)
    settings, train = ModelConfig(path=Path()), TrainConfig(fp8=fp8)
    if refusal is None:
        assert hardware.layer_implementation(settings, train, GPU) == "transformer_engine"
        return
    with pytest.raises(ConfigError, match=refusal) as refused:
        hardware.layer_implementation(settings, train, GPU)
    assert "python tools/doctor.py --config" in str(refused.value)


@pytest.mark.parametrize(
    ("versions", "broken", "refusal"),
    [
        ({"": "2.11.0", "-cu13": "2.11.0"}, None, None),
        ({"": "2.9.0+a1b2c3d"}, None, None),  # built from its source
        ({}, None, "Transformer Engine is not installed"),
        ({"": "2.8.0", "-cu13": "2.8.0"}, None, "Transformer Engine is 2.8.0"),
        ({"": "2.99.0", "-cu13": "2.99.0"}, None, "Transformer Engine is 2.99.0"),
        ({"": "2.11.0", "-cu12": "2.11.0"}, None, "is built for cu12, and torch for cu13"),
        ({"": "2.11.0", "-cu12": "2.11.0", "-cu13": "2.11.0"}, None, "cu12 and cu13, and torch"),
        ({"": "2.11.0"}, "OSError: no libcudnn", r"2.11.0 cannot be imported \(OSError: no libcu"),
    ],
)
def test_the_transformer_engine_fits_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], broken: str | None, refusal: str
) -> None:
    found = {f"transformer-engine{part}": version for part, version in versions.items()}
    monkeypatch.setattr(hardware.installed, "version", found.get)
    monkeypatch.setattr(hardware.installed, "import_error", lambda package: broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    settings, train = ModelConfig(path=Path()), TrainConfig()
    if refusal is None:
        assert hardware.layer_implementation(settings, train, GPU) == "transformer_engine"
        return
    with pytest.raises(ConfigError, match=refusal) as refused:
        hardware.layer_implementation(settings, train, GPU)
    wanted = hardware.installed.transformer_engine().specifier
    named = (f"'transformer-engine[pytorch]{wanted}'", "model.layers=local", "tools/doctor.py")
    for command in named:
        assert command in str(refused.value)
    local = ModelConfig(path=Path(), layers="local")
    assert hardware.layer_implementation(local, train, GPU) == "local"


def apex(folder: Path, *modules: str) -> None:
    """An Apex that holds so much; what compiled code is in its wheel lies beside the package."""
    for module in modules:
        file = folder / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")


NVIDIAS = ("apex/__init__", "apex/normalization/__init__")
EXTENSIONS = ("fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")


@pytest.mark.parametrize(
    ("modules", "refusal"),
    [
        ((*NVIDIAS, *EXTENSIONS), None),
        ((), "NVIDIA's Apex is not installed; run `APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install"),
        (NVIDIAS, r"without CUDA extensions .*No module named 'fused_layer_norm_cuda'"),
        ((*NVIDIAS, EXTENSIONS[0]), "No module named 'fused_weight_gradient_mlp_cuda'"),
        (("apex/__init__", "apex/lib/libapex"), "PyPI's package apex is for websites; run `pip un"),
    ],
)
def test_apex_is_nvidias_and_whole_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], refusal: str | None
) -> None:
    apex(tmp_path, *modules)
    monkeypatch.syspath_prepend(tmp_path)
    asked, train = ModelConfig(path=Path(), layers="apex"), TrainConfig()
    with mock.patch.dict(sys.modules):
        if refusal is None:
            assert hardware.layer_implementation(asked, train, GPU) == "apex"
            return
        with pytest.raises(ConfigError, match=refusal) as refused:
            hardware.layer_implementation(asked, train, GPU)
    for command in ("git+https://github.com/NVIDIA/apex`", "model.layers=local", "doctor.py"):
        assert command in str(refused.value)


def test_apex_takes_a_gpu_and_no_eight_bits() -> None:
    asked = ModelConfig(path=Path(), layers="apex")
    with pytest.raises(ConfigError, match="apex needs an NVIDIA GPU, but this process runs on CPU"):
        hardware.layer_implementation(asked, TrainConfig(), torch.device("cpu"))
    with pytest.raises(ConfigError, match="needs Transformer Engine's layers"):
        hardware.layer_implementation(asked, TrainConfig(fp8="delayed"), GPU)


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(ConfigError, match=r"V100 has compute capability 7.0; training needs 8.0"):
        hardware.check_architecture(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    hardware.check_architecture(GPU)


def test_a_deterministic_run_has_the_bits_of_any_on_a_cpu(
    model: Path, reference_run: list[dict[str, float]], tmp_path: Path
) -> None:
    changes = {"train__steps": 2, "train__deterministic": True}
    lines = runs.train(runs.experiment(tmp_path / "run", model, **changes))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == [line[key] for line in reference_run[:2]]
