"""All that a run can be told: one YAML file, dotted overrides, typed sections.

    defaults < YAML file < key=value overrides

Everything is checked before anything is loaded, and nothing here imports torch: a typo costs a
fraction of a second.
"""

from mcore_sft.config.data import (
    ContaminationConfig,
    DataConfig,
    FilterConfig,
    HoldoutConfig,
    PromptConfig,
    SourceConfig,
)
from mcore_sft.config.evaluation import (
    BenchmarkConfig,
    EvaluationConfig,
    Policy,
    ServerConfig,
    VllmConfig,
)
from mcore_sft.config.loader import (
    dump,
    load,
    parse,
    parse_section,
    read_tree,
    schema,
    without_paths,
)
from mcore_sft.config.model import ModelConfig, ParallelConfig
from mcore_sft.config.run import RunConfig
from mcore_sft.config.section import (
    ConfigError,
    Count,
    CountOrZero,
    NonNegative,
    PlaceOrName,
    Positive,
    Section,
    home,
)
from mcore_sft.config.training import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig

__all__ = [
    "BenchmarkConfig",
    "CheckpointConfig",
    "ConfigError",
    "ContaminationConfig",
    "Count",
    "CountOrZero",
    "DataConfig",
    "EvaluationConfig",
    "FilterConfig",
    "HoldoutConfig",
    "LogConfig",
    "ModelConfig",
    "NonNegative",
    "OptimizerConfig",
    "ParallelConfig",
    "PlaceOrName",
    "Policy",
    "Positive",
    "PromptConfig",
    "RunConfig",
    "Section",
    "ServerConfig",
    "SourceConfig",
    "TrainConfig",
    "VllmConfig",
    "dump",
    "home",
    "load",
    "parse",
    "parse_section",
    "read_tree",
    "schema",
    "without_paths",
]
