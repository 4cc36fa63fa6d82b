import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mcore_sft.config import ConfigError, ModelConfig, ParallelConfig, TrainConfig
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
    ("capability", "documents", "longest", "refused"),
    [
        ((9, 0), 8, 2048, True),
        ((9, 0), 8, 2047, False),
        ((9, 0), 1, 8192, True),
        ((8, 0), 8, 2048, False),  # flash-attn's
    ],
)
def test_fused_attention_is_deterministic_below_a_size(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    documents: int,
    longest: int,
    refused: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    size = 32 * documents * longest**2
    if not refused:
        hardware.check_deterministic(size, GPU)
        return
    with pytest.raises(ConfigError, match=rf"train\.deterministic.*got {size:,} in a row"):
        hardware.check_deterministic(size, GPU)


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
    monkeypatch.setattr(hardware, "check_attention", lambda device: None)
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
    monkeypatch.setattr(hardware, "check_attention", lambda device: None)
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


@pytest.mark.parametrize(
    ("capability", "installed", "refused"),
    [
        ((8, 0), {"is_installed": False, "v2_4_1_plus": False}, True),
        ((8, 9), {"is_installed": True, "v2_4_1_plus": False}, True),
        ((8, 9), {"is_installed": True, "v2_4_1_plus": True}, False),
        ((9, 0), {"is_installed": False, "v2_4_1_plus": False}, False),
        ((10, 0), {"is_installed": False, "v2_4_1_plus": False}, False),
    ],
)
def test_documents_on_an_older_gpu_take_flash_attn(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    installed: dict[str, bool],
    refused: bool,
) -> None:
    flash = SimpleNamespace(max_version="2.8.3", **installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the GPU")
    monkeypatch.setattr(hardware, "check_transformer_engine", lambda: None)
    monkeypatch.setattr(hardware, "_flash_attention", lambda: flash)
    assert hardware.attention_backend(GPU) == ("fused" if capability >= (9, 0) else "flash")
    settings, train = ModelConfig(path=Path()), TrainConfig()
    if not refused:
        assert hardware.layer_implementation(settings, train, GPU) == "transformer_engine"
        return
    with pytest.raises(
        ConfigError, match=r"got flash-attn none, expected 2\.4\.1 to 2\.8\.3"
    ) as error:
        hardware.layer_implementation(settings, train, GPU)
    assert "flash-attn>=2.4.1,<=2.8.3" in str(error.value)
    assert "model.layers=local" in str(error.value)


@pytest.mark.parametrize(
    ("layers", "train", "chosen"),
    [
        ("auto", {}, "transformer_engine"),
        ("auto", {"precision": "fp32"}, "local"),
        ("auto", {"precision": "fp32", "recompute": "selective"}, "local"),
        ("local", {"recompute": "selective"}, "local"),
        ("auto", {"recompute": "selective"}, "expected none or full"),
        ("transformer_engine", {"precision": "fp32"}, "multiplies fp32 numbers as TF32"),
    ],
)
def test_layers_compute_what_is_asked(layers: str, train: dict[str, str], chosen: str) -> None:
    settings = ModelConfig.model_validate({"path": Path(), "layers": layers})
    asked = TrainConfig.model_validate(train)
    if chosen in ("local", "transformer_engine"):
        assert hardware.chosen_layers(settings, asked, gpu=True) == chosen
        return
    with pytest.raises(ConfigError, match=chosen):
        hardware.chosen_layers(settings, asked, gpu=True)


@pytest.mark.parametrize("folder", ["cu13/include", "cuda_runtime/include"])
def test_headers_of_pips_cuda_are_named_unless_others_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    variable = "NVTE_CUDA_INCLUDE_DIR"
    for name in (variable, "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    hardware.prepare_transformer_engine()
    assert variable not in os.environ
    assert os.environ["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] == "1"
    headers = tmp_path / folder
    headers.mkdir(parents=True)
    packages = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": packages}.get)
    hardware.prepare_transformer_engine()
    assert variable not in os.environ
    (headers / "cuda_runtime.h").touch()
    hardware.prepare_transformer_engine()
    assert os.environ[variable] == str(headers)
    monkeypatch.setenv(variable, "mine")
    hardware.prepare_transformer_engine()
    assert os.environ[variable] == "mine"


@pytest.mark.parametrize(
    ("parallel", "set_to"),
    [({}, None), ({"pipeline": 2}, None), ({"tensor": 2}, "1"), ({"context": 2}, "1")],
)
def test_kernels_keep_their_order_where_exchanges_run_beside_products(
    monkeypatch: pytest.MonkeyPatch, parallel: dict[str, int], set_to: str | None
) -> None:
    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(variable, "to be put back")
    monkeypatch.delenv(variable)
    hardware.order_kernels(ParallelConfig.model_validate(parallel))
    assert os.environ.get(variable) == set_to
    monkeypatch.setenv(variable, "8")
    hardware.order_kernels(ParallelConfig.model_validate(parallel))
    assert os.environ[variable] == "8"


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
