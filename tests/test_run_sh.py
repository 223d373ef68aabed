"""run.sh: which interpreter, packages and launch a machine gets; interpreter and driver are made up by the test."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train_gpt as tg

# Answers what run.sh asks PyTorch, and writes down every other call.
PYTHON = """#!/bin/sh
case "$*" in
    *torch.cuda.init*) echo Traceback; echo "RuntimeError: system not yet initialized" >&2; exit 1 ;;
    "-c import torch"*) echo "$TORCH" ;;
    -c*) ;;
    "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "$*" >> "$CALLS" ;;
    *) echo "$*" >> "$CALLS" ;;
esac
"""
NVIDIA_SMI = '#!/bin/sh\n[ -n "$DRIVER" ] || exit 9\nprintf "$DRIVER\\n$DRIVER\\n"\n'
JOB = ["data/embedded.py", "train_gpt.py"]  # PRESET=tiny as one process
WHEEL = ".venv/bin/python -m pip install torch==2.11.0 --index-url https://download.pytorch.org/whl/cu128"
CPU, CUDA_12, CUDA_13 = "0 2.13.0+cpu None", "2.11.0+cu128 12.8", "2.13.0 13.0"  # usable GPUs (or not yet), versions


@dataclasses.dataclass
class Machine:
    """A folder with the programs that run.sh finds; `run` gives what it said and which calls it made."""

    folder: Path

    def __post_init__(self) -> None:
        for name, text in {"python3": PYTHON, "nvidia-smi": NVIDIA_SMI}.items():
            self.program(name, text)

    def program(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def ready(self) -> str:
        """A virtual environment that holds what requirements.txt asks for."""
        python = self.folder / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        shutil.copy(self.folder / "python3", python)
        shutil.copy(ROOT / "requirements.txt", self.folder / "venv" / "installed-requirements.txt")
        return str(self.folder / "venv")

    def run(self, *words: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls = self.folder / "calls"
        calls.unlink(missing_ok=True)
        ours = dict(PATH=f"{self.folder}:/usr/bin:/bin", CALLS=str(calls), VENV=str(self.folder / "new"), TORCH=CPU)
        env = ours | env
        done = subprocess.run([str(ROOT / "run.sh"), *words], env=env, capture_output=True, text=True, check=False)
        return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_gpus_one_process_trains_tiny(machine: Machine) -> None:
    """A laptop: environment, packages, corpus, then PRESET=tiny."""
    done, calls = machine.run()
    assert done.returncode == 0 and done.stdout == "run.sh: 0 GPU(s), PRESET=tiny\n" and not done.stderr
    installs = [call for call in calls if "pip install" in call]
    assert calls[0] == f"-m venv {machine.folder}/new" and calls[-2:] == JOB
    assert installs[0].endswith("-r requirements.txt")
    assert machine.run()[1] == JOB  # the second time everything is in place


@pytest.mark.parametrize("pytorch, driver", [(f"2 {CUDA_13}", "580.65.06"), (f"2 {CUDA_12}", "570.124.06")])
def test_usable_gpus_get_one_process_each(machine: Machine, pytorch: str, driver: str) -> None:
    """Where PyTorch can use the GPUs, torchrun starts one process for each, whatever the driver."""
    done, calls = machine.run(VENV=machine.ready(), TORCH=pytorch, DRIVER=driver, PRESET="default")
    assert (done.returncode, done.stderr) == (0, "")
    assert calls == ["-m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py"]


@pytest.mark.parametrize(
    "pytorch, driver, said, advice",
    [
        (f"0 {CUDA_13}", "570.124.06", "PyTorch 2.13.0 is built for CUDA 13.0, which needs driver 580 or later", WHEEL),
        (CPU, "570.124.06", "PyTorch 2.13.0+cpu is a build without CUDA", WHEEL),
        (CPU, "580.65.06", "PyTorch 2.13.0+cpu is a build without CUDA", "The PyTorch of requirements.txt"),
        (f"0 {CUDA_13}", "580.65.06", "use none of them: RuntimeError: system not yet initialized", "fits this driver"),
        (f"0 {CUDA_12}", "470.82.01", "use none of them: RuntimeError: system not yet initialized", "to be updated"),
    ],
)
@pytest.mark.parametrize("words", [[], ["records/2026-04-29_MLPGateOut"]])
def test_gpus_that_torch_cannot_use_stop_the_run(
    machine: Machine, pytorch: str, driver: str, said: str, advice: str, words: list[str]
) -> None:
    """GPUs without a fitting PyTorch never end as a run on the CPU: one message says what there is and what fits."""
    done, calls = machine.run(*words, VENV=machine.ready(), TORCH=pytorch, DRIVER=driver)
    assert done.returncode == 2 and not calls and not done.stdout
    assert done.stderr.startswith(f"run.sh: found 2 GPU(s) with driver {driver}, but ")
    for part in (said, advice, "VENV=none PYTHON=/path/to/python", "CUDA_VISIBLE_DEVICES="):
        assert part in done.stderr


def test_nothing_is_downloaded_for_a_driver_that_it_cannot_run_on(machine: Machine) -> None:
    """With a driver before 580, the PyTorch of requirements.txt is not even installed."""
    done, calls = machine.run(DRIVER="570.124.06")
    assert done.returncode == 2 and not calls and not (machine.folder / "new").exists()
    assert "brings for CUDA 13, which needs driver 580 or later" in done.stderr and WHEEL in done.stderr
    assert machine.run(DRIVER="580.65.06", TORCH=f"2 {CUDA_13}")[0].returncode == 0


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hiding_the_gpus_keeps_the_run_on_the_cpu(machine: Machine, hidden: str) -> None:
    """CUDA_VISIBLE_DEVICES without a device is a wish, not a mistake; a device that cannot be used is one."""
    env = dict(VENV=machine.ready(), DRIVER="570.124.06")
    done, calls = machine.run(**env, CUDA_VISIBLE_DEVICES=hidden)
    assert (done.returncode, done.stderr, calls) == (0, "", JOB)
    assert machine.run(**env, CUDA_VISIBLE_DEVICES="0")[0].returncode == 2


@pytest.mark.parametrize("words, env", [(["test"], {}), ([], {"STAGES": "describe", "PRESET": "tiny"})])
def test_work_without_gpus_does_not_ask_for_them(machine: Machine, words: list[str], env: dict[str, str]) -> None:
    """The tests and the description of a configuration run on any driver."""
    done, calls = machine.run(*words, VENV=machine.ready(), DRIVER="570.124.06", **env)
    assert (done.returncode, done.stderr, len(calls)) == (0, "", 1)


def test_venv_none_uses_what_is_installed(machine: Machine) -> None:
    """VENV=none makes no environment and calls no pip: PYTHON, or python3, runs everything."""
    before = sorted(machine.folder.iterdir())
    done, calls = machine.run(VENV="none")
    assert (done.returncode, calls) == (0, JOB)
    machine.program("other", PYTHON)
    machine.program("python3", "#!/bin/sh\nexit 1\n")
    done, calls = machine.run(VENV="none", PYTHON=str(machine.folder / "other"), TORCH=f"2 {CUDA_12}", DRIVER="570.1")
    assert done.returncode == 0 and calls[-1].startswith("-m torch.distributed.run")
    assert set(machine.folder.iterdir()) - set(before) == {machine.folder / "other", machine.folder / "calls"}


def test_venv_none_names_what_is_missing(machine: Machine) -> None:
    """One line names every package that a run needs and PYTHON lacks; the packages of the tests only for the tests."""
    bare = str(machine.program("bare", f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n'))
    names = re.findall(r"^([a-z_0-9-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert names[-3:] == ["pytest", "pytest-xdist", "hypothesis"]
    for words, expected in (([], names[:-3]), (["test"], [name.removeprefix("pytest-") for name in names])):
        done, _ = machine.run(*words, VENV="none", PYTHON=bare)
        lacks = f"run.sh: VENV=none, but {bare} lacks: {' '.join(expected)} (requirements.txt has the versions)\n"
        assert (done.returncode, done.stderr) == (2, lacks)


def test_the_real_interpreter_is_understood(machine: Machine) -> None:
    """This interpreter has every package, and its PyTorch can use no device with the number 99."""
    env = dict(VENV="none", PYTHON=sys.executable, DRIVER="580.65.06", CUDA_VISIBLE_DEVICES="99")
    done, _ = machine.run(**env)
    assert done.returncode == 2 and f"but PyTorch {torch.__version__} " in done.stderr, done.stderr


def test_an_old_python_is_refused(machine: Machine) -> None:
    """Before anything is made, with or without a virtual environment."""
    machine.program("python3", "#!/bin/sh\nexit 1\n")
    for venv in ("none", str(machine.folder / "new")):
        done, _ = machine.run(VENV=venv)
        assert done.returncode == 2 and "needs Python 3.11 or later" in done.stderr
    assert not (machine.folder / "new").exists()


def test_first_word_chooses_what_runs(machine: Machine) -> None:
    """A folder starts reproduce.py with all words, test starts pytest on all cores; other words are refused."""
    venv, folder = machine.ready(), "records/2026-04-29_MLPGateOut"
    assert machine.run(folder, "42", VENV=venv)[1] == [f"records/reproduce.py {folder} 42"]
    calls = machine.run("test", "-x", "-n", "2", VENV=venv)[1]
    assert calls == ["-m pytest tests -m not slow -n auto --maxprocesses 16 --dist worksteal -x -n 2"]
    done, calls = machine.run("records/nothing", VENV=venv)
    assert done.returncode == 2 and not calls and "'records/nothing' is neither a folder nor" in done.stderr
    usage = machine.run("--help")[0].stdout
    assert all(re.search(rf"\b{preset}\b", usage) for preset in tg.PRESETS)
    assert "VENV=none" in usage and os.access(ROOT / "run.sh", os.X_OK)
