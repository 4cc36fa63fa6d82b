"""Matrix products: cuBLAS, in fp32, with what it demands of factors of 8 bits."""

import math
from typing import Any

from torch import Tensor

from tests.te.extension import CALLS, DTYPES, kernel
from tests.te.quantizers import is_eight_bits, operand


@kernel
def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """B A^T with each factor as it is or transposed, and the gradient of the bias: [D, dbias]."""
    assert not gelu, "no layer of ours has this epilogue"
    assert comm_overlap is None
    assert extra_output is None
    assert accumulate or not beta
    eight = is_eight_bits(A)
    assert eight == is_eight_bits(B), "one factor alone has 8 bits"
    if eight:
        CALLS["products in 8 bits"] += 1
    else:
        assert A.dtype == B.dtype, (A.dtype, B.dtype)
    left, right = operand(B, over_rows=transB), operand(A, over_rows=not transA)
    if eight:
        for factor in (left, right):
            # A line of 8-bit numbers is a multiple of 16 bytes, so one of outputs is too.
            assert factor.shape[1] % 16 == 0, (
                f"8-bit product over {factor.shape[1]}, no multiple of 16"
            )
            assert factor.shape[0] % 8 == 0, f"8-bit product of {factor.shape[0]} rows, not of 8"
    product = alpha * (left @ right.t())
    if bias is not None and not grad:
        product += bias.float()
    dbias = None if bias is None or not grad else left.sum(1).to(DTYPES[bias_type])
    if not transB and not eight:
        product = product.reshape(*B.shape[:-1], product.shape[-1])
    elif not transB:
        product = product.reshape(*_rows(B), product.shape[-1])
    return [_written(product, A, D, quantizer, output_dtype, accumulate), dbias, gelu_in, None]


def _rows(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor of 8 bits, without the last dimension."""
    data = tensor._data if hasattr(tensor, "_data") else tensor._rowwise_data
    return tuple(data.shape[:-1])


def _written(
    product: Tensor,
    A: Any,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: int | None,
    accumulate: bool,
) -> Any:
    """The output where it is wanted, in the type that is wanted."""
    if D is None:
        assert not accumulate
        dtype = DTYPES[output_dtype] if output_dtype is not None else A.dtype
        made = product.to(dtype)
        return made if quantizer is None else quantizer(made)
    assert D.shape == product.shape, (D.shape, product.shape)
    assert output_dtype is None or D.dtype == DTYPES[output_dtype]
    assert math.prod(D.shape) == 0 or D.is_contiguous()
    if accumulate:
        CALLS["products added in place"] += 1
        return D.add_(product.to(D.dtype))
    return D.copy_(product)


@kernel
def get_num_cublas_streams() -> int:
    """As the library says."""
    return 4


@kernel
def get_cublasLt_version() -> int:
    """That of CUDA 13.0."""
    return 130000
