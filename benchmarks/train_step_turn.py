"""One turn of one contestant of train_step.py, in a process of its own.

    python benchmarks/train_step_turn.py JOB.json     ->  JSON, in the last line

JOB.json: contestant, case (as in train_step.py), reference (loss and gradient norm of the first
step) and the relative tolerance of both. All weights are drawn anew from the names that Hugging
Face gives them, so that each contestant has the same without a file.
"""

import contextlib
import functools
import gc
import importlib.util
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import kernels
import torch
from torch import Tensor
from train_step import Case, architecture, batches
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available  # type: ignore[attr-defined]

from mcore_sft.checkpoint import weights
from mcore_sft.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from mcore_sft.data.packs.batch import IGNORE, Batch
from mcore_sft.model import build
from mcore_sft.runtime.hardware import peak_memory
from mcore_sft.runtime.mesh import Mesh, connect
from mcore_sft.training import optimizer as optim
from mcore_sft.training import step

from megatron.core.models.gpt import GPTModel

LR = 1e-5
SETTINGS = OptimizerConfig(lr=LR)

Step = Callable[[], tuple[float, float]]
"""Takes one step on the packs of the case; returns its loss and gradient norm."""


class RandomWeights:
    """Stands for a folder of safetensors; the numbers are bf16's."""

    ignores_index = False

    def __init__(self, shape: dict[str, Any], device: torch.device) -> None:
        self.device, self.width = device, shape["hidden_size"]
        self.shapes = architecture(shape).shapes()
        self.draw = functools.lru_cache(maxsize=4)(self._draw)

    def names(self) -> set[str]:
        """Hugging Face's names."""
        return set(self.shapes)

    def shape(self, name: str) -> list[int]:
        """Sizes of a tensor."""
        return list(self.shapes[name])

    def types(self, names: Iterable[str]) -> Counter[str]:
        """How many of the tensors `names` are stored in each type."""
        return Counter(bf16=len(list(names)))

    def read(self, name: str, start: int, stop: int, columns: slice | None = None) -> Tensor:
        """Rows of a tensor, fp32."""
        rows = self.draw(name)[start:stop]
        return rows if columns is None else rows[:, columns]

    def _draw(self, name: str) -> Tensor:
        """Norms near 1; all others so wide that attention matters to the result."""
        made = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(self.shapes[name], device=self.device, generator=made)
        drawn = 1 + 0.1 * noise if noise.dim() == 1 else noise * self.width**-0.5
        return drawn.bfloat16().float()


class LayersClock:
    """Time between the output of the embedding and that of the last norm, there and back."""

    def __init__(self, first: torch.nn.Module, last: torch.nn.Module, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []
        first.register_forward_hook(self._passed)
        last.register_forward_hook(self._passed)

    def _passed(self, module: torch.nn.Module, given: Any, output: Tensor) -> None:
        self._mark()
        output.register_hook(lambda grad: self._mark())  # type: ignore[no-untyped-call]

    def _mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Since it was asked last; the device has finished its work."""
        marks, self.marks = self.marks, []
        if len(marks) % 4:
            raise RuntimeError(f"{len(marks)} marks, expected 4 for each micro-batch")
        pairs = list(zip(marks[::2], marks[1::2], strict=True))
        if self.cuda:
            return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1e3
        return float(sum(end - begin for begin, end in pairs))


# ---- ours, and Megatron-core's own output layer and loss


@contextlib.contextmanager
def megatron(case: Case, fp8: str, *, own_loss: bool) -> Iterator[tuple[Step, LayersClock, str]]:
    """Our trainer's step, with its operator for the loss or with Megatron-core's."""
    shape = architecture(case.shape)
    train = TrainConfig(precision="bf16", fp8=fp8)
    with contextlib.ExitStack() as stack:
        mesh = stack.enter_context(connect(ParallelConfig()))
        note = ""
        if own_loss:
            fusion = _fusion(mesh)
            note = f"cross entropy {fusion or 'not fused: its fused one takes a GPU'}"
            for patch in _own_loss(fusion):
                stack.enter_context(patch)
        gpt = build.build(shape, ModelConfig(path=Path()), train, mesh)
        optimizer = optim.build(SETTINGS, train, gpt, mesh)
        source = RandomWeights(case.shape, mesh.device)
        weights.load_pretrained(source, gpt, shape, mesh)  # type: ignore[arg-type]
        source.draw.cache_clear()
        optimizer.reload_model_params()
        model = next(module for module in gpt[0].modules() if isinstance(module, GPTModel))
        packs = batches(case)
        if fp8 == "delayed":  # its first scales are those of a step that changes no weight
            step.train_step(gpt, optimizer, packs, mesh, SETTINGS, 0.0)

        def take() -> tuple[float, float]:
            taken = step.train_step(gpt, optimizer, packs, mesh, SETTINGS, LR)
            return taken.loss, taken.grad_norm

        yield take, LayersClock(model.embedding, model.decoder, mesh.device), note


def _fusion(mesh: Mesh) -> str | None:
    """Megatron-core's best cross entropy here."""
    if mesh.device.type == "cpu":
        return None
    return "te" if importlib.util.find_spec("transformer_engine") else "native"


def _own_loss(fusion: str | None) -> Iterator[Any]:
    """What makes our trainer build and call Megatron-core's own model."""
    configure = build.transformer_config

    def configured(*arguments: Any) -> Any:
        config = configure(*arguments)
        config.cross_entropy_loss_fusion = fusion is not None
        config.cross_entropy_fusion_impl = fusion or "native"
        return config

    def forward(
        packs: Iterator[Batch], model: Any, *, mesh: Mesh, begins: Callable[[], None]
    ) -> tuple[Tensor, Any]:
        begins()
        batch = next(packs).to(mesh.device)
        learned = batch.labels != IGNORE
        losses = model(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.labels.clamp(min=0),
            packed_seq_params=step.packed(batch),
        )
        total = (losses.float() * learned).sum()
        return total, partial(step.token_loss, batch)

    yield mock.patch.object(build, "Gpt", GPTModel)
    yield mock.patch.object(build, "transformer_config", configured)
    yield mock.patch.object(step, "forward_step", forward)


# ---- transformers and torch


def hugging_face(case: Case, dtype: torch.dtype, attention: str) -> Any:
    """The model of the case with the weights that all have."""
    device = torch.device(case.device)
    shape = {key: value for key, value in case.shape.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", **shape)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)  # type: ignore[no-untyped-call]
    source = RandomWeights(case.shape, device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(source.read(name, 0, weight.shape[0]))
    return model.train()


@contextlib.contextmanager
def transformers(case: Case, *, liger: bool) -> Iterator[tuple[Step, LayersClock, str]]:
    """bf16 weights whose gradients are added up in fp32 as they come, for main weights in fp32."""
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    if case.device == "cpu":
        attention = "sdpa"
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()  # rotary embedding, norms, SwiGLU, and head with its loss
    mask = "documents from position_ids" if attention != "sdpa" else "block-diagonal mask"
    model = hugging_face(case, torch.bfloat16, attention)
    params = list(model.parameters())
    mains = [param.detach().float() for param in params]
    for param, main in zip(params, mains, strict=True):
        main.grad = torch.zeros_like(main)
        param.register_post_accumulate_grad_hook(partial(_add_to_main, main))
    optimizer = torch.optim.AdamW(
        mains,
        lr=LR,
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
        fused=True,
    )
    packs = batches(case)
    count = sum(batch.supervised for batch in packs)

    def take() -> tuple[float, float]:
        optimizer.zero_grad(set_to_none=False)
        losses = []
        for pack in packs:
            loss = _loss(model, pack.to(case.device), count)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        norm = torch.nn.utils.get_total_norm([main.grad for main in mains])
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(params, mains)
        return float(sum(losses)), float(norm)

    note = f"{attention}, {mask}; bf16 weights, fp32 gradients, main weights and moments"
    yield take, LayersClock(model.model.embed_tokens, model.model.norm, params[0].device), note


def _add_to_main(main: Tensor, param: Tensor) -> None:
    """Move a gradient into the fp32 sum."""
    assert main.grad is not None
    assert param.grad is not None
    main.grad.add_(param.grad)
    param.grad = None


def _loss(model: Any, batch: Batch, count: int) -> Tensor:
    """Its own loss: the sum over the labels that are not masked, divided by `count`."""
    output = model(
        batch.tokens,
        position_ids=batch.positions,
        labels=batch.labels,
        shift_labels=batch.labels,
        num_items_in_batch=count,
        use_cache=False,
    )
    loss: Tensor = output.loss
    return loss


def reference(case: Case) -> dict[str, float]:
    """Loss and gradient norm in fp32, each document by itself."""
    model = hugging_face(case, torch.float32, "sdpa")
    packs = batches(case)
    count, total = sum(batch.supervised for batch in packs), 0.0
    for pack in packs:
        for start, end in list(pairwise(pack.starts.tolist()))[: pack.examples]:
            labels = pack.labels[0, start:end].to(case.device)
            logits = model(pack.tokens[:, start:end].to(case.device), use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=IGNORE, reduction="sum"
            )
            (loss / count).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    norm = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])
    return {"loss": total / count, "grad_norm": float(norm)}


# ---- a turn


def wrong(found: dict[str, float], expected: dict[str, float], tolerance: list[float]) -> str:
    """What is further from the reference than it may be, NaN too; empty if nothing is."""
    for (name, value), limit in zip(found.items(), tolerance, strict=True):
        if not abs(value - expected[name]) <= limit * abs(expected[name]):
            return (
                f"WRONG: {name} of the first step {value:.6g}, expected {expected[name]:.6g} "
                f"within {limit:.1%}"
            )
    return ""


def measure(case: Case, take: Step, clock: LayersClock, job: dict[str, Any]) -> dict[str, Any]:
    """The steps of a turn, unless the first is wrong."""
    told: dict[str, Any] = {"seconds": [], "layer_seconds": []}
    device = torch.device(case.device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for number in range(case.steps):
        _wait(device)
        begin = time.perf_counter()
        loss, norm = take()
        _wait(device)
        told["seconds"].append(time.perf_counter() - begin)
        told["layer_seconds"].append(clock.seconds())
        if not number:
            first = {"loss": loss, "grad_norm": norm}
            told |= first
            if reason := wrong(first, job["reference"], job["tolerance"]):
                return first | {"reason": reason}
    told["peak_bytes"] = peak_memory(device)
    return told | {"kernels": kernels.kernels(take, case.device)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turn(job: dict[str, Any]) -> dict[str, Any]:
    """What the contestant of `job` shows, or why it shows nothing."""
    case, contestant = Case(**job["case"]), job["contestant"]
    try:
        if contestant["kind"] == "reference":
            return reference(case)
        if contestant["kind"] in ("transformers", "liger"):
            contest = transformers(case, liger=contestant["kind"] == "liger")
        else:
            own_loss = contestant["kind"] == "megatron"
            contest = megatron(case, contestant["fp8"], own_loss=own_loss)
        with contest as (take, clock, note):
            return {"note": note} | measure(case, take, clock, job)
    except Exception as error:  # a contestant may fail in any way; the others still run
        return {"reason": f"not run: {type(error).__name__}: {error}".splitlines()[0]}


if __name__ == "__main__":
    print("\n" + json.dumps(take_turn(json.loads(Path(sys.argv[1]).read_text()))))
