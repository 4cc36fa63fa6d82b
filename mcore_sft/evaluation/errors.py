"""The error of this room."""

from mcore_sft.base.errors import UserError


class EvaluationError(UserError):
    """An evaluation cannot go on; the message says where, why and what mends it."""
