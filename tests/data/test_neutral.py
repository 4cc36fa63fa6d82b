"""What a run does that is told nothing but its rows and its model."""

import io
import json
import shutil
from pathlib import Path

import pytest

from mcore_sft.base.terminal import Console
from mcore_sft.config import DataConfig, PromptConfig
from mcore_sft.data.encode.job import Job
from mcore_sft.data.errors import DataError
from mcore_sft.data.report.preview import preview
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
BARE = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
ASKS = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def tokenizer(folder: Path, *, template: bool) -> Tokenizer:
    """That of the tests, with its own chat template or without one."""
    shutil.copytree(FIXTURES / "tokenizer", folder)
    if not template:
        described = folder / "tokenizer_config.json"
        told = json.loads(described.read_text())
        told.pop("chat_template", None)
        described.write_text(json.dumps(told))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return load_tokenizer(folder)


def test_the_template_is_the_tokenizers_own(tmp_path):
    prompt = Prompt.load(PromptConfig(), tokenizer(tmp_path / "a", template=True))
    assert prompt.describe() == {"template": "chat", "instruction": None}
    assert "math" not in prompt.text("Translate cat to French")


def test_a_template_must_be_named_where_there_is_none(tmp_path):
    bare = tokenizer(tmp_path / "a", template=False)
    with pytest.raises(DataError, match=r"no chat template of its own\. Fix: prompt\.template="):
        Prompt.load(PromptConfig(), bare)
    text = Prompt.load(PromptConfig(template="llama3"), bare).text("cat?")
    assert text == BARE.format("cat?") + ASKS  # no instruction, no system block
    said = Prompt.load(PromptConfig(template="llama3", system="Be brief."), bare).text("cat?")
    assert "system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user" in said


def test_markup_that_is_no_token_is_named(tmp_path):
    markup = {"user_begin": "<|im_start|>user\n", "assistant_begin": "<|im_start|><|im_sep|>"}
    ends = {"assistant_end": "<|eot_id|>", "stop_phrases": ["<|eot_id|>"]}
    (tmp_path / "own.yaml").write_text(json.dumps(markup | ends))
    with pytest.raises(DataError, match=r"of a file: it writes <\|im_start\|>, <\|im_sep\|>, whi"):
        Prompt.load(
            PromptConfig(template=str(tmp_path / "own.yaml")),
            load_tokenizer(FIXTURES / "tokenizer"),
        )


def test_columns_that_were_recognised_are_told(tmp_path):
    row = {"question": "Translate cat to French", "answer": "chat"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "blank.jsonl").write_text("")
    own = load_tokenizer(FIXTURES / "tokenizer")
    for names, said in ((["rows"], None), (["rows", "blank"], "'blank.jsonl': it holds no row")):
        sources = [{"path": f"{name}.jsonl"} for name in names]
        data = DataConfig.model_validate({"root": tmp_path, "train": sources, "workers": 1})
        told, shown = (Console(file=io.StringIO(), width=200) for _ in range(2))
        prompt = Prompt.load(PromptConfig(template="llama3"), own)
        job = Job(config=data, prompt=prompt, tokenizer=own, console=told)
        if said is None:
            preview(job, 1, console=shown)
        else:
            with pytest.raises(DataError, match=said):
                preview(job, 1, console=shown)
        assert BARE.format("Translate cat to French") + ASKS + "chat<|eot_id|>" in (
            shown.file.getvalue()
        )
        assert told.file.getvalue() == "rows.jsonl: using columns question and answer\n"
