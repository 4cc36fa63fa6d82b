"""What a packed dataset holds, for people: examples with their trained tokens, and the counts."""

from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from mcore_sft.config import DataConfig
from mcore_sft.data.conversation import Conversation, read_source
from mcore_sft.data.prompt import Dropped, Example, Prompt
from mcore_sft.data.show import coloured
from mcore_sft.data.tokenizer import Tokenizer


def show_examples(
    config: DataConfig, count: int, prompt: Prompt, tokenizer: Tokenizer, *, console: Console
) -> None:
    """Print the first `count` examples: trained tokens green, the others dim."""
    sources = (read_source(source, root=config.root) for source in config.train)
    for conversation in islice(chain.from_iterable(sources), count):
        made = prompt.examples([conversation])[0]
        if isinstance(made, Dropped):
            console.print(Rule(f"{conversation.where}: dropped ({made.reason})", align="left"))
            continue
        console.print(Rule(_title(conversation, made, config.sequence_length), align="left"))
        console.print(coloured(made, tokenizer))


def show_manifest(manifest: Mapping[str, Any], folder: Path, *, console: Console) -> None:
    """Print counts, drops by reason and packing of every split, and where they lie."""
    splits = manifest["splits"]
    table = Table("", *splits, title="packed dataset")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "rows": "rows read",
        "examples": "examples kept",
        "tokens": "tokens",
        "supervised_tokens": "supervised tokens",
        "longest": "longest example",
        "packs": f"packs of {manifest['sequence_length']:,}",
        "examples_per_pack": "examples per pack",
    }
    for key, label in rows.items():
        table.add_row(label, *(f"{counts[key]:,}" for counts in splits.values()))
    table.add_row(
        "packing efficiency", *(f"{counts['packing_efficiency']:.2%}" for counts in splits.values())
    )
    if any(counts["contaminated_problems"] for counts in splits.values()):
        shared = (counts["contaminated_problems"] for counts in splits.values())
        table.add_row("problems like a benchmark's", *(f"{number:,}" for number in shared))
    for reason in sorted({reason for counts in splits.values() for reason in counts["dropped"]}):
        dropped = (counts["dropped"].get(reason, 0) for counts in splits.values())
        table.add_row(f"dropped: {reason}", *(f"{number:,}" for number in dropped))
    console.print(table)
    console.print(f"{folder}  {manifest['fingerprint'][:12]}", soft_wrap=True)


def _title(conversation: Conversation, example: Example, longest: int) -> str:
    trained = int((example.spans[:, 1] - example.spans[:, 0]).sum())
    title = f"{conversation.where}: {len(example)} tokens, {trained} trained"
    return f"{title}; dropped (longer than {longest})" if len(example) > longest else title
