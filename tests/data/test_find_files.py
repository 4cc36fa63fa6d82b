"""What the path of a source names, and how what cannot be read is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from mcore_sft.data.errors import DataError
from mcore_sft.data.sources.find_files import find_files


def refused(path: str, root: Path) -> str:
    with pytest.raises(DataError) as told:
        find_files(path, root=root)
    return str(told.value)


def test_what_is_named_to_the_letter_is_no_pattern(tmp_path):
    folder = tmp_path / "d[1]"
    folder.mkdir()
    file = folder / "rows[a-].jsonl"
    file.touch()
    assert find_files("d[1]/rows[a-].jsonl", root=tmp_path) == [file]
    assert find_files("d[[]1]/*", root=tmp_path) == [file]
    for path in ("d[1]/*.jsonl", "d[1", "[z-a].jsonl", "[!]*", "[/b]"):
        said = refused(path, tmp_path)
        assert f"no such file ({tmp_path / path})" in said
        assert "write [[] for the character itself" in said


def test_an_absent_file_is_named_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"no such file ({tmp_path}/data/a.jsonl)" in refused("a.jsonl", Path("data"))
    assert f"no such file ({tmp_path}/a.jsonl/b.jsonl)" in refused("a.jsonl/b.jsonl", Path())
    assert "cannot be read (File name too long)" in refused("x" * 300, tmp_path)
    assert "no name of a file" in refused("a\0.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("path", "copy"),
    [
        ("s3://bucket/a b.jsonl", "aws s3 cp 's3://bucket/a b.jsonl' ."),
        (
            "S3://bucket/d/part-*.parquet",
            "aws s3 cp s3://bucket/d/ . --recursive --exclude '*' --include 'part-*.parquet'",
        ),
        ("gs://bucket/d/*.jsonl", "gcloud storage cp 'gs://bucket/d/*.jsonl' ."),
        ("https://example.org/a.jsonl", "curl -fLO https://example.org/a.jsonl"),
        ("hf://buckets/o/n/a.jsonl", "hf cp hf://buckets/o/n/a.jsonl ."),
        ("abfs://box/a.jsonl", None),
    ],
)
def test_addresses_are_refused_with_the_command_that_copies(path, copy, tmp_path):
    said = refused(path, tmp_path)
    assert repr(path) in said
    assert "Fix: copy the files here first" in said
    assert copy is None or f"`{copy}`" in said
    assert refused("file:///tmp/a.jsonl", tmp_path).endswith("give the path itself, /tmp/a.jsonl")


def test_a_pipe_is_refused_with_the_command_that_copies(tmp_path):
    os.mkfifo(tmp_path / "p q")
    assert "`cat 'p q' > rows.jsonl`" in refused("p q", tmp_path)
    assert "a pipe or a device" in refused("-", tmp_path)
    assert "a pipe or a device" in refused("/dev/null", tmp_path)


def test_a_folder_is_refused_with_the_glob_of_its_files(tmp_path):
    (tmp_path / "saved").mkdir()
    assert "such as saved/*.jsonl" in refused("saved", tmp_path)
    for name in ("data-0.arrow", "data-1.arrow", "state.json"):
        (tmp_path / "saved" / name).touch()
    assert "such as saved/*.arrow" in refused("saved/", tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", os.O_CREAT))
    assert "its name is not UTF-8. Fix: rename the file" in refused("*.jsonl", tmp_path)


CAPABILITIES = "-dac_override,-dac_read_search"
WHO = [[], ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"]]


def refused_to_others(code: str, folder: Path) -> list[str]:
    """The lines that `code` prints, run as somebody who is not allowed everything."""
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may read everything")
    command = [*WHO[os.geteuid() == 0], sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_folder_that_may_not_be_entered_is_named(tmp_path):
    """Also where a glob would pass over it without a word."""
    for name in ("locked", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").touch()
    (tmp_path / "locked").chmod(0)
    code = (
        "import sys; from pathlib import Path\n"
        "from mcore_sft.data.errors import DataError\n"
        "from mcore_sft.data.sources.find_files import find_files\n"
        "for path in 'locked/a.jsonl', 'locked/*.jsonl', '*/a.jsonl', '**/a.jsonl', 'o*/*':\n"
        "    try: print(find_files(path, root=Path(sys.argv[1]))[0].name)\n"
        "    except DataError as error: print(error)"
    )
    said = refused_to_others(code, tmp_path)
    (tmp_path / "locked").chmod(0o700)
    assert said[-1] == "a.jsonl"
    for line in said[:-1]:
        assert line.startswith(f"{tmp_path}/locked")
        assert line.endswith("cannot be read (Permission denied)")
    assert len(said) == 5


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    names = ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.idx"]
    for name in (*names, "a.bin"):
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).chmod(0)
    code = (
        "import sys; from pathlib import Path\n"
        "from mcore_sft.config import SourceConfig\n"
        "from mcore_sft.data.errors import DataError\n"
        "from mcore_sft.data.sources.survey import peek, survey\n"
        f"for name in {names}:\n"
        "    mask = 'all' if name == 'a.idx' else None\n"
        "    for look in peek, survey:\n"
        "        try: look(SourceConfig(path=name, mask=mask), root=Path(sys.argv[1]))\n"
        "        except DataError as error: print(error)"
    )
    said = refused_to_others(code, tmp_path)
    told = [line.removeprefix(f"{tmp_path}/").partition(": ") for line in said]
    assert sorted(name for name, _, _ in told) == sorted(2 * names)
    assert all(why.startswith("cannot be read (Permission denied)") for _, _, why in told)


class Hub:
    """A stand-in for the hub's file system and its cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []

    def glob(self, path: str) -> list[str]:
        assert path == "hf://datasets/o/n@refs/convert/parquet/d/*.parquet"
        return [f"datasets/o/n@refs/convert/parquet/d/{i}.parquet" for i in (1, 0)]

    def download(self, name: str, file: str, *, repo_type: str, revision: str | None) -> str:
        self.asked.append((name, file, repo_type, revision))
        if file == "absent.jsonl":
            raise huggingface_hub.errors.EntryNotFoundError("404\nno such file")
        return str(self.folder / Path(file).name)


def test_files_of_the_hub_are_read_from_its_cache(monkeypatch, tmp_path):
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    glob = "hf://datasets/o/n@refs/convert/parquet/d/*.parquet"
    assert find_files(glob, root=tmp_path) == [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    assert hub.asked[0] == ("o/n", "d/0.parquet", "dataset", "refs/convert/parquet")
    for path, asked in (
        ("hf://datasets/o/n/a/b.jsonl", ("o/n", "a/b.jsonl", "dataset", None)),
        ("hf://datasets/o/n@v%2F1/b.jsonl", ("o/n", "b.jsonl", "dataset", "v/1")),
        ("hf://o/n/b.jsonl", ("o/n", "b.jsonl", "model", None)),
        ("hf://spaces/o/n/b.jsonl", ("o/n", "b.jsonl", "space", None)),
    ):
        assert find_files(path, root=tmp_path) == [tmp_path / "b.jsonl"]
        assert hub.asked[-1] == asked
    said = refused("hf://datasets/o/n/absent.jsonl", tmp_path)
    assert said.endswith("cannot be read from the hub (404)")
    assert "path: OWNER/NAME" in refused("hf://datasets/o", tmp_path)
