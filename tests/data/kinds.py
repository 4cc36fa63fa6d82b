"""Folders with a small tokenizer of each kind that models have."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import sentencepiece
import transformers

FIXTURES = Path(__file__).parent.parent / "fixtures"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def model() -> bytes:
    """A sentencepiece model with two control pieces, and pieces of spaces in another order."""
    rows = (FIXTURES / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["generated_solution"].replace("\n", " ") for row in rows]
    folder = Path(mkdtemp())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "user", "assistant"] * 3),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    made = (folder / "m.model").read_bytes()
    shutil.rmtree(folder)
    return made


@cache
def converted() -> str:
    """The tokenizer.json that transformers makes of `model`."""
    folder = Path(mkdtemp())
    write(folder, {"tokenizer.model": model()}, tokenizer_class="LlamaTokenizer", legacy=False)
    made = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    shutil.rmtree(folder)
    return str(made)


def write(folder: Path, files: dict[str, bytes], **config: Any) -> None:
    """A tokenizer's files."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def of_json(told: str, change: Callable[[dict[str, Any]], object], **flags: Any) -> Any:
    """A tokenizer.json with the marks of ChatML, changed."""
    made = json.loads(told)
    number = 1 + max(made["model"]["vocab"].values())
    flags = {**FLAGS, "special": True, **flags}
    for at, content in enumerate(MARKS):
        made["added_tokens"].append({"id": number + at, "content": content, **flags})
    change(made)
    return {"tokenizer.json": json.dumps(made).encode()}


def metaspace(scheme: str) -> Callable[[dict[str, Any]], None]:
    def change(made: dict[str, Any]) -> None:
        made["pre_tokenizer"]["prepend_scheme"] = scheme

    return change


def prepend(made: dict[str, Any]) -> None:
    """As the files of Llama 2 and Zephyr."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, replace]
    made["normalizer"] = {"type": "Sequence", "normalizers": steps}
    made["pre_tokenizer"] = None


def normalized(kind: str) -> Callable[[dict[str, Any]], None]:
    return lambda made: made.update(normalizer={"type": kind})


def prefixed(made: dict[str, Any]) -> None:
    made["pre_tokenizer"]["add_prefix_space"] = True


def nothing(made: dict[str, Any]) -> None:
    """Leave it as it is."""


def folder_of(kind: str, folder: Path) -> Path:
    """A folder with a tokenizer of this kind, and ChatML as its template."""
    bytes_ = (FIXTURES / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    added = {name: 420 + at for at, name in enumerate(MARKS)}
    spm = {"tokenizer.model": model(), "added_tokens.json": json.dumps(added).encode()}
    decoder = {
        str(number): {"content": name, "special": True, **FLAGS} for name, number in added.items()
    }
    llama: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files, config = {
        "spm": lambda: (spm, {**llama, "legacy": False}),
        "spm legacy": lambda: (spm, {**llama, "legacy": True}),
        "metaspace first": lambda: (of_json(converted(), metaspace("first")), plain),
        "metaspace always": lambda: (of_json(converted(), metaspace("always")), plain),
        "metaspace never": lambda: (of_json(converted(), metaspace("never")), plain),
        "prepend": lambda: (of_json(converted(), prepend), plain),
        "prepend, as LlamaTokenizer": lambda: (
            of_json(converted(), prepend),
            {"tokenizer_class": "LlamaTokenizerFast"},
        ),
        "bytes": lambda: (of_json(bytes_, nothing), plain),
        "bytes behind a space": lambda: (of_json(bytes_, prefixed), plain),
        "bytes, NFC": lambda: (of_json(bytes_, normalized("NFC")), plain),
        "bytes, NFKC": lambda: (of_json(bytes_, normalized("NFKC")), plain),
        "bytes, marks that strip": lambda: (of_json(bytes_, nothing, rstrip=True), plain),
        "bytes, marks that are ordinary": lambda: (of_json(bytes_, nothing, special=False), plain),
    }[kind]()
    bos = "<|begin_of_text|>" if kind.startswith("bytes") else "<s>"
    write(folder, files, bos_token=bos, eos_token="<|im_end|>", chat_template=CHATML, **config)
    return folder


KINDS = (
    *("spm", "spm legacy", "metaspace first", "metaspace always", "metaspace never", "prepend"),
    *("prepend, as LlamaTokenizer", "bytes", "bytes behind a space", "bytes, NFC", "bytes, NFKC"),
    *("bytes, marks that strip", "bytes, marks that are ordinary"),
)
