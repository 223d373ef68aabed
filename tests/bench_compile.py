"""Graphs that a run compiles with PyTorch's own compiler, per stage, and the seconds that they take.

    python tests/bench_compile.py [PRESET ...]      default: default, pr1880, pr2135, frontier

All stages at toy size on the stand-in for a GPU of test_graphs.py: padded rows, attention over the table of segments.
The number of graphs is that of a GPU; the seconds are those of a CPU. Takes minutes; the compile cache is not used.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from conftest import build_toy_data
from test_graphs import PaddedRun, attend, shallow

import train_gpt as tg


def compiled_graphs(preset: str, folder: Path) -> dict[str, dict[str, float]]:
    """Stage -> compiled_graphs, compiled_in_clock, fallbacks, compile_seconds of a run."""
    torch._dynamo.reset()
    tg.COMPILES.listen()
    (folder / "data").mkdir()
    config = shallow(build_toy_data(folder / "data"), preset, RUNS_DIR=folder, RUN_ID="run")
    result = tg.main(config, PaddedRun())
    if not result["valid"]:
        raise SystemExit(f"{preset}: {result['violations']}")
    return result["stage_graphs"]


def main() -> None:
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    tg.choose_attention = lambda config, device: ("stand-in", attend)
    rows = [f"{'preset':10} {'stage':9} graphs in_clock fallbacks seconds   torch {torch.__version__}"]
    for preset in sys.argv[1:] or ("default", "pr1880", "pr2135", "frontier"):
        with tempfile.TemporaryDirectory() as folder:
            for stage, found in compiled_graphs(preset, Path(folder)).items():
                graphs, clock, fallbacks, seconds = found.values()
                rows.append(f"{preset:10} {stage:9} {graphs:6} {clock:8} {fallbacks:9} {seconds:7.1f}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
