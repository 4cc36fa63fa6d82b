"""What Transformer Engine does by itself on one GPU, before Megatron-core calls it.

Nothing else of a GPU is worth a look where this fails: a library without code for the card, a
recipe that it lacks, attention that mixes documents. None of it has run yet.
"""

import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytestmark = pytest.mark.gpu
GPU = "cpu" if "tests.te.plugin" in sys.modules else "cuda"
"""`make test-te` has kernels of its own on the CPU."""
RECIPES = {
    "delayed": ("DelayedScaling", 0.1),
    "tensorwise": ("Float8CurrentScaling", 0.1),
    "blockwise": ("Float8BlockScaling", 0.1),
}
"""Transformer Engine's name, and how far the norm of a difference may be, relatively."""
STARTS = [0, 700, 1500, 4096]
"""Of the documents of a pack, and its end."""


def off(found: Tensor, expected: Tensor) -> float:
    """How far `found` is from `expected`, as a share of it."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("recipe", ["none", *RECIPES])
def test_a_norm_with_its_product_is_that_of_torch(recipe: str) -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    torch.manual_seed(0)
    options: dict[str, Any] = {"params_dtype": torch.bfloat16, "device": GPU}
    layer = te.LayerNormLinear(512, 1024, bias=False, normalization="RMSNorm", **options)
    x = torch.randn(256, 512, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(256, 1024, device=GPU, dtype=torch.bfloat16)
    name, limit = RECIPES.get(recipe, ("", 2e-2))
    chosen = getattr(recipes, name)() if name else None
    for _ in range(2 if recipe == "delayed" else 1):  # the first pass has no scales
        x.grad = layer.weight.grad = None
        with te.fp8_autocast(enabled=chosen is not None, fp8_recipe=chosen):
            y = layer(x)
        y.backward(upstream)
    plain, weight = (t.detach().float().requires_grad_() for t in (x, layer.weight))
    expected = functional.rms_norm(plain, (512,), eps=layer.eps) @ weight.t()
    expected.backward(upstream.float())
    for found, wanted in ((y, expected), (x.grad, plain.grad), (layer.weight.grad, weight.grad)):
        assert found is not None
        assert wanted is not None
        assert off(found, wanted) < limit


def test_attention_in_a_pack_is_that_of_each_document_alone() -> None:
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    attention = te.DotProductAttention(
        32,
        128,
        num_gqa_groups=8,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    )
    made = {"device": GPU, "dtype": torch.bfloat16, "requires_grad": True}
    inputs = [torch.randn(STARTS[-1], heads, 128, **made) for heads in (32, 8, 8)]
    upstream = torch.randn(STARTS[-1], 32 * 128, device=GPU, dtype=torch.bfloat16)
    starts = torch.tensor(STARTS, dtype=torch.int32, device=GPU)
    longest = max(end - start for start, end in itertools.pairwise(STARTS))
    output = attention(
        *inputs,
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    output.backward(upstream)
    alone = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    documents = []
    for start, end in itertools.pairwise(STARTS):
        query, key, value = (tensor[start:end].transpose(0, 1)[None] for tensor in alone)
        document = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        documents.append(document[0].transpose(0, 1))
    expected = torch.cat(documents).flatten(1)
    expected.backward(upstream)
    assert off(output, expected) < 1e-2
    for found, wanted in zip(inputs, alone, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        assert off(found.grad, wanted.grad) < 2e-2
