import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcore_sft.data.rows import Chats
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
ASKED = {"role": "user", "content": "What is the capital of France?"}
SAID = {"role": "assistant", "content": "It is Paris,  since 987."}
TALKS = [
    [ASKED, SAID],
    [
        ASKED,
        SAID,
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": " Yes.\n"},
    ],
    [{"role": "system", "content": "Be brief."}, ASKED, SAID],
]


def get(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "get_small_model.py"), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    done = get(tmp_path)
    assert done.returncode
    assert done.stderr == f"error: {tmp_path}: is there already; name a new folder with --output\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    done = get(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_its_own_template_writes_conversations(model: Path) -> None:
    """Its BOS opens every turn."""
    theirs, tokenizer = AutoTokenizer.from_pretrained(model), load_tokenizer(model)
    prompt = Prompt("chat", None, tokenizer)
    for talk in TALKS:
        rows = Chats(name="a.jsonl", numbers=np.ones(1, np.int64), messages=[talk])
        examples, dropped = prompt.encode(rows)
        assert not dropped
        whole = theirs.apply_chat_template(talk, return_dict=False)
        ids = examples.tokens.tolist()
        assert ids == whole[: len(ids)]
        assert theirs.decode(whole[len(ids) :]) == "\n"
        trained = [theirs.decode(ids[begin:end]) for begin, end in examples.spans.tolist()]
        said = [message["content"] for message in talk if message["role"] == "assistant"]
        assert trained == [f"{text}<|im_end|>" for text in said]


@pytest.mark.slow
def test_it_answers(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = tokenizer.apply_chat_template(
        [ASKED], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    loaded = AutoModelForCausalLM.from_pretrained(model)
    made = loaded.generate(**asked, max_new_tokens=16, do_sample=False)[0]
    text = tokenizer.decode(made[asked["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
