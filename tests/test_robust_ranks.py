"""Many processes: any number of ranks, on one host or two, gives one result; and none is lost without a word."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ToyData, free_port
from robust_helpers import (
    assert_same,
    clean_environment,
    ended,
    outcome,
    script_command,
    start_command,
    start_ranks,
    text_of,
    wait_for,
    worker_of,
)
from test_main import documents

import train_gpt as tg

ENV = dict(SLIDING_WINDOW_ENABLED=1, RUN_ID="toy", ITERATIONS=6)


def losses(folder: Path) -> list[float]:
    found = re.findall(r"^train step:\d+/\d+ loss:(\S+)", (folder / "log.txt").read_text(), re.MULTILINE)
    return [float(loss) for loss in found]


def assert_equal_runs(found: Path, expected: Path) -> str:
    """Losses, artifact quality and evaluation sums agree within floating-point tolerance; returns how well."""
    (mine, theirs), results = (
        map(losses, (found, expected)),
        [json.loads((f / "result.json").read_text()) for f in (found, expected)],
    )
    assert len(mine) == len(theirs) == 6
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    worst = 0.0
    for kind in ("prequant", "quantized", "sliding", "ttt"):
        a, b = (result[f"{kind}_val_loss"] for result in results)
        worst = max(worst, abs(a - b))
    for key in (
        "scored_tokens",
        "scored_bytes",
        "learned_targets",
        "val_targets",
        "val_bytes",
        "steps",
        "most_times_scored",
    ):
        assert results[0][key] == results[1][key], key
    sizes = [result["artifact_bytes"] for result in results]
    assert worst < 2e-3 and abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]
    gap = max(abs(a - b) for a, b in zip(mine, theirs))
    return f"largest difference: losses {gap:.1e}, scores {worst:.1e} nats, artifact {sizes[0] - sizes[1]:+d} bytes"


def run_ranks(world_size: int, env: dict[str, str], root: Path) -> Path:
    output = root / f"out{world_size}.txt"
    statuses = [
        ended(process, 120)
        for process in start_ranks(world_size, env | {"RUNS_DIR": str(root / str(world_size))}, output)
    ]
    assert statuses == [0] * world_size, text_of(output)[-3000:]
    return root / str(world_size) / "toy"


@pytest.fixture(scope="module")
def alone(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return run_ranks(1, toy_data.env(**ENV), tmp_path_factory.mktemp("alone"))


@pytest.mark.slow  # test_train.py has a shorter version, and the two hosts below are two ranks
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_run_of_one(
    world_size: int, toy_data: ToyData, tmp_path: Path, alone: Path, capsys: pytest.CaptureFixture
) -> None:
    """All stages by several processes: the same losses, scores and counts."""
    found = run_ranks(world_size, toy_data.env(**ENV), tmp_path)
    with capsys.disabled():
        print(f"\n{world_size} ranks and 1: {assert_equal_runs(found, alone)}")


@pytest.mark.slow
def test_more_ranks_than_rows_or_windows_gives_the_run_of_one(
    toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two rows a step, one row of windows, one batch of documents: ranks without work take part all the same."""
    env = toy_data.env(**ENV | dict(TRAIN_BATCH_TOKENS=128, GPTQ_CALIBRATION_BATCHES=1, VAL_BATCH_TOKENS=2**20))
    env |= dict(TTT_BATCH_SIZE="64", GLOBAL_TTT_CHUNK_TOKENS="32")
    expected = run_ranks(1, env, tmp_path)
    for world_size in (3, 4):
        found = run_ranks(world_size, env, tmp_path)
        with capsys.disabled():
            print(f"\n{world_size} ranks, 2 rows a step: {assert_equal_runs(found, expected)}")


# Two hosts ----------------------------------------------------------------------------------------------------------


def hosts(count: int, static: bool) -> list[list[str]]:
    """torchrun's options on each host of one job."""
    port = free_port()
    shared = [f"--nnodes={count}", "--nproc_per_node=1"]
    if static:
        return [[*shared, f"--node_rank={i}", "--master_addr=127.0.0.1", f"--master_port={port}"] for i in range(count)]
    return [[*shared, "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=toy"]] * count


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True], ids=["c10d", "static"])
def test_two_hosts_without_a_shared_folder_give_the_run_of_one(
    static: bool, toy_data: ToyData, tmp_path: Path, alone: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two torchruns, each in its own working folder with its own runs folder, equal one process and two ranks; only one
    of them speaks; and one process gives their artifact the same score, document by document."""
    processes = []
    for number, options in enumerate(hosts(2, static)):
        home = tmp_path / f"host{number}"
        home.mkdir()
        env = clean_environment(toy_data.env(**ENV | {"RUNS_DIR": "runs"}))
        with open(home / "out.txt", "w") as output:
            processes.append(
                subprocess.Popen(script_command(*options), cwd=home, env=env, stdout=output, stderr=output)
            )
    for number, process in enumerate(processes):
        assert process.wait(60) == 0, text_of(tmp_path / f"host{number}" / "out.txt")[-3000:]
    homes = sorted(tmp_path.glob("host*"), key=lambda home: (home / "runs" / "toy" / "result.json").exists())
    spoken = [re.findall("^(?:train|score|result) ", text_of(home / "out.txt"), re.MULTILINE) for home in homes]
    assert [len(lines) for lines in spoken] == [0, 6 + 3 + 1] and not list((homes[0] / "runs" / "toy").iterdir())
    main = homes[1] / "runs" / "toy"
    first, apart = outcome(main), documents(main)
    assert json.loads((main / "result.json").read_text())["ranks"] == 2
    with capsys.disabled():
        print(f"\ntwo hosts and 1 process: {assert_equal_runs(main, alone)}")
    tg.main(toy_data.config(**ENV | {"RUNS_DIR": homes[1] / "runs", "STAGES": "evaluate"}), tg.Run())
    for kind, nats in documents(main).items():
        assert nats == pytest.approx(apart[kind], rel=1e-5), kind
    if not static:
        together = run_ranks(2, toy_data.env(**ENV), tmp_path)
        assert losses(main) == losses(together)
        assert first.artifact == outcome(together).artifact


# Lost processes -------------------------------------------------------------------------------------------------------


def kill_rank(rank: int, at: str, log: Path, processes: list[Any]) -> float:
    """Kills a rank once the log shows `at`; returns the seconds until all others have ended."""
    assert wait_for(lambda: re.search(at, text_of(log), re.MULTILINE), processes[0])
    processes[rank].kill()
    begin = time.monotonic()
    for process in processes:
        process.join(60)
    return time.monotonic() - begin


@pytest.mark.parametrize(
    "rank, at",
    [
        (1, "^train step:3"),
        pytest.param(0, "^train step:3", marks=pytest.mark.slow),
        pytest.param(1, "^artifact ", marks=pytest.mark.slow),
    ],
)
def test_killed_rank_takes_the_others_down_within_seconds_and_a_restart_resumes(
    rank: int, at: str, toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The survivor says in one line that it lost another process, status 1; both again give the undisturbed run."""
    settings = ENV | dict(ITERATIONS=7, CHECKPOINT_SECONDS=1e-9)
    whole = start_ranks(2, toy_data.env(RUNS_DIR=tmp_path / "whole", **settings), tmp_path / "whole.txt")
    output, log = tmp_path / "out.txt", tmp_path / "toy" / "log.txt"
    assert [ended(process) for process in whole] == [0, 0], text_of(tmp_path / "whole.txt")[-2000:]
    env = toy_data.env(RUNS_DIR=tmp_path, **settings)
    processes = start_ranks(2, env, output)
    seconds = kill_rank(rank, at, log, processes)
    text = text_of(output)
    assert seconds < 5 and processes[rank].exitcode == -signal.SIGKILL and processes[1 - rank].exitcode == 1, text[
        -2000:
    ]
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == (rank == 1) and "Traceback" not in text, text[-2000:]
    assert all("lost another process" in line for line in lines)
    with capsys.disabled():
        print(f"\nrank {rank} killed: the other one ended {seconds:.2f} s later: {lines}")
    assert [ended(process) for process in start_ranks(2, env, output)] == [0, 0], text_of(output)[-2000:]
    assert "\nresumed " in text_of(log)
    assert_same(outcome(tmp_path / "toy"), outcome(tmp_path / "whole" / "toy"))


def test_error_of_one_rank_is_told_once_and_ends_all(toy_data: ToyData, tmp_path: Path) -> None:
    """Data that is missing on every rank: one line of the first process, status 2 everywhere."""
    env = toy_data.env(RUNS_DIR=tmp_path, **ENV | {"DATA_PATH": tmp_path / "nothing"})
    statuses = [ended(process) for process in start_ranks(2, env, tmp_path / "out.txt")]
    lines = [line for line in text_of(tmp_path / "out.txt").splitlines() if line.startswith("error: ")]
    assert statuses == [2, 2] and len(lines) == 1 and "nothing" in lines[0]


@pytest.mark.slow
def test_restarted_job_resumes_from_the_checkpoint(
    toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """torchrun --max-restarts=1 after the loss of one of two ranks: resumed, with the result of the undisturbed run."""
    settings = ENV | dict(ITERATIONS=150, CHECKPOINT_SECONDS=0.1, TRAIN_LOG_EVERY=1)
    whole = start_ranks(2, toy_data.env(**settings | {"RUNS_DIR": tmp_path / "whole"}), tmp_path / "whole.txt")
    assert [ended(process) for process in whole] == [0, 0], text_of(tmp_path / "whole.txt")[-2000:]
    env = toy_data.env(RUNS_DIR=tmp_path, **settings)
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    with open(tmp_path / "out.txt", "w") as output:
        job = subprocess.Popen(
            script_command(*options), cwd=tmp_path, env=clean_environment(env), stdout=output, stderr=output
        )
    log = tmp_path / "toy" / "log.txt"
    assert wait_for(lambda: "\ncheckpoint " in text_of(log), job)
    os.kill(worker_of(job.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    assert wait_for(lambda: "\nresumed " in text_of(log), job), text_of(tmp_path / "out.txt")[-3000:]
    back = time.monotonic() - killed
    assert job.wait(120) == 0, text_of(tmp_path / "out.txt")[-3000:]
    assert_same(outcome(tmp_path / "toy"), outcome(tmp_path / "whole" / "toy"))
    step = re.search(r"^resumed step:(\d+)", text_of(log), re.MULTILINE)[1]
    with capsys.disabled():
        print(f"\nkilled rank 1 of 2: torchrun had the job back {back:.1f} s later, at step {step} of 150; same result")


@pytest.mark.slow
def test_job_without_restarts_ends_within_seconds_of_a_lost_rank(
    toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """torchrun itself ends soon after one rank is killed and says which; SIGTERM to torchrun saves the step."""
    env = clean_environment(toy_data.env(RUNS_DIR=tmp_path, **ENV | dict(ITERATIONS=5000, TRAIN_LOG_EVERY=1)))
    command, log = script_command("--standalone", "--nproc_per_node=2"), tmp_path / "toy" / "log.txt"
    for kind in (signal.SIGKILL, signal.SIGTERM):
        log.unlink(missing_ok=True)
        job = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert wait_for(lambda: "\ntrain step:3/" in text_of(log), job)
        os.kill(worker_of(job.pid, 1) if kind == signal.SIGKILL else job.pid, kind)
        begin = time.monotonic()
        _, err = job.communicate(timeout=60)
        seconds = time.monotonic() - begin
        with capsys.disabled():
            print(f"\n{kind.name}: torchrun ended after {seconds:.1f} s with status {job.returncode}")
        assert seconds < 15 and job.returncode != 0
        if kind == signal.SIGKILL:
            assert err.count("lost another process") == 1 and "SIGKILL" in err
        else:
            assert tg.load_arrays(tmp_path / "toy" / "checkpoint.bin")[0]["step"] >= 3
            assert "stopped by SIGTERM" in err


def test_process_variables_that_make_no_sense_are_one_line(tmp_path: Path) -> None:
    """WORLD_SIZE without an address, or a rank that is no number: status 2 and a hint at torchrun."""
    for wrong in ({"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "x"}, {"WORLD_SIZE": ""}):
        output = tmp_path / "out.txt"
        output.unlink(missing_ok=True)
        assert ended(start_command({"RUNS_DIR": str(tmp_path), "MASTER_ADDR": ""} | wrong, output)) == 2
        lines = text_of(output).splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and "torchrun" in lines[0], lines
