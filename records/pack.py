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
import ast
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from records.check import RECORD_P, Comparison, FolderError, alike, check_folder, compare, passed, read_folder, show
from records.logs import RunLog, logged_source, read_log

# Keys of result.json that the folder states; a run without one of them has not gone through all stages.
NEEDED = (
    "valid validity seed steps val_loss val_bpb prequant_val_bpb quantized_val_bpb total_bytes artifact_bytes"
    " code_bytes artifact_sha256 train_seconds calibration_seconds eval_seconds val_targets val_bytes hardware"
    " torch submitted"
).split()
# Environment settings that name a place or a run; all others are recorded in settings.env as they were.
PLACES = ("data_dir", "data_path", "tokenizer_path")
NOT_RECORDED = ("run_id", "runs_dir", "stages", "seed", "preset", *PLACES)
COMPLIANCE = {  # key of submission.json -> rules of the runs' validity report that it sums up
    "artifact_under_16mb": ("artifact_bytes",),
    "train_under_600s": ("train_seconds",),
    "eval_under_600s": ("eval_seconds",),
    "score_first_ttt": ("score_before_update", "single_pass"),
    "full_validation_set": ("scored_targets", "scored_bytes", "documents"),
}


class PackError(ValueError):
    """Runs or arguments that make no record folder. The message is one line: what, where, and the fix."""


@dataclasses.dataclass
class SeedRun:
    """One finished run."""

    folder: Path
    result: dict[str, Any]
    log: RunLog
    source: bytes  # the script that the log holds

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def settings(self) -> dict[str, str]:
        return self.log.settings[-1]


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
    if log.result != result:
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


def requirements(source: bytes, run: SeedRun) -> str:
    """The lines of the repository's requirements for what the script imports, with the versions that the log states."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    imported = {name.split(".")[0] for name in names}
    logged = {"torch": run.result["torch"], "numpy": run.log.facts.get("numpy")}
    lines = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        pinned = re.match(r"([A-Za-z0-9_-]+)==(\S+)", line)
        if pinned and pinned[1].replace("-", "_") in imported:
            version = (logged.get(pinned[1]) or pinned[2]).split("+")[0]  # without the build, which no index serves
            lines.append(f"{pinned[1]}=={version}")
    return "\n".join(lines) + "\n"


def settings_file(run: SeedRun, tokenizer: Path | None) -> str:
    """Every setting of the runs as environment variables that a shell reads inside the folder."""
    lines = ["# Every setting of the runs but the seed, for a shell in this folder: set -a; . ./settings.env; set +a"]
    for name in PLACES:
        value, key = run.settings.get(name, ""), name.upper()
        if name == "tokenizer_path" and tokenizer:
            lines.append(f"{key}=tokenizers/{tokenizer.name}")
        elif not value:
            continue
        elif os.path.isabs(value):  # of another machine: to be set before
            lines.append(
                f'{key}="${{{key}:?set it: {"a tokenizer model" if "tokenizer" in name else "a data folder"}}}"'
            )
        else:  # relative to the repository, two levels up
            lines.append(f'{key}="${{{key}:-{Path("../..") / value}}}"')
    recorded = {name: value for name, value in run.settings.items() if name not in NOT_RECORDED}
    values = {name: {"True": "1", "False": "0"}.get(value, value) for name, value in recorded.items()}
    return "\n".join(lines + [f"{name.upper()}={shlex.quote(value)}" for name, value in values.items()]) + "\n"


def mean(runs: list[SeedRun], key: str) -> float:
    return statistics.fmean(run.result[key] for run in runs)


def spread(runs: list[SeedRun], key: str) -> float | None:
    """Sample standard deviation (n - 1)."""
    return round(statistics.stdev(run.result[key] for run in runs), 8) if len(runs) > 1 else None


def train_time(run: SeedRun) -> float:
    """Seconds until the last read of training data."""
    return run.result["train_seconds"]


def step_ms(run: SeedRun) -> float:
    """Milliseconds per optimizer step, calibration left out."""
    return 1000 * (run.result["train_seconds"] - run.result["calibration_seconds"]) / max(run.result["steps"], 1)


def compliance(runs: list[SeedRun]) -> dict[str, bool]:
    """What the runs' own validity reports say; a rule that could not be judged in some run is left out."""
    found = {"three_seeds": len(runs) >= 3}
    for key, rules in COMPLIANCE.items():
        verdicts = [row["ok"] for run in runs for row in run.result["validity"] if row["rule"] in rules]
        if verdicts and None not in verdicts:
            found[key] = all(verdicts)
    return found


def submission(runs: list[SeedRun], options: argparse.Namespace, comparison: Comparison | None) -> dict[str, Any]:
    """submission.json: the layout that published records share, filled from the runs."""
    totals = [run.result["total_bytes"] for run in runs]
    per_seed = {
        str(run.seed): {
            "val_loss": round(run.result["val_loss"], 8),
            "val_bpb": round(run.result["val_bpb"], 8),
            "artifact_bytes": run.result["total_bytes"],
            "steps": run.result["steps"],
            "step_avg_ms": round(step_ms(run), 2),
            "train_time_s": round(train_time(run), 1),
            "eval_time_s": round(run.result["eval_seconds"], 1),
            "pre_quant_val_bpb": round(run.result["prequant_val_bpb"], 8),
            "quantized_val_bpb": round(run.result["quantized_val_bpb"], 8),
        }
        for run in runs
    }
    against: dict[str, Any] = {}
    if comparison and comparison.with_margin:
        against = {
            "comparison_baseline": options.reference.resolve().name,
            "delta_vs_leaderboard_bpb": round(-comparison.gain_bpb, 8),
            "delta_vs_leaderboard_nats": round(-comparison.gain_nats, 8),
            "p_value": round(comparison.with_margin.p, 6),
        }
    return {
        "author": options.author,
        "github_id": options.github_id,
        "name": options.name,
        "blurb": options.blurb,
        "date": options.out.name[:10],
        "track": "non-record-16mb" if options.not_a_record else "10min_16mb",
        "val_loss": round(mean(runs, "val_loss"), 8),
        "val_bpb": round(mean(runs, "val_bpb"), 8),
        "val_loss_std": spread(runs, "val_loss"),
        "val_bpb_std": spread(runs, "val_bpb"),
        "seeds": [run.seed for run in runs],
        "seed_results": per_seed,
        "bytes_total": max(totals),
        "artifact_bytes_max": max(totals),
        "artifact_bytes_mean": round(statistics.fmean(totals)),
        "bytes_code": runs[0].result["code_bytes"],
        "train_steps_mean": round(mean(runs, "steps"), 2),
        "step_avg_ms_mean": round(statistics.fmean(step_ms(run) for run in runs), 2),
        **against,
        "hardware": runs[0].result["hardware"],
        "pytorch_version": runs[0].result["torch"],
        **({"cuda_version": cuda} if (cuda := runs[0].log.facts.get("cuda", "None")) != "None" else {}),
        **({"flash_attn_version": used} if (used := runs[0].result.get("attn_backend")) else {}),
        "compliance": compliance(runs),
    }


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def results_table(runs: list[SeedRun]) -> str:
    """One row per seed, and their mean and sample standard deviation."""
    head = [
        "seed",
        "steps",
        "ms/step",
        "bpb before quantisation",
        "bpb quantised",
        "**val_bpb**",
        "val_loss (nats/token)",
    ]
    head += ["artifact bytes", "training s", "evaluation s"]
    columns = [
        (lambda run: run.result["steps"], "{:.0f}"),
        (step_ms, "{:.2f}"),
        (lambda run: run.result["prequant_val_bpb"], "{:.8f}"),
        (lambda run: run.result["quantized_val_bpb"], "{:.8f}"),
        (lambda run: run.result["val_bpb"], "{:.8f}"),
        (lambda run: run.result["val_loss"], "{:.8f}"),
        (lambda run: run.result["total_bytes"], "{:,.0f}"),
        (train_time, "{:.1f}"),
        (lambda run: run.result["eval_seconds"], "{:.1f}"),
    ]
    rows = [[run.seed, *(form.format(value(run)) for value, form in columns)] for run in runs]
    if len(runs) > 1:
        rows.append(["mean", *(form.format(statistics.fmean(map(value, runs))) for value, form in columns)])
        rows.append(["std", *(form.format(statistics.stdev(map(value, runs))) for value, form in columns)])
    return table(head, rows)


def validity_table(runs: list[SeedRun]) -> str:
    """The runs' own report, one row per rule."""
    rows = []
    for row in runs[0].result["validity"]:
        verdicts = [r for run in runs for r in run.result["validity"] if r["rule"] == row["rule"]]
        ok = (
            "not judged"
            if any(r["ok"] is None for r in verdicts)
            else "yes"
            if all(r["ok"] for r in verdicts)
            else "NO"
        )
        found = ", ".join(dict.fromkeys(short(r["found"]) for r in verdicts))
        source = row["source"].replace("#", "thread ")  # `#N` in a README names the entries that it builds on
        rows.append([row["rule"], ok, found, "" if row["limit"] is None else row["limit"], source])
    return table(["rule", "kept", "found (per seed where they differ)", "limit", "source"], rows)


def short(value: Any) -> str:
    """A value of a report in a table: hashes cut, seconds rounded."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def readme(
    runs: list[SeedRun], options: argparse.Namespace, comparison: Comparison | None, facts: dict[str, Any]
) -> str:
    """README.md of the folder."""
    one, title = runs[0], "Not a record" if options.not_a_record else "Record"
    std = spread(runs, "val_bpb")
    headline = f"**val_bpb {mean(runs, 'val_bpb'):.8f}**" + (f" (std {std:.8f}, {len(runs)} seeds)" if std else "")
    largest = max(run.result["total_bytes"] for run in runs)
    against = "No reference was given."
    if comparison:
        tests = [(0.005, comparison.with_margin), (0, comparison.without)]
        text = [f"margin {m} nats: t {w.t:.2f}, {w.df:.1f} degrees of freedom, p {w.p:.4g}" for m, w in tests if w]
        against = (
            f"Against `{options.reference.resolve().name}`: better by {comparison.gain_bpb:.6f} bpb,"
            f" {comparison.gain_nats:.6f} nats per token. One-sided Welch test on the seeds ({comparison.unit}):"
            f" {'; '.join(text) or 'too few scores'}."
            f" The written rule asks for p < {RECORD_P} with the margin."
        )
    by_hand = [(name, value) for name, value, origin in facts["origins"] if origin == "environment"]
    set_by_hand = [f"`{name.upper()}={value}`" for name, value in by_hand if name not in NOT_RECORDED]
    sections = [
        f"# {title}: {options.name} — val_bpb {mean(runs, 'val_bpb'):.4f} ({len(runs)}-seed mean)",
        f"{headline}; at most {largest:,} of 16,000,000 bytes, of which {one.result['code_bytes']:,} are code;"
        f" {one.result['hardware']}.",
        options.blurb,
        "## Results",
        results_table(runs),
        f"val_bpb is the score `{one.result['submitted']}` of the artifact read back from disk, over"
        f" {one.result['val_targets']:,} targets and {one.result['val_bytes']:,} bytes of text. Training seconds end"
        f" with the last read of training data (calibration included). {facts['parameters']:,} parameters.",
        "## Comparison",
        against,
        "## Rules",
        validity_table(runs),
        "The rows come from the runs themselves (last line of each log). `python records/check.py` of the repository"
        " checks this folder as a whole.",
        "## Repeat it",
        f"```\npip install -r requirements.txt\nset -a; . ./settings.env; set +a\n{facts['launch']}\n```",
        f"Tokenizer: {facts['tokenizer']}. Preset `{facts['preset']}`"
        + (f", and by hand: {', '.join(set_by_hand)}" if set_by_hand else "")
        + f". Logged script: {len(one.source)} bytes, SHA-256 `{hashlib.sha256(one.source).hexdigest()}`.",
        "## Files",
        "`train_gpt.py` is the readable script that made the logs; `train_gpt_packed.py` is the same program without"
        f" comments, compressed: its {one.result['code_bytes']:,} bytes are the counted code, and it runs in place of"
        " the other."
        " `settings.env` holds every setting but the seed. The logs are unedited.",
    ]
    if options.details:
        sections[6:6] = [options.details.read_text().strip()]
    if options.credits:
        sections += ["## Credits", options.credits]
    return "\n\n".join(sections) + "\n"


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
    ranks = runs[0].result["ranks"]
    launch = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    head = runs[0].log.facts
    facts = {
        "parameters": start_packed(folder)["parameters"],
        "launch": "\n".join(f"SEED={run.seed} RUN_ID=seed{run.seed} {launch} train_gpt_packed.py" for run in runs),
        "tokenizer": tokenizer_text(runs[0], tokenizer),
        "preset": runs[0].result.get("preset", "default"),
        "origins": head.get("origins", []),
    }
    comparison = None
    if options.reference:  # the folder must exist as a folder to be compared, so its submission.json is written twice
        (folder / "submission.json").write_text(json.dumps(submission(runs, options, None), indent=2) + "\n")
        comparison = compare(read_folder(folder, False), read_folder(options.reference, False))
    (folder / "submission.json").write_text(json.dumps(submission(runs, options, comparison), indent=2) + "\n")
    (folder / "README.md").write_text(readme(runs, options, comparison, facts))


def tokenizer_text(run: SeedRun, tokenizer: Path | None) -> str:
    """Name and hash of the tokenizer in the folder, or of the one that the settings name."""
    if tokenizer:
        return f"`tokenizers/{tokenizer.name}`, SHA-256 `{hashlib.sha256(tokenizer.read_bytes()).hexdigest()}`"
    path = run.settings.get("tokenizer_path") or f"fineweb_{run.settings.get('vocab_size', '?')}_bpe.model"
    return f"`{Path(path).name}` of the challenge, not included"


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
