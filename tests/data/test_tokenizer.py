import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Plain
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from mcore_sft.data import tokenizer as module
from mcore_sft.data.errors import DataError
from mcore_sft.data.tokenizer import load_tokenizer

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


def test_gigatoken_that_differs_is_found_and_left(monkeypatch, capsys):
    wrong = load_tokenizer(FOLDER)
    exact = [wrong.encode(text) for text in TEXTS]

    class Wrong:
        def encode_batch_list(self, texts):
            return [[*wrong.encode(text), 7] for text in texts]

    monkeypatch.setattr(module, "_load_gigatoken", lambda file: Wrong())
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
        assert tokenizer.chat(messages[:count], add_generation_prompt=asks) == expected


def test_no_chat_template_no_chat(tmp_path):
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).chat([{"role": "user", "content": "hi"}]) is None


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
    assert pieces.special_tokens == ("<s>", "</s>", "[INST]")
    ids = pieces.encode("<s>The answer</s>")
    assert ids == [1, *pieces.encode("The answer"), 2]
    assert pieces.decode(ids) == "<s>The answer</s>"
    assert pieces.decode(ids, skip_special=True) == "The answer"
    assert pieces.encode_batch(["The answer"]) == [pieces.encode("The answer")]


def test_saved_sentencepiece_model_loads_in_transformers(pieces, tmp_path):
    pieces.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "so now there are 8 + 5 = 13."
    assert theirs.encode(text, add_special_tokens=False) == pieces.encode(text)
