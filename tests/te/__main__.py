"""python -m tests.te FILE [WORD ...]: a program as on a GPU, with Transformer Engine's own Python.

It runs on the CPU, over the kernels of this package, and takes the layers that a GPU would.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import tests.te.plugin  # noqa: F401
from mcore_sft.model import build
from mcore_sft.runtime.hardware import chosen_layers


def take_engine() -> None:
    """Let models that are built in this process have the layers and the attention of a GPU."""

    def layers(settings: Any, train: Any, device: Any) -> str:
        return chosen_layers(settings, train, gpu=True)

    build.layer_implementation = layers
    build.attention_backend = lambda device: "fused"


if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    take_engine()
    runpy.run_path(sys.argv[0], run_name="__main__")
