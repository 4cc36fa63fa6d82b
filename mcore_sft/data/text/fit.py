"""A tokenizer and the folder of a model in, an error out if they do not belong together.

A tokenizer of another model gives ids that the model knows as other texts: the loss falls all the
same, and what was learned before is lost.
"""

from pathlib import Path

from mcore_sft.base.model_folder import is_file, read_json
from mcore_sft.data.errors import DataError
from mcore_sft.data.text.codec import read_codec
from mcore_sft.data.text.tokenizer import Tokenizer, tokenizer_file

_FIX = "Fix: leave model.tokenizer out, or name the tokenizer that belongs to model.path."


def check_fit(tokenizer: Tokenizer, model: Path, rows: int | None = None) -> int | None:
    """`DataError` if `tokenizer` does not give the ids that the folder `model` was trained with.

    Every id must be the same token as in the folder's own tokenizer, where it has one, and no
    learned token may be missing. The model may have more `rows` (without them, those of its
    config.json) than there are tokens. Returns the id of a pad token that is added to the
    vocabulary, which must never reach the model; None if there is none.
    """
    rows = _rows(model) if rows is None else rows
    own = _own(tokenizer, model)
    size = len(own) if own else rows
    added = {
        number
        for number in tokenizer.vocab.values()
        if (rows is not None and number >= rows) or (own and number not in own)
    }
    if not added:
        return None
    pad = tokenizer.named_pad_id
    if added == {pad} and pad not in (tokenizer.bos_id, tokenizer.eos_id):
        return pad
    raise DataError(
        f"{tokenizer.path}: the tokenizer has {len(tokenizer.vocab)} tokens, but the model {model} "
        f"has a vocabulary of {size}, to which one pad token may be added (got "
        f"{tokenizer.decode([min(added)])!r}, {min(added)}). {_FIX}"
    )


def _rows(model: Path) -> int | None:
    """Rows of the model's embedding, where that is known; raises `UserError`."""
    file = model / "config.json"
    if not is_file(file):
        return None
    config = read_json(file)
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    return rows if isinstance(rows, int) else None


def _own(tokenizer: Tokenizer, model: Path) -> dict[int, str] | None:
    """The tokens of the model's own tokenizer, if it has another; `DataError` if they disagree."""
    file = tokenizer_file(model)
    if file is None or file == tokenizer_file(tokenizer.path):
        return None
    codec = read_codec(file)
    own = {number: token for token, number in codec.vocab.items()}
    for token, number in tokenizer.vocab.items():
        if own.get(number, token) != token:
            raise DataError(
                f"{tokenizer.path}: the tokenizer's token {number} is {token!r} (expected "
                f"{own[number]!r}, as in the model's own {file}). {_FIX}"
            )
    missing = own.keys() - set(tokenizer.vocab.values()) - {codec.vocab[t] for t in codec.added}
    if missing:
        raise DataError(
            f"{tokenizer.path}: {len(missing)} tokens of the model's own {file} are missing, such "
            f"as {own[min(missing)]!r} ({min(missing)}). {_FIX}"
        )
    return own
