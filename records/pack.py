#!/usr/bin/env python3
"""Makes a record folder from finished runs, one per seed; every number in it comes from their result and log.

    python records/pack.py runs/a runs/b runs/c --name "Looped transformer, score-first TTT" --author "Ada Example" \\
        --github-id ada --blurb "One sentence." --out records/2030-01-01_Looped_TTT --reference records/OLDER

The folder holds README.md, submission.json, train_seed<SEED>.log, requirements.txt, settings.env, train_gpt.py (the
script that the logs hold) and train_gpt_packed.py (the same without comments, compressed: the bytes that count). It is
written elsewhere, started once in a clean environment, checked by records/check.py, and only then moved into place.

Exit status: 0 written, 1 a rule failed (nothing is written), 2 a mistake in the arguments or unusable runs.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from records.check import alike, check_folder, passed, show
from records.folder import FolderError, compare, read_folder
from records.logs import logged_source, read_log
from records.texts import SeedRun, Words, readme, requirements, settings_file, submission

# Keys of result.json that the folder states; a run without one of them has not gone through all stages.
NEEDED = (
    "valid validity seed steps val_loss val_bpb prequant_val_bpb quantized_val_bpb total_bytes artifact_bytes"
    " code_bytes artifact_sha256 train_seconds calibration_seconds eval_seconds val_targets val_bytes hardware"
    " torch submitted parameters"
).split()


class PackError(ValueError):
    """Runs or arguments that make no record folder. The message is one line: what, where, and the fix."""


def read_run(folder: Path) -> SeedRun:
    """A run folder, checked to be complete, valid and consistent in itself. Raises PackError."""
    try:
        result = json.loads((folder / "result.json").read_text())
        log, source = read_log(folder / "log.txt"), logged_source(folder / "log.txt")
        artifact = (folder / "artifact.bin").read_bytes()
    except (OSError, ValueError) as error:
        raise PackError(f"{folder}: not a finished run ({error}); give the folder of a run with all stages") from None
    if missing := [key for key in NEEDED if result.get(key) is None]:
        raise PackError(
            f"{folder}: result.json lacks {', '.join(missing[:4])}; run the stages train, quantize, evaluate"
        )
    if log.result != {key: value for key, value in result.items() if key != "stages"}:  # the line is the flat part
        raise PackError(f"{folder}: log.txt does not end with the result of result.json; repeat the run")
    if not result["valid"]:
        raise PackError(
            f"{folder}: the run is INVALID ({'; '.join(result.get('violations', []))}); it cannot be submitted"
        )
    if hashlib.sha256(artifact).hexdigest() != result["artifact_sha256"]:
        raise PackError(f"{folder}: artifact.bin is not the file that was scored; run STAGES=quantize,evaluate again")
    if source is None or not log.settings:
        raise PackError(f"{folder}: log.txt does not hold its script and settings; repeat the run")
    return SeedRun(folder, result, log, source)


def read_runs(folders: list[Path], not_a_record: bool) -> list[SeedRun]:
    """All runs, in the given order. Raises PackError when they are not the same configuration with distinct seeds."""
    runs = [read_run(folder) for folder in folders]
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise PackError(f"seeds {', '.join(map(str, seeds))}: each may occur once; leave out the repeated run")
    if len(runs) < 3 and not not_a_record:
        raise PackError(f"{len(runs)} runs: a record needs 3 seeds or more; add runs, or say --not-a-record")
    if len({hash_ for run in runs for hash_ in run.log.facts["source_hashes"]}) > 1:
        raise PackError("the runs were made with different scripts; repeat those of the older one")
    same = alike([block for run in runs for block in run.log.settings], len(runs))
    if same.status == "fail":
        raise PackError(f"the runs' settings {same.found}; repeat the odd ones")
    return runs


def readable_source(run: SeedRun) -> bytes:
    """The script with its comments: what the log holds, or this repository's where the log holds its packed form."""
    from train_gpt import PACKED_START, packed_script

    if not run.source.startswith(PACKED_START):
        return run.source
    source = (ROOT / "train_gpt.py").read_bytes()
    if packed_script(source.decode()) != run.source:
        raise PackError(f"{run.folder}: made with a packed script that is not this train_gpt.py; check out its commit")
    return source


def start_packed(folder: Path) -> dict[str, Any]:
    """Runs the packed script inside the folder, with the recorded settings and an otherwise empty environment, as far
    as it goes without data. Returns what it describes. Raises PackError when it does not run."""
    env = {"PATH": os.defpath, "STAGES": "describe", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env |= {
        "DATA_DIR": ".",
        "DATA_PATH": ".",
        "TOKENIZER_PATH": ".",
    }  # not read here, but settings.env may ask for them
    command = f"set -a; . ./settings.env; set +a; exec {shlex.quote(sys.executable)} train_gpt_packed.py"
    done = subprocess.run(["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PackError(f"train_gpt_packed.py does not run in the folder: {last}")
    return json.loads(done.stdout)


def words_of(options: argparse.Namespace) -> Words:
    return Words(
        options.author,
        options.github_id,
        options.name,
        options.blurb,
        options.out.name[:10],
        not options.not_a_record,
        options.reference.resolve().name if options.reference else "",
        options.details.read_text().strip() if options.details else "",
        options.credits,
    )


def write_folder(runs: list[SeedRun], options: argparse.Namespace, folder: Path) -> None:
    """Writes all files. Raises PackError when the packed script is not what was counted, or does not run."""
    from train_gpt import packed_script

    source = readable_source(runs[0])
    packed = packed_script(source.decode())
    if {run.result["code_bytes"] for run in runs} != {len(packed)}:
        raise PackError(
            f"the packed script has {len(packed)} bytes, the runs counted {runs[0].result['code_bytes']};"
            " pack with the commit of the runs"
        )
    (folder / "train_gpt.py").write_bytes(source)
    (folder / "train_gpt_packed.py").write_bytes(packed)
    (folder / "requirements.txt").write_text(requirements(source, runs[0]))
    tokenizer = options.tokenizer
    if tokenizer:
        (folder / "tokenizers").mkdir()
        shutil.copyfile(tokenizer, folder / "tokenizers" / tokenizer.name)
    (folder / "settings.env").write_text(settings_file(runs[0], tokenizer))
    for run in runs:
        shutil.copyfile(run.log.path, folder / f"train_seed{run.seed}.log")
    described, words = start_packed(folder), words_of(options)
    if described["parameters"] != runs[0].result["parameters"]:
        raise PackError(
            f"the packed script has {described['parameters']} parameters with settings.env, the runs had"
            f" {runs[0].result['parameters']}; pack with the commit of the runs"
        )
    comparison = None
    if options.reference:  # the folder must exist as a folder to be compared, so its submission.json is written twice
        (folder / "submission.json").write_text(json.dumps(submission(runs, words, None), indent=2) + "\n")
        comparison = compare(read_folder(folder, False), read_folder(options.reference, False))
    (folder / "submission.json").write_text(json.dumps(submission(runs, words, comparison), indent=2) + "\n")
    (folder / "README.md").write_text(readme(runs, words, comparison, tokenizer))


def pack(options: argparse.Namespace) -> str:
    """Writes the folder and returns the report of its check. Raises PackError, also when a rule fails."""
    if options.out.exists():
        raise PackError(f"{options.out}: exists already; a record is never changed, choose another name")
    if not re.fullmatch(r"20\d\d-[01]\d-[0-3]\d_[A-Za-z0-9._+-]+", options.out.name):
        raise PackError(f"{options.out.name}: name the folder YYYY-MM-DD_Short_Name, ASCII, no spaces")
    for file in (options.tokenizer, options.details):
        if file and not file.is_file():
            raise PackError(f"{file}: no such file")
    runs = read_runs(options.runs, options.not_a_record)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=options.out.parent) as scratch:
        folder = Path(scratch) / options.out.name
        folder.mkdir()
        write_folder(runs, options, folder)
        reference = read_folder(options.reference, False) if options.reference else None
        written = read_folder(folder, options.not_a_record)
        verdicts = check_folder(written, reference)
        written.path = options.out
        text = show(written, verdicts)
        if not passed(verdicts):
            raise RuleFailed(text)
        os.rename(folder, options.out)
    return text


class RuleFailed(RuntimeError):
    """The folder breaks a rule; the message is the whole report."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes a record folder from the runs of several seeds.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    for name, text in (
        ("name", "short title"),
        ("author", "display name"),
        ("github-id", "account"),
        ("blurb", "one paragraph"),
    ):
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--out", required=True, type=Path, help="the folder to write, YYYY-MM-DD_Short_Name")
    parser.add_argument("--reference", type=Path, help="the record folder to compare with")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer model to include")
    parser.add_argument("--details", type=Path, help="a Markdown file that goes into the README after the results")
    parser.add_argument("--credits", default="", help="earlier entries that this one builds on, with their numbers")
    parser.add_argument(
        "--not-a-record", action="store_true", help="do not ask for time limits, hardware, seeds, margin"
    )
    try:
        options = parser.parse_args(arguments)
        print(pack(options))
        return 0
    except RuleFailed as error:
        print(f"{error}\nerror: a rule failed, nothing was written", file=sys.stderr)
        return 1
    except (PackError, FolderError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
