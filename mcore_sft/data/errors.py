"""What is said when data cannot be used."""

from mcore_sft.base.errors import UserError


class DataError(UserError):
    """A source, a tokenizer, a template or a packed dataset cannot be used."""
