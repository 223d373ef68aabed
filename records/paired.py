"""Paired differences between runs: by seed, and by document of the validation text.

What ladder.py and report.py say about two sets of runs comes from here, so that it is computed in one way. A run is
anything with a seed, a folder and what its result.json holds.
"""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

RESULT_FILE, SCORES_FILE = "result.json", "documents.csv"  # of a run
ROUNDING_BPB = 1e-6  # by how much the documents of a score may miss its bits per byte
NOTHING = "\u2013"  # in a cell of a table


class RunError(ValueError):
    """A mistake in the arguments or files. Its message is one line: what, where, and the fix."""


class ScoredRun(Protocol):
    """A finished run."""

    @property
    def seed(self) -> int: ...
    @property
    def folder(self) -> Path: ...
    @property
    def result(self) -> dict[str, Any]: ...


class Difference(NamedTuple):
    """Mean of differences, and its standard error; None for fewer than two."""

    mean: float
    error: float | None
    number: int  # of differences: pairs of runs with equal seeds, or documents


class Documents(NamedTuple):
    """The validation documents in the order of the stream, as one score of a run sees them."""

    bytes: np.ndarray  # (n,) int64
    nats: np.ndarray  # (n,) float64


class ByDocument(NamedTuple):
    """A difference in bits per byte, seen by document."""

    difference: Difference
    better: int  # documents with fewer nats


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Raises RunError for a missing or damaged file."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: not a JSON object; {fix}")
    return value


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation (divided by n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(mine: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """Of values by seed, over the seeds that both have; None without any. Error: std(differences) / sqrt(pairs)."""
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if not differences:
        return None
    mean, deviation = mean_and_deviation(differences)
    return Difference(mean, deviation and deviation / math.sqrt(len(differences)), len(differences))


def by_seed(runs: Sequence[ScoredRun], key: str) -> dict[int, float]:
    return {run.seed: run.result[key] for run in runs if run.result.get(key) is not None}


def read_documents(run: ScoredRun) -> Documents | None:
    """The submitted score; None for a run from before SCORES_FILE. Raises RunError for one that is not of the run's
    result."""
    path, kind = run.folder / SCORES_FILE, run.result["submitted"]
    if not path.exists():
        return None
    try:
        with path.open() as file:
            rows = [(int(row["bytes"]), float(row[kind])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read ({error!r}); delete the folder") from None
    found = Documents(np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows]))
    bpb = found.nats.sum() / max(found.bytes.sum(), 1) / math.log(2)
    if not abs(bpb - run.result["val_bpb"]) <= ROUNDING_BPB:
        raise RunError(f"{path}: its {kind} is {bpb:.6f} bpb, not {run.result['val_bpb']:.6f}; delete the folder")
    return found


def document_differences(mine: Sequence[ScoredRun], theirs: Sequence[ScoredRun]) -> ByDocument | None:
    """Of two sets of runs, over the seeds that both have; None without such seeds, or where a run has no SCORES_FILE.

    Raises RunError where the documents of two runs have other bytes.
    """
    ours, others = ({run.seed: run for run in runs} for runs in (mine, theirs))
    return run_differences([(ours[seed], others[seed]) for seed in sorted(ours.keys() & others.keys())])


def run_differences(pairs: Sequence[tuple[ScoredRun, ScoredRun]]) -> ByDocument | None:
    """The same of given pairs of runs."""
    scores = {run.folder: read_documents(run) for pair in pairs for run in pair}
    if not scores or any(score is None for score in scores.values()):
        return None
    first, sizes = next((folder, score.bytes) for folder, score in scores.items())
    for folder, score in scores.items():
        if not np.array_equal(score.bytes, sizes):
            raise RunError(f"{folder}: its documents have other bytes than those of {first}; score them again")
    nats = np.mean([scores[a.folder].nats - scores[b.folder].nats for a, b in pairs], axis=0)
    return ByDocument(ratio(nats, sizes), int((nats < 0).sum()))


def ratio(nats: np.ndarray, sizes: np.ndarray) -> Difference:
    """Sum of `nats` (n,) over sum of `sizes` (n,) bytes, in bits per byte, of n documents taken as drawn at random.

    Error of the ratio r = sum(d) / sum(b): sqrt(n / (n - 1) * sum((d - r b)^2)) / sum(b).
    """
    count, size = len(nats), sizes.sum() * math.log(2)
    left = nats - nats.sum() / sizes.sum() * sizes
    error = math.sqrt(count / (count - 1) * (left**2).sum()) / size if count > 1 else None
    return Difference(float(nats.sum() / size), error, count)


def with_deviation(values: dict[int, float]) -> str:
    """Mean and sample standard deviation of values by seed, as text."""
    if not values:
        return NOTHING
    mean, deviation = mean_and_deviation(list(values.values()))
    return f"{mean:.4f}" + (f" \u00b1 {deviation:.4f}" if deviation is not None else "")


def signed(difference: Difference | None) -> str:
    """A difference and its standard error, as text."""
    if difference is None:
        return NOTHING
    return f"{difference.mean:+.4f}" + (f" \u00b1 {difference.error:.4f}" if difference.error is not None else "")
