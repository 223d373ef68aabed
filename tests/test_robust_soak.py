"""Short version of the soak: whole runs in one process leave nothing behind."""

from pathlib import Path

import pytest
from conftest import FEW_VISITS, ToyData
from robust_helpers import ended, start_child, text_of
from robust_soak import soak, summary


def few_runs(data: ToyData, folder: Path, report: Path) -> int:
    short = dict(ITERATIONS=3, SLIDING_WINDOW_ENABLED=0, **FEW_VISITS)
    samples = soak(data, folder, minutes=0, least_runs=5, settle=1, **short)
    first, last = samples[0], samples[-1]
    grown = (last.rss_mib - first.rss_mib, last.handles - first.handles, last.threads - first.threads)
    report.write_text(f"{summary(samples)}\ngrown: {grown}\n")
    return int(not (len(samples) == 5 and grown[0] < 15 and grown[1] == grown[2] == 0))


@pytest.mark.slow
def test_repeated_runs_in_one_process_leave_no_memory_handle_or_thread(toy_data: ToyData, tmp_path: Path) -> None:
    """Five whole runs, two of them continued: file handles and threads do not grow, memory by less than 15 MiB."""
    report, output = tmp_path / "soak.txt", tmp_path / "out.txt"
    status = ended(start_child(few_runs, toy_data, tmp_path / "runs", report, output=output), 120)
    assert status == 0, text_of(report) or text_of(output)[-3000:]
