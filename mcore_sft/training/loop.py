"""The training loop: a packed dataset in, distributed checkpoints of the fine-tuned model out.

Loader --[Batch]--> gradients --guard--> update --StepResult--> what runs beside the steps
"""

from mcore_sft.base.errors import Stopped
from mcore_sft.checkpoint import weights
from mcore_sft.checkpoint.describe import Description
from mcore_sft.checkpoint.safetensors_folder import SafetensorsFolder
from mcore_sft.checkpoint.sharded import Checkpoints, Progress
from mcore_sft.checkpoint.sums import Sums
from mcore_sft.config import RunConfig
from mcore_sft.data.packs.loader import Loader
from mcore_sft.data.text.tokenizer import load_tokenizer
from mcore_sft.model import build, families
from mcore_sft.model.architecture import Architecture
from mcore_sft.runtime.hardware import be_deterministic, peak_memory
from mcore_sft.runtime.launch import Launch
from mcore_sft.runtime.mesh import Mesh, join
from mcore_sft.runtime.peers import Peers
from mcore_sft.training import optimizer as optim
from mcore_sft.training import step
from mcore_sft.training.agreement import agreed
from mcore_sft.training.beside.accuracy import Accuracy, check_benchmark
from mcore_sft.training.beside.callback import Callbacks, Step
from mcore_sft.training.beside.guards import Guard
from mcore_sft.training.beside.metrics import Metrics
from mcore_sft.training.beside.profiling import Profile
from mcore_sft.training.beside.saving import Saving
from mcore_sft.training.beside.stragglers import OwnTime
from mcore_sft.training.beside.validation import Validation
from mcore_sft.training.beside.watchdog import SLOW, Watchdog
from mcore_sft.training.packs import PACKS, as_begun, load, open_dataset
from mcore_sft.training.resume import report, resumed, what_stays
from mcore_sft.training.step import StepResult
from mcore_sft.training.stop import Stop, reason


def train(config: RunConfig) -> Progress:
    """Fine-tune the model that `config` names on the packs that preprocessing wrote.

    `Stopped` says that it was asked to end before its work was done, and has saved.
    """
    stop = Stop(config.train.max_minutes)
    hang = config.train.hang_seconds
    launch = Launch.read()
    with (
        Peers(launch, config.train.connect_seconds) as peers,
        Watchdog(config.folder, hang, peers) as watchdog,
    ):
        launch.check(config.train.nodes, peers.machines)
        architecture = families.read(config.model.path)
        architecture.check(config.parallel, config.data.sequence_length)
        if config.train.deterministic:
            be_deterministic()
        # Collectives fail later than the watchdog ends them: it knows what each rank was doing.
        timeout = hang and 2 * SLOW * hang
        watchdog.at("while comparing what the ranks were started with", slow=True)
        with agreed(config, peers), join(config.parallel, peers, timeout) as mesh:
            return train_on(mesh, config, architecture, stop, watchdog)


def train_on(
    mesh: Mesh,
    config: RunConfig,
    architecture: Architecture,
    stop: Stop,
    watchdog: Watchdog,
) -> Progress:
    """The story of a run on one rank of `mesh`."""
    watchdog.at("while checking the dataset", slow=True)
    metrics = Metrics(
        config.folder, config.name, config.log, config.train.steps, architecture, mesh
    )
    profile = Profile(config.log, config.folder, mesh)
    dataset = open_dataset(config, "train", mesh)
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    loader = load(config, "train", dataset, tokenizer, architecture, mesh)
    check_benchmark(config, mesh)
    validation = Validation(config, tokenizer, architecture, mesh, metrics, watchdog.beat)
    own_time = OwnTime(mesh, metrics, config.log.stragglers_every)
    watchdog.at("while loading", slow=True)
    gpt = build.build(architecture, config.model, config.train, mesh, own_time.computed)
    optimizer = optim.build(config.optimizer, config.train, gpt, mesh)
    checkpoints = Checkpoints(
        config.folder, config.checkpoint, model=gpt, optimizer=optimizer, mesh=mesh
    )
    fixed = what_stays(config, dataset, architecture)
    progress = resumed(config, checkpoints, fixed, dataset, watchdog.beat)
    loader = as_begun(loader, progress, metrics.say)
    loader.check()
    watchdog.at("while loading", slow=True)
    base = None
    if progress is None:
        base = SafetensorsFolder(config.model.path)
        fixed |= {"base weights": mesh.from_main(base.fingerprint), PACKS: loader.packs_per_step}
        progress = Progress(fixed=fixed)
    description = Description.read(
        config, dataset, progress.fixed.get("base weights"), checkpoints.restored
    )
    if base is not None:
        weights.load_pretrained(base, gpt, architecture, mesh, metrics.console)
        optimizer.reload_model_params()
    sums = Sums(base.files() if base else {}, mesh)

    announce(metrics, config, mesh, loader, progress)
    checkpoints.check_room(config.train.steps - progress.step)
    for line in report(progress, config, dataset, mesh):
        metrics.say(line)
    guard = Guard(config.train, dataset, loader, config.packed, mesh, metrics)
    accuracy = Accuracy(config, checkpoints, metrics, mesh, watchdog.beat)
    steps, asked = config.train.steps, 0

    callbacks = Callbacks()
    saving = Saving(
        checkpoints, description, sums, validation, metrics, watchdog, callbacks, steps=steps
    )
    callbacks += [watchdog, profile, metrics, own_time, validation, saving, accuracy]
    if checkpoints.restored:
        watchdog.on_save(checkpoints.restored)

    def begins() -> None:
        watchdog.beat()
        own_time.go_on()

    with accuracy, metrics.logging(progress.step), stop, saving.completed(), profile:
        validation.make_up(gpt, progress, checkpoints)
        while progress.step < steps and not asked:
            callbacks.before_step(progress.step + 1)
            batches = loader.batches(progress.step)
            own_time.pause()
            metrics.book("data")
            found = step.gradients(gpt, optimizer, batches, mesh, begins)
            metrics.book("forward_backward")
            withheld = guard.withholds(progress, batches, found)
            lr = optim.learning_rate(config.optimizer, progress.step, steps)
            result = step.update(optimizer, found, config.optimizer, lr, withheld=withheld)
            advance(progress, result)
            asked, writing, memory = mesh.largest(
                stop.asked, int(checkpoints.is_writing), peak_memory(mesh.device)
            )
            metrics.book("optimizer")
            taken = Step(
                model=gpt,
                progress=progress,
                result=result,
                batches=batches,
                asked=asked,
                writing=bool(writing),
                memory=memory,
            )
            for callback in callbacks:
                callback.after_step(taken)
                metrics.book(callback.lap)
    if asked and (progress.step < steps or validation.is_due(steps)):
        callbacks.on_stop()
        raise Stopped(
            f"{reason(asked)}; saved after step {progress.step} of {steps}, start again to go on"
        )
    watchdog.at("while waiting for the last evaluation", slow=True)
    accuracy.wait(stop)
    if config.checkpoint.best and (best := checkpoints.best()):
        metrics.say(f"the best is {best}")
    return progress


def advance(progress: Progress, result: StepResult) -> None:
    """Count the step that was taken."""
    progress.step += 1
    progress.examples += result.examples
    progress.tokens += result.tokens
    progress.supervised += result.supervised
    progress.skipped += result.skipped or result.withheld


def announce(
    metrics: Metrics, config: RunConfig, mesh: Mesh, loader: Loader, progress: Progress
) -> None:
    """Say what is about to happen, before the first step."""
    parallel = mesh.parallel
    metrics.say(
        f"{config.name}: {mesh.world.size} process(es) on {mesh.device.type}: tensor "
        f"{mesh.tensor.size}{' + sequence' if parallel.sequence else ''}, pipeline "
        f"{mesh.pipeline.size}{f' x {parallel.virtual}' if parallel.virtual > 1 else ''}, context "
        f"{mesh.context.size}, data {mesh.data.size}"
        f"{' + distributed optimizer' if parallel.distributed_optimizer else ''}; "
        f"{config.train.precision}"
    )
    metrics.say(
        f"{loader.packs_per_step} packs a step (about {loader.examples_per_step:.0f} examples) "
        f"and {loader.filling}, "
        f"{loader.steps_per_epoch} steps an epoch, {config.train.steps} steps "
        f"({config.train.steps / loader.steps_per_epoch:.2f} epochs)"
    )
    if progress.step >= config.train.steps:
        metrics.say(f"nothing to do: train.steps is {config.train.steps}")
    if progress.step:
        metrics.say(f"resumed after step {progress.step} from {config.folder}")
