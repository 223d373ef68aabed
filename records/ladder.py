#!/usr/bin/env python3
"""Measures presets against each other at a small common scale: equal text, equal budget, one table, one picture.

    python records/ladder.py prepare --docs TRAIN.jsonl.xz --val-docs VAL.jsonl.xz --tokenizers DIR --out DATA
    python records/ladder.py run --data DATA --out RUNS --presets baseline,pr1941 --seeds 1,2,3 --seconds 90 --jobs 2
    python records/ladder.py rescore --runs RUNS --data DATA2 --out RUNS2 [--change NGRAM_TILT_ENABLED=0]
    python records/ladder.py report --runs RUNS --table ladder.md --picture ladder.png --against pr1941

prepare exports the same documents with every tokenizer that a preset needs. run starts train_gpt.py once per preset and
seed, with the preset's own settings made small by `scaled`; a run that is there already is skipped. A variation of a
preset, such as pr1941+MLP_GATE_OUT=0+EMBED_WD=0.06, runs like a preset; its values are meant at full size. rescore
scores the artifacts of finished runs on the validation text of another folder, or, with --change, quantises and scores
their weights under other settings. report reads what the runs have written, with --against as differences from one of
the rows, by seed and by document. It shows how the published designs order themselves where everything is small, not
what they reach on eight H100s: their learning rates, for one, were tuned at four times the width and are used as they
are.

Exit status: 0 done, 1 a run failed, 2 a mistake in the arguments or files, 130 interrupted.
"""

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import caseops
import documents
import export
import numpy as np
import shards
import variants
from variants import variant_of

import train_gpt as tg
from records.paired import (
    NOTHING,
    RESULT_FILE,
    ByDocument,
    RunError,
    by_seed,
    document_differences,
    paired_difference,
    read_json,
    signed,
    with_deviation,
)

SMALL_DIM = 128  # width of every run unless --width; a preset of this width, such as tiny, keeps its sizes
LENGTH = 8  # by what lengths of the published systems are divided
HEADS = 2  # by what the number of heads is divided, at every width
BATCH_TOKENS, ROW_TOKENS = 1024, 512  # targets of a step; a row holds the longest sequence, 4096 / LENGTH
MOST_CALIBRATION_ROWS = 32
CHALLENGE_DOCUMENTS = variants.VAL_DOCUMENTS
FEWEST_CHUNKS = 4  # of chunked test-time training: the last one teaches nobody
DATA_VARIANTS = ("sp1024", "sp8192", "caseops", "mp3")  # rows of variants.VARIANTS; each becomes a folder of its name
DATA_FILE, RUN_FILE = "ladder.json", "run.json"
DOCUMENTS_FILE = "documents.jsonl"  # of the data
ARTIFACT_FILE, WEIGHTS_FILE = "artifact.bin", "trained.bin"  # of a run
SCRIPT_FILE = "train_gpt.py"
LABEL = re.compile(r"\w+(\+[A-Z][A-Z0-9_]*=[\w.,:{}-]*)*", re.ASCII)  # of a preset or variation; names a folder too
OWN_SETTINGS = {"PRESET", "SEED", "RUN_ID", "RUNS_DIR", "STAGES", "DATA_PATH", "TOKENIZER_PATH"}  # of the ladder
SPEEDS_FILE = "speeds.json"
BUDGETS = {"seconds": "s by the clock", "processor_seconds": "s of processor time, as steps", "steps": "steps"}
PILOT_RESERVE_S = 60.0  # for the calibration of a pilot, whose length is not known yet
KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")


# ---------------------------------------------------------------------------------------------------------------------
# Scale: what a preset becomes


class Published(NamedTuple):
    """What the author of a system reported; the table of a ladder has its rows in this order."""

    steps: int  # mean of the published seeds, in 600 s on 8xH100
    val_bpb: float | None  # mean over seeds; None: nothing was published
    note: str = ""


LEARNED_FIRST = "its score was taken after training on the validation text"
PUBLISHED = {
    "baseline": Published(13_780, 1.2244),
    "fork5_10l": Published(7_250, 1.1439, "its steps are not known; those of fork5 are used"),
    "pr489": Published(10_480, 1.1327, LEARNED_FIRST),
    "fork5_twin": Published(7_250, None, "steps: middle of 7,100 to 7,410 of the public twins"),
    "fork5": Published(7_250, 1.1217, LEARNED_FIRST + "; steps as for its twin"),
    "pr1880": Published(4_455, 1.0775),
    "pr1941": Published(4_826, 1.0687),
    "default": Published(4_826, None, "PR #1941 with one gate more; steps of PR #1941"),
    "pr1855": Published(4_931, 1.0611),
    "pr2135": Published(4_994, 1.0565),
    "pr2158": Published(5_011, 1.0556, "opened after the deadline"),
    "frontier": Published(5_011, None, "never run at full size; steps as for pr2158"),
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the runs of one preset have in common: the budget, and the validation text in the preset's own tokens."""

    seconds: float  # training budget; 0: the schedule runs by steps
    reserve: float  # seconds of it that are kept for the calibration pass
    steps: int  # optimizer steps in this budget: measured, or given
    val_documents: int
    val_tokens: int
    width: int = SMALL_DIM


def scaled(preset: tg.Config, scale: Scale) -> dict[str, str]:
    """The environment settings that make a run of `preset` small.

    Every value follows by a rule from the preset's own, so that what differs between presets differs here. Not named,
    hence as published: layers, loops, gates, skips, MLP multiplier, initial values, learning rates, momenta, weight
    decays, bits, clips, codec, passes over a chunk, n-gram tilt. What a variation changes takes the same rules, or
    stays as it is where there is none. Raises RunError for a preset of unknown length.
    """
    settings = schedule(preset, scale) | averaging(preset, scale)
    if preset.model_dim > SMALL_DIM:
        settings |= widths(preset, scale.width) | lengths(preset)
        if preset.ttt_enabled:
            chunked = preset.ttt_kind != "lora_phased"
            settings |= chunk_learning(preset, scale) if chunked else document_learning(preset, scale)
    small = {name: as_text(value) for name, value in settings.items() if hasattr(preset, name.lower())}
    return changes(preset) | small


def as_text(value: bool | int | float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else str(int(value))


def changes(preset: tg.Config) -> dict[str, str]:
    """The settings, at full size, in which `preset` is not the published one of its name; none for that one itself."""
    published = tg.Config(preset=preset.preset, **tg.PRESETS[preset.preset])
    values = {name: getattr(preset, name) for name in tg.FIELDS if getattr(preset, name) != getattr(published, name)}
    return {name.upper(): repr(value) if isinstance(value, float) else as_text(value) for name, value in values.items()}


def published_steps(preset: tg.Config) -> int:
    """Steps of the full-size run. Raises RunError where they are in no table."""
    if preset.preset in PUBLISHED:
        return PUBLISHED[preset.preset].steps
    if preset.max_wallclock_seconds:
        raise RunError(f"preset {preset.preset}: its published number of steps is unknown; add it to PUBLISHED")
    return preset.iterations


def widths(preset: tg.Config, width: int) -> dict[str, int | str]:
    """Sizes at `width` channels, in half the heads; what is measured in channels follows in proportion."""
    head = width * HEADS // preset.num_heads
    sizes: dict[str, int | str] = {
        "MODEL_DIM": width,
        "NUM_HEADS": preset.num_heads // HEADS,
        "NUM_KV_HEADS": preset.num_kv_heads // HEADS,
        "ROPE_DIMS": preset.rope_dims * head * preset.num_heads // preset.model_dim,  # the same share of a head
    }
    share = width / preset.model_dim
    if rows := preset.bigram_vocab_size:  # nearly the same share of the parameters
        sizes |= {"BIGRAM_VOCAB_SIZE": round(rows * share), "BIGRAM_DIM": round(preset.bigram_dim * share)}
    if rank := preset.lqer_rank:  # the same share of a matrix, and as many scales for a row
        sizes |= {"LQER_RANK": math.ceil(rank * share), "LQER_ASYM_GROUP": round(preset.lqer_asym_group * share)}
    if preset.fit_artifact == "fill":  # 15 MB would be left to fill: the clips would halve
        sizes |= {"FIT_ARTIFACT": "1"}
    return sizes


def lengths(preset: tg.Config) -> dict[str, int]:
    """An eighth of the sequences: documents are as long as ever, and a step has only BATCH_TOKENS."""
    names = ("TRAIN_SEQ_LEN", "EVAL_SEQ_LEN", "TTT_EVAL_SEQ_LEN", "ROPE_TRAIN_SEQ_LEN", "VAL_BATCH_TOKENS")
    return {name: getattr(preset, name.lower(), 0) // LENGTH for name in names} | {
        # One size for all (published: 524,288 and 786,432 tokens): few steps fit into the budget as it is.
        "TRAIN_BATCH_TOKENS": BATCH_TOKENS,
        "ROW_TOKENS": ROW_TOKENS,
        # Half, not an eighth: an eighth would cost four times as much, and 7/8 of the context is always there.
        "EVAL_STRIDE": preset.eval_stride // 2,
    }


def schedule(preset: tg.Config, scale: Scale) -> dict[str, Any]:
    """The budget, and a warmdown over the published share of it."""
    iters = preset.warmdown_iters
    return {
        "ITERATIONS": 1_000_000 if scale.seconds else scale.steps,
        "MAX_WALLCLOCK_SECONDS": float(scale.seconds),
        "GPTQ_RESERVE_SECONDS": float(scale.reserve),
        "EVAL_MAX_SECONDS": 0,  # the work of an evaluation must not depend on the machine
        "WARMUP_STEPS": 0,  # they only compile
        "TRAIN_LOG_EVERY": 20,
        "VAL_LOSS_EVERY": 0,
        "WARMDOWN_FRAC": min(iters / published_steps(preset), 1.0) if iters else preset.warmdown_frac,
        "WARMDOWN_ITERS": 0,
        # As many rows as tiny has are enough, and a pass over more would take a tenth of the budget.
        "GPTQ_CALIBRATION_BATCHES": min(preset.gptq_calibration_batches, MOST_CALIBRATION_ROWS),
    }


def averaging(preset: tg.Config, scale: Scale) -> dict[str, Any]:
    """What is counted in steps covers the same share of all steps as in the published run."""
    ratio = scale.steps / published_steps(preset)
    return {
        "MUON_MOMENTUM_WARMUP_STEPS": round(preset.muon_momentum_warmup_steps * ratio),
        # An average with decay d spans 1 / (1 - d) steps. 0 is no average, here and there.
        "EMA_DECAY": max(1 - (1 - preset.ema_decay) / ratio, 0.0) if preset.ema_decay else 0.0,
    } | ({"SWA_EVERY": max(round(preset.swa_every * ratio), 1)} if preset.swa_enabled else {})


def document_learning(preset: tg.Config, scale: Scale) -> dict[str, Any]:
    """Adapters per document and the global phases; proportions and rates of the preset tiny, which was tuned here."""
    batch = preset.ttt_batch_size // 8
    # The share of the documents that precedes the last phase, times 8: each of three phases then follows one batch.
    prefix = round(preset.phased_ttt_prefix_docs * 8 * scale.val_documents / CHALLENGE_DOCUMENTS)
    # Documents are as long as ever: the lengths in TTT_CHUNK_STEPS stay.
    steps = ",".join(f"{limit}:{small_chunk(chunk)}" for limit, chunk in preset.chunk_steps)
    return ({"TTT_CHUNK_STEPS": steps} if steps else {}) | {
        "TTT_CHUNK_SIZE": small_chunk(preset.ttt_chunk_size),
        "TTT_BATCH_SIZE": batch,
        "TTT_LORA_RANK": preset.ttt_lora_rank // 8,
        "TTT_LORA_ALPHA": preset.ttt_lora_alpha / 8,  # alpha / rank stays
        "TTT_LORA_LR": preset.ttt_lora_lr * 30,  # 1e-4 -> 3e-3
        "PHASED_TTT_PREFIX_DOCS": max(prefix, batch * preset.phased_ttt_num_phases),
        "GLOBAL_TTT_LR": preset.global_ttt_lr * 10,
        "GLOBAL_TTT_CHUNK_TOKENS": preset.global_ttt_chunk_tokens // 16,
    }


def small_chunk(targets: int) -> int:
    return round(targets * 4 / 3)  # 48 -> 64


def chunk_learning(preset: tg.Config, scale: Scale) -> dict[str, int]:
    """Chunks of the stream and updates in them, for presets that learn from whole chunks.

    As many chunks as published, and as many updates in each pass over one, as far as there are windows for them: an
    update takes TTT_BATCH_SEQS windows for each of 8 ranks, so never fewer than 8, or all that a chunk has.
    """
    chunks = variants.VARIANTS[variant_of(preset)].val_targets / preset.ttt_chunk_tokens
    updates = max(round(preset.ttt_chunk_tokens / (8 * preset.ttt_batch_seqs * preset.eval_seq_len)), 1)
    context = preset.eval_seq_len // LENGTH
    windows = scale.val_tokens // context
    wanted = max(round(windows / chunks), 8 * updates if updates > 1 else 1)
    per_chunk = max(min(wanted, windows // FEWEST_CHUNKS), 1)
    return {"TTT_CHUNK_TOKENS": context * per_chunk, "TTT_BATCH_SEQS": math.ceil(per_chunk / (8 * updates))}


# ---------------------------------------------------------------------------------------------------------------------
# Data: the same documents in every tokenizer


class Take(NamedTuple):
    """Whole documents from the head of a list."""

    lines: list[bytes]  # JSON lines as they are
    text_bytes: int  # UTF-8
    sha256: str  # of the texts, each followed by a line feed
    left_out: int  # documents that were passed over


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Exports one document list with each tokenizer; returns what DATA_FILE in the folder says about it.

    Validation takes only documents that every tokenizer gives back as they are: what a tokenizer normalises has other
    bytes under each byte rule, and bits per byte would be divided by different numbers.
    Raises DataError for unusable input, and when the variants do not count the same bytes in the end.
    """
    models = {name: options.tokenizers / variants.VARIANTS[name].tokenizer for name in DATA_VARIANTS}
    loaded = {name: shards.load_tokenizer(path) for name, path in models.items()}
    val = take(options.val_docs, 1e3 * options.val_kb, functools.partial(keeps_text, tokenizers=loaded))
    train = take(options.docs, 1e6 * options.train_mb)
    with export.new_folder(options.out) as folder:
        path = folder / DOCUMENTS_FILE
        path.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in [*val.lines, *train.lines]))
        summary: dict[str, Any] = {"train": described(train, options.docs), "val": described(val, options.val_docs)}
        summary["documents_sha256"] = shards.file_sha256(path)
        rows = {name: export_variant(name, path, folder / name, models[name], len(val.lines)) for name in models}
        counted = {name: row["val_bytes"] for name, row in rows.items()}
        if set(counted.values()) != {val.text_bytes}:
            fix = "leave out the documents whose bytes are counted otherwise"
            raise shards.DataError(options.val_docs, f"scored bytes {counted}", f"{val.text_bytes} in each", fix)
        summary["variants"] = rows
        shards.write_json(folder / DATA_FILE, summary)
    return summary


def take(path: Path, limit_bytes: float, wanted: Callable[[str], bool] = lambda text: True) -> Take:
    """The first wanted documents whose texts have `limit_bytes` or more; raises DataError where there are too few."""
    lines: list[bytes] = []
    size, digest, left_out = 0, hashlib.sha256(), 0
    for place, line in documents.read_lines([path]):
        text = documents.parse_line(place, line)
        if not wanted(text):
            left_out += 1
            continue
        lines.append(line)
        size += len(text.encode())
        digest.update(text.encode() + b"\n")
        if size >= limit_bytes:
            return Take(lines, size, digest.hexdigest(), left_out)
    raise shards.DataError(path, f"{size} bytes of usable text", f"{limit_bytes:.0f}", "ask for less, or give more")


def keeps_text(text: str, tokenizers: dict[str, Any]) -> bool:
    """Whether every tokenizer gives the text back exactly, so that all byte rules count its UTF-8 bytes."""
    for name, tokenizer in tokenizers.items():
        seen = caseops.encode(text) if variants.VARIANTS[name].caseops else text
        if tokenizer.decode(tokenizer.encode(seen)) != seen:
            return False
    return text == text.strip()


def described(part: Take, path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "documents": len(part.lines),
        "left_out": part.left_out,
        "text_bytes": part.text_bytes,
        "text_sha256": part.sha256,
    }


def export_variant(name: str, path: Path, out: Path, model: Path, val_documents: int) -> dict[str, Any]:
    """Shards of one variant, and its sizes as train_gpt.py counts them."""
    kind = {"caseops": variants.VARIANTS[name].caseops, "mp3": variants.VARIANTS[name].mp3}
    manifest = export.export(export.Options([path], out, val_documents, tokenizer=model, **kind))
    sizes = {"VOCAB_SIZE": str(manifest["vocab_size"]), "MARKER_PAIR_MODE": str(int(kind["mp3"]))}
    validation = tg.load_validation(tg.load_config(data_paths(out) | sizes)[0])
    return {
        "tokenizer": model.name,
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "train_tokens": manifest["splits"]["train"]["tokens"],
        "val_tokens": manifest["splits"]["val"]["tokens"],
        "val_documents": len(validation.documents),
        "val_bytes": int(validation.bytes.sum()),
    }


def data_paths(folder: Path) -> dict[str, str]:
    """The settings that make the script read the variant in `folder`."""
    return {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / export.TOKENIZER_FILE)}


# ---------------------------------------------------------------------------------------------------------------------
# Run


class Job(NamedTuple):
    """One start of the script."""

    name: str  # its folder
    settings: dict[str, str]  # PRESET, SEED and what `scaled` says
    places: dict[str, str]  # where data and results are
    about: dict[str, Any]  # what RUN_FILE says besides the settings
    source: Path | None = None  # artifact or weights of an earlier run, which are to be scored


class Outcome(NamedTuple):
    job: Job
    result: dict[str, Any] | None  # None: failed
    message: str


class Finished(NamedTuple):
    """A run with all of its results."""

    about: dict[str, Any]  # RUN_FILE
    result: dict[str, Any]  # RESULT_FILE
    folder: Path

    @property
    def seed(self) -> int:
        return self.about["seed"]

    @property
    def width(self) -> int:
        return self.about.get("width", SMALL_DIM)  # series from before --width do not say it


def run(options: argparse.Namespace, command: Sequence[str] = ()) -> list[Outcome]:
    """Runs every preset with every seed, `--jobs` at a time; a failure is an outcome like any other.

    Where the schedule runs by the clock, one short pilot per preset measures its speed first, under the same load.
    With --processor-seconds the number of steps is fixed instead, by the processor time of a few steps here: results
    then do not depend on what else the machine does.
    `command` replaces the script in tests. Raises RunError for unknown presets or data.
    """
    data = read_json(options.data / DATA_FILE, "make it with `ladder.py prepare`")
    configs = {label: load_preset(label) for label in options.presets}
    scales = {name: by_steps(config, data, options.steps, options.width) for name, config in configs.items()}
    for label in configs:
        check_changes(label, scales[label])
    script = kept_script(options.out)
    command, common = command or [sys.executable, str(script)], circumstances(options, data, script)
    failed = []
    if options.processor_seconds:
        speeds = step_seconds(configs, scales, options)
        scales = {
            name: by_steps(config, data, round(options.processor_seconds / speeds[name]), options.width)
            for name, config in configs.items()
        }
    if options.seconds:
        short = {name: pilot_scale(scale, options) for name, scale in scales.items()}
        pilots = [make_job(name, configs[name], short[name], None, common, options) for name in scales]
        outcomes = run_all(pilots, options, command)
        failed = [outcome for outcome in outcomes if not outcome.result]
        speeds = {outcome.job.about["preset"]: outcome.result for outcome in outcomes if outcome.result}
        scales = {name: measured(scales[name], speeds[name], options.seconds) for name in scales if name in speeds}
    jobs = [
        make_job(name, configs[name], scales[name], seed, common, options) for seed in options.seeds for name in scales
    ]
    return failed + run_all(jobs, options, command)


def rescore(options: argparse.Namespace, command: Sequence[str] = ()) -> list[Outcome]:
    """Scores all finished runs of a folder again: on the validation text of another prepared folder, or with the
    settings of `--change`, which like those of a variation are meant at full size.

    Every artifact is copied into a folder of the same name under `--out`, where the script that made it runs with the
    same settings and nothing but its evaluate stage; after a change of quantisation, the trained weights and both
    stages. Results of training stay behind: bits per byte before quantisation are of the other text. `command` replaces
    the script in tests. Raises RunError for unusable folders and changes.
    """
    if options.out.resolve() == options.runs.resolve():
        raise RunError(f"--out {options.out}: holds the runs themselves; choose another folder")
    data = read_json(options.data / DATA_FILE, "make it with `ladder.py prepare`")
    runs, unfinished = read_runs(options.runs)
    if lacking := {run.about["variant"] for run in runs} - data["variants"].keys():
        raise RunError(
            f"--data: no {', '.join(sorted(lacking))}, which these runs need; there is {[*data['variants']]}"
        )
    script = options.runs.resolve() / SCRIPT_FILE
    if not script.exists():
        raise RunError(f"{script}: missing, the script that made the runs; copy it there")
    for name in unfinished:
        print(f"{name}: not finished, left out")
    now = {"threads": options.threads, "jobs": options.jobs, "machine": machine()}
    now |= {"script_sha256": shards.file_sha256(script), "rescored_from": options.runs.resolve().name}
    runs = [run for run in runs if not options.presets or run.about["preset"] in options.presets]
    jobs = [rescore_job(run, data, now, options) for run in runs]
    return run_all(jobs, options, command or [sys.executable, str(script)])


def rescore_job(run: Finished, data: dict[str, Any], now: dict[str, Any], options: argparse.Namespace) -> Job:
    """What RUN_FILE says of the training stays true: its text, its settings, its budget."""
    about = {key: value for key, value in run.about.items() if key not in ("settings", "processor_share")}
    about |= now | {"data": data | {"train": about["data"]["train"]}}
    name, changed, stages, file = run.folder.name, {}, "evaluate", ARTIFACT_FILE
    if options.change:
        label = f"{about['preset']}+{options.change}"
        changed = small_changes(run, label, data)
        if any(tg.QUANTIZE in tg.FIELDS[key.lower()].metadata["stage"] for key in changed):
            stages, file = "quantize,evaluate", WEIGHTS_FILE
        name, about["preset"] = f"{label}-seed{run.seed}", label
    places = data_paths((options.data / about["variant"]).resolve()) | {
        "RUNS_DIR": str(options.out.resolve()),
        "RUN_ID": name,
        "STAGES": stages,
    }
    return Job(name, run.about["settings"] | changed, places, about, run.folder / file)


def small_changes(run: Finished, label: str, data: dict[str, Any]) -> dict[str, str]:
    """What `label`, a variation of a finished run, sets otherwise at the scale of that run. Raises RunError where that
    is nothing, or would have changed the training."""
    before, after = (
        scaled(config, by_steps(config, data, run.about["expected_steps"], run.width))
        for config in map(load_preset, (run.about["preset"], label))
    )
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    if not changed:
        raise RunError(f"--change {label}: changes nothing at this scale; leave it out")
    if early := [key for key in changed if tg.TRAIN in tg.FIELDS[key.lower()].metadata["stage"]]:
        raise RunError(f"--change {label}: {', '.join(early)} belongs to the training; use `ladder.py run`")
    return changed


def kept_script(out: Path) -> Path:
    """The copy of train_gpt.py that all runs in a folder use, whatever happens to the original between two starts."""
    source, copy = ROOT / SCRIPT_FILE, out.resolve() / SCRIPT_FILE
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    elif copy.read_bytes() != source.read_bytes():
        print(f"{copy}: kept from the first start; {source} has changed since and is not used")
    return copy


def step_seconds(
    configs: dict[str, tg.Config], scales: dict[str, Scale], options: argparse.Namespace
) -> dict[str, float]:
    """Processor seconds per training step of each preset, over a run; kept in the folder, so that runs can continue."""
    path = options.out / SPEEDS_FILE
    known = read_json(path, "delete it") if path.exists() else {}
    for name in configs.keys() - known.keys():
        places = data_paths(options.data / variant_of(configs[name]))
        config = tg.load_config({"PRESET": configs[name].preset} | scaled(configs[name], scales[name]) | places)[0]
        trainer, times = tg.Trainer(config, tg.Run(), tg.Log(None)), {}
        for looping in (False, True):
            spent = []
            for number in range(6):
                rows, start = trainer.step_rows(number), time.process_time()
                trainer.update(rows, looping, 1.0, 0.9)
                spent.append(time.process_time() - start)
            times[looping] = statistics.median(spent[1:])
        share = config.enable_looping_at if config.num_loops else 1.0
        known[name] = share * times[False] + (1 - share) * times[True]
        print(f"{name}: {known[name]:.3f} processor seconds per step", flush=True)
        shards.write_json(path, known)
    return known


def load_preset(label: str) -> tg.Config:
    """The full-size configuration of a preset, or of a variation `NAME+KEY=VALUE+...` with values as at full size.

    Raises RunError for anything else, a setting given twice, and one that is the ladder's own or none.
    """
    where = f"--presets {label}"
    if not LABEL.fullmatch(label):
        raise RunError(f"{where}: must be NAME or NAME+KEY=VALUE+..., values of letters, digits and _ . , : {{ }} -")
    name, *parts = label.split("+")
    given = dict(part.split("=") for part in parts)
    if len(given) < len(parts):
        raise RunError(f"{where}: gives a setting twice; leave one out")
    try:
        config = tg.load_config(given | {"PRESET": name})[0]
    except tg.UserError as error:
        raise RunError(f"{where}: {error}") from None
    usable = {key for key, name in tg.NAMES.items() if name.field} - OWN_SETTINGS
    if odd := given.keys() - usable:
        raise RunError(f"{where}: {', '.join(sorted(odd))} cannot be varied: set by the ladder, or of no effect")
    return config


def check_changes(label: str, scale: Scale) -> None:
    """Raises RunError for a change that the small scale does not show, such as one of a size that is equal for all.

    A change is compared with its absence at the published number of steps, where rounding hides the least.
    """
    name, *parts = label.split("+")
    config = load_preset(label)
    scale = dataclasses.replace(scale, steps=published_steps(config))
    for number, part in enumerate(parts):
        try:
            without = load_preset("+".join([name, *parts[:number], *parts[number + 1 :]]))
        except RunError:
            continue  # the others need this one
        if scaled(without, scale) == scaled(config, scale):
            raise RunError(f"--presets {label}: {part} changes nothing at this scale; leave it out")


def by_steps(config: tg.Config, data: dict[str, Any], steps: int, width: int = SMALL_DIM) -> Scale:
    """The scale of a run of so many steps. Raises RunError where the data lack the preset's tokenizer."""
    row = data["variants"].get(variant_of(config))
    if row is None:
        raise RunError(f"--data: no {variant_of(config)} for preset {config.preset}; there is {[*data['variants']]}")
    return Scale(0.0, 0.0, steps or 1, row["val_documents"], row["val_tokens"], width)


def measured(scale: Scale, pilot: dict[str, Any], seconds: float) -> Scale:
    """The scale of a run of so many seconds at the speed of its pilot, with half as much again for the calibration."""
    calibration = pilot["calibration_seconds"]
    reserve = math.ceil(15 * calibration) / 10
    if reserve >= seconds:
        raise RunError(
            f"--seconds {seconds:g}: calibration takes {calibration:.1f} s of {pilot['run_id']}; give more"
        )
    speed = pilot["steps"] / max(pilot["train_seconds"] - calibration, 1e-9)
    steps = max(round(speed * (seconds - reserve)), 1)
    return dataclasses.replace(scale, seconds=seconds, reserve=reserve, steps=steps)


def pilot_scale(scale: Scale, options: argparse.Namespace) -> Scale:
    """A few seconds of training; how many steps that are is what the pilot is to say."""
    seconds = options.pilot_seconds + PILOT_RESERVE_S
    return dataclasses.replace(scale, seconds=seconds, reserve=PILOT_RESERVE_S, steps=100)


def make_job(
    label: str,
    config: tg.Config,
    scale: Scale,
    seed: int | None,
    common: dict[str, Any],
    options: argparse.Namespace,
) -> Job:
    """One run with all stages; without a seed, the pilot of its preset or variation, which only trains."""
    pilot = seed is None
    name = f"{label}-pilot" if pilot else f"{label}-seed{seed}"
    settings = {"PRESET": config.preset, "SEED": str(seed or 0)} | scaled(config, scale)
    places = data_paths((options.data / variant_of(config)).resolve()) | {
        "RUNS_DIR": str(options.out.resolve()),
        "RUN_ID": name,
        "STAGES": "train" if pilot else "train,quantize,evaluate",
    }
    about = {"preset": label, "seed": seed, "variant": variant_of(config), "expected_steps": scale.steps}
    return Job(name, settings, places, common | about | {"parameters": parameters(settings | places)})


def circumstances(options: argparse.Namespace, data: dict[str, Any], script: Path) -> dict[str, Any]:
    """What all runs of one start have in common."""
    return {
        "budget": {kind: value for kind in BUDGETS if (value := getattr(options, kind))},
        "width": options.width,
        "data": data,
        "threads": options.threads,
        "jobs": options.jobs,
        "machine": machine(),
        "script_sha256": shards.file_sha256(script),
    }


def machine() -> dict[str, Any]:
    """What a speed depends on, as far as the system says it."""
    info, model = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def run_all(jobs: list[Job], options: argparse.Namespace, command: Sequence[str]) -> list[Outcome]:
    """Outcomes in the order in which they come; each is printed as a line. Whatever ends this ends what it started."""
    outcomes, start, running = [], time.monotonic(), []
    pool = ThreadPoolExecutor(options.jobs)
    try:
        for future in as_completed([pool.submit(run_one, job, options, command, running) for job in jobs]):
            outcome = future.result()
            outcomes.append(outcome)
            state, seconds = "done" if outcome.result else "FAILED", time.monotonic() - start
            counted = f"{len(outcomes)}/{len(jobs)}"
            print(f"{state} {counted} {outcome.job.name} {outcome.message} elapsed_s:{seconds:.0f}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()  # does nothing to one that has ended
    return outcomes


def run_one(job: Job, options: argparse.Namespace, command: Sequence[str], running: list[subprocess.Popen]) -> Outcome:
    """Starts the script unless its result is there already; returns what it wrote. Keeps itself in `running`."""
    folder = Path(job.places["RUNS_DIR"]) / job.name
    try:
        if earlier := finished(folder, job):
            return Outcome(job, earlier, f"{headline(earlier)} (already there)")
        folder.mkdir(parents=True, exist_ok=True)
        if job.source:
            shutil.copyfile(job.source, folder / job.source.name)
        about = job.about | {"settings": job.settings}
        shards.write_json(folder / RUN_FILE, about)
        status, said, share = start_script(job, options, command, running)
        shards.write_json(folder / RUN_FILE, about | {"processor_share": share})
        result = complete(folder, job)
        if result is None:
            return Outcome(job, None, f"exit status {status}: {said[-1][:300] if said else 'no output'}")
        return Outcome(job, result, f"{headline(result)} processor_share:{share:.2f}")
    except (RunError, tg.UserError, OSError) as error:
        return Outcome(job, None, str(error))


def start_script(
    job: Job, options: argparse.Namespace, command: Sequence[str], running: list[subprocess.Popen]
) -> tuple[int, list[str], float]:
    """Exit status, lines of output, and the share of its threads' time that the process had a processor.

    A share well below 1 says that the machine was busy with other things, so that its clock was no fair budget.
    """
    env = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    env |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads), "REPORT": "0"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=env | job.settings | job.places, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    running.append(process)
    with process.stdout:
        said = process.stdout.read().strip().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    share = (usage.ru_utime + usage.ru_stime) / (time.monotonic() - start) / options.threads
    return process.returncode, said, share


def parameters(env: dict[str, str]) -> int:
    """Number of parameters of the model of these settings."""
    config = tg.load_config(env)[0]
    return sum(parameter.numel() for parameter in tg.GPT(config, tg.Run(), "meta").parameters())


def finished(folder: Path, job: Job) -> dict[str, Any] | None:
    """The result of an earlier run of this job. Raises RunError when the folder holds a run of other settings."""
    if not (folder / RUN_FILE).exists():
        return None
    earlier = read_json(folder / RUN_FILE, "delete the folder")
    compared = {"settings": job.settings} | {key: job.about.get(key) for key in ("data", "threads", "rescored_from")}
    for key, mine in compared.items():
        theirs = earlier.get(key)
        if theirs != mine:
            odd = [name for name in mine if mine[name] != theirs.get(name)] if isinstance(mine, dict) else [key]
            raise RunError(f"{folder}: holds a run with other {key} ({', '.join(odd)}); choose another --out")
    return complete(folder, job) if "processor_share" in earlier else None


def complete(folder: Path, job: Job) -> dict[str, Any] | None:
    """The result of a run that has gone through all of its stages."""
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    result = read_json(path, "delete the folder")
    return result if ",".join(result.get("stage_seconds", {})) == job.places["STAGES"] else None


def headline(result: dict[str, Any]) -> str:
    """The figures of a run on one line."""
    keys = ("val_bpb", "prequant_val_bpb", "steps", "train_seconds", "eval_seconds")
    return " ".join(f"{key}:{result[key]:.5g}" for key in keys if key in result)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(options: argparse.Namespace) -> str:
    """Writes the table and the picture of the runs in a folder; returns the table.

    Raises RunError where there is no finished run, where runs differ in data, budget or threads, and where the row
    of `--against` is not there or other documents were scored in it.
    """
    runs, unfinished = read_runs(options.runs)
    presets = ladder_order({run.about["preset"] for run in runs})
    if options.against and options.against not in presets:
        raise RunError(f"--against {options.against}: no such row; there is {', '.join(presets)}")
    groups = {name: [run for run in runs if run.about["preset"] == name] for name in presets}
    lines = [introduction(presets, options.against, runs[0].width), *facts(runs, unfinished), ""]
    text = "\n".join([*lines, *table(groups, options.against), "", *remarks(groups)]) + "\n"
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(text)
    draw(groups, options.picture)
    return text


def read_runs(folder: Path) -> tuple[list[Finished], list[str]]:
    """The finished runs in order of their seeds, and the names of the others."""
    runs, unfinished = [], []
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        about, result_path = read_json(path, "delete the folder"), path.parent / RESULT_FILE
        if about["seed"] is None:  # a pilot
            continue
        result = read_json(result_path, "delete the folder") if result_path.exists() else {}
        if "val_bpb" in result:
            runs.append(Finished(about, result, path.parent))
        else:
            unfinished.append(path.parent.name)
    if not runs:
        raise RunError(f"{folder}: holds no finished run; start some with `ladder.py run`")
    for key in ("budget", "width", "data", "threads"):
        if len({json.dumps((run.about | {"width": run.width})[key], sort_keys=True) for run in runs}) > 1:
            raise RunError(f"{folder}: runs with different {key}; keep each kind in a folder of its own")
    return sorted(runs, key=lambda run: run.about["seed"]), unfinished


def ladder_order(presets: set[str]) -> list[str]:
    """As in PUBLISHED, then the others by name; the variations of a preset after it, by their text."""
    rank = {name: place for place, name in enumerate(PUBLISHED)}
    return sorted(presets, key=lambda label: (rank.get(label.split("+")[0], len(rank)), label.split("+")))


def total_seconds(runs: list[Finished]) -> dict[int, float]:
    """Training and scoring, by seed, of the runs that have done both."""
    train, score = by_seed(runs, "train_seconds"), by_seed(runs, "eval_seconds")
    return {seed: train[seed] + score[seed] for seed in train.keys() & score.keys()}


def table(groups: dict[str, list[Finished]], against: str | None) -> list[str]:
    """Two tables in Markdown: scores and costs. `against` is the row with which the others are compared."""
    by_document, more = (("over documents", "better"), ("time", "bytes")) if against else ((), ())
    scores = [("preset", "seeds", "final bpb", f"minus {against or 'row above'}", *by_document, "before quantisation",
               "quantised", "sliding", "final is", "claimed at full size")]  # fmt: skip
    costs = [("preset", "steps", "tokens/s", "train s", "eval s", "artifact bytes", *more, "parameters", "tokenizer")]
    above: list[Finished] = []
    for name, runs in groups.items():
        final, published = by_seed(runs, "val_bpb"), PUBLISHED.get(name)
        base = [] if name == against else groups[against] if against else above
        kinds = (with_deviation(by_seed(runs, f"{kind}_val_bpb")) for kind in ("prequant", "quantized", "sliding"))
        submitted = "/".join(sorted({run.result["submitted"] for run in runs}))
        claim = f"{published.val_bpb:.4f}" if published and published.val_bpb else NOTHING
        difference = [signed(paired_difference(final, by_seed(base, "val_bpb")))]
        if against:
            difference += document_cells(document_differences(runs, base))
        scores.append((name, str(len(runs)), f"**{with_deviation(final)}**", *difference, *kinds, submitted, claim))
        keys = ("steps", "tokens_per_s", "train_seconds", "eval_seconds", "total_bytes")
        size, variant = f"{runs[0].about['parameters']:,}", runs[0].about["variant"]
        extra = cost_cells(runs, base) if against else []
        costs.append((name, *(rounded(by_seed(runs, key)) for key in keys), *extra, size, variant))
        above = runs
    return [*as_markdown(scores), "", *as_markdown(costs)]


def document_cells(found: ByDocument | None) -> list[str]:
    if found is None:
        return [NOTHING, NOTHING]
    return [signed(found.difference), f"{found.better} of {found.difference.number}"]


def cost_cells(mine: list[Finished], theirs: list[Finished]) -> list[str]:
    """Time in percent and bytes, each the mean over equal seeds minus the mean of the other row."""
    ours, others = total_seconds(mine), total_seconds(theirs)
    longer, base = paired_difference(ours, others), [others[seed] for seed in ours.keys() & others.keys()]
    larger = paired_difference(by_seed(mine, "total_bytes"), by_seed(theirs, "total_bytes"))
    percent = f"{100 * longer.mean / statistics.fmean(base):+.1f} %" if longer else NOTHING
    return [percent, f"{larger.mean:+,.0f}" if larger else NOTHING]


def as_markdown(rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]


def rounded(values: dict[int, float]) -> str:
    return f"{statistics.fmean(values.values()):,.0f}" if values else NOTHING


INTRODUCTION = f"""# Presets at a small common scale

Every system with width {{width}} instead of 512, sequences divided by {LENGTH}, {BATCH_TOKENS} tokens a step, its own
tokenizer and its own learning rates: see `scaled` in `records/ladder.py`. Bits per byte compare inside these tables
only. \u00b1 is the sample standard deviation over seeds; in *minus {{base}}*, the standard error of the mean
difference between equal seeds. Seeds differ in initial weights and adapters, not in the order of the data. Neither
figure covers the choice of the validation text{{but}}.
"""
BY_DOCUMENT = """
*over documents* is the same difference with another error: of the documents of the validation text, each with its mean
difference over the seeds, taken as drawn at random (ratio estimator). It says what other documents of this kind would
change, the first error what other seeds would. *better* counts the documents that take fewer bits than in {base}.
*time*, of training and scoring together, and *bytes* of the artifact are differences from {base} too.
"""
VARIATIONS = """
`NAME+KEY=VALUE` is the preset with other settings: values of the full size, made small by the same rules.
"""


def introduction(presets: list[str], against: str | None, width: int) -> str:
    """What the columns are."""
    text = INTRODUCTION.format(width=width, base=against or "row above", but=", but the next one does" if against else "")
    if against:
        text += BY_DOCUMENT.format(base=against)
    return text + (VARIATIONS if any("+" in label for label in presets) else "")


def facts(runs: list[Finished], unfinished: list[str]) -> list[str]:
    """What was measured, on what, with what."""
    about, budget = runs[0].about, runs[0].about["budget"]
    machines = various("{cpu}, {cores} cores, {system}".format(**run.about["machine"]) for run in runs)
    versions = various("Python {python}, numpy {numpy}".format(**run.about["machine"]) for run in runs)
    shares = [run.about.get("processor_share", math.nan) for run in runs]
    given = ", ".join(f"{value:g} {BUDGETS[kind]}" for kind, value in budget.items())
    lines = [
        f"* budget: {given}, for the training of each run, {about['threads']} thread(s), "
        f"{about['jobs']} run(s) side by side",
        f"* training text: {text_of(about['data']['train'])}",
        f"* validation text: {text_of(about['data']['val'])}; the same bytes with every tokenizer",
        f"* machine: {machines}; used as {various(run.result['hardware'] for run in runs)}",
        f"* versions: {versions}, PyTorch {various(run.result['torch'] for run in runs)}",
        f"* train_gpt.py: sha256 {various(run.about['script_sha256'][:16] for run in runs)}",
    ]
    if not math.isnan(sum(shares)):
        had = f"{min(shares):.2f} to {max(shares):.2f}"
        lines.append(f"* share of the time in which a run's threads had a processor: {had}")
    if source := about.get("rescored_from"):
        lines.append(
            f"* artifacts of the runs in {source}, scored again on this validation text; their times are of that"
        )
    return [*lines, *([f"* not finished: {', '.join(unfinished)}"] if unfinished else [])]


def various(values: Iterable[str]) -> str:
    return "; ".join(sorted(set(values)))


def text_of(part: dict[str, Any]) -> str:
    size = f"{part['text_bytes']:,} bytes in {part['documents']:,} documents of {part['file']}"
    return f"{size}, sha256 {part['text_sha256'][:16]}"


def remarks(groups: dict[str, list[Finished]]) -> list[str]:
    """What the figures in the last column are, and runs that broke a rule."""
    lines = [
        "Claims are of eight H100s at full size, mean over the author's seeds, with all of FineWeb's validation text."
    ]
    lines += [f"* {name}: {PUBLISHED[name].note}" for name in groups if name in PUBLISHED and PUBLISHED[name].note]
    broken = [f"{run.result['run_id']}: {'; '.join(run.result.get('violations', []))}" for runs in groups.values()
              for run in runs if not run.result.get("valid", True)]  # fmt: skip
    return lines + [f"* rule broken by {text}" for text in broken]


def draw(groups: dict[str, list[Finished]], path: Path) -> None:
    """Final bpb of every preset: a point per seed, a bar at the mean, and the quantised artifact without more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.5 + 1.1 * len(groups), 4.5))
    labels: tuple = ("quantised artifact, plain", "final score, mean", "final score, one seed")
    for place, runs in enumerate(groups.values()):
        plain, final = (list(by_seed(runs, f"{kind}val_bpb").values()) for kind in ("quantized_", ""))
        mean, left, right = statistics.fmean(final), place - 0.25, place + 0.25
        axes.hlines(statistics.fmean(plain), left, right, "0.65", label=labels[0])
        axes.hlines(mean, left, right, "tab:blue", linewidth=2, label=labels[1])
        axes.plot([place] * len(final), final, "o", color="black", markersize=4, label=labels[2])
        axes.annotate(f"{mean:.3f}", (right + 0.03, mean), va="center", fontsize=8)
        labels = (None, None, None)  # once in the legend
    axes.set_xticks(range(len(groups)), [name.replace("+", "\n+") for name in groups], rotation=20)
    axes.set(ylabel="bits per byte", title="Presets at a small common scale", xlim=(-0.5, len(groups) - 0.1))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def split_labels(text: str) -> list[str]:
    """Presets and variations of a comma list; a comma before a digit belongs to a value, as in 256:12,1024:24."""
    return [label.strip(",") for label in re.split(r",(?=[A-Za-z])", text) if label.strip(",")]


def numbers(text: str) -> list[int]:
    return [int(word) for word in words(text)]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures presets against each other at a small common scale.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("prepare", help="export the same documents with every tokenizer")
    data.add_argument("--docs", type=Path, required=True, help="training documents, JSON lines with a key text")
    data.add_argument("--val-docs", type=Path, required=True, help="validation documents, the same")
    data.add_argument("--tokenizers", type=Path, required=True, help="folder with the SentencePiece models")
    data.add_argument("--out", type=Path, required=True, help="folder to make")
    data.add_argument("--train-mb", type=float, default=24, help="megabytes of training text (default 24)")
    data.add_argument("--val-kb", type=float, default=75, help="kilobytes of validation text (default 75)")
    runs = commands.add_parser("run", help="train and score every preset with every seed")
    runs.add_argument("--data", type=Path, required=True, help="folder that prepare made")
    runs.add_argument("--out", type=Path, required=True, help="folder for the runs; the same again continues")
    runs.add_argument(
        "--presets",
        type=split_labels,
        default=words("baseline,pr489,fork5,pr1880,pr1941,pr1855,pr2135,pr2158"),
        help="comma list; NAME+KEY=VALUE+... is a variation of NAME, with values as at full size",
    )
    runs.add_argument("--width", type=int, default=SMALL_DIM, help=f"channels of the models (default {SMALL_DIM})")
    runs.add_argument("--seeds", type=numbers, default=[1, 2, 3], help="comma list (default 1,2,3)")
    budget = runs.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, default=0, help="training budget of a run by the clock")
    budget.add_argument("--processor-seconds", type=float, default=0, help="the same as steps that take so long")
    budget.add_argument("--steps", type=int, default=0, help="the same in optimizer steps")
    runs.add_argument("--pilot-seconds", type=float, default=10, help="length of a speed measurement (default 10)")
    again = commands.add_parser("rescore", help="score finished runs on another text, or under other settings")
    again.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    again.add_argument("--data", type=Path, required=True, help="folder that prepare made, with the text to score")
    again.add_argument("--out", type=Path, required=True, help="folder for the scores; the same again continues")
    again.add_argument("--presets", type=split_labels, default=[], help="only these rows of the runs (default all)")
    again.add_argument("--change", metavar="KEY=VALUE+...", help="settings of quantisation or scoring, as at full size")
    for starting in (runs, again):
        starting.add_argument("--jobs", type=int, default=2, help="runs side by side (default 2)")
        starting.add_argument("--threads", type=int, default=1, help="threads of each run (default 1)")
    tables = commands.add_parser("report", help="table and picture of the finished runs")
    tables.add_argument("--runs", type=Path, required=True)
    tables.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    tables.add_argument("--picture", type=Path, required=True, help="PNG file to write")
    tables.add_argument(
        "--against", metavar="LABEL", help="row to compare the others with (default: each the one above)"
    )
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        unused = value == 0 and name in BUDGETS  # one of them is given
        if isinstance(value, int | float) and not (value > 0 or unused):
            parser.error(f"--{name.replace('_', '-')} {value}: must be a positive number")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        if options.command == "prepare":
            print(json.dumps(prepare(options), indent=1))
        elif options.command == "report":
            print(report(options))
        else:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that run_all ends its processes
            outcomes = rescore(options) if options.command == "rescore" else run(options)
            return 1 if any(outcome.result is None for outcome in outcomes) else 0
        return 0
    except (RunError, shards.DataError, tg.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
