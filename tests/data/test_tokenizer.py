import base64
import json
import shutil
from itertools import pairwise
from pathlib import Path

import awkward
import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from tokenizers import Tokenizer as Plain
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from mcore_sft.data.errors import DataError
from mcore_sft.data.text import codec
from mcore_sft.data.text import tokenizer as module
from mcore_sft.data.text.tokenizer import load_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
FOLDER = FIXTURES / "tokenizer"
TEXTS = [
    json.loads(line)["generated_solution"] + "<|eot_id|>"
    for line in (FIXTURES / "rows.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


def test_roles_come_from_the_files(tokenizer):
    assert tokenizer.vocab_size == 701
    assert tokenizer.bos_id == tokenizer.token_id("<|begin_of_text|>") == 0
    assert tokenizer.eos_id == tokenizer.token_id("<|eot_id|>")
    assert tokenizer.pad_id == tokenizer.token_id("<|finetune_right_pad_id|>")
    assert tokenizer.special_tokens[0] == "<|begin_of_text|>"
    with pytest.raises(DataError, match="no token '<s>'"):
        tokenizer.token_id("<s>")


def test_file_itself_is_the_same_tokenizer(tokenizer, tmp_path):
    alone = shutil.copy(FOLDER / "tokenizer.json", tmp_path / "tokenizer.json")
    other = load_tokenizer(Path(alone))
    named = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert (other.bos_id, other.eos_id, other.pad_id) == named  # by the names of Llama 3
    assert other.encode("1 + 1") == tokenizer.encode("1 + 1")


def test_special_tokens_become_their_ids_and_nothing_is_added(tokenizer):
    bos, eot = tokenizer.bos_id, tokenizer.eos_id
    ids = tokenizer.encode("<|begin_of_text|>a<|eot_id|>")
    assert ids == [bos, *tokenizer.encode("a"), eot]
    assert tokenizer.encode("") == []
    assert tokenizer.decode(ids) == "<|begin_of_text|>a<|eot_id|>"
    assert tokenizer.decode(ids, skip_special=True) == "a"


def test_batch_is_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.gigatoken, "gigatoken knows byte-level BPE"
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS


@pytest.mark.parametrize("gigatoken", [True, False])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_column_is_one_by_one(gigatoken, start, count):
    tokenizer = load_tokenizer(FOLDER, gigatoken=gigatoken)
    texts = ["", *TEXTS][start : start + count]
    column = pa.array(["", *TEXTS], pa.large_string()).slice(start, count)
    ids, offsets = tokenizer.encode_column(column)
    assert tokenizer.gigatoken == gigatoken
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert (offsets[0], offsets[-1], len(offsets)) == (0, len(ids), count + 1)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [
        tokenizer.encode(text) for text in texts
    ]


@pytest.mark.parametrize("count", [64, 100, 1000, 9000, 32_000])
def test_sample_looks_at_prompts_and_answers_alike(monkeypatch, count):
    tokenizer = load_tokenizer(FOLDER)
    tokenizer.encode_batch(TEXTS)  # gigatoken is loaded and proved now
    seen, exact = [], tokenizer._codec.encode_batch
    monkeypatch.setattr(tokenizer._codec, "encode_batch", lambda t: seen.extend(t) or exact(t))
    tokenizer.encode_column(pa.array([str(i % 2) for i in range(count)], pa.large_string()))
    assert len(seen) >= max(16, count // 500)
    assert 0.4 < sum(map(int, seen)) / len(seen) < 0.6


def test_gigatoken_that_cuts_added_tokens_otherwise_is_left(monkeypatch):
    import gigatoken

    class Blind:
        def encode_batch_list(self, texts, parallel):
            return [tokenizer.encode(text.replace("<|", "< |")) for text in texts]

    tokenizer = load_tokenizer(FOLDER)
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda content: Blind())
    plain = ["1 + 1"] * 100  # a sample of these shows nothing
    assert tokenizer.encode_batch(plain) == [tokenizer.encode("1 + 1")] * 100
    assert not tokenizer.gigatoken


def test_gigatoken_that_differs_is_found_and_left(monkeypatch, capsys):
    wrong = load_tokenizer(FOLDER)
    exact = [wrong.encode(text) for text in TEXTS]

    class Wrong:
        def encode_batch(self, texts, parallel):
            return awkward.from_iter([[*wrong.encode(text), 7] for text in texts.to_list()])

    monkeypatch.setattr(module, "_load_gigatoken", lambda codec: Wrong())
    assert wrong.encode_batch(TEXTS) == exact
    assert not wrong.gigatoken
    assert "using the slower `tokenizers`" in capsys.readouterr().err


def test_what_gigatoken_cannot_load_goes_by_tokenizers(tmp_path, capsys):
    words = Plain(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["?", "</s>"]))
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert not tokenizer.gigatoken
    assert "gigatoken" in capsys.readouterr().err


def test_saved_tokenizer_loads_in_transformers_and_here(tokenizer, tmp_path):
    alone = load_tokenizer(Path(shutil.copy(FOLDER / "tokenizer.json", tmp_path)))
    for number, one in enumerate((tokenizer, alone)):
        folder = tmp_path / f"saved{number}"
        one.save(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.encode(TEXTS[0], add_special_tokens=False) == one.encode(TEXTS[0])
        assert theirs.eos_token == "<|eot_id|>"
        assert load_tokenizer(folder).fingerprint == one.fingerprint


def test_chat_renders_as_transformers_does(tokenizer):
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    messages = [{"role": "user", "content": " 1 + 1? "}, {"role": "assistant", "content": "2"}]
    for count, asks in ((1, True), (2, False)):
        expected = theirs.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=asks
        )
        assert (
            tokenizer.chat_template.render(messages[:count], add_generation_prompt=asks) == expected
        )


def test_no_chat_template_no_chat(tmp_path):
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None


def test_fingerprint_follows_what_decides_the_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["eos_token"] = "<|end_of_text|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_tokenizer(tmp_path).fingerprint != tokenizer.fingerprint


def test_absent_or_broken_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer here.*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        control_symbols=["[INST]"],
        minloglevel=2,
    )
    return load_tokenizer(folder)


def test_sentencepiece_model(pieces):
    assert pieces.vocab_size == 400
    assert (pieces.bos_id, pieces.eos_id) == (1, 2)
    assert pieces.special_tokens == ("<unk>", "<s>", "</s>", "[INST]")
    ids = pieces.encode("<s>The answer</s>")
    assert (ids[0], ids[-1], pieces.spell(ids)) == (1, 2, "<s>The answer</s>")
    assert pieces.decode(ids) == "<s>The answer</s>"
    assert pieces.decode(ids, skip_special=True) == "The answer"
    assert pieces.encode_batch(["The answer"]) == [pieces.encode("The answer")]


def test_saved_sentencepiece_model_loads_in_transformers(pieces, tmp_path):
    pieces.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "so now there are 8 + 5 = 13."
    assert theirs.encode(text, add_special_tokens=False) == pieces.encode(text)


WORDS = (  # of Llama 3, which gigatoken knows
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"<|begin_of_text|>": 901, "<|eot_id|>": 903, "<|end|>": 910}


@pytest.fixture(scope="module")
def ranks():
    """The tokens of the fixture in tiktoken's way: bytes and the order in which they are merged."""
    made = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    letters = {letter: byte for byte, letter in codec._letters().items()}
    added = {token["content"] for token in made["added_tokens"]}
    words = sorted(made["model"]["vocab"].items(), key=lambda item: item[1])
    tokens = [bytes(map(letters.__getitem__, word)) for word, _ in words if word not in added]
    # The last one cannot be made by merges: it is only found as a whole word.
    return {token: rank for rank, token in enumerate([*tokens, b"xyz"])}


def write_ranks(ranks, folder, name="tokenizer.model"):
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in reversed(ranks.items())]
    (folder / name).write_bytes(b"".join(lines))
    described = json.dumps({"pat_str": WORDS, "special_tokens": SPECIAL})
    (folder / "tiktoken.json").write_text(described, encoding="utf-8")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.tiktoken"])
def test_tiktoken_file_has_tiktokens_ids(ranks, tmp_path, name):
    write_ranks(ranks, tmp_path, name)
    theirs = tiktoken.Encoding(
        "theirs", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=SPECIAL
    )
    texts = [
        *TEXTS,
        *(letter * n for letter in " \n=a1" for n in range(1, 30)),
        "<|end|>é\x00",
        "xyz",
        "wxyz",
    ]
    wanted = theirs.encode_batch(texts, allowed_special="all")
    for path in (tmp_path, tmp_path / name):
        ours = load_tokenizer(path)
        assert [ours.encode(text) for text in texts] == wanted
        assert ours.encode_batch(texts) == wanted
        assert ours.gigatoken
        assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (901, 903, 911)
        assert ours.special_tokens == tuple(SPECIAL)
        assert [ours.decode(ids) for ids in wanted] == texts


def test_tiktoken_file_is_saved_for_transformers(ranks, tmp_path):
    write_ranks(ranks, tmp_path)
    ours = load_tokenizer(tmp_path)
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS[:20]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.eos_token == "<|eot_id|>"
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (None, r"tiktoken\.json: not there, but ranks of tiktoken do not say how words are cut"),
        ("{", r"tiktoken\.json: cannot be used .* expected \{\"pat_str\""),
        ('{"pat_str": 1, "special_tokens": {}}', "pat_str is not text"),
        ('{"pat_str": "a", "special_tokens": {"<s>": 3}}', "the number of another token"),
    ],
)
def test_tiktoken_file_guesses_nothing(ranks, tmp_path, described, said):
    write_ranks(ranks, tmp_path)
    (tmp_path / "tiktoken.json").unlink()
    if described is not None:
        (tmp_path / "tiktoken.json").write_text(described, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        load_tokenizer(tmp_path)


def test_broken_tiktoken_files_are_named(ranks, tmp_path):
    write_ranks(ranks, tmp_path)
    file = tmp_path / "tokenizer.model"
    whole = file.read_bytes()
    for content, said in (
        (whole[:-2] + b"\n", "two tokens have the same rank|expected a token in base64"),
        (whole + b"a b c\n", r"tokenizer\.model:\d+: b'a b c', expected a token in base64"),
        (b"\n".join(whole.splitlines()[:100]), "no rank for the byte"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=said):
            load_tokenizer(tmp_path)
