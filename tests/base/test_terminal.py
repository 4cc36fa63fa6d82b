import io

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mcore_sft.base.terminal import Console, printable

HOSTILE = "a\x1b]0;title\x1b\\b\x1b[31mred\x9b2J\u202e[/v2] :smile: [bold]"
SHOWN = r"a\x1b]0;title\x1b\b\x1b[31mred\x9b2J\u202e[/v2] :smile: [bold]"


def test_characters_that_a_terminal_obeys_are_written_out():
    assert printable(HOSTILE) == SHOWN
    assert printable("line\n\ttab \u00e9 \u05d0") == "line\n\ttab \u00e9 \u05d0"
    assert printable("over\rwritten\x07") == r"over\rwritten\x07"


@pytest.mark.parametrize(
    "wrapped",
    [str, Text, Panel, lambda text: Text(text, style="bold red")],
    ids=["str", "text", "panel", "styled"],
)
def test_whatever_is_printed_is_text_alone(wrapped):
    file = io.StringIO()
    Console(file=file, width=200, force_terminal=True).print(wrapped(HOSTILE))
    plain = file.getvalue().replace("\x1b[1;31m", "").replace("\x1b[0m", "")
    assert SHOWN in plain
    assert not set(plain) & set("\x1b\x07\x9b\u202e")


def test_cells_and_titles_of_tables_are_text_alone():
    table = Table("column", title=Text(HOSTILE))
    table.add_row(HOSTILE)
    file = io.StringIO()
    Console(file=file, width=200).print(table)
    assert file.getvalue().count(SHOWN) == 2
