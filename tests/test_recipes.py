from pathlib import Path

import pytest

from mcore_sft import config

SMOKE = sorted(file.stem for file in Path("configs").glob("*_smoke.yaml"))


@pytest.mark.parametrize("name", SMOKE)
def test_a_smoke_form_differs_in_size_alone(name):
    small = config.load(f"configs/{name}.yaml").model_dump()
    full = config.load(f"configs/{name.removesuffix('_smoke')}.yaml").model_dump()
    for section in ("prompt", "parallel", "optimizer"):
        assert small[section] == full[section]
    sized = ("steps", "global_batch", "validate_every")
    for section in ("data", "train"):
        for key, value in full[section].items():
            if key not in (*sized, "train"):
                assert small[section][key] == value, key
