"""Convergence benchmarks: a tier of configs/nightly in, judged runs, their history and a page out.

    python tools/nightly.py --tier cpu --data DIR [--only NAME ...] [--webhook URL] [--publish]
    python tools/nightly.py --tier cpu --data DIR --golden NAME --reason TEXT

Run it in the repository: docs/nightly.md.
"""

import sys
from pathlib import Path

# Beside this file, `import nightly` would find this file.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mcore_sft import command  # noqa: E402
from nightly import night  # noqa: E402

if __name__ == "__main__":
    command.run(night.main)
