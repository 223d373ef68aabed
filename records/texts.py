"""The texts of a record folder, as a function of its runs: submission.json, README.md, settings.env.

records/pack.py writes them; records/check.py makes them again from the logs of the folder and compares, so that no
number in them can be changed by hand. Words that nobody can derive (names, descriptions) come in as `Words`.
"""

import ast
import dataclasses
import hashlib
import os
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

from script import definitions

from records.folder import Comparison, parsed
from records.logs import RunLog

ROOT = Path(__file__).resolve().parent.parent
ARTIFACT_LIMIT_BYTES = definitions("ARTIFACT_LIMIT_BYTES")["ARTIFACT_LIMIT_BYTES"]
RECORD_P = 0.01  # of the written test (README)
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


@dataclasses.dataclass(frozen=True)
class Words:
    """What the author says, and what no run says."""

    author: str
    github_id: str
    name: str
    blurb: str
    date: str
    is_record: bool
    reference: str = ""  # name of the folder that `comparison` is with
    details: str = ""  # Markdown after the results
    credits: str = ""


def requirements(source: bytes, run: SeedRun) -> str:
    """The lines of the repository's requirements for what the script imports, with the versions that the log states."""
    nodes = [node for node in ast.walk(parsed(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
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


def submission(runs: list[SeedRun], words: Words, comparison: Comparison | None) -> dict[str, Any]:
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
            "comparison_baseline": words.reference,
            "delta_vs_leaderboard_bpb": round(-comparison.gain_bpb, 8),
            "delta_vs_leaderboard_nats": round(-comparison.gain_nats, 8),
            "p_value": round(comparison.with_margin.p, 6),
        }
    return {
        "author": words.author,
        "github_id": words.github_id,
        "name": words.name,
        "blurb": words.blurb,
        "date": words.date,
        "track": "10min_16mb" if words.is_record else "non-record-16mb",
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


def readme(runs: list[SeedRun], words: Words, comparison: Comparison | None, tokenizer: Path | None) -> str:
    """README.md of the folder; `tokenizer` is the model in it."""
    one, title, facts = runs[0], "Record" if words.is_record else "Not a record", runs[0].log.facts
    std = spread(runs, "val_bpb")
    headline = f"**val_bpb {mean(runs, 'val_bpb'):.8f}**" + (f" (std {std:.8f}, {len(runs)} seeds)" if std else "")
    largest = max(run.result["total_bytes"] for run in runs)
    against = "No reference was given."
    if comparison:
        tests = [(0.005, comparison.with_margin), (0, comparison.without)]
        text = [f"margin {m} nats: t {w.t:.2f}, {w.df:.1f} degrees of freedom, p {w.p:.4g}" for m, w in tests if w]
        against = (
            f"Against `{words.reference}`: better by {comparison.gain_bpb:.6f} bpb,"
            f" {comparison.gain_nats:.6f} nats per token. One-sided Welch test on the seeds ({comparison.unit}):"
            f" {'; '.join(text) or 'too few scores'}."
            f" The written rule asks for p < {RECORD_P} with the margin."
        )
    by_hand = [(name, value) for name, value, origin in facts.get("origins", []) if origin == "environment"]
    set_by_hand = [f"`{name.upper()}={value}`" for name, value in by_hand if name not in NOT_RECORDED]
    sections = [
        f"# {title}: {words.name} — val_bpb {mean(runs, 'val_bpb'):.4f} ({len(runs)}-seed mean)",
        f"{headline}; at most {largest:,} of {ARTIFACT_LIMIT_BYTES:,} bytes, of which"
        f" {one.result['code_bytes']:,} are code; {one.result['hardware']}.",
        words.blurb,
        "## Results",
        results_table(runs),
        f"val_bpb is the score `{one.result['submitted']}` of the artifact read back from disk, over"
        f" {one.result['val_targets']:,} targets and {one.result['val_bytes']:,} bytes of text. Training seconds end"
        f" with the last read of training data (calibration included). {one.result['parameters']:,} parameters.",
        "## Comparison",
        against,
        "## Rules",
        validity_table(runs),
        "The rows come from the runs themselves (last line of each log). `python records/check.py` of the repository"
        " checks this folder as a whole.",
        "## Repeat it",
        f"```\npip install -r requirements.txt\nset -a; . ./settings.env; set +a\n{launch(runs)}\n```",
        f"Tokenizer: {tokenizer_text(one, tokenizer)}. Preset `{one.result.get('preset', 'default')}`"
        + (f", and by hand: {', '.join(set_by_hand)}" if set_by_hand else "")
        + f". Logged script: {len(one.source)} bytes, SHA-256 `{hashlib.sha256(one.source).hexdigest()}`.",
        "## Files",
        "`train_gpt.py` is the readable script that made the logs; `train_gpt_packed.py` is the same program without"
        f" comments, compressed: its {one.result['code_bytes']:,} bytes are the counted code, and it runs in place of"
        " the other."
        " `settings.env` holds every setting but the seed. The logs are unedited.",
    ]
    if words.details:
        sections[6:6] = [words.details]
    if words.credits:
        sections += ["## Credits", words.credits]
    return "\n\n".join(sections) + "\n"


def launch(runs: list[SeedRun]) -> str:
    """The commands that repeat the runs, one per seed."""
    ranks = runs[0].result["ranks"]
    start = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    return "\n".join(f"SEED={run.seed} RUN_ID=seed{run.seed} {start} train_gpt_packed.py" for run in runs)


def tokenizer_text(run: SeedRun, tokenizer: Path | None) -> str:
    """Name and hash of the tokenizer in the folder, or of the one that the settings name."""
    if tokenizer:
        return f"`tokenizers/{tokenizer.name}`, SHA-256 `{hashlib.sha256(tokenizer.read_bytes()).hexdigest()}`"
    path = run.settings.get("tokenizer_path") or f"fineweb_{run.settings.get('vocab_size', '?')}_bpe.model"
    return f"`{Path(path).name}` of the challenge, not included"
