"""Reads training logs of Parameter Golf: those of this repository and those that other people's scripts print.

One table, FACTS, says which line states which fact; another, SCORE, how a line states a score. Both work on the log
alone; nothing of a record folder is executed. Three families are known, named after when they were common:

    ours    `event key:value ...` lines, the source at the head, `result {json}` at the end
    march   `step:100/20000 train_loss:...`, source and a row of `=` at the head of some
    april   `100/20000 train_loss: ...`, a sorted block of `  name: value` under `Hyperparameters:`

Truncated and renamed variants of these are read as far as they go; what a log does not say is absent.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


def whole(text: str) -> int:
    """'15,863,489' -> 15863489."""
    return int(text.replace(",", ""))


def milliseconds(text: str) -> float:
    return float(text) / 1000


def minutes(text: str) -> float:
    return float(text) * 60


# fact, pattern (one group, from the beginning of a line), conversion. The last match in a log counts; of several rows
# for one fact, the one whose match comes last. Seconds, bytes and tokens are the units unless the name says otherwise.
FACTS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("seed", r"^(?:\s*seed:\s*|.*\bmax_wallclock_seconds:\S+ .*\bseed:)(\d+)\b", int),
    ("seed", r"^(?:\w+:\S+ )+seed:(\d+)\b", int),
    ("seed", r"^S(?:eed: |EED=)(\d+)", int),
    ("seed", r"^config preset:.* seed:(\d+)", int),
    ("val_targets", r"^val_loader:.*\btokens:(\d+)", int),
    ("val_targets", r"^val_tokens:\s*(\d+)", int),
    ("val_targets", r"^Validation tokens: ([\d,]+)", whole),
    ("train_shards", r"^(?:train_loader:.*\b)?train_shards:\s*(\d+)", int),
    ("dataset", r"^train_loader:dataset:(\S+)", str),
    ("documents", r"^ttt_phased: total_docs:(\d+)", int),
    ("parameters", r"^model_params:\s*(\d+)", int),
    ("parameters", r"^Total params: ([\d,]+)", whole),
    ("gated_tokens", r"^.*\b(?:within_word|word_start)_gated?:(\d+)", int),
    ("steps", r"^(?:step:)?(\d+)/\d+ val_loss:", int),
    ("steps", r"^stopping_early: .*\bstep:\s*(\d+)/", int),
    ("train_s", r"^step:\d+/\d+ .*\btrain_time:([\d.]+)ms", milliseconds),
    ("train_s", r"^stopping_early: .*\btrain_time:\s*([\d.]+)ms", milliseconds),
    ("train_s_rounded", r"^(?:stopping_early: .*\b|(?:step:)?\d+/\d+ .*\b)train_time: ([\d.]+)m\b", minutes),
    ("train_s_rounded", r"^train_time: ([\d.]+)m\b", minutes),
    ("calibration_s", r"^(?:GPTQ|gptq): ?.*\b[Hh]essians\b.*\b(?:in |time[=:] ?)([\d.]+)s", float),
    ("calibration_s", r"^(?:GPTQ|gptq): ?calibrated\b.*\bin ([\d.]+)s", float),
    ("step_ms", r"^step:\d+/\d+ .*\bstep_avg:([\d.]+)ms", float),
    ("python", r"^(?:Running Python |versions python:)(\d+\.\d+)", str),
    ("model_bytes", r"^Serialized model (?!:)\S.*?:\s*([\d,]+) bytes", whole),
    ("code_bytes", r"^Code size(?: \(compressed\))?:\s*([\d,]+) bytes", whole),
    ("code_bytes", r"^.*\| Code: ([\d,]+) bytes", whole),
    ("source_size", r"^Code size \(uncompressed\):\s*([\d,]+) bytes", whole),
    ("total_bytes", r"^Total submission size (?!:)\S.*?:\s*([\d,]+) bytes", whole),
    ("total_bytes", r"^.*\bmodel: [\d,]+ bytes \| Total submission: ([\d,]+) bytes", whole),
    ("total_bytes", r"^(?:final_|total_|submission_)?artifact(?:_bytes|_size| size)?[:=]\s*([\d,]{6,})\b", whole),
    (
        "total_bytes",
        r"^(?i:total(?: |_)(?:artifact|bytes|submission(?: |_)bytes|size))[^:=\n]*[:=]\s*([\d,]{6,})\b",
        whole,
    ),
    ("plain_total_bytes", r"^Total submission size:\s*([\d,]+) bytes", whole),
    ("eval_s", r"^total_eval_time:\s*([\d.]+)s", float),
    ("ranks", r"^(?:.*\b)?world_size:\s*(\d+)", int),
    ("ranks", r"^World size: (\d+)", int),
    ("gpu", r"^\|\s+\d+\s+(NVIDIA [A-Z]+\d+[^|]*?)\s{2,}", str),
    ("torch", r"^Running PyTorch (\S+)", str),
    ("torch", r"^(?:versions .*\b|.*\b(?:py)?torch(?:_version)?[:=]\s*)(?:torch:)?(\d+\.\d+\.\S+)", str),
    ("numpy", r"^versions .*\bnumpy:(\S+)", str),
    ("cuda", r"^versions .*\bcuda:(\S+)", str),
    ("source_bytes", r"^source bytes:(\d+)", int),
    ("source_sha256", r"^source .*\bsha256:([0-9a-f]{64})", str),
)
# fact -> key of the result line of a log of ours, which is more exact than any other line of it
RESULT_FACTS = {
    "model_bytes": "artifact_bytes",
    "code_bytes": "code_bytes",
    "total_bytes": "total_bytes",
    "steps": "steps",
    "ranks": "ranks",
    "torch": "torch",
    "gpu": "hardware",
    "seed": "seed",
    "val_targets": "val_targets",
    "documents": "val_documents",
    "eval_s": "eval_seconds",
    "parameters": "parameters",
    "train_shards": "train_shards",
}
COMPILED = tuple((name, re.compile(pattern, re.M), convert) for name, pattern, convert in FACTS)

# A line that states a score: `<label> val_loss:2.1 val_bpb:1.2 <rest>`; = for the colon, blanks after it, vl and bpb
# for the names, or no loss at all (`Final BPB: 1.2`) occur too.
SCORE = re.compile(
    r"^(?P<label>[^\n{}'\"]{0,80}?)[ ,|:]*\b(?:(?:val_loss|vl)[:=]\s*(?P<loss>\d+\.\d+)[ ,|]+)?"
    r"(?:val_)?bpb(?: \([^)\n]*\))?[:=]\s*(?P<bpb>\d+\.\d+)\b(?P<rest>[^\n]*)$",
    re.M | re.I,
)
SECONDS = re.compile(r"(?:eval_time|elapsed|seconds)[:=]\s*([\d.]+)(ms|s)?")
SETTINGS_BLOCK = re.compile(r"(?:^ {2,4}[A-Za-z_]\w*: ?(?!.* = ).*\n){15,}", re.M)  # fields of a class have ` = `
RULER = re.compile(r"^={60,}$", re.M)  # ends the source text in many logs
STAMP = re.compile(r"^\d{9,}\.\d+ ", re.M)  # seconds since 1970 before each line, as some launchers write them
SOURCE_LINE = re.compile(r"^source bytes:(\d+) sha256:([0-9a-f]{64})$", re.M)

# What a score is of, by words in its label; the first row that matches. Anything else is a final score.
SCORE_KINDS = (
    (
        "running",
        re.compile(r"\d+/\d+|^(step[: ]|validation\b|$)|chunk|progress|batch|running|warmup|swa:|ema:|best", re.I),
    ),
    ("averaged", re.compile(r"pre[-_ ]?quant(?!-ttt)(?!ization.*ttt)|post_?(ema|swa|average)|^ema$|averaged", re.I)),
    ("quantized", re.compile(r"^(diagnostic )?quantized$|roundtrip|kind:quantized", re.I)),
)


class Score(NamedTuple):
    """One line that states a score."""

    label: str
    kind: str  # running, averaged (before quantisation), quantized, or final
    loss: float | None  # nats per token
    bpb: float  # bits per byte
    decimals: int  # how many the line shows of bpb
    loss_decimals: int
    seconds: float | None  # of this evaluation


@dataclasses.dataclass
class RunLog:
    """What one log says. `facts` holds those of FACTS that were found."""

    path: Path
    style: str  # ours, march, april or unknown
    facts: dict[str, Any]
    scores: list[Score]
    settings: list[dict[str, str]]  # the `  name: value` blocks, or one of the key:value pairs of the head lines
    result: dict[str, Any] | None  # of a log of ours
    body: str = ""  # of a log of ours: all but the scripts

    def lines(self, event: str, **values: str) -> list[dict[str, str]]:
        """The `event key:value ...` lines of a log of ours with these values, in its order."""
        found = [line.split(" ")[1:] for line in re.findall(rf"^{event} .*:.*$", self.body, re.M)]
        pairs = [dict(word.split(":", 1) for word in words if ":" in word) for words in found]
        return [line for line in pairs if values.items() <= line.items()]

    @property
    def final(self) -> Score | None:
        """The score that the run ends with."""
        ends = [score for score in self.scores if score.kind in ("quantized", "final")]
        return ends[-1] if ends else None

    @property
    def timed(self) -> list[tuple[str, float]]:
        """Label and seconds of each evaluation after training, in the order of the log. An evaluation that two lines
        report, the second with more digits, is counted once."""
        found: list[tuple[str, float]] = []
        for score in self.scores:
            last_seconds = found[-1][1] if found else -math.inf
            if score.kind != "running" and score.seconds and abs(score.seconds - last_seconds) > 0.005 * score.seconds:
                found.append((score.label, score.seconds))
        return found

    @property
    def passes(self) -> list[tuple[str, float]]:
        """Evaluations of the compressed model, without diagnostic ones."""
        kinds = {score.label: score.kind for score in self.scores}
        return [(n, s) for n, s in self.timed if kinds[n] in ("quantized", "final") and "diagnostic" not in n]

    @property
    def eval_seconds(self) -> float | None:
        """Seconds of the evaluation that gave the final score."""
        if "eval_s" in self.facts or self.final is None:
            return self.facts.get("eval_s")
        name = self.final.label.removesuffix("_exact")
        times = [s.seconds for s in self.scores if s.label.removesuffix("_exact") == name and s.seconds is not None]
        return times[-1] if times else None

    @property
    def total_bytes(self) -> int | None:
        """Artifact and code, as the log adds them up; the sum for the uncompressed model does not count."""
        plain, raw = self.facts.get("plain_total_bytes"), self.facts.get("model_bytes")
        code = self.facts.get("code_bytes")
        if "total_bytes" in self.facts:
            return self.facts["total_bytes"]
        return plain if plain is not None and (raw is None or code is None or plain == raw + code) else None


def read_log(path: Path) -> RunLog:
    """Parses one log. Raises OSError when the file cannot be read."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    return parse_log(data.decode(encoding, errors="replace").replace("\r\n", "\n"), path)


def parse_log(text: str, path: Path = Path("log")) -> RunLog:
    """What a log's text says; see RunLog. A log may hold several runs of ours (stages started one by one)."""
    text = STAMP.sub("", text)
    sources = list(SOURCE_LINE.finditer(text))
    style = "ours" if sources else "unknown"
    facts: dict[str, Any] = {}
    body = text
    if sources:
        facts["source_found"] = find_source(text, sources[-1]) is not None
        facts["source_hashes"] = sorted({line[2] for line in sources})
        facts["origins"] = re.findall(r"^setting name:(\S+) value:(\S*) origin:(\S+)$", text, re.M)
        body = without_sources(text, sources)
    else:
        parts = [split_script(chunk) for chunk in RULER.split(text)]
        scripts = [script for script, _ in parts if script]
        if scripts:
            facts["source_sha256"] = hashlib.sha256(scripts[-1].encode()).hexdigest()
            facts["source_text"] = scripts[-1]
            body = "\n".join(rest for _, rest in parts)
    where: dict[str, int] = {}
    for name, pattern, convert in COMPILED:
        for match in pattern.finditer(body):
            if match.start() >= where.get(name, -1):
                where[name], facts[name] = match.start(), convert(match[1])
    if style != "ours" and re.search(r"^step:\d+/\d+ (train|val)_loss:", body, re.M):
        style = "march"
    elif style != "ours" and re.search(r"^\d+/\d+ (train|val)_loss:", body, re.M):
        style = "april"
    result = read_result(body)
    facts |= {fact: result[key] for fact, key in RESULT_FACTS.items() if result and result.get(key) is not None}
    kept = body if style == "ours" else ""
    return RunLog(path, style, facts, read_scores(body), read_settings(body), result, kept)


def split_script(chunk: str) -> tuple[str, str]:
    """The script at the head of a part of a log, up to its main guard if it has one, and the rest of that part."""
    if not re.search(r"^import torch$", chunk, re.M) or not re.search(r"^def \w+\(", chunk, re.M):
        return "", chunk
    guard = re.search(r"^if __name__ == .*\n(?:[ \t]+.*\n|\n)*", chunk + "\n", re.M)
    return (chunk[: guard.end()].strip(), chunk[guard.end() :]) if guard else (chunk.strip(), "")


def find_source(text: str, line: re.Match) -> tuple[bytes, int] | None:
    """The script before a `source bytes:N sha256:H` line and where it begins; None if no N bytes there hash to H."""
    count, before = int(line[1]), text[: line.start()].removesuffix("\n")
    for encoding in ("utf-8", "latin1"):  # the packed script is logged as Latin-1 characters
        try:
            data = before[-count:].encode(encoding)[-count:]
        except UnicodeEncodeError:
            continue
        if len(data) == count and hashlib.sha256(data).hexdigest() == line[2]:
            return data, len(before) - len(data.decode(encoding))
    return None


def without_sources(text: str, lines: list[re.Match]) -> str:
    """The log without the scripts at the head of each of its runs, so that no line of code is taken for a fact."""
    parts, begin = [], 0
    for line in lines:
        found = find_source(text, line)
        parts.append(text[begin : max(begin, found[1] if found else line.start() - int(line[1]))])
        begin = line.start()
    return "".join(parts) + text[begin:]


def logged_source(path: Path) -> bytes | None:
    """The script at the head of the last run in a log of ours, byte for byte; None where it is not there."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = list(SOURCE_LINE.finditer(text))
    found = find_source(text, lines[-1]) if lines else None
    return found[0] if found else None


def read_scores(body: str) -> list[Score]:
    """All score lines, in the order of the log."""
    scores = []
    for match in SCORE.finditer(body):
        label = match["label"].strip(" :,|-=[]>")
        kind = next((kind for kind, pattern in SCORE_KINDS if pattern.search(label)), "final")
        seconds = SECONDS.search(match["rest"])
        value = float(seconds[1]) / (1000 if seconds[2] == "ms" else 1) if seconds else None
        loss = float(match["loss"]) if match["loss"] else None
        shown = [len((match[name] or ".").split(".")[1]) for name in ("bpb", "loss")]
        scores.append(Score(label, kind, loss, float(match["bpb"]), *shown, value))
    return scores


def read_settings(body: str) -> list[dict[str, str]]:
    """The configurations that a log states: its `  name: value` blocks (one per started run), or the pairs of those
    lines before the first step that hold three or more."""
    if blocks := SETTINGS_BLOCK.findall(body):
        lines = [[line.split(":", 1) for line in block.strip("\n").split("\n")] for block in blocks]
        return [{name.strip(): value.strip() for name, value in pairs} for pairs in lines]
    head, *steps = re.split(r"^(?:step:|warmup_step)", body, maxsplit=1, flags=re.M)
    lines = re.findall(r"^[a-z_]+:\S+(?: [a-z_]+:\S+){2,}$", head, re.M) if steps else []
    pairs = dict(re.findall(r"(?:^| )([a-z_]\w*):(\S+)", "\n".join(lines), re.M))
    return [pairs] if pairs else []


def read_result(body: str) -> dict[str, Any] | None:
    """The object of the last `result {...}` line."""
    for line in reversed(re.findall(r"^result (\{.*\})$", body, re.M)):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None
