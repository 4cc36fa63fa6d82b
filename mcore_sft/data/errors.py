"""What is said when data cannot be used."""

from mcore_sft.base.errors import UserError


class DataError(UserError):
    """A source, a tokenizer, a template or a packed dataset cannot be used."""


def first_line(error: Exception) -> str:
    """The first line of what an error says, or what kind it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class WorkerEnded(DataError):
    """A process that worked on the data was ended from outside; what it had finished is sound."""
