"""What a base folder can be, and the head be asked: nothing silently wrong, one sentence."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import doctor
import plan
import preprocess
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd import forward_ad

from mcore_sft import command, train
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Console
from mcore_sft.checkpoint import weights
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.config import ParallelConfig
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.model import families
from mcore_sft.ops.linear_cross_entropy import linear_cross_entropy, reference
from tests import tiny
from tests.runs import FIXTURES, loaded, on_layout

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 17209920\n"
PAGE = "\n<!DOCTYPE html><html><body>Sign in to go on</body></html>"


# --- 17: the head's derivative in forward mode ---

HIDDEN, WEIGHT, LABELS = torch.randn(20, 12), torch.randn(104, 12), torch.randint(0, 101, (20,))
LOGITS, ONES = torch.randn(20, 104), torch.ones(20)
OPS = torch.ops.mcore_sft


def into_main_grad(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, LABELS, main_grad=torch.zeros(104, 12)).loss


def changed(operator: Any, *arguments: Any) -> Callable[[Tensor], Tensor]:
    """An operator that changes its first argument, as a function of it."""

    def function(values: Tensor) -> Tensor:
        values = values.clone()
        found = operator(values, *arguments)
        return values if found is None else found

    return function


OPTIONS = (101, "", False)
FORMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "sum": (lambda h, w: linear_cross_entropy(h, w, LABELS).loss, (HIDDEN, WEIGHT)),
    "none": (
        lambda h, w: linear_cross_entropy(h, w, LABELS, reduction="none").loss,
        (HIDDEN, WEIGHT),
    ),
    "main_grad": (into_main_grad, (HIDDEN, WEIGHT)),
    "operator": (
        lambda h, w: OPS.linear_cross_entropy(h, w, LABELS, None, None, *OPTIONS, False, False)[0],
        (HIDDEN, WEIGHT),
    ),
    "main_grad operator": (
        lambda h, w: OPS.linear_cross_entropy_main_grad_(
            h, w, LABELS, None, torch.zeros(104, 12), *OPTIONS, False
        )[0],
        (HIDDEN, WEIGHT),
    ),
    "statistics": (lambda x: OPS.cross_entropy_statistics(x, LABELS, 0, 101), (LOGITS,)),
    "rows": (changed(OPS.cross_entropy_, LABELS, ONES, 101), (LOGITS,)),
    "rows' gradient": (
        changed(OPS.cross_entropy_gradient_, LABELS, *[ONES] * 3, 0, 101),
        (LOGITS,),
    ),
    "scale": (changed(OPS.scale_, torch.tensor(2.0)), (LOGITS,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_17_a_derivative_in_forward_mode_is_an_error_that_says_so(form: str) -> None:
    function, inputs = FORMS[form]
    refusal = pytest.raises(RuntimeError, match="no derivative in forward mode")
    for place, value in enumerate(inputs):

        def of_one(x: Tensor, place: int = place) -> Tensor:
            return function(*inputs[:place], x, *inputs[place + 1 :])

        tangent = torch.ones_like(value)
        with refusal:
            torch.func.jvp(of_one, (value,), (tangent,))
        with refusal:
            torch.func.jacfwd(of_one)(value)
        with forward_ad.dual_level(), refusal:
            of_one(forward_ad.make_dual(value, tangent))
        with forward_ad.dual_level(), refusal, torch.no_grad():
            of_one(forward_ad.make_dual(value, tangent))
        of_one(value)  # the value alone is there as ever


def test_17_the_reference_has_the_derivative_that_was_taken_for_0() -> None:
    tangent = torch.ones_like(HIDDEN)
    _, found = torch.func.jvp(lambda h: reference(h, WEIGHT, LABELS).loss, (HIDDEN,), (tangent,))
    assert abs(found) > 1e-3
    weight = HIDDEN.clone().requires_grad_()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="linear_cross_entropy has no"):
        linear_cross_entropy(forward_ad.make_dual(weight, tangent), WEIGHT, LABELS)


# --- refused or said before the first step ---


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, in one folder."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny.make_model(folder, num_hidden_layers=2, vocab_size=703)
    for file in (FIXTURES / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(base, tmp_path / "model")


def edit(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(tiny.hf_config(folder) | changes))


def change(folder: Path, function: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    """Replace each tensor by those that `function` makes of it."""
    made: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / SINGLE).items():
        made |= function(name, tensor)
    save_file(made, folder / SINGLE, {"format": "pt"})


def shard(folder: Path) -> None:
    """Put the weights into two files with an index, beside the single file."""
    tensors = load_file(folder / SINGLE)
    where = {name: SHARD.replace("00001", f"0000{n % 2 + 1}") for n, name in enumerate(tensors)}
    for file in set(where.values()):
        part = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def experiment(folder: Path) -> Path:
    file = folder.parent / "experiment.yaml"
    tree = {
        "name": "x",
        "output": str(folder.parent / "run"),
        "model": {"path": str(folder)},
        "data": {"root": str(FIXTURES), "train": [{"path": "rows.jsonl"}], "workers": 1},
    }
    tree["data"]["sequence_length"] = 512  # type: ignore[index]
    file.write_text(json.dumps(tree))
    return file


class Said:
    """What each command says of an experiment; none may end in a traceback."""

    def __init__(self, monkeypatch: Any, capsys: Any, folder: Path) -> None:
        self.monkeypatch, self.capsys, self.file = monkeypatch, capsys, experiment(folder)

    def by(self, main: Callable[[], None], *arguments: str) -> str:
        self.monkeypatch.setattr(sys, "argv", ["x", "--config", str(self.file), *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command.run(main)
        error = self.capsys.readouterr().err
        assert ended.value.code in (0, 2), error
        return str(error).removeprefix("error: ").rstrip() if ended.value.code else ""

    def by_doctor(self) -> str:
        self.monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        wrong = [x for x in doctor.experiment(str(self.file), [], None) if x.state == doctor.WRONG]
        assert not any("Traceback" in one.found for one in wrong)
        return wrong[0].found if wrong else ""

    def by_all(self) -> list[str]:
        """What all commands say that read config.json alone."""
        return [
            self.by(preprocess.main, "--show", "1"),
            self.by(train.main),
            self.by(train.main, "--dry-run"),
            self.by(plan.main, "--gpus", "1"),
            self.by_doctor(),
        ]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: Any, folder: Path) -> Said:
    return Said(monkeypatch, capsys, folder)


@pytest.mark.parametrize(
    ("stored", "precision", "words"),
    [
        (torch.bfloat16, "fp32", "base weights in bf16: the fp32 main weights start from exactly"),
        (torch.bfloat16, "bf16", "base weights in bf16: the fp32 main weights start from exactly"),
        (torch.float16, "bf16", "start from them, fp16 rounded to bf16"),
        (torch.float32, "bf16", "start from them, fp32 rounded to bf16"),
        (torch.float32, "fp32", ""),
    ],
)
def test_a_base_in_another_precision_says_which_values_the_run_starts_from(
    folder: Path, stored: torch.dtype, precision: str, words: str
) -> None:
    change(folder, lambda name, tensor: {name: tensor.to(stored)})
    ((told, exact),) = on_layout("one", _load, folder, precision)
    assert words in told
    assert bool(told) == bool(words)
    assert exact == ("rounded" not in words)


def _load(parallel: ParallelConfig, folder: Path, precision: str) -> tuple[str, bool]:
    """What loading says, and whether the fp32 main weights are the values of the folder."""
    with loaded(folder, parallel, precision) as here:
        console = Console(stderr=False, width=1000)
        with console.capture() as captured:
            weights.load_pretrained(
                SafetensorsFolder(folder), here.model, here.architecture, here.mesh, console
            )
        here.optimizer.reload_model_params()
        stored = load_file(folder / SINGLE)
        main = [x for group in here.optimizer.param_groups for x in group["params"]]
        assert all(x.dtype == torch.float32 for x in main)
        norm = stored["model.norm.weight"].float()
        exact = any(x.shape == norm.shape and torch.equal(x.data, norm) for x in main)
    return captured.get(), exact


LLAMA3 = tiny.LLAMA3_ROPE


@pytest.mark.parametrize(
    ("positions", "rope", "longest"),
    [
        (64, {"rope_type": "default"}, 64),
        (64, {"rope_type": "default", "factor": 8.0}, 64),
        (64, {"rope_type": "linear", "factor": 4.0}, 256),
        (4096, {"type": "linear", "factor": 4.0}, 16384),  # as Vicuna's 16k
        (512, LLAMA3, 512),  # what is said is more than 8 x 32
        (64, LLAMA3, 256),
        (32, LLAMA3 | {"factor": 1.0}, 32),
    ],
)
def test_a_sequence_above_the_models_positions_is_refused_unless_rope_is_scaled_to_it(
    folder: Path, positions: int, rope: dict[str, Any], longest: int
) -> None:
    rope = {"rope_theta": 1e4} | rope
    edit(folder, max_position_embeddings=positions, rope_parameters=None, rope_scaling=rope)
    read = families.read(folder)
    read.check(ParallelConfig(), longest)
    with pytest.raises(UserError, match=rf"too few positions \(got {longest + 1}, .* {longest}:"):
        read.check(ParallelConfig(), longest + 1)


def test_a_sequence_above_the_models_positions_is_refused_by_all_commands_alike(
    folder: Path, said: Said
) -> None:
    edit(folder, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4})
    found = said.by_all()
    assert "data.sequence_length: the model has too few positions (got 512," in found[0]
    assert len(set(found)) == 1, found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_in_the_base_weights_is_found_at_loading_by_tensor_name(
    folder: Path, value: float
) -> None:
    """On the stage that reads it and on the one that does not."""
    bad = "model.layers.1.mlp.up_proj.weight"

    def spoilt(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name == bad:
            tensor[3, 5] = value
        return {name: tensor.bfloat16()}

    change(folder, spoilt)
    first, second = on_layout("pp2", _refused, folder)
    assert (
        first
        == second
        == f"{folder}: a NaN or an infinity in {bad}; copy the model again, or"
        + (" take another (model.path)")
    )


def _refused(parallel: ParallelConfig, folder: Path) -> str:
    try:
        with loaded(folder, parallel, "bf16"):
            return ""
    except UserError as error:
        return str(error)


def read_all(folder: Path) -> None:
    """All that a run reads of its base before the first step."""
    families.read(folder)
    assert load_tokenizer(folder).chat_template_source
    SafetensorsFolder(folder).fingerprint()


READ = ["config.json", "tokenizer.json", "tokenizer_config.json", SINGLE, INDEX, SHARD]


def prepared(folder: Path, name: str) -> Path:
    """The file of this name, without a single file of weights beside an index."""
    if name in (INDEX, SHARD):
        shard(folder)
        (folder / SINGLE).unlink()
    return folder / name


@pytest.mark.parametrize("name", READ)
def test_weights_that_may_not_be_read(base: Path, name: str) -> None:
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        folder = shutil.copytree(base, Path(made) / "model")
        folder.chmod(0o755)
        file = prepared(folder, name)
        for one in folder.iterdir():
            one.chmod(0o644)
        file.chmod(0)
        with _unprivileged(), pytest.raises(UserError) as refused:
            read_all(folder)
    assert str(refused.value) == f"{file}: cannot be read (Permission denied)"


@pytest.mark.parametrize("read", [families.read, load_tokenizer, SafetensorsFolder])
def test_a_folder_that_may_not_be_entered(base: Path, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        folder = shutil.copytree(base, Path(made) / "model")
        folder.chmod(0)
        with (
            _unprivileged(),
            pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"),
        ):
            read(folder)
        folder.chmod(0o755)


@contextmanager
def _unprivileged() -> Iterator[None]:
    """As nobody, where this is root, who may read all."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", [*READ, "chat_template.jinja"])
@pytest.mark.parametrize(
    ("content", "words"), [(POINTER, "a Git LFS pointer"), (PAGE, "an HTML page")]
)
def test_a_git_lfs_pointer_or_an_html_page_in_place_of_a_file(
    folder: Path, name: str, content: str, words: str
) -> None:
    file = prepared(folder, name)
    file.write_text(content)
    with pytest.raises(UserError) as refused:
        read_all(folder)
    assert str(refused.value).startswith(f"{file}: this is {words} (")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "", POINTER, "[" * 100_000])
def test_broken_json_is_one_sentence_in_every_command(
    folder: Path, said: Said, name: str, content: str
) -> None:
    if name == "generation_config.json":  # asked where nothing else names the tokens
        (folder / "tokenizer_config.json").unlink()
    (folder / name).write_text(content)
    for sentence in (said.by(preprocess.main, "--show", "1"), said.by_doctor()):
        assert sentence.startswith(f"{folder / name}: "), sentence
        assert "not valid JSON" in sentence or "Git LFS" in sentence


def quantized(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not name.endswith("proj.weight"):
        return {name: tensor.bfloat16()}
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    stem = name.removesuffix(".weight")
    if not name.endswith("proj.weight"):
        return {name: tensor.half()}
    return {f"{stem}.qweight": torch.zeros(4, 4, dtype=torch.int32), f"{stem}.scales": ONES.half()}


@pytest.mark.parametrize(("make", "method"), [(quantized, "fp8"), (packed, "gptq")])
def test_a_folder_with_quantized_weights_is_refused_by_all_commands_alike(
    folder: Path, said: Said, make: Callable[[str, Tensor], dict[str, Tensor]], method: str
) -> None:
    edit(folder, quantization_config={"quant_method": method})
    assert said.by_doctor() == "", "what is left of a quantization that was undone"
    change(folder, make)
    found = said.by_all()
    assert f"quantized (quantization_config: {method})" in found[0]
    assert "Fix: take the unquantized model" in found[0]
    assert len(set(found)) == 1, found
    tiny_config = tiny.hf_config(folder)
    del tiny_config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(tiny_config))
    assert "is quantized (got " in said.by_doctor(), "the weights tell it too"


def test_of_a_single_file_beside_an_index_the_single_file_is_read(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    shard(folder)
    change(folder, lambda name, tensor: {name: tensor + 0.01})
    name = "model.embed_tokens.weight"
    ours = SafetensorsFolder(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()[name]
    assert torch.equal(ours.read(name, 0, 703), theirs)
    ((told, _),) = on_layout("one", _load, folder, "fp32")
    assert told.count("\n") == 1
    assert f"{SINGLE} is read, as transformers does, and not the files of the {INDEX}" in told
    (folder / SHARD).unlink()  # an index that is of no use is none of ours
    assert SafetensorsFolder(folder).fingerprint() == ours.fingerprint()
