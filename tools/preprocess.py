"""Text in, packed dataset out: python tools/preprocess.py --config configs/X.yaml [--show N]."""

from rich.console import Console

from mcore_sft import command
from mcore_sft.data.prepare import check_fit, prepare
from mcore_sft.data.prompt import Prompt
from mcore_sft.data.report import show_examples, show_manifest
from mcore_sft.data.tokenizer import load_tokenizer


def main() -> None:
    """Tokenize, pack and write the sources of an experiment, or only show some of its examples."""
    parser = command.parser("text -> packed dataset")
    parser.add_argument(
        "--show",
        type=int,
        metavar="N",
        help="print N examples, trained tokens green; write nothing",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset there")
    arguments = parser.parse_intermixed_args()
    config = command.experiment(arguments)

    tokenizer = load_tokenizer(config.model.tokenizer_path)
    check_fit(tokenizer, config.model.path)
    prompt = Prompt.load(config.prompt, tokenizer)
    if arguments.show is not None:
        show_examples(config.data, arguments.show, prompt, tokenizer, console=Console())
        return
    manifest = prepare(
        config.data,
        config.packed,
        prompt=prompt,
        tokenizer=tokenizer,
        console=Console(stderr=True),
        overwrite=arguments.overwrite,
    )
    show_manifest(manifest, config.packed, console=Console())


if __name__ == "__main__":
    command.run(main)
