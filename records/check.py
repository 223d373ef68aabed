#!/usr/bin/env python3
"""Checks record folders of Parameter Golf, ours or anybody's, against the rules of the challenge.

    python records/check.py records/2030-01-01_Name            every rule, one line each
    python records/check.py FOLDER --reference OLDER_FOLDER    and whether it beats that record
    python records/check.py FOLDER --base origin/main          and whether nothing else changed in this checkout
    python records/check.py FOLDER... --json                   for programs
    python records/check.py FOLDER --not-a-record              without time limits, hardware, seeds and margin

Each line says what was found, what the limit is, and where the rule comes from: a number in the list of rules, a
strength, and a thread of github.com/openai/parameter-golf. Strength H is a hard rule (README or a ruling of a
maintainer), P a precedent, C the criterion of issue #1017, G a grey area. Verdicts: ok, FAIL, warn (to be explained),
`?` (cannot be judged from the folder), `-` (not asked of a folder that is no record).

Nothing in a folder is executed or imported. Exit status: 0 nothing failed, 1 a rule failed, 2 a folder is unreadable.
"""

import argparse
import ast
import functools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from script import definitions
from variants import VAL_DOCUMENTS, VARIANTS

from records.claims import other_numbers, readme_tables, stated_in_logs
from records.finding import Finding, fail, ok, unknown, warn, worst
from records.folder import (
    UNPARSABLE,
    Comparison,
    Folder,
    FolderError,
    Welch,
    agree,
    compare,
    decimals,
    number,
    read_folder,
)
from records.logs import RunLog, Score, logged_source
from records.own import is_own, result_in_log, texts_from_logs
from records.texts import RECORD_P

# The limits of the challenge, from the script that every run has to keep them in.
SCRIPT = definitions(
    "ARTIFACT_LIMIT_BYTES", "TIME_LIMIT_S", "CHALLENGE_BYTES", "PACKED_START", "packed_script", "without_docstrings"
)
CAP_BYTES: int = SCRIPT["ARTIFACT_LIMIT_BYTES"]
LIMIT_S: float = SCRIPT["TIME_LIMIT_S"]  # training, and again evaluation, on 8xH100
TRUE_BYTES: tuple[float, float] = SCRIPT["CHALLENGE_BYTES"]  # of the validation text, whatever the export
NARROW_BYTES = 5_000  # the compressed size moves by several kB between runs (#568, #1978)
BOARD_P = 0.25  # the test that the board was built with (#1902); RECORD_P is that of the written rule
ROUNDED_FIRST = 5e-5  # bpb: what rounding the seeds to four decimals before averaging can do
LN2 = math.log(2)


class Export(NamedTuple):
    """What the logs of merged records say about one export of the validation documents."""

    name: str
    targets: int  # scored by the stock loader, which drops the tail
    bytes_per_token: float


EXPORTS = tuple(Export(n, v.val_targets, v.val_bytes / v.val_targets) for n, v in VARIANTS.items() if v.val_targets)
FIRST_EXPORT = Export("sp1024 before the documents were frozen", 63_779_840, 2.4423)  # the naive baseline's log
LONGEST_TAIL = 4096  # targets that the stock loader may drop
KNOWN_TRUNCATED = 9_662_464  # 10,000 documents, or a cut shard (#1854, #1923)

PREINSTALLED = {"torch", "numpy", "sentencepiece", "tqdm", "huggingface_hub", "datasets", "tiktoken", "kernels"}
PREINSTALLED |= {"setuptools", "typing_extensions", "triton", "flash_attn_interface", "flash_attn"}


# ------------------------------------------------------------------------------------------------------------
# RULES: one small function each, folder -> finding
# ------------------------------------------------------------------------------------------------------------


def of_logs(folder: Folder, rule: Callable[[RunLog], Finding | None]) -> Finding:
    """The worst finding over the logs; None means that a log says nothing of the matter."""
    found = [(log, rule(log)) for log in folder.logs]
    if len(found) > 1 and len({finding for _, finding in found}) == 1 and found[0][1]:
        return found[0][1]  # all logs alike
    named = [finding._replace(found=f"{log.path.name}: {finding.found}") for log, finding in found if finding]
    return worst(named, "no log says" if folder.logs else "no logs")


def folder_name(folder: Folder) -> Finding:
    name = folder.path.resolve().name
    good = re.fullmatch(r"20\d\d-[01]\d-[0-3]\d_[A-Za-z0-9._+-]+", name)
    return (ok if good else fail)(name, "YYYY-MM-DD_Short_Name, ASCII, no spaces")


def files(folder: Folder) -> Finding:
    missing = [name for name in ("README.md", "submission.json", "train_gpt.py") if not (folder.path / name).is_file()]
    missing += [] if folder.logs else ["a log with a final score"]
    return (
        fail("missing: " + ", ".join(missing))
        if missing
        else ok(f"README, submission.json, train_gpt.py, {len(folder.logs)} logs")
    )


def one_new_folder(folder: Folder, base: str = "") -> Finding:
    """What the checkout around the folder changes since `base`, committed or not: this new folder, and nothing else."""
    if not base:
        return unknown("no --base to compare the checkout with")
    path, limit = folder.path.resolve(), "one new folder"

    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", "-C", str(path), *words], capture_output=True, text=True, timeout=60, check=True)
        return [line for line in done.stdout.split("\0") if line]

    try:
        root = Path(git("rev-parse", "--show-toplevel")[0].strip())
        start = git("merge-base", base, "HEAD")[0].strip()
        changed = git("diff", "--name-only", "--no-renames", "-z", start, "--", str(root))
        changed += git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", str(root))
        there = git("ls-tree", "--name-only", "-z", start, "--", ".")
    except (OSError, subprocess.SubprocessError, IndexError):
        return unknown(f"cannot compare with {base}: no such revision, or no git checkout")
    outside = [name for name in changed if path not in (root / name).resolve().parents]
    if there:
        return fail(f"the folder is in {base} already", limit)
    return (
        fail("changed outside of it: " + ", ".join(outside[:4]), limit) if outside else ok(f"new since {base}", limit)
    )


def script_compiles(folder: Folder) -> Finding:
    """With this Python, and with the one that the logs state where that is another one and installed."""
    if not folder.script:
        return unknown("no train_gpt.py")
    stated = max((log.facts["python"] for log in folder.logs if "python" in log.facts), key=version, default="")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    path, problem = folder.path / "train_gpt.py", ""
    try:
        compile(folder.tree or folder.script, path.name, "exec", dont_inherit=True)
    except UNPARSABLE as error:
        if sys.version_info >= (3, 12) or "f-string" not in str(error):
            return fail(f"{error}")
        problem = str(error)  # Python 3.12 reads more f-strings than those before it
    if not problem:
        older = version(stated) < version(here) if stated else False
        message = compile_elsewhere(path, f"python{stated}") if older else ""
        return (
            fail(f"does not compile with Python {stated}: {message}") if message else ok(f"{len(folder.script)} bytes")
        )
    if stated and version(stated) <= version(here):
        return fail(f"does not compile with Python {stated}, which a log states: {problem}")
    newer = stated or "3.12"
    if message := compile_elsewhere(path, f"python{newer}"):
        return fail(f"does not compile with Python {newer} either: {message}")
    if message is None:
        return unknown(f"does not compile with Python {here}: {problem}; Python {newer} is not here to try")
    return warn(f"compiles with Python {newer}, not with {here}: {problem}", "the versions that people have")


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def compile_elsewhere(path: Path, python: str) -> str | None:
    """What another Python says of a script when it compiles it, without running it: empty if nothing; None if that
    Python is not there."""
    program = "import sys; compile(open(sys.argv[1], 'rb').read(), 'train_gpt.py', 'exec')"
    try:
        command = [shutil.which(python) or python, "-W", "ignore", "-I", "-c", program, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "Error" not in done.stderr:  # a launcher without that version behind it
        return None
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def is_packed(script: bytes) -> bool:
    """A script that unpacks itself, so that its text says little."""
    return b"exec(" in script and re.search(rb"b85decode|decompress", script) is not None and script.count(b"\n") < 40


def installs(folder: Folder) -> Finding:
    tree = folder.tree
    if tree is None or is_packed(folder.script):
        return unknown("script is packed" if folder.script else "no train_gpt.py")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    runners = [c for c in calls if {"subprocess", "system", "popen", "check_call", "check_output"} & dotted(c.func)]
    words = r"\b(pip3?['\", ]+install|apt(-get)?['\", ]+install|curl|wget|git['\", ]+clone)\b"
    found = [ast.unparse(call)[:80] for call in runners if re.search(words, ast.unparse(call))]
    return fail("installs or downloads by itself: " + found[0]) if found else ok("no installation in the script")


def dotted(node: ast.AST) -> set[str]:
    """The names of `a.b.c`."""
    names = set()
    while isinstance(node, ast.Attribute):
        names.add(node.attr)
        node = node.value
    return names | ({node.id} if isinstance(node, ast.Name) else set())


def imports(folder: Folder) -> set[str]:
    """Top-level names of the modules that train_gpt.py imports."""
    names: set[str] = set()
    for node in ast.walk(folder.tree or ast.Module([], [])):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def requirements(folder: Folder) -> Finding:
    needed = imports(folder) - PREINSTALLED - sys.stdlib_module_names
    needed = {name for name in needed if not (folder.path / f"{name}.py").exists()}
    listed = "".join(f.read_text(errors="replace").lower() for f in folder.path.glob("requirements*.txt"))
    missing = sorted(name for name in needed if name.lower().replace("_", "-") not in listed.replace("_", "-"))
    missing = [name for name in missing if name.lower() not in folder.readme.lower()]
    return (
        warn("imported but not listed: " + ", ".join(missing))
        if missing
        else ok(f"{len(needed)} further packages, all listed")
    )


def code_size(folder: Folder) -> Finding:
    """The logged size of the code against train_gpt.py as it is, or, where the log counts a compressed form, that form
    against what compression can do."""
    scripts = [path.read_bytes() for path in folder.path.glob("*.py")]  # a script may run another one
    shipped = {
        size for s in scripts for size in (len(s), len(s.replace(b"\r\n", b"\n")), len(s.decode(errors="replace")))
    }

    def judge(log: RunLog) -> Finding | None:
        counted, plain = log.facts.get("code_bytes"), log.facts.get("source_size")
        if counted == 0:
            return fail("the log counts 0 bytes of code", "all code needed at evaluation counts")
        if counted is None or not folder.script or log.style == "ours":
            return None
        text = f"the log counts {counted:,} bytes of code"
        if {counted, plain} & shipped and (plain is None or plain in shipped):
            squeezed = len(zlib.compress(folder.script)) if counted not in shipped else 0
            return (ok if counted > 0.5 * squeezed else fail)(f"{text}, train_gpt.py has {len(folder.script):,}")
        if same_program(log.facts.get("source_text", "").encode(), folder.script):
            return warn(f"{text}, train_gpt.py has {len(folder.script):,}: the same program with other comments")
        size = f"{plain or counted:,}"
        return fail(f"{text}; the script that made it had {size} bytes, train_gpt.py has {len(folder.script):,}")

    return of_logs(folder, judge) if folder.script else unknown("no train_gpt.py")


def code_closure(folder: Folder) -> Finding:
    helpers = sorted(name for name in imports(folder) if (folder.path / f"{name}.py").exists())
    if not helpers:
        return ok("no helper modules") if folder.tree else unknown("script cannot be read")
    size = sum((folder.path / f"{name}.py").stat().st_size for name in helpers)
    counted = max([log.facts.get("code_bytes", 0) for log in folder.logs], default=0)
    text = f"imports {', '.join(helpers)} ({size} bytes); counted code {counted}"
    return ok(text) if counted >= len(folder.script) + size else warn(text, "all code needed at evaluation counts")


def packed_script(folder: Folder) -> Finding:
    """Ours: train_gpt_packed.py is byte for byte what packing train_gpt.py gives, and as long as the logs count."""
    path = folder.path / "train_gpt_packed.py"
    if not path.exists():
        return (
            fail("the logs are of train_gpt.py's packed form, which is not here")
            if is_own(folder)
            else unknown("not ours")
        )
    packed = path.read_bytes()
    counted = {log.facts["code_bytes"] for log in folder.logs if "code_bytes" in log.facts}
    if counted - {len(packed)}:
        return fail(f"{len(packed)} bytes, but the logs count {', '.join(map(str, sorted(counted)))}")
    try:
        expected = SCRIPT["packed_script"](folder.script.decode())
    except UNPARSABLE as error:
        return fail(f"train_gpt.py cannot be packed: {error}")
    if packed == expected:
        return ok(f"{len(packed)} bytes, byte for byte what packing train_gpt.py gives")
    head, _, tail = expected.partition(b"s=B.decompress('")
    framed = packed.startswith(head) and packed.endswith(tail[tail.rindex(b"'.encode(") :])
    return fail("not what packing train_gpt.py gives: " + ("the program inside" if framed else "the lines that run it"))


def json_fields(folder: Folder) -> Finding:
    if folder.submission_error:
        return fail(folder.submission_error)
    s = folder.submission
    missing = [key for key in ("author", "github_id", "name") if not isinstance(s.get(key), str) or not s[key].strip()]
    date = s.get("date")
    if not isinstance(date, str) or not re.fullmatch(r"\d{4}-\d\d-\d\d([T ][\d:.]+(Z|[+-]\d\d:?\d\d)?)?", date):
        missing.append(f"date (is {date!r})")
    return fail("missing or of another type: " + ", ".join(missing)) if missing else ok("author, github_id, name, date")


def val_bpb(folder: Folder) -> Finding:
    value = folder.submission.get("val_bpb")
    if number(value) is None:
        return fail(f"val_bpb is {value!r}", "a number at the top level")
    return ok(f"{value:.8f}") if 0 < value < 10 else fail(f"val_bpb is {value}", "between 0 and 10")


def bytes_total(folder: Folder) -> Finding:
    value = folder.submission.get("bytes_total")
    return (
        ok(f"{value:,}")
        if isinstance(value, int) and number(value)
        else fail(f"bytes_total is {value!r}", "a whole number")
    )


def val_loss_unit(folder: Folder) -> Finding:
    loss, bpb = folder.stated("val_loss"), folder.stated("val_bpb")
    if loss is None or bpb is None:
        return unknown("no val_loss")
    return (
        fail(f"val_loss {loss} is the bpb again", "nats per token")
        if abs(loss - bpb) < 1e-4
        else ok(f"{loss} nats per token")
    )


def stated_sizes(folder: Folder) -> dict[str, int]:
    sizes = {
        f"seed {seed}": int(row["artifact_bytes"]) for seed, row in folder.seeds.items() if "artifact_bytes" in row
    }
    top = {key: folder.stated(key) for key in ("bytes_total", "artifact_bytes_max", "artifact_bytes")}
    return sizes | {key: int(value) for key, value in top.items() if value is not None}


def size_stated(folder: Folder) -> Finding:
    sizes = stated_sizes(folder)
    over = [f"{name}: {size:,}" for name, size in sizes.items() if size > CAP_BYTES]
    if over:
        return fail("; ".join(over), f"{CAP_BYTES:,}")
    return ok(f"{max(sizes.values()):,}", f"{CAP_BYTES:,}") if sizes else unknown("no sizes in submission.json")


def size_logged(folder: Folder) -> Finding:
    def judge(log: RunLog) -> Finding | None:
        total = log.total_bytes
        return None if total is None else (ok if total <= CAP_BYTES else fail)(f"{total:,}", f"{CAP_BYTES:,}")

    return of_logs(folder, judge)


def size_margin(folder: Folder) -> Finding:
    sizes = [log.total_bytes for log in folder.logs if log.total_bytes] or list(stated_sizes(folder).values())
    if not sizes:
        return unknown("no sizes")
    left = CAP_BYTES - max(sizes)
    return (ok if left >= NARROW_BYTES or left < 0 else warn)(f"{left:,} bytes left", f"{NARROW_BYTES:,}")


def train_time(folder: Folder) -> Finding:
    """The clock at the end of the last step, which may be in flight when the time is up: the loop looks once a step."""

    def judge(log: RunLog) -> Finding | None:
        seconds, rounding = log.facts.get("train_s"), 0.0
        if log.style == "ours":
            seconds = number((log.result or {}).get("train_seconds")) or seconds
        if seconds is None and "train_s_rounded" in log.facts:
            seconds, rounding = log.facts["train_s_rounded"], 3.0  # minutes with one decimal
        if seconds is None:
            return None
        over = seconds - rounding - LIMIT_S
        step, long_step = (0.0, 0.0) if log.style == "ours" else (max(log.facts.get("step_ms", 0) / 1000, 0.15), 0.5)
        status = ok if over <= step else warn if over <= max(2 * step, long_step) else fail
        return status(f"{seconds:.1f} s", f"{LIMIT_S:g} s")

    return of_logs(folder, judge)


def calibration_time(folder: Folder) -> Finding:
    def judge(log: RunLog) -> Finding | None:
        trained = log.facts.get("train_s", log.facts.get("train_s_rounded"))
        if log.style == "ours" or "calibration_s" not in log.facts or trained is None:
            return None
        last = trained + log.facts["calibration_s"]
        text = f"last training read at {last:.1f} s"
        return ok(text) if last <= LIMIT_S else warn(text, f"{LIMIT_S:g} s in the strict reading")

    return of_logs(folder, judge)


def stopped_by_clock(folder: Folder) -> Finding:
    def judge(log: RunLog) -> Finding | None:
        forced = {
            k: v
            for block in log.settings
            for k, v in block.items()
            if k.lower() in ("forced_stop_step", "stop_after_step", "force_stop_step")
        }
        found = [f"{key} {value}" for key, value in forced.items() if value not in ("0", "-1", "None", "")]
        return fail("; ".join(found), "no forced step") if found else ok("no forced step") if log.settings else None

    return of_logs(folder, judge)


def eval_time(folder: Folder) -> Finding:
    """The evaluation that gave the score, and all passes over the validation text of one submission together."""
    logged = {log.path.name: log.eval_seconds for log in folder.logs if log.eval_seconds is not None}
    for log in folder.logs:
        if (together := sum(seconds for _, seconds in log.passes)) > max(logged.get(log.path.name, 0.0), LIMIT_S):
            logged[f"{log.path.name}, {' + '.join(label for label, _ in log.passes)}"] = together
    stated = {f"seed {s}": row["eval_time_s"] for s, row in folder.seeds.items() if "eval_time_s" in row}
    times = logged or stated
    over = [f"{name}: {seconds:.1f} s" for name, seconds in times.items() if seconds > LIMIT_S]
    if over:
        return fail("; ".join(over[:3]), f"{LIMIT_S:g} s")
    return (
        ok(f"{max(times.values()):.1f} s at most", f"{LIMIT_S:g} s")
        if times
        else unknown("no evaluation time in logs or submission.json")
    )


def hardware(folder: Folder) -> Finding:
    text = " ".join(str(folder.submission.get(key, "")) for key in ("hardware", "gpu", "platform"))
    gpus = {f"{log.facts.get('ranks', '?')} x {log.facts.get('gpu', '?')}" for log in folder.logs}
    if wrong := [log.facts["ranks"] for log in folder.logs if log.facts.get("ranks", 8) != 8]:
        return fail(f"{wrong[0]} processes in a log", "8xH100 SXM")
    if wrong := [log.facts["gpu"] for log in folder.logs if "H100" not in log.facts.get("gpu", "H100")]:
        return fail(wrong[0], "8xH100 SXM")
    if re.search(r"8\s*x?\s*(nvidia\s*)?H100", text.replace("×", "x"), re.I) or any(
        gpu.startswith("8 x NVIDIA H100") for gpu in gpus
    ):
        return ok(text.strip() or sorted(gpus)[0], "8xH100 SXM")
    return fail(text.strip(), "8xH100 SXM") if text.strip() else unknown("no hardware in submission.json or logs")


def seeds(folder: Folder) -> Finding:
    numbers = [log.facts.get("seed", log.path.name) for log in folder.logs if log.final]
    claimed = folder.submission.get("seeds")
    claimed = sorted(folder.seeds) or (claimed if isinstance(claimed, list) else [])
    if folder.repeated:
        return fail(f"submission.json states seed {', '.join(folder.repeated)} twice", "distinct")
    if len(set(map(str, numbers))) < len(numbers):
        return fail(f"seeds of the logs: {numbers}", "distinct")
    if copies := same_run_twice(folder):
        return fail(f"{' and '.join(copies)} are one run under two seeds", "a run for each")
    if len(numbers) < 3:
        return fail(
            f"{len(numbers)} logs with a final score" + (f", seeds claimed: {claimed}" if claimed else ""), "3 seeds"
        )
    if any("seed" not in log.facts for log in folder.logs):
        return warn(f"{len(numbers)} logs, not all of which tell their seed", "3 seeds")
    if claimed and not set(map(str, claimed)) <= set(map(str, numbers)):
        return fail(f"seeds claimed: {claimed}, in the logs: {numbers}", "a log for each")
    return ok(f"{len(numbers)} seeds: {', '.join(map(str, numbers))}", "3 seeds")


def same_run_twice(folder: Folder) -> list[str]:
    """Names of two logs all of whose scores are the same."""
    seen: dict[tuple, str] = {}
    for log in folder.logs:
        scores = tuple((score.label, score.loss, score.bpb) for score in log.scores if score.kind != "running")
        if len(scores) > 1 and scores in seen:
            return [seen[scores], log.path.name]
        seen[scores] = log.path.name
    return []


def seed_names(folder: Folder) -> Finding:
    def judge(log: RunLog) -> Finding | None:
        inside, outside = log.facts.get("seed"), log.facts.get("seed_in_name")
        return None if outside is None else (ok if inside == outside else fail)(f"seed {inside} inside")

    return of_logs(folder, judge)


# Settings that may differ between the seeds of one record: what names a run or its files, or follows from the process.
PER_RUN = re.compile(
    r"seed|run_id|run_name|path|file|_dir$|^rank|local_rank|device|main_process|timestamp|^stages$", re.I
)


def same_settings(folder: Folder) -> Finding:
    blocks = [block for log in folder.logs for block in log.settings]
    return alike(blocks, sum(bool(log.settings) for log in folder.logs), folder.script.decode(errors="replace"))


def alike(blocks: list[dict[str, str]], logs: int, script: str = "") -> Finding:
    """Whether the settings of all started runs are the same, but for what may differ between seeds: names and places,
    what the script computes from the seed, and a time budget that is a second shorter."""
    blocks = [{key: value for key, value in block.items() if not PER_RUN.search(key)} for block in blocks]
    if logs < 2 and len(blocks) < 2:
        return unknown("fewer than two logs state their settings")
    odd = sorted(
        {key for block in blocks for key in blocks[0].keys() | block.keys() if blocks[0].get(key) != block.get(key)}
    )
    odd = [key for key in odd if not re.search(rf"\b{re.escape(key)}\b[^\n=]*=[^\n]*\bseed\b", script)]
    shown = {key: ", ".join(dict.fromkeys(str(block.get(key)) for block in blocks)) for key in odd}
    budgets = [key for key in odd if same_budget(key, [block.get(key, "") for block in blocks])]
    if set(budgets) == set(odd):
        return (
            warn("; ".join(f"{key}: {shown[key]}" for key in odd), "one time budget")
            if odd
            else ok(f"{len(blocks[0])} settings alike in {logs} logs")
        )
    return fail("differ between logs: " + "; ".join([f"{key}: {text}" for key, text in shown.items()][:4]))


def same_budget(key: str, values: list[str]) -> bool:
    """A time budget in seconds that differs by two at most."""
    if not re.search(r"wall_?clock|budget|max_.*seconds", key, re.I):
        return False
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    return max(numbers) - min(numbers) <= 2


def same_source(folder: Folder) -> Finding:
    hashes = {log.path.name: log.facts["source_sha256"] for log in folder.logs if "source_sha256" in log.facts}
    if not hashes:
        return unknown("no log holds its source or a hash of it")
    if any(log.facts.get("source_found") is False for log in folder.logs):
        return fail("a log whose source does not have the hash that it states")
    different = set(hashes.values()) | {text for log in folder.logs for text in log.facts.get("source_hashes", [])}
    if len(different) > 1:
        return fail(f"{len(different)} different sources in {len(hashes)} logs")
    log = next(log for log in folder.logs if "source_sha256" in log.facts)
    text = log.facts.get("source_text")
    logged = logged_source(log.path) if log.style == "ours" else text.encode() if text else b""
    mine = [path.read_bytes().replace(b"\r\n", b"\n").strip() for path in folder.path.glob("*.py")]
    if (logged or b"").strip() in mine:
        return ok(f"train_gpt.py, sha256 {next(iter(hashes.values()))[:12]}")
    if log.style == "ours" and folder.script:
        return fail("the logs hold another train_gpt.py")
    if same_program(logged or b"", folder.script):
        return warn("the logs hold train_gpt.py with other comments")
    if not folder.script:
        return unknown("no train_gpt.py")
    return (
        unknown("train_gpt.py is packed, the logs hold text")
        if is_packed(folder.script)
        else fail("the logs hold another train_gpt.py")
    )


def same_program(a: bytes, b: bytes) -> bool:
    """Whether two scripts differ in comments, docstrings and layout only."""
    try:
        return program(a) == program(b)
    except UNPARSABLE:
        return False


@functools.lru_cache(maxsize=4)  # logs of one folder hold the same script
def program(script: bytes) -> str:
    """The tree of a script without docstrings, as text. Raises one of UNPARSABLE."""
    return ast.dump(SCRIPT["without_docstrings"](ast.parse(script)))


def score_in_logs(folder: Folder) -> Finding:
    """The scores that submission.json states are final scores of the logs."""
    if not folder.logs:
        return (
            fail("no log with a final score")
            if not folder.submission_error
            else unknown("neither logs nor submission.json")
        )
    if cut := [log.path.name for log in folder.logs if not log.final]:
        return fail(f"no final score in {', '.join(cut[:3])}")
    for seed, row in folder.seeds.items():
        log, claim = folder.log_of(seed), number(row.get("val_bpb"))
        if (
            log
            and claim is not None
            and not any(agree(claim, s.bpb, s.decimals) for s in log.scores if s.kind != "running")
            and not any(agree(claim, s.bpb, s.decimals) for other in folder.all_logs_of(seed) for s in other.scores)
        ):
            return fail(f"seed {seed}: {claim} in submission.json, {log.final.bpb} in {log.path.name}")
        if (
            log
            and claim is not None
            and not any(agree(claim, s.bpb, s.decimals) for s in log.scores if s.kind in ("quantized", "final"))
        ):
            return fail(f"seed {seed}: {claim} is the score before quantisation in {log.path.name}")
    claim, runs = folder.stated("val_bpb"), [bpb for _, bpb in folder.results().values()]
    if claim is None:
        return unknown("no val_bpb")
    single = [
        s
        for log in folder.logs
        for s in log.scores
        if s.kind in ("quantized", "final") and agree(claim, s.bpb, s.decimals)
    ]
    if agree(claim, statistics.fmean(runs), folder.digits[0]) or (single and len(runs) == 1):
        return ok(f"{claim} in {len(runs)} logs")
    if single:
        return warn(f"{claim} is the score of one of {len(runs)} logs, their mean is {statistics.fmean(runs):.8f}")
    close = abs(claim - statistics.fmean(runs)) < ROUNDED_FIRST and len(runs) > 1
    return (warn if close else fail)(f"{claim} in submission.json, mean of the logs {statistics.fmean(runs):.8f}")


def mean_and_std(folder: Folder) -> Finding:
    rows = [bpb for _, bpb in folder.results().values()]
    claim, spread = folder.stated("val_bpb"), folder.stated("val_bpb_std")
    if claim is None or len(rows) < 2:
        return unknown("fewer than two scores")
    mean, sample = statistics.fmean(rows), statistics.stdev(rows)
    text = f"mean {mean:.8f}, std {sample:.8f} of {len(rows)}"
    if not agree(claim, mean, folder.digits[0]):
        best, close = agree(claim, min(rows)), abs(claim - mean) < ROUNDED_FIRST
        return (warn if best or close else fail)(
            f"val_bpb {claim} is {'the best seed' if best else 'not the mean'}: {text}"
        )
    if spread is not None and not agree(spread, sample, folder.digits[0]):
        near = agree(spread, statistics.pstdev(rows)) or abs(spread / sample - 1) < 0.05 if sample else False
        return (warn if near else fail)(f"val_bpb_std {spread}: {text}")
    return ok(text)


def loss_in_logs(folder: Folder) -> Finding:
    claim, losses = folder.stated("val_loss"), [loss for loss, _ in folder.results().values() if loss is not None]
    if claim is None or not losses:
        return unknown("no val_loss in submission.json or logs")
    shown = [
        s.loss for log in folder.logs for s in log.scores if s.loss is not None and s.kind in ("quantized", "final")
    ]
    digits = min(folder.digits[1], 5)
    if agree(claim, statistics.fmean(losses), digits) or any(agree(claim, loss, digits) for loss in shown):
        return ok(f"{claim} nats per token")
    return fail(f"val_loss {claim}, mean of the runs {statistics.fmean(losses):.8f}")


def sizes_in_logs(folder: Folder) -> Finding:
    logged = {log.facts.get("seed"): log for log in folder.logs if log.total_bytes}
    rows = {
        seed: row["artifact_bytes"] for seed, row in folder.seeds.items() if "artifact_bytes" in row and seed in logged
    }
    # Some count the model alone as the artifact of a seed, and the code apart.
    if rows and all(
        size != logged[seed].total_bytes and size == logged[seed].facts.get("model_bytes")
        for seed, size in rows.items()
    ):
        return warn("artifact_bytes of the seeds leave out the code", "code + model")
    return stated_in_logs(folder, "size")


def steps_in_logs(folder: Folder) -> Finding:
    return stated_in_logs(folder, "steps")


def times_in_logs(folder: Folder) -> Finding:
    return stated_in_logs(folder, "step_ms", "train_s", "eval_s")


def code_in_logs(folder: Folder) -> Finding:
    found, stated = stated_in_logs(folder, "code"), folder.stated("bytes_code", "code_bytes")
    if found.status == "fail" and stated in {path.stat().st_size for path in folder.path.glob("*.py")}:
        return warn(f"{found.found}; it is right for the script here, which is not that of the logs")  # see code_size
    return found


def parts_in_logs(folder: Folder) -> Finding:
    """Scores before quantisation and before test-time training, and the losses of the seeds."""
    return stated_in_logs(folder, "before", "before_loss", "quantised", "loss")


def loss_std(folder: Folder) -> Finding:
    rows, claim = [loss for loss, _ in folder.results().values()], folder.stated("val_loss_std")
    if claim is None or len(rows) < 2 or None in rows:
        return unknown("no val_loss_std, or fewer than two losses")
    sample, population = statistics.stdev(rows), statistics.pstdev(rows)
    text = f"val_loss_std {claim}: std {sample:.8f} of {len(rows)}"
    if agree(claim, sample, folder.digits[1]):
        return ok(text)
    near = agree(claim, population, folder.digits[1]) or abs(claim / sample - 1) < 0.05 if sample else False
    return (warn if near else fail)(text)


def same_parameters(folder: Folder) -> Finding:
    counts = {log.facts["parameters"] for log in folder.logs if "parameters" in log.facts}
    if not counts:
        return unknown("no parameter count in the logs")
    return fail(f"{sorted(counts)} parameters in the logs") if len(counts) > 1 else ok(f"{counts.pop():,} parameters")


def readme_agrees(folder: Folder) -> Finding:
    claim = folder.stated("val_bpb")
    if not folder.readme or claim is None:
        return unknown("no README or no val_bpb")
    shown = {text for text in re.findall(r"(?<![\d.])\d\.\d{3,}", folder.readme)}
    there = lambda value: any(  # to the digits of both: JSON drops the last zeros of 1.1060
        agree(float(text), value, len(text) - 2) or agree(value, float(text), len(text) - 2) for text in shown
    )
    missing = [f"val_bpb {claim}"] if not there(claim) else []
    missing += [
        f"seed {s}: {r['val_bpb']}" for s, r in folder.seeds.items() if "val_bpb" in r and not there(r["val_bpb"])
    ]
    return (
        fail("not in the README: " + "; ".join(missing[:3]))
        if missing
        else ok(f"val_bpb and {len(folder.seeds)} seeds are in the README")
    )


def readme_sizes(folder: Folder) -> Finding:
    rows = {seed: int(row["artifact_bytes"]) for seed, row in folder.seeds.items() if "artifact_bytes" in row}
    numbers = {re.sub(r"[,_]", "", text) for text in re.findall(r"\b\d[\d,_]*\d\b", folder.readme)}
    if not rows:
        return unknown("submission.json has no sizes of the seeds")
    missing = [f"seed {seed}: {size:,}" for seed, size in rows.items() if str(size) not in numbers]
    return (
        warn("not in the README: " + "; ".join(missing[:3])) if missing else ok(f"{len(rows)} sizes are in the README")
    )


def unjudged_numbers(folder: Folder) -> Finding:
    return ok("all are made again from the logs") if is_own(folder) else other_numbers(folder)


def export_of(log: RunLog, score: Score) -> tuple[float, float, float] | None:
    """(targets, implied bytes, uncertainty of these in bytes) of a score; targets are those of the log, or those of the
    export whose bytes per token fit."""
    if not score.loss or not score.bpb:
        return None
    per_token = score.loss / (score.bpb * LN2)
    nearest = min(EXPORTS, key=lambda export: abs(per_token / export.bytes_per_token - 1))
    targets = number((log.result or {}).get("scored_tokens")) or log.facts.get("val_targets")
    if targets is None and abs(per_token / nearest.bytes_per_token - 1) > 0.002:
        return None
    targets = targets or nearest.targets
    rounding = 0.5 * (10.0**-score.decimals / score.bpb + 10.0**-score.loss_decimals / score.loss)
    tail = max(nearest.targets - targets, 0)  # dropped by a longer context than that of the stock loader
    slack = targets * per_token * rounding + (tail * per_token if tail <= LONGEST_TAIL else 0)
    return targets, targets * per_token, slack


def implied_bytes(folder: Folder) -> Finding:
    """Bytes of text that the pairs of a loss and a bpb imply: of the logs, of submission.json, and of README tables."""

    def judge(log: RunLog) -> Finding | None:
        score = folder.scored(log)
        return judge_pair(folder, log, score) if score else None

    found = of_logs(folder, judge)
    stated = worst((pair_finding(folder, *pair) for pair in stated_pairs(folder)), "no pair of a loss and a bpb")
    silent = not any(folder.scored(log) for log in folder.logs)
    return stated if found.status != "fail" and (stated.status == "fail" or silent) else found


def judge_pair(folder: Folder, log: RunLog, score: Score) -> Finding | None:
    found = export_of(log, score)
    if found is None:
        return None
    targets, size, slack = found
    limit = f"{TRUE_BYTES[0] / 1e6:.2f} to {TRUE_BYTES[1] / 1e6:.2f} M"
    text = f"{size / 1e6:.2f} M bytes of text implied by {int(targets):,} targets"
    if TRUE_BYTES[0] - slack <= size <= TRUE_BYTES[1] + slack:
        return ok(text, limit)
    if int(targets) == FIRST_EXPORT.targets and abs(size / targets / FIRST_EXPORT.bytes_per_token - 1) < 1e-3:
        return warn(f"{text}: {FIRST_EXPORT.name}", limit)
    if not folder.is_record and own_corpus(log):
        return unknown(f"{text}: another corpus, not comparable", limit)
    excess = size / TRUE_BYTES[0] - 1
    if 0.155 < excess < 0.185:
        text += f", {excess:.1%} too many: the leading space is counted twice"
    elif abs(size / 164.6e6 - 1) < 0.002:
        text += ": CaseOps scored with the plain byte table"
    if abs(excess) < 1e-3:
        return warn(f"{text}: a few targets more or less than all", limit)
    return fail(text, limit)


def stated_pairs(folder: Folder) -> list[tuple[str, int | None, float, float, float, float]]:
    """(place, seed, loss, unit of its last digit, bpb, unit) of every loss that stands beside its bpb."""
    rows = [("submission.json", None, folder.submission)]
    rows += [(f"submission.json, seed {seed}", seed, row) for seed, row in folder.seeds.items()]
    pairs = []
    for place, seed, row in rows:
        loss, bpb = number(row.get("val_loss")), number(row.get("val_bpb"))
        if loss and bpb:
            pairs.append((place, seed, loss, 10.0 ** -decimals(loss), bpb, 10.0 ** -decimals(bpb)))
    for table in folder.tables:
        columns = [[i for i, name in enumerate(table.columns) if name == wanted] for wanted in ("val_loss", "val_bpb")]
        for seed, cells in table.rows.items():
            if all(columns) and seed.isdigit() and (loss := cells[columns[0][0]]) and (bpb := cells[columns[1][0]]):
                pairs.append((f"README, seed {seed}", int(seed), loss.value, loss.unit, bpb.value, bpb.unit))
    return pairs


def pair_finding(
    folder: Folder, place: str, seed: int | None, loss: float, loss_unit: float, bpb: float, bpb_unit: float
) -> Finding:
    """A stated pair has the bytes per token of the logs, or without these of a known export."""
    if not bpb or not loss:
        return unknown(f"{place}: no pair")
    mine = [log for log in folder.logs if seed is None or log.facts.get("seed") == seed]
    known = [s.loss / (s.bpb * LN2) for log in mine if (s := folder.scored(log)) and s.loss and s.bpb]
    per_token, rounding = loss / (bpb * LN2), 1.1 * (loss_unit / loss + bpb_unit / bpb) + 2e-4
    exports = [*(export.bytes_per_token for export in EXPORTS), FIRST_EXPORT.bytes_per_token]
    gap = min(abs(per_token / value - 1) for value in known or exports)
    text = f"{place}: loss {loss:g} and bpb {bpb:g} imply {per_token:.4f} bytes per token"
    if gap <= rounding:
        return ok(text)
    if not known and not folder.is_record:
        return unknown(f"{text}, of no known export")
    return fail(
        f"{text}, {'the logs say' if known else 'the nearest export has'} "
        + f"{min(known or exports, key=lambda v: abs(per_token / v - 1)):.4f}"
    )


def own_corpus(log: RunLog) -> bool:
    """A log of ours that says itself that it was scored on something else than the challenge's documents."""
    report = {entry.get("rule"): entry for entry in (log.result or {}).get("validity", []) if isinstance(entry, dict)}
    documents = report.get("documents", {}).get("found", (log.result or {}).get("val_documents"))
    return log.style == "ours" and documents not in (None, VAL_DOCUMENTS)


def coverage(folder: Folder) -> Finding:
    def judge(log: RunLog) -> Finding | None:
        targets, documents = log.facts.get("val_targets"), log.facts.get("documents")
        if not folder.is_record and own_corpus(log):
            return unknown(f"{targets} targets of another corpus")
        if documents not in (None, VAL_DOCUMENTS):
            return fail(f"{documents:,} documents", f"{VAL_DOCUMENTS:,}")
        if targets is None:
            return None
        for export in EXPORTS:
            if export.targets - LONGEST_TAIL <= targets <= export.targets + LONGEST_TAIL:
                return ok(f"{targets:,} targets of {export.name}")
        if targets == KNOWN_TRUNCATED:
            return fail(f"{targets:,} targets: 10,000 documents or a cut shard", "all 50,000 documents")
        if targets == FIRST_EXPORT.targets:
            return warn(f"{targets:,} targets: {FIRST_EXPORT.name}")
        score = folder.scored(log)
        found = export_of(log, score) if score else None
        if found and TRUE_BYTES[0] - found[2] <= found[1] <= TRUE_BYTES[1] + found[2]:
            return ok(f"{targets:,} targets of an unknown export with the right bytes")
        return warn(f"{targets:,} targets: no known export", "of all 50,000 documents")

    return of_logs(folder, judge)


def disjoint_documents(folder: Folder) -> Finding:
    for script in sorted(folder.path.glob("*prepare*.py")):
        text = script.read_text(errors="replace")
        default = re.search(r"--val[-_]docs['\"][^)]*?default\s*=\s*([\d_]+)", text)
        if default and int(default[1]) != VAL_DOCUMENTS:
            return warn(f"{script.name} defaults to {default[1]} validation documents", f"{VAL_DOCUMENTS:,}")

    def judge(log: RunLog) -> Finding | None:
        nested = any("datasets/datasets" in value for block in log.settings for value in block.values())
        count = log.facts.get("train_shards")
        if count is None:
            return None
        print_found = 1490 <= count <= 1510 and nested
        return (warn if print_found else ok)(
            f"{count} training shards"
            + (" in datasets/datasets: 40,000 scored documents may be in them" if print_found else "")
        )

    return of_logs(folder, judge)


# Words in labels and settings that name a method which needs a look, or is out.
METHODS = (
    (
        "fail",
        "pre-quantisation test-time training",
        re.compile(r"pre-?quant[-_ ]?(legal[-_ ])?ttt(?!_enabled|_every)", re.I),
    ),
    ("warn", "SLOT: optimised on the window that is scored", re.compile(r"\bslot\b|_slot(_|\b)|slot_eval", re.I)),
    ("warn", "count cache", re.compile(r"n-?gram", re.I)),
    ("warn", "byte mixture", re.compile(r"\bppm\b|_ppm_|byte_?mix", re.I)),
)


def methods(folder: Folder) -> Finding:
    def judge(log: RunLog) -> Finding:
        score = folder.scored(log)
        labels = [score.label if score else ""]
        labels += [s.label for s in log.scores if re.search("pre-?quant-?ttt", s.label, re.I)]
        labels += [
            k
            for block in log.settings
            for k, v in block.items()
            if re.fullmatch(r"pre_?quant_?ttt(_enabled)?", k, re.I) and v in ("1", "True")
        ]
        found = [(status, name) for status, name, words in METHODS for label in labels if words.search(label + " ")]
        found += [("fail", "pre-quantisation test-time training") for label in labels[1:]]
        return Finding(*min(found)) if found else ok(f"scored by {labels[0]}")

    return of_logs(folder, judge)


def gates(folder: Folder) -> Finding:
    def judge(log: RunLog) -> Finding | None:
        count = log.facts.get("gated_tokens")
        return None if count is None else (ok if count == 0 else fail)(f"{count} tokens gated by their own class", "0")

    return of_logs(folder, judge)


def own_report(folder: Folder) -> Finding:
    def judge(log: RunLog) -> Finding | None:
        if log.style != "ours":
            return None
        if not log.result:
            return fail("no result line: the run did not finish")
        report = [entry for entry in log.result.get("validity", []) if isinstance(entry, dict)]
        broken = [f"{e.get('rule')}: {e.get('found')} (limit {e.get('limit')})" for e in report if e.get("ok") is False]
        broken = broken or (log.result.get("violations") or [] if not log.result.get("valid") else [])
        open_ = [str(e.get("rule")) for e in report if e.get("ok") is None]
        if broken:
            return fail("; ".join(map(str, broken[:3])))
        return ok(
            f"{len(report) - len(open_)} rules kept" + (f", not judged there: {', '.join(open_)}" if open_ else "")
        )

    return of_logs(folder, judge)


def versions(folder: Folder) -> Finding:
    stated = folder.submission.get("pytorch_version")

    def judge(log: RunLog) -> Finding:
        names = {
            "torch": stated or log.facts.get("torch"),
            "gpu": folder.submission.get("hardware") or log.facts.get("gpu"),
        }
        names |= {
            "training shards": log.facts.get("train_shards") or log.style == "ours",
            "steps": log.facts.get("steps") or (log.result or {}).get("steps"),
        }
        missing = [name for name, value in names.items() if not value]
        return warn("not stated: " + ", ".join(missing)) if missing else ok(f"torch {names['torch']}")

    return of_logs(folder, judge)


def credit(folder: Folder) -> Finding:
    if not folder.readme:
        return unknown("no README")
    found = re.search(r"#\d+|pull/\d+|PR \d+", folder.readme)
    return ok(f"names {found[0]}") if found else warn("the README names no earlier entry", "#N of the base")


def show_test(comparison: Comparison, test: Welch | None) -> str:
    gain = f"better by {comparison.gain_bpb:.5f} bpb, {comparison.gain_nats:.5f} nats per token"
    return gain + (
        f"; t {test.t:.2f}, {test.df:.1f} degrees of freedom, p {test.p:.4g} ({comparison.unit})"
        if test
        else "; one score only, no test"
    )


def record_margin(folder: Folder, reference: Folder | None = None) -> Finding:
    comparison = compare(folder, reference) if reference else None
    if comparison is None:
        return unknown("no --reference with scores")
    test = comparison.with_margin
    good = test is not None and test.p < RECORD_P
    return (ok if good else fail)(show_test(comparison, test), f"0.005 nats at p < {RECORD_P}")


def board_practice(folder: Folder, reference: Folder | None = None) -> Finding:
    comparison = compare(folder, reference) if reference else None
    if comparison is None:
        return unknown("no --reference with scores")
    test = comparison.without
    good = test is not None and test.p < BOARD_P
    return (ok if good else warn)(show_test(comparison, test), f"p < {BOARD_P} without a margin")


class Rule(NamedTuple):
    """One check. `number` is that of the list of rules, `source` the public thread, H, P, C or G the strength."""

    name: str
    number: str
    strength: str
    source: str
    check: Callable[..., Finding]
    record_only: bool = False  # not asked of a folder that is no record


RULES = (
    Rule("folder_name", "56", "H", "README", folder_name),
    Rule("one_new_folder", "56", "H", "README", one_new_folder),
    Rule("files", "57", "H", "README, #561", files),
    Rule("script_compiles", "59", "H", "README", script_compiles),
    Rule("no_installs", "7", "H", "README FAQ, #1855", installs),
    Rule("requirements", "57", "P", "README", requirements),
    Rule("code_size", "2, 52", "P", "#1835, #86", code_size),
    Rule("code_closure", "3", "H", "README FAQ, #1412", code_closure),
    Rule("packed_script", "4", "P", "#1394, #1855", packed_script),
    Rule("json_fields", "58", "H", "README", json_fields),
    Rule("val_bpb", "58", "H", "README", val_bpb),
    Rule("bytes_total", "58", "H", "README", bytes_total),
    Rule("val_loss_unit", "52", "H", "#86", val_loss_unit),
    Rule("size_stated", "1", "H", "README FAQ", size_stated),
    Rule("size_logged", "2", "P", "#1835", size_logged),
    Rule("size_margin", "1", "P", "#568, #1978", size_margin),
    Rule("train_time", "11", "H", "README, #1908", train_time, record_only=True),
    Rule("calibration_time", "12", "H", "#677, #1529", calibration_time, record_only=True),
    Rule("stopped_by_clock", "11", "H", "#1945", stopped_by_clock, record_only=True),
    Rule("eval_time", "19", "H", "README FAQ, #1972", eval_time, record_only=True),
    Rule("hardware", "17", "H", "README", hardware, record_only=True),
    Rule("seeds", "51", "H", "README, #2124", seeds, record_only=True),
    Rule("seed_names", "51", "H", "#2124", seed_names),
    Rule("same_settings", "51", "H", "#2124", same_settings),
    Rule("same_source", "52", "H", "#86", same_source),
    Rule("score_in_logs", "52", "H", "#86, #1719", score_in_logs),
    Rule("mean_and_std", "52", "H", "#1719", mean_and_std),
    Rule("loss_in_logs", "52", "H", "#86", loss_in_logs),
    Rule("sizes_in_logs", "52", "H", "#86", sizes_in_logs),
    Rule("steps_in_logs", "52", "H", "#86", steps_in_logs),
    Rule("code_in_logs", "52", "H", "#86", code_in_logs),
    Rule("times_in_logs", "52", "H", "#86", times_in_logs),
    Rule("parts_in_logs", "52", "H", "#86", parts_in_logs),
    Rule("loss_std", "52", "H", "#1719", loss_std),
    Rule("same_parameters", "52", "H", "#86", same_parameters),
    Rule("readme_agrees", "52", "H", "#86", readme_agrees),
    Rule("readme_sizes", "52", "H", "#86", readme_sizes),
    Rule("readme_tables", "52", "H", "#86", readme_tables),
    Rule("other_numbers", "52", "H", "#86", unjudged_numbers),
    Rule("coverage", "37", "H", "README, #1854", coverage),
    Rule("implied_bytes", "42, 44, 48", "P", "#1719, #2071", implied_bytes),
    Rule("disjoint_documents", "39", "H", "#2127, #2146", disjoint_documents),
    Rule("methods", "28, 29, 32, 33", "H/P", "#677, #1376, #1872", methods),
    Rule("gates", "25", "H", "#1514, #2118", gates),
    Rule("own_report", "24, 30, 31", "H", "#1017", own_report),
    Rule("result_in_log", "52", "H", "#86", result_in_log),
    Rule("texts_from_logs", "52", "H", "#86", texts_from_logs),
    Rule("versions", "53", "H", "README FAQ, #86", versions),
    Rule("credit", "60", "P", "practice", credit),
    Rule("record_margin", "49", "H", "README", record_margin, record_only=True),
    Rule("board_practice", "50", "P", "#1902", board_practice, record_only=True),
)


class Verdict(NamedTuple):
    """One line of the report: status ok, fail, warn, unknown or waived."""

    rule: Rule
    status: str
    found: str
    limit: str


def check_folder(folder: Folder, reference: Folder | None = None, base: str = "") -> list[Verdict]:
    """All rules applied to one folder; `base` is a revision of the git checkout around it."""
    verdicts = []
    for rule in RULES:
        if rule.check is texts_from_logs:
            named = reference and folder.submission.get("comparison_baseline") == reference.path.resolve().name
            finding = texts_from_logs(folder, compare(folder, reference) if named else None)
        elif rule.check in (record_margin, board_practice):
            finding = rule.check(folder, reference)
        elif rule.check is one_new_folder:
            finding = rule.check(folder, base)
        else:
            finding = rule.check(folder)
        waived = rule.record_only and not folder.is_record and finding.status != "ok"
        verdicts.append(Verdict(rule, "waived" if waived else finding.status, finding.found, finding.limit))
    return verdicts


SYMBOLS = {"ok": "ok", "fail": "FAIL", "warn": "warn", "unknown": "?", "waived": "-"}


def show(folder: Folder, verdicts: list[Verdict]) -> str:
    """The report on one folder."""
    lines = [f"{folder.path}: {'record' if folder.is_record else 'not a record'}, {len(folder.logs)} logs"]
    for verdict in verdicts:
        rule, limit = verdict.rule, f" (limit {verdict.limit})" if verdict.limit else ""
        lines.append(
            f"  {SYMBOLS[verdict.status]:4} {rule.name:18} {verdict.found}{limit}"
            f" [{rule.number} {rule.strength}; {rule.source}]"
        )
    counts = {status: sum(v.status == status for v in verdicts) for status in SYMBOLS}
    lines.append("  " + ", ".join(f"{SYMBOLS[status]}: {count}" for status, count in counts.items()))
    return "\n".join(lines)


def as_json(folder: Folder, verdicts: list[Verdict]) -> dict[str, Any]:
    rows = [
        {"rule": v.rule.name, "status": v.status, "found": v.found, "limit": v.limit, "number": v.rule.number}
        | {"strength": v.rule.strength, "source": v.rule.source}
        for v in verdicts
    ]
    return {"folder": str(folder.path), "record": folder.is_record, "passed": passed(verdicts), "verdicts": rows}


def passed(verdicts: list[Verdict]) -> bool:
    return not any(verdict.status == "fail" for verdict in verdicts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks record folders against the rules of Parameter Golf.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--base", default="", metavar="REV", help="a revision of the checkout that has no such folder yet"
    )
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="the record to beat")
    parser.add_argument(
        "--not-a-record", action="store_true", help="do not ask for time limits, hardware, seeds, margin"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", SyntaxWarning)  # of other people's scripts
    try:
        reference = read_folder(options.reference, False) if options.reference else None
        folders = [read_folder(path, options.not_a_record) for path in options.folders]
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reports = [(folder, check_folder(folder, reference, options.base)) for folder in folders]
    if options.json:
        print(json.dumps([as_json(*report) for report in reports], indent=1))
    else:
        print("\n\n".join(show(*report) for report in reports))
    return 0 if all(passed(verdicts) for _, verdicts in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
