"""A packed dataset in, what it holds for people to read, or what is wrong with it.

python tools/inspect_data.py DIR                                 counts and lengths
python tools/inspect_data.py DIR --pack 3 --tokenizer MODEL      a pack as text, coloured
python tools/inspect_data.py DIR --verify                        checksums, then structure
python tools/inspect_data.py DIR --verify --tokenizer MODEL      and the ids of every example
"""

import argparse
import random
from pathlib import Path
from typing import Any

from mcore_sft import command
from mcore_sft.base.progress import progress
from mcore_sft.base.terminal import Console, Parser
from mcore_sft.data import manifest as manifests
from mcore_sft.data.errors import DataError
from mcore_sft.data.packs.damage import find_damage, find_structural_damage
from mcore_sft.data.packs.dataset import Arrays, PackedDataset
from mcore_sft.data.packs.retokenize import other_ids
from mcore_sft.data.report.report import show_manifest
from mcore_sft.data.report.show import Viewer, length_chart, load_own_tokenizer

_SHOWN = 20
_LEGEND = "green: supervised; dim: not; bold: special tokens"
_HOW_TO_GET_TEXT = "for text, give the tokenizer that made the dataset (--tokenizer DIR)"


def main() -> None:
    """Inspect as the command line says."""
    arguments = _arguments()
    folder: Path = arguments.folder
    console = Console()
    if arguments.verify:
        _verify(folder, arguments.tokenizer, console)
        return
    manifest = manifests.read(folder)
    if arguments.pack is None and arguments.example is None and arguments.random is None:
        _summarize(folder, manifest, arguments.split, console)
        return
    split = arguments.split or next(iter(manifest["splits"]))
    arrays = _open(folder, manifest, split)
    dataset = PackedDataset(folder, split, verify=False)
    tokenizer = load_own_tokenizer(arguments.tokenizer, dataset) if arguments.tokenizer else None
    viewer = Viewer(dataset, arrays, tokenizer, ids=arguments.ids, console=console)
    if arguments.example is not None:
        viewer.example(arguments.example)
    elif arguments.pack is not None:
        viewer.pack(arguments.pack)
    else:
        viewer.pack(random.Random(arguments.random).randrange(len(dataset)))
    legend = _LEGEND if tokenizer else f"{_LEGEND}; {_HOW_TO_GET_TEXT}"
    console.print(legend, style="italic", soft_wrap=True)


def _arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=command.path, metavar="DIR", help="such as results/NAME/data"
    )
    parser.add_argument("--split", metavar="NAME", help="train, validation; default: the first")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pack", type=int, metavar="N", help="show this pack, from 0")
    what.add_argument("--example", type=int, metavar="N", help="show this example, from 0")
    what.add_argument("--random", type=int, metavar="SEED", help="show a pack drawn by this seed")
    what.add_argument("--verify", action="store_true", help="read all of it and name any damage")
    parser.add_argument(
        "--tokenizer",
        type=command.path,
        metavar="DIR",
        help="needed to show text, and to verify ids",
    )
    parser.add_argument("--ids", action="store_true", help="a line for each token, with its id")
    return parser.parse_args()


def _verify(folder: Path, tokenizer: Path | None, console: Console) -> None:
    found = find_damage(folder, console=Console(stderr=True))
    for sentence in found:
        console.print(sentence, soft_wrap=True)
    if found:
        raise DataError(f"{folder}: damaged, see above; run preprocess again with --overwrite")
    manifest = manifests.read(folder)
    verified = _verify_ids(folder, manifest, tokenizer, console) if tokenizer else ""
    console.print(
        f"{folder}: sound ({len(manifest['files'])} files, {', '.join(manifest['splits'])})"
        f"{verified}",
        soft_wrap=True,
    )


def _verify_ids(folder: Path, manifest: dict[str, Any], tokenizer: Path, console: Console) -> str:
    """Compare the ids of every example with those of its text; `DataError` if some differ."""
    first = next(iter(manifest["splits"]))
    own = load_own_tokenizer(tokenizer, PackedDataset(folder, first, verify=False))
    total = sum(split["tokens"] for split in manifest["splits"].values())
    wrong = 0
    with progress("ids", total=total, console=Console(stderr=True)) as advance:
        for split in manifest["splits"]:
            for sentence in other_ids(folder, split, own, advance):
                wrong += 1
                if wrong <= _SHOWN:
                    console.print(sentence, soft_wrap=True)
    if wrong:
        raise DataError(
            f"{folder}: {wrong:,} examples have other ids than their text (the first are above). "
            "Fix: run preprocess again with --overwrite"
        )
    return "; every example has the ids of its text"


def _summarize(folder: Path, manifest: dict[str, Any], only: str | None, console: Console) -> None:
    splits = {
        split: _open(folder, manifest, split) for split in ([only] if only else manifest["splits"])
    }
    show_manifest(manifest, folder, console=console)
    for split, arrays in splits.items():
        counts = manifest["splits"][split]
        share = counts["supervised_tokens"] / counts["tokens"]
        console.print()
        title = f"{split}: {share:.1%} of the tokens are supervised"
        console.print(length_chart(arrays.tokens.lengths, title))


def _open(folder: Path, manifest: dict[str, Any], split: str) -> Arrays:
    """The arrays of a split in which every number points where it should."""
    if split not in manifest["splits"]:
        there = ", ".join(manifest["splits"])
        raise DataError(f"{folder}: no split {split!r}, only {there}; give one (--split NAME)")
    found = next(find_structural_damage(folder, manifest, split, tokens=False), None)
    if found:
        raise DataError(f"{found} (--verify lists all that is wrong)")
    return Arrays.open(folder, split)


if __name__ == "__main__":
    command.run(main)
