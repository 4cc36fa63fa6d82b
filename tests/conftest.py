"""What several test files share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import runs, tiny

torch.set_num_threads(1)
# Jobs that a script starts in the background ignore Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# So it is with SIGHUP under nohup: these tests go on all the same, and what they start hears it.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs remember SHA-256 of these tests' files in a folder that goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, with the project's own rows packed for it."""
    folder = tiny.make_model(tmp_path_factory.mktemp("model") / "tiny", vocab_size=703)
    runs.pack_rows(runs.experiment(folder / "run", folder))
    return folder


@pytest.fixture(scope="session")
def reference_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Twenty steps of one process in fp32: what every layout is compared with."""
    return runs.train(runs.experiment(tmp_path_factory.mktemp("reference"), model))
