"""Earlier records in, the commits between which a benchmark broke out: what `git bisect` needs."""

import subprocess
from collections.abc import Sequence

from mcore_sft.base.errors import UserError
from nightly.history import Outcome, Record

DIRTY = "-dirty"
DIGITS = 12
UNKNOWN = "no earlier commit is known to pass"


def current() -> str:
    """Of this clone, with `DIRTY` behind it where a tracked file differs; raises `UserError`."""
    return git("describe", "--always", f"--dirty={DIRTY}", f"--abbrev={DIGITS}", "--exclude=*")


def suspects(earlier: Sequence[Record], now: str, outcome: Outcome) -> str:
    """Since which commits a benchmark has not passed, which it did not with `outcome` at `now`.

    `earlier` are its records in the order of the history. The range begins at the last commit that
    passed, and ends at the first after it with the same outcome, because one that crashed says
    nothing of one that fails.
    """
    head = now.removesuffix(DIRTY)
    try:
        lineage = {commit[:DIGITS] for commit in git("rev-list", head).splitlines()}
        known = [record for record in earlier if record.commit[:DIGITS] in lineage]
        known = [x for x in known if not x.commit.endswith(DIRTY) and x.commit != now]
        passed = [place for place, record in enumerate(known) if record.outcome == "passed"]
        if not passed:
            return UNKNOWN
        good = known[passed[-1]].commit
        if good == head:
            return f"passed at {head}: what is not committed makes the difference"
        later = [x.commit for x in known[passed[-1] + 1 :] if x.outcome == outcome]
        for bad in (*later, head):
            if count := int(git("rev-list", "--count", f"{good}..{bad}")):
                break
    except UserError as error:
        return f"the commits are not known: {error}"
    of = "the only commit" if count == 1 else f"one of {count} commits"
    told = f"{of} after {good}, the last that passed, up to {bad}, the first that {outcome}"
    if now != head and bad not in later:
        return f"what is not committed, or {told}"
    return told + (f": git bisect start {bad} {good}" if count > 1 else "")


def git(*words: str) -> str:
    """What it prints; raises `UserError`."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"git is needed here and cannot be run ({error}); install it") from None
    if done.returncode:
        raise UserError(
            f"git {words[0]} fails here ({done.stderr.strip()}); run this in a clone of the project"
        )
    return done.stdout.strip()
