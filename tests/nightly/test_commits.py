"""The commits between which a benchmark broke out, in a clone of a few commits."""

import subprocess

import pytest

from mcore_sft.base.errors import UserError
from nightly import commits
from tests.nightly import sample


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Five commits in a row, and one beside the last."""
    folder = tmp_path_factory.mktemp("clone")

    def git(*words):
        told = ["git", "-c", "user.name=A", "-c", "user.email=a@b.example", *words]
        done = subprocess.run(told, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (folder / "file").write_text("0")
    git("add", "file")
    made = []
    for number in range(5):
        git("commit", "--quiet", "--allow-empty", "-m", str(number))
        made.append(git("rev-parse", "--short=12", "HEAD"))
    git("checkout", "--quiet", "-b", "beside", made[3])
    git("commit", "--quiet", "--allow-empty", "-m", "beside")
    return folder, made, git("rev-parse", "--short=12", "HEAD")


@pytest.fixture
def said(clone, monkeypatch):
    """What is said where these (place of the commit, outcome) came before."""
    folder, made, _ = clone
    monkeypatch.chdir(folder)

    def told(*before, now=4, outcome="failed", dirty=""):
        name = lambda at: at if isinstance(at, str) else made[at]  # noqa: E731
        earlier = [sample.record(0, commit=name(at), outcome=ended) for at, ended in before]
        text = commits.suspects(earlier, made[now] + dirty, outcome)
        for number, commit in enumerate(made):
            text = text.replace(commit, f"<{number}>")
        return text

    return told


def test_the_range_is_what_git_bisect_asks_for(said):
    assert said((0, "passed"), (1, "passed")) == (
        "one of 3 commits after <1>, the last that passed, up to <4>, the first that failed: "
        "git bisect start <4> <1>"
    )


def test_the_range_ends_at_the_first_that_failed(said):
    told = said((0, "passed"), (1, "crashed"), (2, "failed"), (3, "failed"))
    assert told.endswith("git bisect start <2> <0>")
    assert said((1, "passed"), (3, "failed"), outcome="crashed").endswith("start <4> <1>")


def test_of_one_commit_nothing_is_to_be_searched(said):
    assert said((3, "passed")) == (
        "the only commit after <3>, the last that passed, up to <4>, the first that failed"
    )


def test_commits_that_are_not_in_this_line_are_passed_over(said, clone):
    told = said((1, "passed"), (clone[2], "passed"), ("0123456789ab", "passed"), (4, "crashed"))
    assert told.endswith("git bisect start <4> <1>")
    assert said((clone[2], "passed"), (4, "passed")) == commits.UNKNOWN
    assert said() == commits.UNKNOWN


def test_an_older_commit_that_was_run_later_does_not_end_the_range(said):
    assert said((2, "passed"), (0, "failed")).endswith("git bisect start <4> <2>")


def test_what_is_not_committed_is_suspected_too(said):
    assert said((4, "passed"), dirty="-dirty") == (
        "passed at <4>: what is not committed makes the difference"
    )
    told = said((2, "passed"), dirty="-dirty")
    assert told.startswith("what is not committed, or one of 2 commits after <2>")
    assert "bisect" not in told
    told = said((3, "passed"), (4, "failed"), dirty="-dirty")
    assert told.startswith("the only commit after <3>")


def test_a_current_commit_that_differs_is_named_so(clone, monkeypatch):
    folder, _, beside = clone
    monkeypatch.chdir(folder)
    assert commits.current() == beside
    (folder / "file").write_text("1")
    assert commits.current() == f"{beside}-dirty"


def test_without_a_clone_the_failure_is_told_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commits.suspects([], "abc", "failed").startswith("the commits are not known: git rev-li")


def test_without_git_that_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="git is needed here"):
        commits.current()
