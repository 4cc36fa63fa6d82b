"""How many micro-batches in a row a chunk of an interleaved pipeline stage takes."""


def group_size(micro_batches: int, stages: int) -> int:
    """The smallest group of at least `stages` micro-batches that Megatron-core accepts.

    It refuses a last group that is smaller than `stages`; the larger a group, the more activations
    are kept. There must be `stages` micro-batches.
    """
    sizes = range(stages, micro_batches + 1)
    return next(size for size in sizes if not 0 < micro_batches % size < stages)
