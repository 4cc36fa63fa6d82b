"""The kernels of tests/te compute what their names say, and refuse what the real ones refuse."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

pytestmark = pytest.mark.te
SCALINGS = ("delayed", "tensorwise", "blocks of 1 x 128", "blocks of 128 x 128")


def quantizer(scaling: str, **asked: Any) -> Any:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import (
        Float8CurrentScalingQuantizer,
        Float8Quantizer,
    )

    ways = {"rowwise": True, "columnwise": True} | asked
    if scaling == "delayed":
        return Float8Quantizer(torch.ones(1), torch.zeros(1), tex.DType.kFloat8E4M3, **ways)
    if scaling == "tensorwise":
        place = torch.device("cpu")
        return Float8CurrentScalingQuantizer(tex.DType.kFloat8E4M3, place, **ways)
    blocks = {"block_scaling_dim": 2 if scaling == SCALINGS[3] else 1}
    return Float8BlockQuantizer(tex.DType.kFloat8E4M3, **ways, **blocks)


def product(a: Any, b: Any, layout: str) -> Tensor:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    asked: dict[str, Any] = {"layout": layout, "out_dtype": torch.float32}
    if "workspace" in inspect.signature(general_gemm).parameters:  # 2.9
        asked["workspace"] = torch.empty(1)
    made: Tensor = general_gemm(a, b, **asked)[0]
    return made


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Of columns and rows that are of very different sizes, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 4 ** torch.randn(rows // 16, 1, generator=generator).repeat_interleave(16, 0)
    x = torch.randn(rows, columns, generator=generator) * sizes
    return x.bfloat16()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("layout", "a", "b"),
    [
        ("TN", (160, 272), (144, 272)),
        ("NN", (272, 160), (144, 272)),
        ("NT", (272, 160), (272, 144)),
    ],
)
def test_products_in_8_bits_are_near_those_in_16(
    scaling: str, layout: str, a: tuple[int, int], b: tuple[int, int]
) -> None:
    left, right = matrix(*a, seed=1), matrix(*b, seed=2)
    made = product(quantizer(scaling)(left), quantizer(scaling)(right), layout)
    plain = product(left, right, layout)
    assert plain.shape == (144, 160)
    assert 1e-4 < (made - plain).norm() / plain.norm() < 0.05


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_product_over_rows_needs_a_transpose(scaling: str) -> None:
    whole = quantizer(scaling)(matrix(128, 128, seed=1))
    part = quantizer(scaling, columnwise=False)(matrix(128, 128, seed=1))
    product(part, part, "TN")
    for a, b, layout in ((part, whole, "NN"), (whole, part, "NT")):
        with pytest.raises(AssertionError, match="8-bit product: no"):
            product(a, b, layout)


@pytest.mark.parametrize("scaling", SCALINGS[:3])
def test_8_bits_are_summed_over_multiples_of_16(scaling: str) -> None:
    rows = quantizer(scaling)(matrix(144, 128, seed=1)[:136])
    product(rows, rows, "TN")
    with pytest.raises(AssertionError, match="8-bit product over 136"):
        product(rows, rows, "NT")
    few = quantizer(scaling)(matrix(16, 128, seed=1)[:12])
    with pytest.raises(AssertionError, match="12 rows"):
        product(few, few, "TN")


def test_8_bits_are_multiplied_by_8_bits_alone() -> None:
    x = matrix(32, 32, seed=1)
    with pytest.raises(AssertionError, match="one factor alone"):
        product(quantizer("delayed")(x), x, "TN")


def test_delayed_scaling_forgets_what_is_older_than_its_history() -> None:
    import transformer_engine_torch as tex

    history, scale = torch.zeros(3, 1), torch.ones(1)
    seen = []
    for largest in (8.0, 2.0, 1.0, 0.0, 4.0):
        history[0] = largest
        update = tex.fused_amax_and_scale_update_after_reduction
        update(history[0].clone(), [history], [scale], "max", tex.DType.kFloat8E4M3, 0.0)
        assert history[0] == 0
        seen.append(448 / scale.item())
    assert seen == [8.0, 8.0, 8.0, 2.0, 4.0]


DOCUMENTS = [0, 8, 24, 64]


def heads(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, count, 16, generator=generator).bfloat16().requires_grad_()


def attention(q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> Tensor:
    from transformer_engine.pytorch.attention.dot_product_attention import backends
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    starts = torch.tensor(DOCUMENTS, dtype=torch.int32)
    asked = {"cu_seqlens": starts, "longest": 40} | changes
    module = backends.FusedAttention(0.25, attention_type="self", layer_number=1)
    made: Tensor = module(
        q,
        k,
        v,
        qkv_layout="thd_thd_thd",
        cu_seqlens_q=asked["cu_seqlens"],
        cu_seqlens_kv=asked["cu_seqlens"],
        max_seqlen_q=asked["longest"],
        max_seqlen_kv=asked["longest"],
        attn_mask_type="padding_causal",
        window_size=(-1, 0),
        fused_attention_backend=FusedAttnBackend["F16_arbitrary_seqlen"],
        fp8_meta={},
        quantizers=None,
    )
    return made


def test_fused_attention_is_that_of_each_document() -> None:
    q, k, v = heads(1, 4), heads(2, 2), heads(3, 2)
    made = attention(q, k, v).reshape(64, 4, 16)
    whole = [x.detach().float().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    plain = [
        functional.scaled_dot_product_attention(
            *(x[:, start:end] for x in whole), is_causal=True, scale=0.25, enable_gqa=True
        )
        for start, end in itertools.pairwise(DOCUMENTS)
    ]
    expected = torch.cat(plain, 1).transpose(0, 1)
    assert_close(made.float(), expected, rtol=1e-2, atol=1e-2)
    slopes = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    made.backward(slopes)
    expected.backward(slopes.float())
    for mine, theirs in zip((q, k, v), whole, strict=True):
        gradient = theirs.grad.transpose(0, 1)
        assert_close(mine.grad.float(), gradient, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda: {"cu_seqlens": torch.tensor(DOCUMENTS)}, "int64"),
        (lambda: {"longest": 32}, "32"),
        (lambda: {"q": heads(1, 8)[:, ::2]}, "contiguous"),
        (lambda: {"q": heads(1, 4).float()}, "only supports FP16 and BF16"),
        (lambda: {"q": heads(1, 3)}, "3 query heads of 2"),
    ],
)
def test_fused_attention_refuses(change: Callable[[], dict[str, Any]], refusal: str) -> None:
    asked = {"q": heads(1, 4), "k": heads(2, 2), "v": heads(3, 2)}
    attention(**asked)
    with pytest.raises(AssertionError, match=refusal):
        attention(**asked | change())


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_fused_rope_turns_as_megatron_core_does(size: int, rank: int) -> None:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    angles = torch.outer(torch.arange(64.0), 10.0 ** -torch.arange(8.0)).repeat(1, 2)
    x = torch.randn(64 // size, 2, 16, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    starts = torch.tensor(DOCUMENTS, dtype=torch.int32)
    made = apply_rotary_pos_emb(
        x,
        angles[:, None, None],
        tensor_format="thd",
        fused=True,
        cu_seqlens=starts,
        cp_size=size,
        cp_rank=rank,
    )
    places = []
    for start, end in itertools.pairwise(DOCUMENTS):
        parts = torch.arange(end - start).chunk(2 * size)
        places += [parts[rank], parts[2 * size - 1 - rank]]
    turn = angles[torch.cat(places), None]
    low, high = x.chunk(2, -1)
    expected = x * turn.cos() + torch.cat((-high, low), -1) * turn.sin()
    assert_close(made, expected, rtol=1e-5, atol=1e-5)
    (back,) = torch.autograd.grad(made, x, made.detach())
    assert_close(back, x.detach(), rtol=1e-5, atol=1e-5)


def test_swiglu_is_one_kernel_with_its_gradient() -> None:
    from transformer_engine.pytorch.ops import SwiGLU

    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    made = SwiGLU()(x)
    gate, up = x.chunk(2, -1)
    expected = functional.silu(gate) * up
    assert_close(made, expected, rtol=1e-5, atol=1e-6)
    (mine,), (theirs,) = (torch.autograd.grad(y.square().sum(), x) for y in (made, expected))
    assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_not_written_here_says_so() -> None:
    import transformer_engine_torch as tex

    with pytest.raises(NotImplementedError, match="no kernel geglu"):
        tex.geglu(torch.ones(2, 4), None)
