from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_sft.ops import library

each = pytest.mark.parametrize(
    ("load", "built"), [(library.load, "_C.abi3.so"), (library.load_cuda, "_C_cuda.abi3.so")]
)


@each
def test_absent_operators_are_named_with_the_mend(
    load: Callable[[Path], None], built: str, tmp_path: Path
) -> None:
    other = {"_C.abi3.so": "_C_cuda.abi3.so", "_C_cuda.abi3.so": "_C.abi3.so"}[built]
    (tmp_path / other).touch()  # neither is taken for the other
    with pytest.raises(library.LibraryError, match=r"not built.*pip install") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@each
def test_a_file_that_is_no_library_is_named_with_the_mend(
    load: Callable[[Path], None], built: str, tmp_path: Path
) -> None:
    (tmp_path / built).write_bytes(b"not a library")
    with pytest.raises(library.LibraryError, match=r"cannot load it.*pip install") as caught:
        load(tmp_path)
    assert built in str(caught.value)


def test_absent_cuda_operators_say_what_their_build_needs(tmp_path: Path) -> None:
    with pytest.raises(library.LibraryError, match=r"nvcc.*CUDA build of torch"):
        library.load_cuda(tmp_path)


def test_why_the_cuda_operators_could_not_be_built_is_told(tmp_path: Path) -> None:
    (tmp_path / "_C_cuda.reason").write_text("nvcc is of CUDA 12\n")
    with pytest.raises(library.LibraryError, match=r"could not be built \(nvcc is of CUDA 12\)"):
        library.load_cuda(tmp_path)


def test_loading_twice_is_loading_once() -> None:
    library.load()
    library.load()
