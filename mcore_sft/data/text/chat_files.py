"""The tokenizer's files as an export has them: with the chat template and the stop of training.

tokenizer_config.json    eos_token is what the model learned to end an answer with
chat_template.jinja      the markup that was trained; none where the texts held their own

Where that is the tokenizer's own template, those that it has beside it stay too.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcore_sft.data.text.hugging_face import CONFIG, ROLES, TEMPLATE, TEMPLATES
from mcore_sft.data.text.prompt import Prompt
from mcore_sft.data.text.tokenizer import Tokenizer


def save(tokenizer: Tokenizer, prompt: Prompt, folder: Path) -> None:
    """Write files into `folder` from which transformers loads `tokenizer`, to chat as `prompt`."""
    tokenizer.save(folder)
    chat_as(tokenizer, prompt, folder)


def chat_as(tokenizer: Tokenizer, prompt: Prompt, folder: Path) -> None:
    """Make the files of `tokenizer` in `folder` chat as `prompt`."""
    templates = prompt.chat_templates
    if templates != {name: own.source for name, own in tokenizer.chat_templates.items()}:
        (folder / TEMPLATE).unlink(missing_ok=True)
        shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
        _edit(folder / CONFIG, lambda told: told.pop("chat_template", None))
        for name, template in templates.items():
            file = folder / (TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            file.write_text(template, encoding="utf-8")
    named = any("eos_token" in template for template in templates.values())
    if tokenizer.eos_id in prompt.stop_ids or (prompt.is_chat and named):
        return  # a template that names it would write another token
    stop = prompt.stop_tokens[0]
    _edit(folder / CONFIG, lambda told: told.update(eos_token=stop))
    _edit(folder / ROLES, lambda told: told.update(eos_token=stop))  # which may be read last


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON object that is there."""
    if file.exists():
        told = json.loads(file.read_text(encoding="utf-8"))
        change(told)
        file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
