import json
import sys

import pytest

from mcore_sft import config
from tools import demo
from tools.demo import Demo, DemoError, Layout, finish, read_shares
from tools.demo_data import NAMES, THINGS, VOCAB_SIZE, write_data


@pytest.fixture
def made(tmp_path):
    return Demo(folder=tmp_path, layout=Layout(tensor=2, sequence=True, pipeline=1, data=1))


def write_report(folder, right, silent, total=500):
    folder.mkdir()
    score = {
        "symbolic_correct": {"hits": right, "total": total},
        "no_answer": {"hits": silent, "total": total},
    }
    (folder / "report.json").write_text(json.dumps({"score": score}))


def write_log(folder):
    lines = [{"step": 1, "loss": 6.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}]
    lines.append({"step": 3, "validation_loss": 0.6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("sizes", "processes", "said"),
    [
        ((2, True, 1, 1), 2, "2 ranks (tensor 2, sequence parallel)"),
        ((2, True, 2, 2), 8, "8 ranks (tensor 2, pipeline 2, data 2, sequence parallel)"),
        ((1, False, 1, 1), 1, "1 rank"),
    ],
)
def test_layout_counts_its_ranks_and_fits_the_experiment(sizes, processes, said):
    layout = Layout(**dict(zip(("tensor", "sequence", "pipeline", "data"), sizes, strict=True)))
    assert (layout.processes, str(layout)) == (processes, said)
    parallel = config.load(demo.EXPERIMENT, layout.overrides).parallel
    assert (parallel.tensor, parallel.sequence, parallel.pipeline) == sizes[:3]


def test_sequence_parallelism_follows_tensor_unless_told(monkeypatch):
    for words, sequence in (
        (["--pipeline", "2"], True),
        (["--tensor", "1"], False),
        (["--no-sequence"], False),
    ):
        monkeypatch.setattr(sys, "argv", ["demo.py", *words])
        layout, short = demo._parse()
        assert (layout.sequence, short) == (sequence, False)


def test_shares_are_those_of_the_report(tmp_path):
    write_report(tmp_path / "after", right=450, silent=3)
    right, silent = read_shares(tmp_path / "after")
    assert (right.percent, silent.hits, silent.total) == (90.0, 3, 500)


@pytest.mark.parametrize(("right", "passes"), [(450, True), (449, False)])
def test_the_end_shows_both_scores_and_fails_below_ninety_percent(made, right, passes, capfd):
    pytest.importorskip("matplotlib")
    write_log(made.folder)
    write_report(made.folder / "before", right=0, silent=500)
    write_report(made.folder / "after", right=right, silent=0)
    if passes:
        finish(made)
    else:
        with pytest.raises(DemoError, match="449 of 500 held-out problems"):
            finish(made)
    shown = capfd.readouterr().out
    assert "before          | 500         | 0.00%            | 100.00%" in shown
    assert f"after           | 500         | {right / 5:.2f}%" in shown


def test_a_short_demo_takes_few_steps_and_asks_for_no_score(made, capfd):
    pytest.importorskip("matplotlib")
    made.short = True
    settings = config.load(demo.EXPERIMENT, made.experiment[2:])
    assert settings.train.steps == 20
    write_log(made.folder)
    for name in ("before", "after"):
        write_report(made.folder / name, right=0, silent=500)
    finish(made)
    assert "All four commands ran" in capfd.readouterr().out


def test_a_command_that_fails_ends_the_demo_with_its_name(made):
    with pytest.raises(DemoError, match=r"`broken\.py` ended with code"):
        made.run(sys.executable, "-u", "broken.py")


def test_every_run_has_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({demo._new_folder() for _ in range(3)}) == 3


def test_every_word_of_the_demo_is_one_token_and_the_vocabulary_is_odd(tmp_path):
    learned, held_out, tokenizer = write_data(tmp_path)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert VOCAB_SIZE % 2 == 1
    for word in (*NAMES, *THINGS):
        assert tokenizer.encode(f" {word}").tokens == [f"Ġ{word}"]
    for name, rows in (("train", learned), ("held_out", held_out)):
        assert len((tmp_path / "text" / f"{name}.jsonl").read_text().splitlines()) == len(rows)
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
