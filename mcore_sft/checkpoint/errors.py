"""What is wrong with a checkpoint or a Hugging Face folder, said to the user."""

from mcore_sft.base.errors import UserError


class CheckpointError(UserError):
    """A checkpoint or a Hugging Face folder cannot be read or written."""


class Damaged(CheckpointError):
    """A checkpoint is not as it was written: a run may set it aside and use an older one."""


class Misnamed(CheckpointError):
    """A folder has the number of another step than it holds."""


class Gone(CheckpointError):
    """A checkpoint was removed or moved while it was read."""
