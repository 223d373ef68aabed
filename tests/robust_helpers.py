"""Runs of the real command line in processes of their own, which tests may kill; and what must be equal afterwards."""

import dataclasses
import functools
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT, free_port

import train_gpt as tg

CHILDREN = multiprocessing.get_context("forkserver")  # see conftest.py

TIMED = re.compile("second|tokens_per_s|peak_memory|run_id|ranks|hardware|^stages$")


@functools.cache
def packed() -> dict[str, bytes]:
    """Text of the script -> its packed form, which every child would need a second for."""
    text = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    return {text: tg.packed_script(text)}


def main_in_child(function: Callable, arguments: tuple, output: str | None, packed: dict[str, bytes]) -> None:
    """In a child: `function(*arguments)` is its exit status; standard output and error go to a file."""
    import torch
    from tqdm import tqdm

    tg.packed_script = packed.__getitem__
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is shared between processes, and left over by one that is killed
    if output:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
    sys.exit(function(*arguments))


def start_child(function: Callable, *arguments: Any, output: Path | None = None) -> Any:
    process = CHILDREN.Process(target=main_in_child, args=(function, arguments, output and str(output), packed()))
    process.start()
    return process


def ended(process: Any, seconds: float = 60.0) -> int:
    """Exit status of a child; a hang is a failure."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


# What can be planted into a child before it runs the command line -------------------------------------------------


def die_at(name: str, half_written: bool) -> None:
    """The process is killed while it writes the file `name`: with half of it on disk, or before the renaming."""
    replace, fsync = os.replace, os.fsync

    def killing_replace(source: Any, target: Any) -> None:
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def killing_fsync(handle: int) -> None:
        fsync(handle)
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name == name + ".part":
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if half_written:
        os.fsync = killing_fsync
    else:
        os.replace = killing_replace


def slow_down(name: str, mark: str) -> None:
    """Calls of train_gpt's function `name` say so in the file `mark` and then take a minute."""
    import train_gpt as tg

    def waiting(*arguments: Any, **named: Any) -> None:
        Path(mark).touch()
        time.sleep(60)

    for table in (tg.QUANTIZERS, tg.TTT_KINDS):
        table.update({key: waiting for key, function in table.items() if function is getattr(tg, name)})
    setattr(tg, name, waiting)


def file_size_limit(size: int) -> None:
    """No file may grow beyond this, as on a full disk: a write then fails instead of ending the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def nobody() -> None:
    """Gives up the rights of root, for which no folder is read-only."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def command(env: dict[str, str], plant: tuple | None = None) -> int:
    """The script's command line with exactly these settings, in this process."""
    for name in list(os.environ):
        if name.lower() in tg.FIELDS or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    os.environ.update(env)
    if plant:
        plant[0](*plant[1:])
    return tg.command_line()


def start_command(env: dict[str, str], output: Path | None = None, plant: tuple | None = None) -> Any:
    return start_child(command, env, plant, output=output)


def start_ranks(world_size: int, env: dict[str, str], output: Path, plant: tuple | None = None) -> list[Any]:
    """The processes that torchrun would start on one host; `plant` goes to the last rank."""
    shared = env | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(world_size))
    last = world_size - 1
    return [
        start_command(shared | dict(RANK=str(r), LOCAL_RANK=str(r)), output, plant if r == last else None)
        for r in range(world_size)
    ]


# What a finished run leaves -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """All of a finished run that may not depend on how often it was interrupted."""

    result: dict[str, Any]
    losses: dict[str, set[str]]  # step -> losses in the log: one each, however often a step was repeated
    trained: bytes
    artifact: bytes


def outcome(folder: Path) -> Outcome:
    result = json.loads((folder / "result.json").read_text())
    kept = {
        key: value for key, value in result.items() if not TIMED.search(key) and key not in ("validity", "train_tokens")
    }
    losses: dict[str, set[str]] = {}
    for step, loss in re.findall(r"^train step:(\d+)/\d+ loss:(\S+)", (folder / "log.txt").read_text(), re.MULTILINE):
        losses.setdefault(step, set()).add(loss)
    return Outcome(kept, losses, (folder / "trained.bin").read_bytes(), (folder / "artifact.bin").read_bytes())


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Every score, loss and byte is equal."""
    assert found.result == expected.result and len(found.result) > 20
    assert found.losses == expected.losses and all(len(seen) == 1 for seen in found.losses.values())
    assert found.trained == expected.trained and found.artifact == expected.artifact


def wait_for(condition: Callable[[], Any], process: Any = None, seconds: float = 60.0) -> bool:
    """True when the condition holds; False when the process ended before; a hang is a failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and (process.poll() if hasattr(process, "poll") else process.exitcode) is not None:
            return False
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.002)
    return True


def text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def script_command(*torchrun: str) -> list[str]:
    """The command of a person, with torchrun's options in front of the script where there are any."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    return [sys.executable, *launcher, str(ROOT / "train_gpt.py")]


def clean_environment(env: dict[str, str]) -> dict[str, str]:
    """The settings of a run inside this machine's environment, one thread per process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | env


def worker_of(launcher: int, rank: int) -> int | None:
    """Process id of a rank below a torchrun process, once it runs."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if parent == launcher and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    return int(folder.name)
            except OSError:
                continue  # it ended in between
    return None
