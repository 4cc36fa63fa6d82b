"""Convergence benchmarks: a tier of configs/nightly in, judged runs, their history and a page out.

    python tools/nightly.py --tier cpu --data DIR [--only NAME ...] [--webhook URL] [--publish]
    python tools/nightly.py --tier cpu --data DIR --golden NAME --reason TEXT

All of it lies in results/nightly: history.jsonl, page.html, and each run by tier and commit.
Stopped and started again at the same commit, it goes on. Exit code 0: all passed, 1: something
failed, 2: it could not begin, 3: something crashed, or could not be kept.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mcore_sft import command
from mcore_sft.base import files, web
from mcore_sft.base.errors import UserError
from mcore_sft.base.terminal import Parser, say
from nightly import commits, history, page, tier, work
from nightly.history import Record
from nightly.run import Night, Run
from nightly.suite import SuiteRun, full_run

OUTPUT = Path("results/nightly")
RESULTS = Path("benchmarks/results")
HISTORY, PAGE = "history.jsonl", "page.html"
FAILED, CRASHED = 1, 3
HOOK_SECONDS, HOOK_BYTES = 30.0, 2**20
"""In which time a webhook must have taken the summary in all, and how long its reply may be."""


def main() -> None:
    """Run what the command line names."""
    arguments = _arguments()
    wanted = tier.named(arguments.tier)
    with _alone(arguments.output / wanted.name):
        _run(arguments, wanted)


def _run(arguments: argparse.Namespace, wanted: tier.Tier) -> None:
    night = _night(wanted, arguments.output, arguments.data)
    if arguments.golden:
        if not arguments.reason:
            raise UserError("--golden needs --reason TEXT: why the curve is made (anew)")
        file = Run(night, wanted.benchmark(arguments.golden)).keep_golden(arguments.reason)
        say(f"{file}: commit it, and say the reason there too")
        return
    names = arguments.only or wanted.names
    parts = [part(night, name) for name in names]
    for one in parts:
        one.check()
    say(f"{wanted.name} at {night.commit}: {', '.join(names)}")
    records, all_kept = [], True
    for name, one in zip(names, parts, strict=True):
        say(f"{name} ...")
        records.append(one.record())
        all_kept &= keep(arguments.output, records[-1])
        say(told(records[-1]))
    text = summary(records)
    say(f"{text}\n{arguments.output / PAGE}")
    if url := arguments.webhook or wanted.webhook:
        send(url, text, records)
    if arguments.publish:
        publish([record for record in records if wanted.suite(record.benchmark)])
    sys.exit(exit_code(records) if all_kept else CRASHED)


def part(night: Night, name: str) -> Run | SuiteRun:
    """The benchmark or the suite of this name; raises `UserError` of another."""
    suite = night.tier.suite(name)
    return SuiteRun(night, suite) if suite else Run(night, night.tier.benchmark(name))


def publish(records: Sequence[Record], folder: Path = RESULTS) -> None:
    """Keep the records of suites in files to be committed; raises `UserError` of other code."""
    for record in records:
        if record.commit.endswith(commits.DIRTY) or record.outcome == "crashed":
            raise UserError(
                f"{record.benchmark} {record.outcome} at {record.commit} and was not published. "
                "Fix: run a commit, without changes, to its end"
            )
        file = folder / f"{record.benchmark}.json"
        content = json.dumps(json.loads(record.to_json()), indent=2, ensure_ascii=False)
        files.replace(file, content + "\n")
        say(f"{file}: commit it; the README says: {full_run(record)}")


def keep(output: Path, record: Record) -> bool:
    """Add the record to the history and the page; says so on stderr where that cannot be done."""
    file = output / HISTORY
    try:
        if record not in history.read(file)[0]:  # it was kept when this night was stopped
            history.append(file, record)
        page.write(file, output / PAGE)
    except OSError as error:
        say(f"{record.benchmark} is not in the history or the page: {error}", error=True)
        return False
    return True


def told(record: Record) -> str:
    """A benchmark on the console: what it came to, and what did not pass."""
    lines = [f"{record.benchmark}: {record.outcome.upper()}"]
    lines += [f"  {'ok   ' if f.passed else 'WRONG'} {f.sentence}" for f in record.findings]
    lines += [f"  {text}" for text in (record.narrowed, record.commits, record.crash) if text]
    return "\n".join(lines)


def summary(records: Sequence[Record]) -> str:
    """One line of the night, and one of each benchmark that did not pass."""
    bad = [record for record in records if record.outcome != "passed"]
    first, passed = records[0], len(records) - len(bad)
    names = "".join(f"; {record.benchmark} {record.outcome}" for record in bad)
    head = f"nightly {first.tier} at {first.commit}: {passed} of {len(records)} passed{names}"
    return "\n".join([head, *(_in_short(record) for record in bad)])


def _in_short(record: Record) -> str:
    """Where a benchmark departs first, without what it does not, and since which commits."""
    failed = [finding for finding in record.findings if not finding.passed]
    failed.sort(key=lambda finding: math.inf if finding.step is None else finding.step)
    said = [finding.sentence for finding in failed[:1]]
    said += (record.crash or "").splitlines()[-1:]
    said += [text for text in (record.narrowed, record.commits) if text]
    return f"{record.benchmark}: {'; '.join(said)}"


def exit_code(records: Sequence[Record]) -> int:
    """The worst of what happened."""
    outcomes = {record.outcome for record in records}
    return CRASHED if "crashed" in outcomes else FAILED if "failed" in outcomes else 0


def send(url: str, text: str, records: Sequence[Record]) -> None:
    """POST the summary as JSON (`text`, as chat services read it, and the records)."""
    content = {"text": text, "records": [json.loads(record.to_json()) for record in records]}
    body, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
    try:
        reply = web.exchange(url, body, headers, seconds=HOOK_SECONDS, most_bytes=HOOK_BYTES)
    except web.NoReply as error:
        said = str(error)
    else:
        if 200 <= reply.status < 300:
            return
        said = f"HTTP {reply.status}"
        if reply.location is not None:
            said += "; it sends the client elsewhere, which is not followed"
    # without the address, which is a secret of some chat services
    say(f"the webhook did not take the summary: {said}", error=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other night of the tier runs meanwhile; raises `UserError`."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.lock(folder / "lock"))
        except files.Locked as held:
            raise UserError(
                f"{folder}: another night is running there{held.by}; wait for its end, or give "
                "--output"
            ) from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error}); give --output DIR") from None
        yield


def _night(wanted: tier.Tier, output: Path, data: Path | None) -> Night:
    commit = commits.current()
    folder = output.absolute() / wanted.name / commit
    work.end_all_of(folder)  # of a night that was killed
    if commit.endswith(commits.DIRTY) and folder.exists():
        shutil.rmtree(folder)  # of other files than those of now
    records, torn = history.read(output / HISTORY)
    if torn:
        say(torn, error=True)
    return Night(
        tier=wanted,
        commit=commit,
        commit_time=commits.git("log", "-1", "--format=%cI"),
        machine={"device": _device(), "cores": len(os.sched_getaffinity(0))},
        output=output.absolute(),
        data=data and data.absolute(),
        until=time.monotonic() + 60 * wanted.minutes,
        earlier=[record for record in records if record.tier == wanted.name],
    )


def _device() -> str:
    """The first GPU, or the processor."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(asked[0]):
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if names := done.stdout.splitlines():
            return f"{len(names)} x {names[0]}"
    return platform.machine()


def _arguments() -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tier", required=True, metavar="NAME", help="of configs/nightly")
    parser.add_argument(
        "--data", type=command.path, metavar="DIR", help="what {data} is in the tier"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks and suites")
    parser.add_argument("--output", type=command.path, default=OUTPUT, metavar="DIR")
    parser.add_argument("--webhook", metavar="URL", help="where the summary is sent")
    parser.add_argument(
        "--publish", action="store_true", help=f"write what suites came to into {RESULTS}"
    )
    parser.add_argument("--golden", metavar="NAME", help="make this benchmark's golden curve")
    parser.add_argument("--reason", metavar="TEXT", help="why")
    return parser.parse_args()
