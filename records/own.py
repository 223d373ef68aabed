"""Consistency of a folder that records/pack.py made: its logs line by line, and its texts, made again from the logs.

A log of this repository's script ends with a `result` line, from which everything in the folder is made.
`result_in_log` compares that line with the lines that the stages wrote, `texts_from_logs` the texts with the `result`
lines.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from records import texts
from records.finding import Finding, fail, ok, unknown, warn, worst
from records.folder import Comparison, Folder
from records.logs import RunLog, logged_source
from records.texts import ARTIFACT_LIMIT_BYTES

LN2 = math.log(2)
MALFORMED = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
)  # what a damaged log raises
# event, what selects its line, field of the line -> key of the result. The last such line counts.
LINES = (
    ("calibrated", {}, {"seconds": "calibration_seconds", "last_training_read_s": "train_seconds"}),
    ("diagnostic", {"weights": "averaged"}, {"val_loss": "prequant_val_loss", "val_bpb": "prequant_val_bpb"}),
    ("artifact", {}, {"gptq_s": "gptq_seconds", "compress_s": "compress_seconds"}),
    ("fit", {}, {"cost_bpb": "fit_cost_bpb"}),
    ("config", {}, {"preset": "preset", "run_id": "run_id", "seed": "seed"}),
    ("hardware", {}, {"devices": "hardware"}),
    ("versions", {}, {"torch": "torch"}),
    ("attention", {}, {"backend": "attn_backend"}),
    ("check", {"item": "kernels"}, {"detail": "kernels"}),
)
SCORED = ("oversize", "quantized", "sliding", "ttt")
# rule of the validity report -> key of the result that it is about
JUDGED = {
    "artifact_bytes": "total_bytes",
    "train_seconds": "train_seconds",
    "eval_seconds": "eval_seconds",
    "scored_targets": "targets_scored",
    "single_pass": "most_times_scored",
    "scored_bytes": "scored_bytes",
    "text_bytes": "text_bytes",
    "documents": "val_documents",
    "score_before_update": "learned_before_score",
    "weights_from_artifact": "scored_sha256",
    "hardware": "hardware",
}
# Rules in which `found` must equal the limit.
EQUAL = ("scored_targets", "single_pass", "scored_bytes", "score_before_update", "weights_from_artifact")
# label of the table at the end of a log -> keys of the result whose values stand in that row
TABLE = {
    "before quantisation": ("prequant_val_bpb", "prequant_val_loss"),
    "quantised, over the limit": ("oversize_val_bpb", "oversize_val_loss"),
    "quantised artifact": ("quantized_val_bpb", "quantized_val_loss"),
    "sliding window": ("sliding_val_bpb", "sliding_val_loss"),
    "test-time training": ("ttt_val_bpb", "ttt_val_loss"),
    "artifact bytes": ("total_bytes", None, "artifact_bytes", "code_bytes"),
    "training": ("steps", "tokens_per_s"),
    "peak memory": ("peak_memory_mib",),
}


def is_own(folder: Folder) -> bool:
    return bool(folder.logs) and all(log.style == "ours" for log in folder.logs)


def shown(key: str, value: Any) -> str:
    """A value as a line of the log shows it."""
    if isinstance(value, float):
        return f"{value:.8f}" if key.endswith("bpb") else f"{value:.6g}"
    return str(value).replace(" ", "_" if key == "detail" else "")


def result_in_log(folder: Folder) -> Finding:
    """The result line of each log of ours against its other lines, its settings, and itself."""
    if not is_own(folder):
        return unknown("the logs are not of this repository's script")
    findings = []
    for log in folder.logs:
        if not log.result:
            return fail(f"{log.path.name}: no result line")
        try:
            problem = next(problems(log, log.result), None)
        except MALFORMED as error:
            problem = f"the log lacks what a finished run says ({error!r})"
        findings.append(
            fail(f"{log.path.name}: {problem}") if problem else ok("the result is what the log's lines say")
        )
    try:
        return worst([*findings, *differences(folder.logs)], "")
    except MALFORMED as error:
        return fail(f"a log lacks what a finished run says ({error!r})")


# Lines that say the same in all runs of one configuration on one data set: event, fields.
SAME = (
    ("check", ("item", "ok", "detail")),
    ("setting", ("name", "origin")),
    ("data", ("train_tokens", "val_tokens", "row_tokens")),
    ("calibrated", ("hessians",)),
    ("looping", ("visits",)),
    ("ttt", ("documents", "batches", "pauses", "chunks", "epochs")),
    ("global_ttt", ("phase", "batches", "steps")),
    ("hints", ("positions",)),
)


def differences(logs: list[RunLog]) -> Iterator[Finding]:
    """What runs of one configuration must have in common beside the values of their settings. The lines of logs that
    grew over different numbers of starts are not compared."""
    if len({tuple(log.settings[-1]) for log in logs}) > 1:
        yield fail("the names of the settings differ between logs", "one configuration")
    for event in ("versions", "hardware"):
        if len({str(log.lines(event)[-1:]) for log in logs}) > 1:
            yield warn(f"the lines `{event}` differ between logs", "one machine")
    documents = {str((log.result or {}).get("val_documents")) for log in logs}
    if documents != {line["documents"] for log in logs for line in log.lines("ttt") if "documents" in line} | documents:
        yield fail("the lines `ttt` have other documents than the results")
    if len({len(log.lines("config")) for log in logs}) > 1:
        return
    for event, names in SAME:
        seen = [[[line.get(name) for name in names] for line in map(without_machine, log.lines(event))] for log in logs]
        if any(lines != seen[0] for lines in seen):
            yield fail(f"the lines `{event}` differ between logs", "one configuration, one data set")


def without_machine(line: dict[str, str]) -> dict[str, str]:
    """A line without the free space of the disk and the file that a stage continues from, which differ between runs."""
    return line | {"detail": ""} if line.get("item") in ("disk", "earlier") else line


def problems(log: RunLog, result: dict[str, Any]) -> Iterator[str]:
    yield from problems_with_lines(log, result)
    yield from problems_with_sums(log, result)
    yield from problems_with_validity(log, result)
    yield from problems_with_steps(log, result)
    yield from problems_with_settings(log, result)
    yield from problems_with_table(log, result)


# What a run of all stages has tried before its first one, a line `check item:...` for each.
CHECKED = ("packages", "train_data", "validation", "attention", "kernels", "memory", "quantizer", "artifact", "disk")


def problems_with_lines(log: RunLog, result: dict[str, Any]) -> Iterator[str]:
    passed = {line["item"] for line in log.lines("check") if line["ok"] == "True"}
    for item in CHECKED:
        if item not in passed:
            yield f"no line `check item:{item} ok:True`"
    rows = list(LINES)
    kinds = [kind for kind in SCORED if f"{kind}_val_bpb" in result]
    rows += [("score", {"kind": k}, {n: f"{k}_{n}" for n in ("val_loss", "val_bpb", "seconds")}) for k in kinds]
    for event, selected, fields in rows:
        found = log.lines(event, **selected)
        if not found and any(key in result for key in fields.values()):
            yield f"no line `{event} {' '.join(':'.join(pair) for pair in selected.items())}`"
        for field, key in fields.items() if found else ():
            if found[-1].get(field) != shown(field, result.get(key)):
                yield f"{key} is {result.get(key)} in the result, {found[-1].get(field)} in the line `{event}`"
    for kind in kinds:
        line = log.lines("score", kind=kind)[-1]
        if (line["tokens"], line["bytes"]) != (str(result["scored_tokens"]), str(result["scored_bytes"])):
            yield f"the line `score kind:{kind}` has {line['tokens']} tokens and {line['bytes']} bytes"
    for name, seconds in result["stage_seconds"].items():
        if [shown("", seconds)] != [line["seconds"] for line in log.lines("stage", name=name)][-1:]:
            yield f"stage {name} took {seconds} s in the result, its line says something else"
    for stage, graphs in result["stage_graphs"].items():
        stated = {"stage": stage} | {key: shown(key, value) for key, value in graphs.items()}
        warned = bool(log.lines("warning", stage=stage, fallbacks=stated["fallbacks"]))
        same = log.lines("graphs", stage=stage)[-1:] == [stated]
        if not (same if graphs["compiled_graphs"] else warned or not any(graphs.values())):
            yield f"the line `graphs stage:{stage}` is not that of the result"
    packed = {"bytes": str(result["artifact_bytes"]), "clip_factor": shown("", result["clip_factor"])}
    if not log.lines("artifact", **packed):
        yield f"no line says that an artifact of {result['artifact_bytes']} bytes was made"


def problems_with_sums(log: RunLog, result: dict[str, Any]) -> Iterator[str]:
    """Values that the result states twice, or that follow from other parts of it."""
    r, settings = result, log.settings[-1]
    submitted = r["submitted"]
    per_byte = r["val_targets"] / r["val_bytes"] / LN2
    data = log.lines("data")[-1]
    rows = [
        ("total_bytes", r["artifact_bytes"] + r["code_bytes"], 0.0),
        ("train_tokens", r["steps"] * int(settings["train_batch_tokens"]), 0.0),
        ("val_loss", r[f"{submitted}_val_loss"], 0.0),
        ("val_bpb", r[f"{submitted}_val_bpb"], 0.0),
        ("eval_seconds", r[f"{submitted}_seconds"], 0.0),
        ("val_targets", int(data["val_tokens"]) - 1, 0.0),
        ("scored_tokens", r["val_targets"], 0.0),
        ("scored_bytes", r["val_bytes"], 0.0),
        ("tokens_per_s", r["train_tokens"] / max(r["train_seconds"] - r["calibration_seconds"], 1e-9), 1e-9),
        ("ranks", int(r["hardware"].split("x")[0]), 0.0),
        ("seed", int(settings["seed"]), 0.0),
        ("scored_sha256", r["artifact_sha256"], 0.0),
        ("targets_scored", r["val_targets"], 0.0),
    ]
    kinds = [key.removesuffix("_val_bpb") for key in r if key.endswith("_val_bpb")]
    rows += [(f"{kind}_val_bpb", r[f"{kind}_val_loss"] * per_byte, 1e-12) for kind in kinds]
    graphs = r["stage_graphs"].values()
    totals = ("compiled_graphs", "compiled_in_clock", "compile_seconds")
    rows += [(key, sum(stage[key] for stage in graphs), 1e-12) for key in totals]
    for key, expected, tolerance in rows:
        if r[key] != expected and not (tolerance and math.isclose(r[key], expected, rel_tol=tolerance)):
            yield f"{key} is {r[key]} in the result, {expected} by its other parts"


def problems_with_validity(log: RunLog, result: dict[str, Any]) -> Iterator[str]:
    """The report: its rows are in the log, are about the result's own figures, and are judged by their limits."""
    rows = result["validity"]
    lines = log.lines("validity")[-len(rows) :]
    if [line["rule"] for line in lines] != [row["rule"] for row in rows]:
        yield "the validity lines are not those of the result"
    for row, line in zip(rows, lines):
        rule, found, limit, verdict = row["rule"], row["found"], row["limit"], row["ok"]
        if line != {key: shown(key, value) for key, value in row.items()}:
            yield f"the line `validity rule:{rule}` is not that of the result"
        if rule not in JUDGED:
            continue
        if found != result.get(JUDGED[rule]):
            yield f"rule {rule} was judged on {found}, the result says {result.get(JUDGED[rule])}"
        kept = found == limit if rule in EQUAL else found <= limit if rule.endswith(("_bytes", "_seconds")) else verdict
        if rule == "text_bytes":
            kept = abs(found - limit) <= result["byte_sidecar"] * limit / 1000
        if verdict is not None and verdict != kept:
            yield f"rule {rule} is called {'kept' if verdict else 'broken'} with {found}, limit {limit}"
    broken = [row for row in rows if row["ok"] is False]
    if result["valid"] != (not broken) or len(result["violations"]) != len(broken):
        yield "valid and violations are not those of the validity report"


def problems_with_steps(log: RunLog, result: dict[str, Any]) -> Iterator[str]:
    """The lines of steps: those that the script writes, steps and seconds rising up to the result's."""
    if log.lines("resumed"):  # steps between a checkpoint and the stop are there twice
        return
    before, last, every = (0, 0.0), int(log.settings[-1]["iterations"]), int(log.settings[-1]["train_log_every"])
    lines, steps = log.lines("train"), int(result["steps"])
    for line in lines:
        step, total = map(int, line["step"].split("/"))
        now = step, float(line["seconds"])
        if not now > before or total != last or not 0 <= float(line["lr_multiplier"]) <= 1:
            yield f"the line `train step:{line['step']}` does not follow the one before it"
        before = now
        if step == steps and line["loss"] != shown("loss", result["train_loss"]):
            yield f"train_loss is {result['train_loss']} in the result, {line['loss']} in the last step"
    written = [step for step in range(1, steps + 1) if step <= 5 or step % every == 0 or step == last]
    if [int(line["step"].split("/")[0]) for line in lines] != written:
        yield f"the lines of steps are not those of {steps} steps"
    if before[1] > float(shown("", result["train_seconds"])):
        yield f"training took {result['train_seconds']} s in the result, the lines of steps go on to {before[1]} s"


def problems_with_settings(log: RunLog, result: dict[str, Any]) -> Iterator[str]:
    """The lines of settings with their origins, and the block of all settings."""
    block = log.settings[-1]
    if block["run_id"] != str(result["run_id"]):
        yield f"run_id is {block['run_id']} in the settings, {result['run_id']} in the result"
    stated = log.lines("config")[-1]
    if stated["stages"] != block["stages"]:
        yield f"stages are {block['stages']} in the settings, {stated['stages']} in the line `config`"
    for line in log.lines("setting"):
        name, value = line["name"], line["value"]
        full = {"True": "1", "False": "0"}.get(block.get(name, ""), block.get(name, "")).replace(" ", "")
        plain = {"True": "1", "False": "0"}.get(value, value)
        if name in block and plain != full and plain != shown("", as_number(full)):
            yield f"the line `setting name:{name}` says {value}, the settings {block[name]}"


def as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def problems_with_table(log: RunLog, result: dict[str, Any]) -> Iterator[str]:
    """The table before the result line."""
    text = log.body.rpartition("\nvalidity ")[2].partition("\nresult ")[0]
    for label, keys in TABLE.items():
        if any(key in result for key in keys if key):
            row = re.search(rf"^{re.escape(label)}  +(.*)$", text, re.M)
            numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", row[1].replace("int6", "")) if row else []
            values = [result.get(key) if key else None for key in keys]
            if len(numbers) < len(keys) or not all(map(displays, numbers, values)):
                yield f"the row `{label}` of the table is not the result's"
    row = re.search(r"^seconds  +(.*)$", text, re.M)
    if not row or row[1] != ", ".join(f"{stage} {s:.1f}" for stage, s in result["stage_seconds"].items()):
        yield "the row `seconds` of the table is not the result's"
    mark = [label for label, keys in TABLE.items() if f"{result['submitted']}_val_bpb" in keys]
    if not re.search(rf"^{mark[0]} .*<- submitted$", text, re.M) or text.count("<- submitted") != 1:
        yield "the table marks another score as the submitted one"
    if not re.search(r"^valid  +yes$" if result["valid"] else r"^valid  +INVALID", text, re.M):
        yield "the row `valid` of the table is not the result's"


def displays(text: str, value: float | None) -> bool:
    """Whether a number of the table is this value with so many decimals; None stands for the limit."""
    places = len(text.split(".")[1]) if "." in text else 0
    return text.replace(",", "") == (str(ARTIFACT_LIMIT_BYTES) if value is None else f"{value:.{places}f}")


# ------------------------------------------------------------------------------------------------------------
# TEXTS
# ------------------------------------------------------------------------------------------------------------

COMPARED = ("comparison_baseline", "delta_vs_leaderboard_bpb", "delta_vs_leaderboard_nats", "p_value")
FREE = "\0"  # in place of words of the author


def texts_from_logs(folder: Folder, comparison: Comparison | None = None) -> Finding:
    """submission.json, README.md, settings.env and requirements.txt, made again from the logs. Words of the author are
    taken as they are; so is the comparison with another folder, unless that folder is given."""
    if not is_own(folder):
        return unknown("not written by records/pack.py")
    try:
        runs = runs_of(folder)
        words = words_of(folder, runs)
        tokenizer = next(iter(sorted((folder.path / "tokenizers").glob("*"))), None)
        findings = [
            submission_finding(folder, texts.submission(runs, words, comparison), comparison),
            readme_finding(folder.readme, texts.readme(runs, words, comparison, tokenizer)),
            file_finding(folder.path / "settings.env", texts.settings_file(runs[0], tokenizer)),
            requirements_finding(folder.path / "requirements.txt", texts.requirements(folder.script, runs[0])),
        ]
    except MALFORMED as error:
        return fail(f"a log lacks what the texts are made of ({error!r})")
    return worst(findings, "")


def runs_of(folder: Folder) -> list[texts.SeedRun]:
    """The runs in the order of submission.json."""
    order = {seed: place for place, seed in enumerate(folder.submission.get("seeds") or [])}
    logs = sorted(folder.logs, key=lambda log: order.get(log.facts.get("seed"), len(order)))
    return [texts.SeedRun(folder.path, log.result or {}, log, logged_source(log.path) or b"") for log in logs]


def words_of(folder: Folder, runs: list[texts.SeedRun]) -> texts.Words:
    stated = {name: str(folder.submission.get(name, "")) for name in ("author", "github_id", "name", "blurb")}
    return texts.Words(
        **stated,
        date=folder.path.resolve().name[:10],
        is_record=not str(folder.submission.get("track")).startswith("non-record"),
        reference=str(folder.submission.get("comparison_baseline", "")),
        details=FREE,
        credits=FREE,
    )


def submission_finding(folder: Folder, expected: dict[str, Any], comparison: Comparison | None) -> Finding:
    stated = json.loads(json.dumps(folder.submission))
    if not comparison:  # computed from the other folder, which is not given
        expected |= {key: stated[key] for key in COMPARED if key in stated}
    expected = json.loads(json.dumps(expected))
    odd = [key for key in expected.keys() | stated.keys() if expected.get(key, FREE) != stated.get(key, FREE)]
    shown_ = [f"{key} is {stated.get(key)!r}, the logs give {expected.get(key)!r}" for key in sorted(odd)]
    return fail("submission.json: " + "; ".join(text[:160] for text in shown_[:2])) if odd else ok("texts of the logs")


def readme_finding(readme: str, expected: str) -> Finding:
    """Whether the README is the expected text. FREE stands for any words; without words, its heading is left out."""
    head, middle, _ = expected.split(FREE)
    middle = middle.removesuffix("\n\n## Credits\n\n").strip("\n")
    free = re.escape("No reference was given.")
    pattern = re.escape(head.rstrip("\n")) + r"(?s:\n\n.*?)??\n\n" + re.escape(middle) + r"(?s:\n\n## Credits\n\n.+)?\n"
    pattern = pattern.replace(free, rf"(?:{free}|Against `.*\.)")
    if re.fullmatch(pattern, readme):
        return ok("texts of the logs")
    lines = readme.split("\n")
    odd = next((line for line in (head + middle).split("\n") if line.strip() and line not in lines), "")
    return fail(
        f"README.md: the logs give the line {odd[:160]!r}" if odd else "README.md: has other lines than the logs give"
    )


def file_finding(path: Path, expected: str) -> Finding:
    if not path.exists():
        return fail(f"no {path.name}")
    found = path.read_text(errors="replace")
    if found == expected:
        return ok("texts of the logs")
    pairs = zip(found.split("\n") + [""], expected.split("\n") + [""])
    mine, right = next(((a, b) for a, b in pairs if a != b), ("", ""))
    return fail(f"{path.name}: {mine[:80]!r}, the logs give {right[:80]!r}")


def requirements_finding(path: Path, expected: str) -> Finding:
    """The same packages, and the versions that the logs state; no log states those of the others."""
    found = dict(re.findall(r"^([\w-]+)==(\S+)$", path.read_text() if path.exists() else "", re.M))
    wanted = dict(re.findall(r"^([\w-]+)==(\S+)$", expected, re.M))
    odd = [f"{n} {found.get(n)}" for n in wanted if n not in found or n in ("torch", "numpy") and found[n] != wanted[n]]
    return fail(f"requirements.txt: {', '.join(odd)}, the logs give another") if odd else ok("texts of the logs")
