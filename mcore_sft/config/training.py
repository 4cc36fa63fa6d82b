"""How a model is trained: steps, optimizer, checkpoints, and what is shown of it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mcore_sft.config.section import (
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Section,
    Seed,
)


class TrainConfig(Section):
    """How long, how much at once, how exactly."""

    steps: Count = 1000
    """Optimizer steps."""
    packs: Count | None = None
    """Packs a step, on every layout; without it, as many as hold `global_batch` examples."""
    global_batch: Count | None = None
    """Examples a step, in the nearest number of packs; 512 where `packs` is not given."""
    micro_batch: Count = 1
    """Packs joined in one row of a forward pass."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Parameters and activations; gradients, moments and main weights are fp32 in both."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """How the matrix products of the layers are scaled to 8 bits (Transformer Engine alone): by the
    largest values of past steps, by one scale a tensor, or by one for each block, in which no
    document of a pack touches another."""
    fp8_bf16_ends: CountOrZero = 0
    """Layers at either end of the model that stay in bf16 all the same."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them: those of
    attention (`selective`, in local layers alone), or of whole layers but for their inputs
    (`full`)."""
    seed: Seed = 42
    """Seed of the order in which packs are visited."""
    last_step: Literal["drop", "pad"] = "drop"
    """An epoch's last partial step is left out, or filled with fully masked packs."""
    validate_every: CountOrZero = 0
    """Steps between validation losses; 0 is never."""
    validation_packs: CountOrZero = 0
    """Packs of a validation loss; 0 is all of them."""
    evaluate_every: CountOrZero = 0
    """Steps between evaluations of checkpoints, in a process beside the training; a multiple of
    checkpoint.every. The last step is evaluated too. 0 is never."""
    evaluate_benchmark: str | None = None
    """Which of evaluation.benchmarks they ask; without it, the first."""
    evaluate_gpus: str | None = None
    """CUDA_VISIBLE_DEVICES of that process, such as "7", where no rank computes, or "" for the CPU;
    without it the run's own, of which it shares the first with a rank."""
    max_minutes: Positive | None = None
    """Save and stop after the step in which so many minutes since the start are over, as after
    SIGTERM, SIGHUP and SIGUSR1, with exit code 75 (torchrun makes 1 of it); leave time for the
    save. When it is started again, the run goes on."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is no finite number does: the run ends, or the update is not
    made, with the packs named in both; after ten such steps in a row the run ends."""
    on_spike: Literal["warn", "skip"] = "warn"
    """What a loss spike does: it is told, or the update is not made either."""
    spike_sigmas: Positive = 6.0
    """A loss so many standard deviations above the mean of the last ones is a spike."""
    nodes: Count | None = None
    """Machines that the run is started on; with fewer it ends at once. Without it, as many as Slurm
    gives, or as come."""
    connect_seconds: Positive = 120.0
    """The run ends at once where not all ranks have come within so many seconds."""
    hang_seconds: Positive | None = 600.0
    """The run ends, and every rank's stack is written, after so many seconds in which a rank has
    computed no micro-batch; loading, and writing a checkpoint that is waited for, may stand still
    1.5 times as long. None is never."""
    deterministic: bool = False
    """The same bits from the same run on the same layout, on GPUs too, where that costs speed. What
    is random in a run is drawn from the seeds of its configuration alone, always."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Steps of that mean; while there are fewer than half of them, there are no spikes."""

    @model_validator(mode="before")
    @classmethod
    def _size(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("packs") is given.get("global_batch") is None:
            return {**given, "global_batch": 512}
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.packs and self.global_batch:
            raise ValueError(
                f"packs: {self.packs} and global_batch: {self.global_batch} are two sizes of a "
                "step; give one, and null for the other"
            )
        if self.fp8 != "none" and self.precision != "bf16":
            raise ValueError(f"fp8: {self.fp8} needs precision: bf16, given {self.precision}")
        if self.fp8 == "delayed" and self.recompute == "full":
            raise ValueError(
                "recompute: full with fp8: delayed takes new scales for each layer that it "
                "computes again (got both, expected one of them). Fix: train.fp8=blockwise or "
                "train.recompute=none"
            )
        if self.fp8_bf16_ends and self.fp8 in ("none", "delayed"):
            raise ValueError(
                f"fp8_bf16_ends: {self.fp8_bf16_ends} needs fp8: tensorwise or blockwise, given "
                f"{self.fp8}"
            )
        return self


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    lr: Positive = 2e-5
    """Peak learning rate of AdamW."""
    min_lr: NonNegative = 0.0
    """Where linear, cosine and wsd schedules end."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning rate after the warmup; `wsd` (warmup, stable, decay) keeps it and falls linearly at
    the end."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of all steps in which wsd falls."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warmup from zero."""
    warmup_ratio: Fraction = 0.0
    """The same as a share of all steps, to the nearest step, instead of warmup_steps."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay of the first and second moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    decay_1d: bool = True
    """Decay norms and biases too, as torch does; false leaves them out, as Megatron does."""
    clip_grad: Positive | None = None
    """Largest gradient norm; none is no clipping."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.schedule == "constant":
            self.require_effect("min_lr", needs="schedule: linear, cosine or wsd")
        if self.schedule != "wsd":
            self.require_effect("decay_ratio", needs="schedule: wsd")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} and warmup_ratio: {self.warmup_ratio} are two "
                "lengths of the warmup; give one, and 0 for the other"
            )
        return self

    def warmup(self, steps: int) -> int:
        """Steps of the warmup, of `steps` in all."""
        return self.warmup_steps or round(self.warmup_ratio * steps)

    def decay_begin(self, steps: int) -> float:
        """Where wsd begins to fall, in steps of `steps`; a part of one counts."""
        return (1 - self.decay_ratio) * steps


class CheckpointConfig(Section):
    """When the run is saved."""

    every: CountOrZero = 0
    """Steps between checkpoints; the last step is always kept. 0 is only then."""
    keep: CountOrZero = 0
    """Newest checkpoints that stay; 0 is all or, with `best`, the last alone."""
    best: CountOrZero = 0
    """Checkpoints that are best by `metric`, which stay beside those; 0 is none."""
    metric: Literal["validation_loss", "accuracy"] = "validation_loss"
    """What the best are told by: the lowest validation loss, or the highest accuracy of those that
    train.evaluate_every evaluates."""
    keep_every: CountOrZero = 0
    """Checkpoints of every so many steps stay too, to be averaged; a multiple of `every`. 0 is
    none."""
    resume: bool = True
    """Go on from the newest complete checkpoint of this run, if there is one."""


class LogConfig(Section):
    """What is shown and written of a run."""

    every: Count = 1
    """Steps between lines on the console; the JSON lines hold every step."""
    tensorboard: bool = False
    """Write every step's numbers for TensorBoard too, into `tensorboard` in the run's folder."""
    wandb: str | None = None
    """Send the numbers of every step to this W&B project too."""
    curve: bool = False
    """Draw loss.png into the run's folder at the end, as tools/draw_loss.py does at any time."""
    peak_tflops: Positive | None = None
    """Peak speed of one device, in 1e12 bf16 operations a second, for the share of it that is used
    (mfu); without it, that of the GPU's data sheet where it is known."""
    stragglers_every: CountOrZero = 100
    """Steps between comparisons of the ranks' own times, which name the slow ones; 0 is never."""
    profile: tuple[Count, Count] | None = None
    """First and last of the steps that are profiled; none are without it."""
    profiler: Literal["torch", "nsys"] = "torch"
    """`torch` writes a trace for each rank into `profile` in the run's folder; `nsys` marks the
    steps for `nsys profile --capture-range=cudaProfilerApi`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.profile and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile {list(self.profile)}: the first step is after the last")
        return self
