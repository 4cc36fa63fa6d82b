"""Which packages are installed, which versions are wanted, and whether they can be imported.

The versions that are wanted are those that pyproject.toml declares, for this Python.
"""

import importlib.util
from importlib import metadata

from packaging.requirements import Requirement

_MODULES = {
    "megatron-core": "mcore_sft.runtime.megatron_core",
    "protobuf": "google.protobuf",
    "pyyaml": "yaml",
    "transformer-engine": "transformer_engine.pytorch",
}


def version(package: str) -> str | None:
    """The installed version of `package`; None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def left_behind(module: str) -> str | None:
    """The folder of `module` where nothing but folders is left of it; None where it is or is not.

    pip leaves folders of what it uninstalls, and they can be imported.
    """
    found = importlib.util.find_spec(module)
    if found is None or found.origin is not None:
        return None
    return next(iter(found.submodule_search_locations or ()), None)


def requirements(package: str, extra: str = "") -> list[Requirement]:
    """What `package` declares that it needs: always, or for one of its extras."""
    declared = [Requirement(line) for line in metadata.requires(package) or ()]
    if not extra:
        return [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [
        one
        for one in declared
        if one.marker is not None
        and one.marker.evaluate({"extra": extra})
        and not one.marker.evaluate({"extra": ""})
    ]


def transformer_engine() -> Requirement:
    """The versions of Transformer Engine that go with the Megatron-core of this Python."""
    (one,) = requirements("mcore-sft", "gpu")
    return one


def import_error(package: str) -> str | None:
    """Why `package` cannot be imported, on one line; None where it can.

    A package with compiled parts that do not fit raises whatever it likes.
    """
    try:
        importlib.import_module(_MODULES.get(package, package.replace("-", "_")))
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
