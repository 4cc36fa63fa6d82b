"""A stand-in for Transformer Engine 2.11 that computes on CPU, in plain torch.

It has the classes, signatures and refusals that Megatron-core meets. Inputs and weights are
rounded to 8 bits, gradients are not, and no kernel of the real one is here.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
