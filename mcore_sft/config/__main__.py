"""The JSON schema of an experiment file: python -m mcore_sft.config > configs/schema.json."""

import json

from mcore_sft.config.loader import schema

if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
