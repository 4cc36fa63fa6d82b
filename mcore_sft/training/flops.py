"""How many operations a step needs, for the share of the device's peak that they take (MFU)."""

from mcore_sft.model.architecture import Architecture


def step_flops(a: Architecture, *, tokens: int, supervised: int, squares: float) -> float:
    """Operations of one step, forward and backward, that a model of shape `a` cannot do without.

    As PaLM (arXiv 2204.02311, appendix B): a multiplication and an addition for each weight and
    token, twice as many backward, 6 in all; for the scores and the values of attention
    12 x layers x heads x head_dim x length^2 for a document. Halved here, since a token sees those
    before it alone, as Megatron-LM counts too. Unlike PaLM's, the output layer is counted for
    `supervised` tokens alone, padding for nothing, and what is computed a second time (activation
    recomputation) not again. `squares` is the sum of length^2 over the documents.
    """
    weights = a.layers * a.layer_size(matrices=True)
    scores = a.layers * a.heads * a.head_dim
    return 6.0 * (weights * tokens + a.hidden * a.vocab * supervised + scores * squares)
