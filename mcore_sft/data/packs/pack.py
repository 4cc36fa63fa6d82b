"""Examples that share one row."""

from dataclasses import dataclass

from mcore_sft.data.text.prompt import Example


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """Examples laid side by side; none of them sees another."""

    examples: tuple[Example, ...]

    @classmethod
    def empty(cls) -> "Pack":
        """A pack without examples: all padding, nothing to learn."""
        return cls(examples=())

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example) for example in self.examples)
