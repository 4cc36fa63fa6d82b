import machine
import pytest


def test_without_git_the_commit_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.machine("numpy")["commit"] == ""
