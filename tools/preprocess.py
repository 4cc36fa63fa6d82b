"""Text in, packed dataset out: python tools/preprocess.py --config configs/X.yaml [--show N]."""

import argparse

from mcore_sft import command
from mcore_sft.base.model_folder import is_file
from mcore_sft.base.terminal import Console, Parser, say
from mcore_sft.config import RunConfig
from mcore_sft.data.encode.job import Job
from mcore_sft.data.export import export_json_lines
from mcore_sft.data.prepare import merge, prepare, prepare_shard
from mcore_sft.data.report.preview import preview
from mcore_sft.data.report.report import show_manifest
from mcore_sft.data.text.chat import require_asked
from mcore_sft.data.text.fit import check_fit
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer


def main() -> None:
    """Tokenize, pack and write the sources of an experiment, or only show some of its examples."""
    arguments = _parser().parse_intermixed_args()
    config = command.experiment(arguments)
    job = _job(config)
    if arguments.show is not None:
        preview(job, arguments.show, console=Console())
    elif arguments.export_jsonl is not None:
        rows = export_json_lines(job, arguments.export_jsonl, overwrite=arguments.overwrite)
        say(f"{arguments.export_jsonl}: {rows:,} rows")
    elif arguments.shard is not None:
        index, count = arguments.shard
        shard = prepare_shard(
            job, config.packed, index=index, count=count, overwrite=arguments.overwrite
        )
        say(f"{shard}: shard {index} of {count}; when all are there: --merge {count}")
    else:
        overwrite = arguments.overwrite
        if arguments.merge is None:
            manifest = prepare(job, config.packed, overwrite=overwrite)
        else:
            manifest = merge(job, config.packed, count=arguments.merge, overwrite=overwrite)
        show_manifest(manifest, config.packed, console=Console())


def _parser() -> Parser:
    parser = command.parser("text -> packed dataset")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--show",
        type=_count,
        metavar="N",
        help="print N examples of each source, trained tokens green; write nothing",
    )
    instead.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="encode every N-th block, from I (0 to N - 1), on this machine",
    )
    instead.add_argument(
        "--merge", type=_count, metavar="N", help="make the dataset of the N shards"
    )
    instead.add_argument(
        "--export-jsonl",
        type=command.path,
        metavar="FILE",
        help="write data.train, without what data.holdout keeps for validation, as NeMo-Skills' "
        "plain JSON lines (expected_answer, input, output)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset there")
    return parser


def _job(config: RunConfig) -> Job:
    tokenizer = load_tokenizer(config.model.tokenizer_path, gigatoken=config.data.gigatoken)
    if tokenizer.caveat:
        say(f"{tokenizer.path}: {tokenizer.caveat}", error=True)
    unfed = check_fit(tokenizer, config.model.path)
    if is_file(config.model.path / "config.json"):  # what training would refuse, hours earlier
        # Imported here, because the processes that tokenize load this module and need no torch.
        from mcore_sft.model import families

        families.read(config.model.path).check_length(config.data.sequence_length)
    prompt = Prompt.load(config.prompt, tokenizer)
    if prompt.is_chat:
        require_asked(tokenizer, config.prompt.variables, config.prompt.date)
    return Job(
        config=config.data,
        prompt=prompt,
        tokenizer=tokenizer,
        console=Console(stderr=True),
        unfed=unfed,
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, given {text!r}")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, given {text!r}")
    return int(index), int(count)


if __name__ == "__main__":
    command.run(main)
