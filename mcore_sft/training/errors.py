"""What stops a training run, said to the user."""

from mcore_sft.base.errors import UserError


class TrainingError(UserError):
    """The run cannot go on: the data does not fit the model, or the numbers are no numbers."""
