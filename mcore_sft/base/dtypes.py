"""Number formats: what torch and safetensors call those that a configuration names."""

from typing import NamedTuple


class Names(NamedTuple):
    """One format elsewhere."""

    torch: str
    safetensors: str


DTYPES = {
    "fp64": Names("float64", "F64"),
    "fp32": Names("float32", "F32"),
    "fp16": Names("float16", "F16"),
    "bf16": Names("bfloat16", "BF16"),
}
"""Those of weights that are not quantized, by our names."""

BY_TORCH = {names.torch: name for name, names in DTYPES.items()}
BY_SAFETENSORS = {names.safetensors: name for name, names in DTYPES.items()}
