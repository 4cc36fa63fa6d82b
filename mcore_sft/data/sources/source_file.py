"""A file of a source as it was when the sources were surveyed; one that changes is an error."""

from dataclasses import dataclass
from pathlib import Path

from mcore_sft.data.errors import DataError


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when the sources were surveyed."""

    path: Path
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "SourceFile":
        """The file as it is now."""
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    @property
    def kind(self) -> str:
        """The ending of its name in lower case, which says what it is read as."""
        return self.path.suffix.lower()

    def require_unchanged(self) -> None:
        """`DataError` if the file is not what it was."""
        try:
            unchanged = SourceFile.of(self.path) == self
        except OSError:
            unchanged = False
        if not unchanged:
            raise changed(self.path)


def changed(path: Path) -> DataError:
    """The error for a file that is not what it was."""
    return DataError(
        f"{path}: it changed while it was read; run again when nothing writes to it any more"
    )
