"""A conversation and its ids in, the same from transformers; `DataError` where they differ.

What engines run is apply_chat_template of transformers; on a sample of every dataset it is run too.
"""

from collections.abc import Sequence

from mcore_sft.data.errors import DataError
from mcore_sft.data.text.chat_template import Messages, Tools
from mcore_sft.data.text.tokenizer import Tokenizer


def require_same_ids(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    messages: Messages,
    tools: Tools | None,
    *,
    template: str | None,
    asks: bool,
) -> None:
    """`DataError` if apply_chat_template has other ids than `ids` for a conversation.

    template: the chat template, if it is not the tokenizer's own. asks: whether it asks for an
    answer at the end.
    """
    try:
        expected = tokenizer.hugging_face.apply_chat_template(
            list(messages),
            tools=list(tools) if tools is not None else None,
            chat_template=template,
            add_generation_prompt=asks,
            return_dict=False,
        )
    except DataError:
        raise
    except Exception as error:  # a template is a program
        said = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{tokenizer.path}: transformers refuses this conversation, which was written here "
            f"({type(error).__name__}: {said:.300}). Fix: mend the chat template"
        ) from None
    if said := differ(tokenizer, ids, expected):
        raise DataError(f"{tokenizer.path}: {said}")


def differ(tokenizer: Tokenizer, found: Sequence[int], expected: Sequence[int]) -> str:
    """Where ids differ from those of transformers, in a sentence; nothing where they do not."""
    if found == expected:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
        min(len(found), len(expected)),
    )
    return (
        f"token {at} is {_token(tokenizer, found, at)} (expected "
        f"{_token(tokenizer, expected, at)}, as transformers has it), behind "
        f"{tokenizer.spell(found[max(0, at - 8) : at])!r}. Fix: give the tokenizer's files as the "
        "model has them; data.gigatoken=false may avoid it"
    )


def _token(tokenizer: Tokenizer, ids: Sequence[int], at: int) -> str:
    if at >= len(ids):
        return "the end"
    return f"{ids[at]} {tokenizer.spell([ids[at]])!r}"
