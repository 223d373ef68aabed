"""A record folder of Parameter Golf as data: submission.json, README tables and logs, in the layouts that people use.

Nothing is judged here and nothing in a folder is executed. records/check.py applies the rules; records/pack.py writes
folders. `compare` puts two folders side by side.
"""

import ast
import dataclasses
import functools
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from records.logs import RunLog, Score, read_log

MARGIN_NATS = 0.005  # a record beats the one before by this much, in nats per token (README)
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what other people's scripts make ast raise


class FolderError(ValueError):
    """A folder that cannot be checked at all. The message is one line."""


@functools.lru_cache(maxsize=2)
def parsed(script: bytes) -> ast.Module:
    """The tree of a script; shared, so it must not be changed. Raises one of UNPARSABLE."""
    return ast.parse(script)


@dataclasses.dataclass
class Folder:
    """The contents of a record folder, parsed once."""

    path: Path
    is_record: bool
    submission: dict[str, Any]  # empty where the file is missing or no object
    submission_error: str
    readme: str
    script: bytes
    logs: list[RunLog]  # one per seed where the folder tells seeds apart
    seeds: dict[int, dict[str, Any]]  # what submission.json says of each seed
    repeated: list[str]  # seeds that submission.json states more than once, which the table above cannot hold

    def stated(self, *names: str) -> float | None:
        """The first of these keys of submission.json that holds a number."""
        return next((value for name in names if (value := number(self.submission.get(name))) is not None), None)

    @functools.cached_property
    def tree(self) -> ast.Module | None:
        """train_gpt.py, parsed; None where there is none or this Python cannot read it."""
        try:
            return parsed(self.script) if self.script else None
        except UNPARSABLE:
            return None

    @functools.cached_property
    def tables(self) -> list["Table"]:
        return read_tables(self.readme)

    def log_of(self, seed: int) -> RunLog | None:
        return next((log for log in self.logs if log.facts.get("seed") == seed), None)

    @functools.cached_property
    def spare_logs(self) -> list[RunLog]:
        """Further logs of the folder, as of a separate evaluation or a repetition; read when a figure is in none of
        `logs`."""
        known = {log.path for log in self.logs}
        return [log for file in log_files(self.path) if file not in known and (log := named_log(file)).scores]

    def all_logs_of(self, seed: int) -> list[RunLog]:
        return [log for log in [*self.logs, *self.spare_logs] if log.facts.get("seed") == seed]

    def scored(self, log: RunLog) -> Score | None:
        """The score of a log that the folder claims, or else the one it ends with."""
        claims = [self.seed_value(log.facts.get("seed"), "val_bpb"), self.stated("val_bpb")]
        for claim in claims:
            for score in reversed(log.scores):
                if (
                    claim is not None
                    and score.kind in ("quantized", "final")
                    and agree(claim, score.bpb, score.decimals)
                ):
                    return with_loss(score, log)
        return with_loss(log.final, log) if log.final else None

    def seed_value(self, seed: int | None, name: str) -> float | None:
        return number(self.seeds.get(seed, {}).get(name)) if seed is not None else None

    @property
    def digits(self) -> tuple[int, int]:
        """Decimals of bpb and of the loss that all logs show."""
        found = [score for log in self.logs if (score := self.scored(log))]
        return min([s.decimals for s in found], default=8), min([s.loss_decimals for s in found], default=8)

    def results(self) -> dict[str, tuple[float | None, float]]:
        """(nats per token, bits per byte) of each run: from its log, or where there is none from submission.json."""
        found = {log.path.name: self.scored(log) for log in self.logs}
        runs = {name: (score.loss, score.bpb) for name, score in found.items() if score}
        stated = {
            f"seed {seed}": (number(v.get("val_loss")), number(v.get("val_bpb"))) for seed, v in self.seeds.items()
        }
        listed = {name: (loss, bpb) for name, (loss, bpb) in stated.items() if bpb is not None}
        return runs if len(runs) >= len(listed) else listed


SEED_ALIASES = {
    "val_bpb": ("val_bpb", "ttt_val_bpb", "bpb"),
    "val_loss": ("val_loss", "ttt_val_loss"),
    "artifact_bytes": ("artifact_bytes", "bytes_total", "total_bytes"),
    "steps": ("steps", "train_steps", "step_stop"),
    "eval_time_s": ("eval_time_s", "eval_s", "eval_time_seconds", "ttt_eval_time_s"),
    "train_time_s": ("train_time_s", "train_s", "train_time_seconds"),
    "step_avg_ms": ("step_avg_ms", "ms_per_step"),
    "pre_quant_val_bpb": ("pre_quant_val_bpb", "prequant_val_bpb"),
    "quantized_val_bpb": ("quantized_val_bpb", "pre_ttt_val_bpb"),
}


def with_loss(score: Score, log: RunLog) -> Score:
    """The score with the loss of the line that states both to the same bpb, and ours with all digits of the result."""
    if log.result and agree(score.bpb, number(log.result.get("val_bpb")) or 0.0, score.decimals):
        return score._replace(loss=log.result.get("val_loss"), bpb=log.result["val_bpb"], decimals=8, loss_decimals=8)
    return score


def number(value: Any) -> float | None:
    """A finite JSON number, or None for anything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def decimals(value: float) -> int:
    """How many decimals a number was written with, as far as JSON keeps them: 1.0810 counts as 3."""
    text = repr(float(value))
    return int(text.split("e-")[1]) if "e-" in text else len(text.split(".")[1])


def agree(stated: float, exact: float, digits: int = 8) -> bool:
    """Whether a stated number is the exact one, rounded or cut to the decimals of the stated one, at least two. Both
    are known to at most `digits` decimals."""
    places = max(decimals(stated), 2)
    unit, gap = 10.0 ** -min(places, digits), abs(stated - exact)
    if places > digits:
        return gap < 1.01 * unit
    return gap <= 0.505 * unit or -1e-9 < abs(exact) - abs(stated) < unit


def read_folder(path: Path, not_a_record: bool) -> Folder:
    """Parses a folder. Raises FolderError when there is nothing to check."""
    if not path.is_dir():
        raise FolderError(f"{path}: no such folder; give the folder of a record")
    try:
        files = {file.name: file for file in path.iterdir() if file.is_file()}
        if not files.keys() & {"submission.json", "README.md", "train_gpt.py"} and not read_logs(path, {}):
            raise FolderError(
                f"{path}: holds neither submission.json, README.md, train_gpt.py nor a log; is it a record?"
            )
        submission, twice, error = read_submission(path / "submission.json")
        readme = files["README.md"].read_text(errors="replace") if "README.md" in files else ""
        script = files["train_gpt.py"].read_bytes() if "train_gpt.py" in files else b""
        rows = seed_rows(submission)
        seeds = dict(rows)
        track = f"{submission.get('track') or ''} {path.resolve().parent.name}".lower()
        is_record = not (not_a_record or re.search(r"non[-_ ]?record|unlimited", track))
        logs, again = read_logs(path, seeds), repetitions(rows, submission, twice)
        return Folder(path, is_record, submission, error, readme, script, logs, seeds, again)
    except OSError as error:
        raise FolderError(f"{path}: cannot read ({error})") from None


def read_submission(path: Path) -> tuple[dict[str, Any], list[str], str]:
    """submission.json, the keys that one of its objects holds twice, and what is wrong with it as a file."""
    twice: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(key for key in dict.fromkeys(keys) if keys.count(key) > 1)
        return dict(pairs)

    if not path.exists():
        return {}, [], "no submission.json"
    try:
        value = json.loads(path.read_text(), object_pairs_hook=as_dict)
    except (ValueError, RecursionError) as error:
        return {}, [], f"not JSON: {error}"
    return (value, twice, "") if isinstance(value, dict) else ({}, [], f"holds a {type(value).__name__}, not an object")


def seed_rows(submission: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """What submission.json says of each seed, in any of its layouts, in its order and with its repetitions: objects
    keyed by seed, lists of objects with a seed, or a list of scores beside the list of seeds."""
    listed = submission.get("seeds")
    for key in ("seed_results", "val_bpb_seeds", "seeds"):
        rows = submission.get(key)
        if isinstance(rows, dict):
            pairs = list(rows.items())
        elif isinstance(rows, list) and any(isinstance(row, dict) for row in rows):
            pairs = [(row.get("seed", ""), row) for row in rows if isinstance(row, dict)]
        elif (
            key == "val_bpb_seeds" and isinstance(rows, list) and isinstance(listed, list) and len(rows) == len(listed)
        ):
            pairs = list(zip(listed, rows))
        else:
            continue
        found = []
        for name, row in pairs:
            digits = re.fullmatch(r"(?:seed[ _-]?)?(\d+)", str(name))
            row = {"val_bpb": row} if number(row) is not None else row
            if digits and isinstance(row, dict):
                found.append((int(digits[1]), under_known_names(row)))
        if found:
            return found
    return []


def under_known_names(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a seed under the names of SEED_ALIASES."""
    known = {
        name: next((row[key] for key in keys if number(row.get(key)) is not None), None)
        for name, keys in SEED_ALIASES.items()
    }
    return {name: value for name, value in known.items() if value is not None}


def repetitions(rows: list[tuple[int, Any]], submission: dict[str, Any], twice: list[str]) -> list[str]:
    """Seeds that are stated twice: in one list, or as keys of one object."""
    listed = submission.get("seeds")
    listed = [str(seed) for seed in listed] if isinstance(listed, list) and not any(map(is_row, listed)) else []
    seeds = [str(seed) for seed, _ in rows]
    again = [seed for column in (listed, seeds) for seed in column if column.count(seed) > 1]
    return list(dict.fromkeys([*again, *(key for key in twice if key.isdigit())]))


def is_row(value: Any) -> bool:
    return isinstance(value, dict | list)


def log_files(path: Path) -> list[Path]:
    files = [f for f in [*sorted(path.glob("*")), *sorted(path.glob("*/*"))] if f.suffix in (".log", ".txt")]
    return [f for f in files if f.is_file() and not f.name.startswith("requirements")]


def named_log(file: Path) -> RunLog:
    """A log, with the seed in its file name beside the one in its text."""
    log, named = read_log(file), re.search(r"(?:seed|_s)[_-]?(\d+)", file.name)
    if named:
        log.facts.setdefault("seed", int(named[1]))
        log.facts["seed_in_name"] = int(named[1])
    return log


def read_logs(path: Path, seeds: dict[int, dict[str, Any]]) -> list[RunLog]:
    """The logs of the submitted runs: train_seed<SEED>.log; without these, the file that fits each seed best."""
    files = log_files(path)
    proper = [f for f in files if re.fullmatch(r"train_seed\d+\.log", f.name)]
    with_seed = [f for f in files if re.search(r"seed[_-]?\d+", f.name)]
    logs = [log for file in proper or with_seed or files if (log := named_log(file)).final or proper]
    if proper:
        claimed = [log for log in logs if log.facts.get("seed") in seeds]
        return claimed if len(claimed) == len(seeds) > 0 else logs
    chosen: dict[Any, RunLog] = {}
    for log in logs:
        seed = log.facts.get("seed", log.path.name)
        claim = number(seeds.get(seed, {}).get("val_bpb")) if isinstance(seed, int) else None
        fits = claim is not None and any(agree(claim, s.bpb, s.decimals) for s in log.scores)
        if seed not in chosen or fits:
            chosen[seed] = log
    return list(chosen.values())


# ------------------------------------------------------------------------------------------------------------
# README TABLES
# ------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A number as a README shows it. Units are bytes, seconds (milliseconds in columns of steps), bpb, nats."""

    value: float
    unit: float  # of its last digit
    text: str


class Table(NamedTuple):
    """A Markdown table with a column of seeds, or one of names and values, transposed to a single row."""

    columns: list[str]  # names in lower case, without marks
    rows: dict[str, list[Cell | None]]  # by seed, or "mean", "std", "value"


CELL = re.compile(
    r"(?P<number>[-+−]?\d[\d,_]*(?:\.\d+)?)\s*(?P<unit>bytes|B|MB|KB|K|ms|s|sec|seconds|m|min)?(?:\s*\([^)]*\))?"
)
UNITS = {"MB": 1e6, "KB": 1e3, "K": 1e3, "ms": 1e-3, "m": 60.0, "min": 60.0}


def read_cell(text: str, column: str) -> Cell | None:
    """`**15,981,234 bytes**`, `83.3ms`, `1.0694`; None for anything but one number, and for one with a tilde."""
    match = CELL.fullmatch(re.sub(r"\*|`|<[^>]*>", "", text).strip())
    if not match:
        return None
    digits = re.sub(r"[,_]", "", match["number"]).replace("−", "-")
    scale = UNITS.get(match["unit"] or "", 1e-3 if re.search(r"\bms\b", column) and not match["unit"] else 1.0)
    if re.search(r"ms/step|step[_ ]?avg|step[_ ](time|ms)", column):
        scale = 1e3 if match["unit"] == "s" else 1.0
    places = len(digits.split(".")[1]) if "." in digits else 0
    return Cell(float(digits) * scale, scale * 10.0**-places, text)


def table_blocks(readme: str) -> list[list[list[str]]]:
    """The Markdown tables of a text as rows of cells, without the line under the head."""
    found = []
    for block in re.findall(r"(?:^[ \t]*\|.*\n?){3,}", readme, re.M):
        head, ruler, *lines = [split_row(line) for line in block.strip().split("\n")]
        if ruler and all(re.fullmatch(r":?-+:?", cell) for cell in ruler):
            found.append([head, *lines])
    return found


def read_tables(readme: str) -> list[Table]:
    """The tables of a README that have a column of seeds, and those of a name and a value in each row."""
    tables = []
    for head, *lines in table_blocks(readme):
        names = [re.sub(r"[*`\\]", "", name).strip().lower() for name in head]
        if names[:1] == ["seed"]:
            tables.append(Table(names[1:], seed_cells(names, lines)))
        elif len(names) == 2 and names[0] in ("metric", "", "quantity", "item") and names[1] in ("value", "result"):
            labels = [re.sub(r"[*`\\]", "", line[0]).strip().lower() for line in lines if len(line) == 2]
            cells = [read_cell(line[1], label) for label, line in zip(labels, (x for x in lines if len(x) == 2))]
            tables.append(Table(labels, {"value": cells}))
    return tables


def split_row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def seed_cells(names: list[str], lines: list[list[str]]) -> dict[str, list[Cell | None]]:
    """Rows of a table whose first column holds seeds, `mean` (or avg) and `std`, or both as `mean ± std`; others are
    left out."""
    rows: dict[str, list[Cell | None]] = {}
    for line in lines:
        label = re.sub(r"[*`\\]", "", line[0]).strip().lower()
        seed, summary = re.fullmatch(r"(?:seed )?(\d+)", label), re.match(r"(mean|avg|average|std)\b", label)
        if len(line) != len(names) or not seed and not summary:
            continue
        parts = [re.split(r"±|\+/-", text) for text in line[1:]]
        key = seed[1] if seed else {"avg": "mean", "average": "mean"}.get(summary[1], summary[1])
        rows.setdefault(key, [read_cell(part[0], name) for name, part in zip(names[1:], parts)])
        if any(len(part) == 2 for part in parts):
            rows.setdefault(
                "std", [read_cell(part[1], n) if len(part) == 2 else None for n, part in zip(names[1:], parts)]
            )
    return rows


# ------------------------------------------------------------------------------------------------------------
# COMPARISON
# ------------------------------------------------------------------------------------------------------------


class Welch(NamedTuple):
    """One-sided test that the mean of the new scores is below that of the reference by more than a margin."""

    t: float
    df: float
    p: float


def welch(new: list[float], reference: list[float], margin: float) -> Welch | None:
    """Welch's test of the reference less the margin against the new scores; None with fewer than two on a side.
    Lower scores are better."""
    import scipy.stats  # slow to load, and most folders are checked without a reference

    if min(len(new), len(reference)) < 2:
        return None
    if statistics.variance(new) + statistics.variance(reference) == 0:
        gain = statistics.fmean(reference) - statistics.fmean(new) - margin
        return Welch(math.copysign(math.inf, gain), 1.0, 0.0 if gain > 0 else 1.0)
    result = scipy.stats.ttest_ind([x - margin for x in reference], new, equal_var=False, alternative="greater")
    return Welch(float(result.statistic), float(result.df), float(result.pvalue))


class Comparison(NamedTuple):
    """A folder against a reference: gains are positive where the folder is better."""

    gain_bpb: float
    gain_nats: float  # per token of the folder's tokenizer
    with_margin: Welch | None
    without: Welch | None
    unit: str  # what the tests were computed in


def compare(folder: Folder, reference: Folder) -> Comparison | None:
    """The comparison of two folders, in nats per token where both use the same tokenizer, else in bpb with the margin
    converted by the folder's own nats per token and bpb. None where a folder has no scores."""
    mine, theirs = list(folder.results().values()), list(reference.results().values())
    if not mine or not theirs:
        return None
    ratio = lambda rows: [loss / bpb for loss, bpb in rows if loss and bpb]
    bpb_gain = statistics.fmean(b for _, b in theirs) - statistics.fmean(b for _, b in mine)
    ratios = ratio(mine) or ratio(theirs)  # of the reference, where the folder states no losses
    per_bpb = statistics.fmean(ratios) if ratios else None
    same = (
        len(ratio(mine)) == len(mine)
        and len(ratio(theirs)) == len(theirs)
        and abs(ratio(theirs)[0] / per_bpb - 1) < 1e-3
    )
    if same:
        a, b, margin, unit = [x for x, _ in mine], [x for x, _ in theirs], MARGIN_NATS, "nats per token"
        nats = statistics.fmean(b) - statistics.fmean(a)
    elif per_bpb:
        a, b, margin, unit = [x for _, x in mine], [x for _, x in theirs], MARGIN_NATS / per_bpb, "bpb"
        nats = bpb_gain * per_bpb
    else:
        return None
    return Comparison(bpb_gain, nats, welch(a, b, margin), welch(a, b, 0.0), unit)
