"""Quantizers: tensors to 8 bits by delayed, tensorwise and blockwise scaling, and back.

x [..., K] -> bytes [..., K] for products over K, bytes [K, ...] for those over the rows, or both,
each with the inverse of what it was multiplied by
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.te.extension import CALLS, DTYPES, MODULE, kernel

BLOCK = 128
_LARGEST = {dtype: torch.finfo(DTYPES[dtype]).max for dtype in (7, 8)}
"""By the numbers of DType."""


@kernel
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` as `quantizer` makes it, in `output` where one is given."""
    kind = type(quantizer).__name__
    CALLS[f"quantize: {kind}"] += 1
    x = tensor.detach()
    made = _empty(quantizer, x) if output is None else output
    if noop is not None and noop.item():
        return made
    {
        "Float8Quantizer": _delayed,
        "Float8CurrentScalingQuantizer": _tensorwise,
        "Float8BlockQuantizer": _blockwise,
    }[kind](x, quantizer, made)
    return made


def _empty(quantizer: Any, x: Tensor) -> Any:
    """A tensor to fill; modules ask for the plain storage, which is no torch tensor."""
    made = quantizer.make_empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    if not (quantizer.internal and isinstance(made, Tensor)):
        return made
    own = next(kind for kind in type(made).__mro__ if kind.__name__.endswith("TensorStorage"))
    return own(**made.get_metadata())


@kernel
def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    """What 2.11's Python makes by itself, and 2.20 has made."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    common = {"shape": shape, "dtype": dtype, "quantizer": quantizer, "fp8_dtype": quantizer.dtype}
    data, turned = (
        torch.empty(size, dtype=torch.uint8) if asked else None
        for size, asked in (
            (shape, quantizer.rowwise_usage),
            ([shape[-1], *shape[:-1]], quantizer.columnwise_usage),
        )
    )
    if not hasattr(quantizer, "block_scaling_dim"):
        scale = torch.empty(1)
        return Float8Tensor(data=data, data_transpose=turned, fp8_scale_inv=scale, **common)
    scales = [
        None if x is None else torch.empty(quantizer.get_scale_shape(shape, columnwise=way))
        for way, x in enumerate((data, turned))
    ]
    return Float8BlockwiseQTensor(
        rowwise_data=data,
        rowwise_scale_inv=scales[0],
        columnwise_data=turned,
        columnwise_scale_inv=scales[1],
        is_2D_scaled=quantizer.block_scaling_dim == 2,
        **common,
    )


def _delayed(x: Tensor, quantizer: Any, made: Any) -> None:
    quantizer.amax.copy_(torch.maximum(quantizer.amax, _largest(x).reshape_as(quantizer.amax)))
    _fill(x, quantizer.scale.reshape(()), quantizer, made)


def _tensorwise(x: Tensor, quantizer: Any, made: Any) -> None:
    assert not getattr(quantizer, "use_existing_amax", False)
    largest = _largest(x)
    if quantizer.with_amax_reduction:
        CALLS["quantize: all-reduce"] += 1
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    _fill(x, _scale(largest, quantizer), quantizer, made)


def _fill(x: Tensor, scale: Tensor, quantizer: Any, made: Any) -> None:
    """One scale for all of x: the bytes, and their transpose where it is asked for."""
    eight = _bytes(x.float() * scale, quantizer)
    if made._data is not None:
        made._data.copy_(eight)
    if made._transpose is not None:
        made._transpose.copy_(_transposed(eight).reshape(made._transpose.shape))  # 2.9: [K, rest]
        made._transpose_invalid = False
    made._scale_inv.copy_((1 / scale).reshape_as(made._scale_inv))
    made._fp8_dtype = quantizer.dtype


def _blockwise(x: Tensor, quantizer: Any, made: Any) -> None:
    """One scale for each 1 x 128 or 128 x 128 neighbours, along each of the ways asked for."""
    rows = x.float().reshape(-1, x.shape[-1])
    compact = getattr(quantizer, "all_gather_usage", False)
    assert not (compact and quantizer.block_scaling_dim == 2), "weights are never gathered"
    for data, scales, turned in (
        (made._rowwise_data, made._rowwise_scale_inv, False),
        (made._columnwise_data, made._columnwise_scale_inv, True),
    ):
        if data is None:
            continue
        lines = rows.t() if turned else rows
        eight, inverse = _in_blocks(lines, quantizer)
        if compact and turned:
            eight, inverse = eight.t(), inverse.t()
        elif quantizer.block_scaling_dim == 1 and not compact:
            inverse = inverse.t()
        data.copy_(eight.reshape(data.shape))
        scales.zero_()
        scales[: inverse.shape[0], : inverse.shape[1]] = inverse


def _in_blocks(lines: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Bytes of lines [R, C], and the inverse scales [R or R / 128, C / 128]."""
    high = BLOCK if quantizer.block_scaling_dim == 2 else 1
    down, across = (-(-size // step) for size, step in zip(lines.shape, (high, BLOCK), strict=True))
    padded = torch.zeros(down * high, across * BLOCK)
    padded[: lines.shape[0], : lines.shape[1]] = lines
    blocks = padded.reshape(down, high, across, BLOCK)
    scale = _scale(blocks.abs().amax((1, 3), keepdim=True), quantizer)
    eight = _bytes(blocks * scale, quantizer).reshape(padded.shape)
    return eight[: lines.shape[0], : lines.shape[1]], 1 / scale.reshape(down, across)


def _largest(x: Tensor) -> Tensor:
    return x.abs().max().float() if x.numel() else torch.zeros(())


def _scale(largest: Tensor, quantizer: Any) -> Tensor:
    scale = _LARGEST[quantizer.dtype] / largest.clamp(min=quantizer.amax_epsilon)
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return torch.where(torch.isfinite(scale) & (largest > 0), scale, 1.0)


def _bytes(x: Tensor, quantizer: Any) -> Tensor:
    largest = _LARGEST[quantizer.dtype]
    return x.clamp(-largest, largest).to(DTYPES[quantizer.dtype]).view(torch.uint8)


def _transposed(data: Tensor) -> Tensor:
    return data.reshape(-1, data.shape[-1]).t().reshape(data.shape[-1], *data.shape[:-1])


@kernel
def dequantize(input: Any, otype: int) -> Tensor:
    """The numbers of a tensor with one scale."""
    assert input._data is not None, "the transpose alone cannot be turned back"
    numbers: Tensor = input._data.view(DTYPES[input._fp8_dtype]).float() * input._scale_inv
    return numbers.to(DTYPES[otype])


@kernel
def bgrad_quantize(input: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The sum over the rows, which is the gradient of a bias, and `input` in 8 bits."""
    return input.float().reshape(-1, input.shape[-1]).sum(0).to(input.dtype), quantizer(input)


@kernel
def fp8_transpose(input: Tensor, dtype: int, *, out: Tensor | None = None) -> Tensor:
    """Bytes [..., K] as [K, ...]."""
    assert input.is_contiguous()
    made = _transposed(input).contiguous()
    return made if out is None else out.copy_(made)


@kernel
def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The first two dimensions in the other order."""
    made = tensor.transpose(0, 1).contiguous()
    return made if out is None else out.copy_(made)


@kernel
def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: list[Tensor],
    scales: list[Tensor],
    amax_compute_algo: str,
    fp8_dtype: int,
    margin: float,
) -> None:
    """Take over the largest values of a step: they join the end of each history, whose row 0 is
    emptied for the next step; a scale is made of the largest of all."""
    newest = amax_reduction_buffer.split([history.shape[1] for history in amax_histories])
    for history, scale, found in zip(amax_histories, scales, newest, strict=True):
        last = torch.where(found > 0, found, history[0])
        rolled = torch.cat([history[1:], last[None]])
        largest = rolled.amax(0) if amax_compute_algo == "max" else last
        rolled[0] = 0
        history.copy_(rolled)
        made = _LARGEST[fp8_dtype] / largest / 2**margin
        scale.copy_(torch.where((largest > 0) & torch.isfinite(made), made, scale))


def is_eight_bits(tensor: Any) -> bool:
    """Whether `tensor` is one of TE's, of bytes and scales."""
    return hasattr(tensor, "_fp8_dtype")


def operand(tensor: Any, *, over_rows: bool) -> Tensor:
    """The numbers [N, K] of a factor that is summed over K; its own rows are K if `over_rows`.

    Hopper multiplies 8 bits only where both factors lie with K last: a transpose must be there.
    """
    if not is_eight_bits(tensor):
        matrix: Tensor = tensor.reshape(-1, tensor.shape[-1]).float()
        return matrix.t() if over_rows else matrix
    if hasattr(tensor, "_transpose"):
        data = tensor._transpose if over_rows else tensor._data
        assert data is not None, "8-bit product: no transpose" if over_rows else "no data"
        assert not (over_rows and tensor._transpose_invalid), "8-bit product: an old transpose"
        lines = _lines(data, over_rows)
        return lines.view(DTYPES[tensor._fp8_dtype]).float() * tensor._scale_inv
    _require_ready(tensor)
    data, scales = (
        (tensor._columnwise_data, tensor._columnwise_scale_inv)
        if over_rows
        else (tensor._rowwise_data, tensor._rowwise_scale_inv)
    )
    assert data is not None, f"8-bit product: no {'columnwise' if over_rows else 'rowwise'} data"
    lines = _lines(data, over_rows)
    rows, columns = lines.shape
    if tensor._is_2D_scaled:
        large = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    else:
        large = scales.t().repeat_interleave(BLOCK, 1)
    return lines.view(DTYPES[tensor._fp8_dtype]).float() * large[:rows, :columns]


def _lines(data: Tensor, over_rows: bool) -> Tensor:
    return data.reshape(data.shape[0], -1) if over_rows else data.reshape(-1, data.shape[-1])


def _require_ready(tensor: Any) -> None:
    """Blocks that were quantized to be gathered are turned before they are multiplied."""
    if hasattr(tensor, "_data_format"):
        assert tensor._data_format == MODULE.Float8BlockScaleTensorFormat.GEMM_READY
