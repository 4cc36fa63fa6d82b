"""One experiment: all sections, and what only several of them together can get wrong."""

import math
from pathlib import Path
from typing import Self

from pydantic import model_validator

from mcore_sft.config.data import DataConfig, PromptConfig
from mcore_sft.config.evaluation import BenchmarkConfig, EvaluationConfig
from mcore_sft.config.model import ModelConfig, ParallelConfig
from mcore_sft.config.section import Place, Section
from mcore_sft.config.training import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig


class RunConfig(Section):
    """One experiment: every command reads the sections it needs."""

    name: str
    """Name of the experiment."""
    output: Place | None = None
    """Folder of the run; without it, results/NAME."""
    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is more than "
                f"train.steps {self.train.steps}; the learning rate would never be reached"
            )
        warmup = self.optimizer.warmup(self.train.steps)
        decay_begin = self.optimizer.decay_begin(self.train.steps)
        if self.optimizer.schedule == "wsd" and warmup > math.ceil(decay_begin):
            raise ValueError(
                f"optimizer.decay_ratio {self.optimizer.decay_ratio} of train.steps "
                f"{self.train.steps} begins within the warmup of {warmup} steps; shorten either"
            )
        if self.log.profile and self.log.profile[0] > self.train.steps:
            raise ValueError(
                f"log.profile {list(self.log.profile)} begins after the last step, "
                f"train.steps {self.train.steps}"
            )
        if self.data.sequence_length % self.parallel.tensor and self.parallel.sequence:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is not a multiple of "
                f"parallel.tensor {self.parallel.tensor}, which parallel.sequence needs"
            )
        if self.train.validate_every and not (self.data.validation or self.data.holdout.fraction):
            raise ValueError(
                "train.validate_every is set but data.validation names no source and "
                "data.holdout.fraction is 0"
            )
        return self

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        saves, kept = self.checkpoint.every, self.checkpoint.keep_every
        if kept and (not saves or kept % saves):
            raise ValueError(
                f"checkpoint.keep_every {kept} is no multiple of checkpoint.every {saves}, and "
                "only what is saved can stay"
            )
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        saves, measures = self.checkpoint.every, self.train.validate_every
        if not self.checkpoint.best:
            return self
        if self.checkpoint.metric == "accuracy":
            if not self.train.evaluate_every:
                raise ValueError("checkpoint.metric accuracy needs train.evaluate_every, given 0")
        elif not (measures and saves and saves % measures == 0):
            raise ValueError(
                f"checkpoint.best needs the validation loss of each checkpoint, but "
                f"checkpoint.every {saves} is no multiple of train.validate_every {measures}"
            )
        return self

    @model_validator(mode="after")
    def _check_evaluated(self) -> Self:
        every, saves = self.train.evaluate_every, self.checkpoint.every
        if not every:
            return self
        if not saves or every % saves:
            raise ValueError(
                f"train.evaluate_every {every} is no multiple of checkpoint.every {saves}, and "
                "only checkpoints can be evaluated"
            )
        if self.evaluation.engine == "server":
            raise ValueError(
                "train.evaluate_every needs evaluation.engine transformers or vllm, which load "
                "each checkpoint; given server, which answers with the model that it serves"
            )
        names, named = [x.name for x in self.evaluation.benchmarks], self.train.evaluate_benchmark
        if not names or (named and named not in names):
            raise ValueError(
                f"train.evaluate_every needs {named or 'a benchmark'} among "
                f"evaluation.benchmarks, given {', '.join(names) or 'none'}"
            )
        return self

    @property
    def watched(self) -> BenchmarkConfig:
        """The benchmark of train.evaluate_every."""
        asked = self.train.evaluate_benchmark
        return next(x for x in self.evaluation.benchmarks if asked in (None, x.name))

    @property
    def folder(self) -> Path:
        """Where checkpoints, logs and curves of this run lie."""
        return self.output or Path("results") / self.name

    @property
    def packed(self) -> Path:
        """Where the packed dataset of this run lies."""
        return self.data.packed or self.folder / "data"
