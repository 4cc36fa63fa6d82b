"""Attention within documents: cuDNN's fused kernel, and RoPE.

T = rows, H = query heads, G = key-value heads, D = head width; document i has rows
padded[i] : padded[i] + length[i]
"""

import ast
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.te import cuda
from tests.te.extension import CALLS, MODULE, DType, kernel


@kernel
def get_cudnn_version() -> int:
    """Of a release that fuses attention within documents."""
    return 91500


@kernel
def get_fused_attn_backend(*asked: Any) -> Any:
    """cuDNN's kernel, for documents in 16 bits on Hopper and newer; none else.

    2.20 gives one object and is told why not, too.
    """
    dtype, objects = (asked[1], False) if len(asked) > 1 else (asked[0].qkv_dtype, True)
    backend = MODULE.NVTE_Fused_Attn_Backend
    fits = dtype in (DType.kBFloat16, DType.kFloat16) and cuda.CAPABILITY >= (9, 0)
    chosen = backend.NVTE_F16_arbitrary_seqlen if fits else backend.NVTE_No_Backend
    return (chosen, "" if fits else "no kernel") if objects else chosen


@kernel
def fused_attn_fwd(*given: Any) -> list[Tensor]:
    """Outputs [T, H, D], logarithms of the sums [T, H, 1], and a random state."""
    asked = _named("fused_attn_fwd", given)
    _check(asked)
    q, v = asked["q"], asked["v"]
    output = torch.zeros(*q.shape[:2], v.shape[2])
    sums = torch.full((*q.shape[:2], 1), float("-inf"))
    for mine, theirs in _documents(asked):
        scores = _scores(asked, mine, theirs)
        total = torch.logsumexp(scores, -1)
        shares = torch.exp(scores - total[..., None])
        output[mine] = torch.einsum("hqk,khd->qhd", shares, _for_heads(v[theirs], q))
        sums[mine] = total.t()[..., None]
    return [output.to(q.dtype), sums, torch.zeros(2, dtype=torch.int64)]


@kernel
def fused_attn_bwd(*given: Any) -> list[Tensor | None]:
    """The gradients of q, k and v, from the outputs and the sums that are given."""
    asked = _named("fused_attn_bwd", given)
    _check(asked)
    CALLS["attention backward, deterministic"] += asked["deterministic"]
    q, k, v = asked["q"], asked["k"], asked["v"]
    output, gradient = (asked[name].reshape(*q.shape[:2], -1).float() for name in ("o", "d_o"))
    sums = asked["aux_ctx_tensors"][0]
    assert sums.shape == (*q.shape[:2], 1), sums.shape
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for mine, theirs in _documents(asked):
        shares = torch.exp(_scores(asked, mine, theirs) - sums[mine, :, 0].t()[..., None])
        product = (gradient[mine] * output[mine]).sum(-1).t()[..., None]
        towards = torch.einsum("qhd,khd->hqk", gradient[mine], _for_heads(v[theirs], q))
        slopes = shares * (towards - product) * asked["attn_scale"]
        dq[mine] = torch.einsum("hqk,khd->qhd", slopes, _for_heads(k[theirs], q))
        dk[theirs] = _of_groups(torch.einsum("hqk,qhd->khd", slopes, q[mine].float()), k)
        dv[theirs] = _of_groups(torch.einsum("hqk,qhd->khd", shares, gradient[mine]), v)
    return [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None]


@functools.cache
def _names(kernel_name: str) -> list[str]:
    """What each argument of a kernel is, by the words of the only call that TE's files have of it.

    Each release puts some more arguments between the others.
    """
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(fused_attn)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"tex.{kernel_name}"
    ]
    (call,) = calls
    assert not call.keywords
    return [
        ast.unparse(word.slice if isinstance(word, ast.Subscript) else word) for word in call.args
    ]


def _named(kernel_name: str, given: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(_names(kernel_name), given, strict=True))


def _check(asked: dict[str, Any]) -> None:
    """What the kernel demands, and what ours never ask for."""
    q, k, v = asked["q"], asked["k"], asked["v"]
    for tensor in (q, k, v):
        assert tensor.dim() == 3, tensor.shape
        assert tensor.is_contiguous(), "q, k and v are contiguous"
        assert tensor.dtype in (torch.bfloat16, torch.float16), tensor.dtype
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads of {k.shape[1]} groups"
    assert q.shape[2] % 8 == 0, f"head width {q.shape[2]}, no multiple of 8"
    for name in ("q", "kv"):
        for starts in (asked[f"cu_seqlens_{name}"], asked[f"cu_seqlens_{name}_padded"]):
            assert starts is None or starts.dtype == torch.int32, starts.dtype
    assert asked["qkv_layout"].name == "NVTE_THD_THD_THD", asked["qkv_layout"]
    assert asked["dropout"] == 0.0
    assert tuple(asked["window_size"]) in ((-1, -1), (-1, 0)), asked["window_size"]


def _documents(asked: dict[str, Any]) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries, and of the keys, of each document that has any."""
    rows = []
    for name, tensor in (("q", asked["q"]), ("kv", asked["k"])):
        ends = asked[f"cu_seqlens_{name}"]
        starts = asked[f"cu_seqlens_{name}_padded"]
        lengths = (ends[1:] - ends[:-1]).tolist()
        starts = (ends if starts is None else starts).tolist()
        assert max(lengths) <= asked[f"max_seqlen_{name}"], (lengths, asked[f"max_seqlen_{name}"])
        assert starts[-1] <= tensor.shape[0]
        rows.append([slice(a, a + size) for a, size in zip(starts[:-1], lengths, strict=True)])
    for mine, theirs in zip(*rows, strict=True):
        if mine.start < mine.stop:
            yield mine, theirs


def _scores(asked: dict[str, Any], mine: slice, theirs: slice) -> Tensor:
    """Scores [H, Q, K] of a document, those of later keys -inf under a causal mask."""
    q = asked["q"]
    keys = _for_heads(asked["k"][theirs], q)
    scores = torch.einsum("qhd,khd->hqk", q[mine].float(), keys) * asked["attn_scale"]
    if "CAUSAL" in asked["attn_mask_type"].name:
        assert scores.shape[1] == scores.shape[2]
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)


def _of_groups(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient.reshape(gradient.shape[0], x.shape[1], -1, x.shape[2]).sum(2)


@kernel
def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """Rows [T, ...] of b documents as [b, max_seq_len, ...], which unfused attention takes."""
    made = torch.zeros(b, max_seq_len, *tensor.shape[1:], dtype=tensor.dtype)
    for document, rows in zip(made, tensor.tensor_split(cu_seqlens[1:].tolist()), strict=False):
        document[: rows.shape[0]] = rows
    return made


@kernel
def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """And back."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    made = torch.cat([rows[:length] for rows, length in zip(tensor, lengths, strict=True)])
    assert made.shape[0] == t
    return made


@kernel
def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """The heads [T, H, D] of a rank's part of each document, turned by their places in it."""
    asked = (input, freqs, start_positions, qkv_format, interleaved, cu_seqlens)
    return _turned(*asked, cp_size, cp_rank, 1)


@kernel
def fused_rope_backward(output_grads: Tensor, freqs: Tensor, *given: Any) -> Tensor:
    """Turned back; 2.9 does not say where documents start."""
    *start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank = given
    (start,) = start_positions or (None,)
    asked = (output_grads, freqs, start, qkv_format, interleaved, cu_seqlens)
    return _turned(*asked, cp_size, cp_rank, -1)


def _turned(
    x: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    size: int,
    rank: int,
    sign: int,
) -> Tensor:
    assert start_positions is None
    assert not interleaved
    assert qkv_format.name == "NVTE_THD"
    assert x.dim() == 3
    assert cu_seqlens is not None
    assert cu_seqlens.dtype == torch.int32
    assert freqs.dtype == torch.float32
    assert freqs.shape[1:3] == (1, 1)
    starts = (cu_seqlens // size).tolist()
    assert starts[-1] == x.shape[0], (starts[-1], x.shape)
    places = torch.cat([_places(b - a, size, rank) for a, b in itertools.pairwise(starts)])
    assert int(places.max()) < freqs.shape[0], "the kernel would read beyond the table"
    angles, width = freqs[places, 0], freqs.shape[-1]
    turn, rest = x[..., :width].float(), x[..., width:]
    low, high = turn.chunk(2, -1)
    made = turn * angles.cos() + sign * torch.cat((-high, low), -1) * angles.sin()
    return torch.cat((made.to(x.dtype), rest), -1)


def _places(rows: int, size: int, rank: int) -> Tensor:
    """Places in a document of a context-parallel rank's two parts of it."""
    if size == 1:
        return torch.arange(rows)
    half = rows // 2
    first, second = rank * half, (2 * size - rank - 1) * half
    return torch.cat((torch.arange(first, first + half), torch.arange(second, second + half)))
