"""RMSNorm and SwiGLU, forward and backward, in fp32."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.te.extension import DTYPES, kernel


@kernel
def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """The norm of each row [N, C], None, and the inverse roots [N]."""
    assert not zero_centered_gamma
    assert input.dim() == 2
    assert input.is_contiguous()
    x = input.float()
    rsigma = torch.rsqrt(x.square().mean(-1) + eps)
    normal = (x * rsigma[:, None] * weight.float()).to(DTYPES[otype])
    if quantizer is not None:
        made = quantizer.quantize(normal, out=ln_out)
    else:
        made = normal if ln_out is None else ln_out.copy_(normal)
    return [made, None, rsigma]


@kernel
def rmsnorm_bwd(
    dz: Tensor,
    x: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    """The gradients of x [N, C] and of the weight [C]."""
    assert not zero_centered_gamma
    assert dz.shape == x.shape
    assert dz.dtype == x.dtype, (dz.dtype, x.dtype)
    gradient, normal = dz.float(), x.float() * rsigma[:, None]
    scaled = gradient * gamma.float()
    dx = rsigma[:, None] * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (gradient * normal).sum(0).to(gamma.dtype)]


@kernel
def swiglu(input: Tensor, quantizer: Any) -> Any:
    """silu(a) b of rows [..., a b]."""
    assert input.is_contiguous()
    gate, up = input.float().chunk(2, -1)
    made = (functional.silu(gate) * up).to(input.dtype)
    return made if quantizer is None else quantizer(made)


@kernel
def dswiglu(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
    """The gradient of the rows [..., a b]."""
    assert grad.dtype == fwd_input.dtype
    gate, up = fwd_input.float().chunk(2, -1)
    share = torch.sigmoid(gate)
    slope = share * (1 + gate * (1 - share))
    of = grad.float()
    made = torch.cat((of * up * slope, of * gate * share), -1).to(grad.dtype)
    return made if quantizer is None else quantizer(made)
