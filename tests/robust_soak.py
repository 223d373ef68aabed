"""Soak: whole toy runs in one process, again and again; memory, file handles and threads may not grow.

python tests/robust_soak.py MINUTES     not collected by pytest; test_robust_soak.py is the short version
"""

import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from conftest import ToyData, build_toy_data

import train_gpt as tg


class Sample(NamedTuple):
    """What this process holds after a run."""

    minutes: float
    rss_mib: float
    handles: int
    threads: int


def sample(start: float) -> Sample:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    handles = len(os.listdir("/proc/self/fd")) - 1  # without the one that lists the folder
    threads = len(os.listdir("/proc/self/task"))  # of the operating system, not only Python's
    return Sample((time.monotonic() - start) / 60, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, handles, threads)


def one_run(data: ToyData, folder: Path, number: int, **changes: Any) -> float:
    """A whole run with checkpoints, every second one continued, its folder removed; returns its score."""
    settings = dict(CHECKPOINT_SECONDS=1e-9, SLIDING_WINDOW_ENABLED=1) | changes
    env = data.env(RUNS_DIR=folder, RUN_ID=f"soak{number}", **settings)
    result = tg.main(tg.load_config(env)[0], tg.Run())
    if number % 2:
        again = tg.main(tg.load_config(env)[0], tg.Run())  # restores the last checkpoint: nothing is left to train
        assert again["val_bpb"] == result["val_bpb"] and again["artifact_sha256"] == result["artifact_sha256"]
    shutil.rmtree(folder / f"soak{number}")
    return result["val_bpb"]


def soak(data: ToyData, folder: Path, minutes: float, least_runs: int, settle: int = 3, **changes: Any) -> list[Sample]:
    """One sample per run, without the first `settle` runs, which load libraries and fill caches."""
    start, samples, scores = time.monotonic(), [], set()
    number = 0
    while time.monotonic() - start < 60 * minutes or number < least_runs + settle:
        scores.add(one_run(data, folder, number, **changes))
        number += 1
        if number > settle:
            samples.append(sample(start))
    assert len(scores) == 1, f"the same run gave {scores}"
    named = {thread.name for thread in threading.enumerate()}
    assert named <= {"MainThread", "tqdm_monitor"}, named  # the second belongs to the progress bar, once per process
    return samples


def slope(samples: list[Sample], field: str) -> float:
    """Growth per run by least squares."""
    return float(np.polyfit(range(len(samples)), [getattr(s, field) for s in samples], 1)[0])


def summary(samples: list[Sample]) -> str:
    first, last = samples[0], samples[-1]
    half = samples[len(samples) // 2 :]
    lines = [f"soak runs:{len(samples)} minutes:{last.minutes:.1f}"]
    for field, unit in (("rss_mib", "KiB"), ("handles", ""), ("threads", "")):
        scale = 1024 if unit else 1
        values = [getattr(s, field) for s in samples]
        lines.append(
            f"soak {field} start:{getattr(first, field):.1f} end:{getattr(last, field):.1f} max:{max(values):.1f}"
            f" slope_per_run{'_' + unit if unit else ''}:{scale * slope(samples, field):.3f}"
            f" second_half:{scale * slope(half, field):.3f}"
        )
    return "\n".join(lines)


def run(minutes: float) -> None:
    with tempfile.TemporaryDirectory() as root, open(os.devnull, "w") as nowhere:
        data = build_toy_data(Path(root))
        console, sys.stdout = sys.stdout, nowhere
        try:
            samples = soak(data, Path(root) / "runs", minutes, least_runs=5)
        finally:
            sys.stdout = console
        print(summary(samples), flush=True)


if __name__ == "__main__":
    run(float(sys.argv[1]))
