"""Nothing is lost: runs that are killed, stopped or starved of disk space continue to the same result."""

import functools
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, ToyData
from robust_helpers import (
    Outcome,
    assert_same,
    clean_environment,
    command,
    die_at,
    ended,
    file_size_limit,
    nobody,
    outcome,
    script_command,
    slow_down,
    start_child,
    start_command,
    text_of,
    wait_for,
)

import train_gpt as tg

ENV = dict(SLIDING_WINDOW_ENABLED=1, CHECKPOINT_SECONDS=0.05, ITERATIONS=8)


@pytest.fixture(scope="module")
def whole(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that nothing disturbs."""
    root = tmp_path_factory.mktemp("whole")
    process = start_command(toy_data.env(RUNS_DIR=root, RUN_ID="toy", **ENV), root / "output.txt")
    assert ended(process) == 0, text_of(root / "output.txt")
    return outcome(root / "toy")


def finish(env: dict[str, str], folder: Path, expected: Outcome) -> None:
    """The same command once more, to the end: the result is that of the undisturbed run."""
    output = folder.parent / "last.txt"
    assert ended(start_command(env, output)) == 0, text_of(output)
    assert_same(outcome(folder), expected)
    assert not list(folder.glob("*.part"))


# Kill -9 --------------------------------------------------------------------------------------------------------

# What the console shows when a stage begins, and about how long it takes here relative to the whole.
MOMENTS = {"start": "^source ", "train": "^train step:[2-9]", "quantize": "^stage name:train", "evaluate": "^artifact "}


def place(text: str) -> str:
    """The stage in which an output ends."""
    for stage, mark in reversed(MOMENTS.items()):
        if re.search(mark, text, re.MULTILINE):
            return stage
    return "start"


def kill_in(stage: str, start: Any, output: Path, pause: float) -> str | None:
    """Starts a run, kills it `pause` seconds after a stage began; returns where that was, None if it was too late."""
    process, mark = start(output), re.compile(MOMENTS[stage], re.MULTILINE)
    if wait_for(lambda: mark.search(text_of(output)), process):
        time.sleep(pause)
    process.kill()
    status = process.wait(60) if hasattr(process, "wait") else ended(process)
    if status != -signal.SIGKILL:
        assert status == 0
        return None
    return place(text_of(output))


def killed_until_done(
    env: dict[str, str], folder: Path, kills: list[tuple[str, float]], expected: Outcome, start: Any
) -> list[str]:
    """A run that is killed at these moments, with the same command again each time; returns the stages it died in."""
    hits = []
    for number, (stage, pause) in enumerate(kills):
        hit = kill_in(stage, start, folder.parent / f"{folder.name}.{number}.txt", pause)
        hits += [hit] if hit else []
        if (folder / "checkpoint.bin").exists():
            tg.load_arrays(folder / "checkpoint.bin")  # whole at any moment
    finish(env, folder, expected)
    return hits


def test_run_killed_in_each_stage_ends_with_the_undisturbed_result(
    toy_data: ToyData, tmp_path: Path, whole: Outcome, capsys: pytest.CaptureFixture
) -> None:
    """Three kills, one in each stage; every score, loss, weight and byte of the artifact is that of the whole run."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="toy", **ENV)
    start = functools.partial(start_command, env)
    kills = [("train", 0.15), ("quantize", 0.02), ("evaluate", 0.3)]
    hits = killed_until_done(env, tmp_path / "toy", kills, whole, start)
    with capsys.disabled():
        print(f"\nkilled in: {hits}")
    assert len(hits) == 3


def start_script(env: dict[str, str], output: Path) -> subprocess.Popen:
    with open(output, "w") as file:
        return subprocess.Popen(script_command(), env=clean_environment(env), cwd=output.parent, stdout=file)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_never_change_the_result(
    toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The script itself, killed at 20 random moments of all stages over five runs: always the undisturbed result."""
    settings = ENV | dict(CHECKPOINT_SECONDS=0.2, ITERATIONS=60)
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="whole", **settings)
    subprocess.run(script_command(), env=clean_environment(env), cwd=tmp_path, stdout=subprocess.DEVNULL, check=True)
    expected, dice, hits = outcome(tmp_path / "whole"), random.Random(7), []
    lengths = {"start": 1.0, "train": 2.0, "quantize": 0.3, "evaluate": 2.0}
    for number in range(8):
        if len(hits) >= 20:
            break
        env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID=f"killed{number}", **settings)
        start = functools.partial(start_script, env)
        stages = [*MOMENTS, dice.choice(list(MOMENTS))]
        kills = [(stage, dice.uniform(0, lengths[stage])) for stage in stages]
        hits += killed_until_done(env, tmp_path / f"killed{number}", kills, expected, start)
        with capsys.disabled():
            print(f"\nrun {number}: {len(hits)} kills so far, in { ({s: hits.count(s) for s in MOMENTS}) }", flush=True)
    assert len(hits) >= 20 and set(hits) == set(MOMENTS)


def some_fast(cases: list[tuple], fast: list[tuple]) -> list[Any]:
    """All cases as parameters, those that are not named as fast ones marked slow."""
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases]


FILES = ["checkpoint.bin", "trained.bin", "artifact.bin", "result.json"]
FAST_FILES = [("checkpoint.bin", True), ("trained.bin", False)]


@pytest.mark.parametrize("name, half_written", some_fast([(n, h) for n in FILES for h in (True, False)], FAST_FILES))
def test_kill_while_a_file_is_written_leaves_the_earlier_one(
    name: str, half_written: bool, toy_data: ToyData, tmp_path: Path, whole: Outcome
) -> None:
    """Half a file, or a whole one that was not renamed yet: the file of that name is what it was, and all goes on."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="toy", **ENV)
    folder = tmp_path / "toy"
    folder.mkdir()
    assert ended(start_command(env, tmp_path / "out.txt", (die_at, name, half_written))) == -signal.SIGKILL
    assert (folder / f"{name}.part").exists() and not (folder / name).exists()
    if half_written:
        finish(env, folder, whole)


@pytest.mark.slow
def test_stale_partial_files_of_a_killed_run_are_no_obstacle(toy_data: ToyData, tmp_path: Path, whole: Outcome) -> None:
    """Left-overs under every temporary name, garbage or empty, are overwritten and gone afterwards."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for number, name in enumerate(("checkpoint.bin", "trained.bin", "artifact.bin", "result.json", "loss_curve.png")):
        (folder / f"{name}.part").write_bytes(b"\xff garbage" * (1000 * (number % 2)))
    (folder / "log.txt").write_bytes(b"train step:3/6 lo")  # the line that a killed run did not finish
    finish(toy_data.env(RUNS_DIR=tmp_path, RUN_ID="toy", **ENV), folder, whole)


# Signals --------------------------------------------------------------------------------------------------------


def test_signal_in_the_last_step_is_not_forgotten(toy_data: ToyData, tmp_path: Path, monkeypatch: Any) -> None:
    """It ends the run after that step, with a checkpoint, instead of being dropped with the loop."""
    config = toy_data.config(RUNS_DIR=tmp_path, RUN_ID="toy", ITERATIONS=2)
    config.run_dir.mkdir()
    trainer = tg.Trainer(config, tg.Run(), tg.Log(None))
    real = trainer.update

    def update(*arguments: Any) -> Any:
        if trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    trainer.update = update
    with pytest.raises(tg.Interrupted):
        trainer.loop()
    assert tg.load_arrays(tmp_path / "toy" / "checkpoint.bin")[0]["step"] == 2


LATER = [
    (kind, *where)
    for kind in (signal.SIGTERM, signal.SIGINT)
    for where in (("quantize", "gptq"), ("evaluate", "adapt_documents"))
]


@pytest.mark.parametrize("kind, stage, function", some_fast(LATER, [LATER[0], LATER[3]]))
def test_signal_in_a_later_stage_ends_it_at_once_and_keeps_the_files(
    kind: signal.Signals, stage: str, function: str, toy_data: ToyData, tmp_path: Path, whole: Outcome
) -> None:
    """Quantising and scoring stop within two seconds with status 128 + n and one line; what there was is untouched."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="toy", STAGES=stage, **ENV)
    folder, output, mark = tmp_path / "toy", tmp_path / "out.txt", tmp_path / "mark"
    folder.mkdir()
    (folder / "trained.bin").write_bytes(whole.trained)
    (folder / "artifact.bin").write_bytes(whole.artifact)
    process = start_command(env, output, (slow_down, function, str(mark)))
    assert wait_for(mark.exists, process)
    tg.os.kill(process.pid, kind)
    begin = time.monotonic()
    assert ended(process) == 128 + kind and time.monotonic() - begin < 2
    assert text_of(output).splitlines()[-1].startswith(f"stopped by {kind.name}") and "Traceback" not in text_of(output)
    assert (folder / "trained.bin").read_bytes() == whole.trained
    assert (folder / "artifact.bin").read_bytes() == whole.artifact


# Disk and clock ---------------------------------------------------------------------------------------------------


def refused(output: Path, status: int, *words: str) -> None:
    """Status 2 and one last line that has these words."""
    text = text_of(output)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in text, text[-2000:]
    assert all(re.search(word, lines[0]) for word in words), lines[0]


LOG_BYTES = (ROOT / "train_gpt.py").stat().st_size + 30_000  # the log holds the script; a checkpoint is larger


@pytest.mark.parametrize("name, limit", [("checkpoint.bin", LOG_BYTES), ("log.txt", 1000)])
def test_full_disk_is_one_line_naming_file_and_bytes(
    name: str, limit: int, toy_data: ToyData, tmp_path: Path, whole: Outcome
) -> None:
    """A size limit on files stands for the full disk; with room again, the same command goes on to the same result."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="toy", **ENV)
    folder, output = tmp_path / "toy", tmp_path / "out.txt"
    folder.mkdir()
    refused(output, ended(start_command(env, output, (file_size_limit, limit))), name, r"\d bytes", "free space")
    assert not list(folder.glob("*.part"))
    if name == "checkpoint.bin":
        assert not (folder / name).exists()
        finish(env, folder, whole)


def test_full_disk_keeps_the_earlier_file(tmp_path: Path) -> None:
    """The file that was there before the disk was full is still readable, and no partial one takes the space."""
    path = tmp_path / "a.bin"
    tg.write_container(path, {"n": 1}, [b"old"])
    process = start_child(write_large, path, 10_000, output=tmp_path / "out.txt")
    assert ended(process) == 2
    assert re.search(r"a.bin: cannot write 1000\d\d\d bytes \(File too large\)", text_of(tmp_path / "out.txt"))
    assert tg.read_container(path) == ({"n": 1}, [b"old"]) and not list(tmp_path.glob("*.part"))


def write_large(path: Path, limit: int) -> int:
    file_size_limit(limit)
    try:
        tg.write_container(path, {"n": 2}, [bytes(1_000_000)])
    except tg.UserError as error:
        print(error, flush=True)
        return 2
    return 0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Any:
    """A file system of 900 kB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting is refused here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_file_system_is_one_line_and_a_larger_one_continues(
    toy_data: ToyData, tmp_path: Path, tiny_disk: Path, whole: Outcome
) -> None:
    """On a tiny tmpfs the run is refused before training, with the bytes that are free and needed; elsewhere it runs."""
    output = tmp_path / "out.txt"
    env = toy_data.env(RUN_ID="toy", **ENV)
    status = ended(start_command(env | {"RUNS_DIR": str(tiny_disk)}, output))
    refused(output, status, rf"RUNS_DIR={tiny_disk}: \d+ bytes free in {tiny_disk}/toy, a run writes \d+; free space or")
    assert [path.name for path in (tiny_disk / "toy").iterdir()] == ["log.txt"]
    shutil.copytree(tiny_disk / "toy", tmp_path / "runs" / "toy")
    finish(env | {"RUNS_DIR": str(tmp_path / "runs")}, tmp_path / "runs" / "toy", whole)


@pytest.mark.parametrize("where", ["runs", "runs/toy"])
def test_read_only_output_folder_is_one_line(where: str, toy_data: ToyData, tmp_path_factory: Any) -> None:
    """A runs folder, or the folder of the run, that may not be written: refused before training, with its name."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:  # one that a user without rights can enter
        root = Path(name)
        root.chmod(0o755)
        (root / "runs" / "toy").mkdir(parents=True)
        shutil.copytree(toy_data.folder, root / "toy")
        shutil.copy(toy_data.tokenizer, root / "toy.model")
        (root / "out.txt").touch()
        if where == "runs":
            (root / "runs" / "toy").rmdir()
        (root / where).chmod(0o555)
        env = toy_data.env(
            DATA_PATH=root / "toy", TOKENIZER_PATH=root / "toy.model", RUNS_DIR=root / "runs", RUN_ID="toy"
        )
        status = ended(start_child(command, env, (nobody,), output=root / "out.txt"))
        refused(root / "out.txt", status, str(root / where), "Permission denied", "RUNS_DIR")
        assert "train step" not in text_of(root / "out.txt")
        (root / where).chmod(0o755)


def test_clock_that_jumps_backwards_changes_nothing(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Outcome
) -> None:
    """The wall clock goes back an hour at each look; times stay positive and rising, the result is the same."""
    now = [2e9]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    torch.set_num_threads(1)
    monkeypatch.setattr(time, "time", back)
    result = tg.main(toy_data.config(RUNS_DIR=tmp_path, RUN_ID="toy", **ENV), tg.Run())
    assert_same(outcome(tmp_path / "toy"), whole)
    assert all(value >= 0 for key, value in result.items() if key.endswith("seconds") and key != "stage_seconds")
    history = tg.load_arrays(tmp_path / "toy" / "checkpoint.bin")[1]["history"]
    assert (history[1:, 2] >= history[:-1, 2]).all() and (history[:, 2] >= 0).all()
