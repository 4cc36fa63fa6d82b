"""What is wrong with a checkpoint or a Hugging Face folder, said to the user."""

from mcore_sft.base.errors import UserError


class CheckpointError(UserError):
    """A checkpoint or a Hugging Face folder cannot be read or written."""
