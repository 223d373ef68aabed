#!/usr/bin/env python3
"""Runs the system of a record folder, and prints the measured figures beside those of its authors.

    ./run.sh records/2026-04-29_MLPGateOut 42                       seed 42; without a seed, the first published one
    PRESET=fork5_twin ./run.sh records/2026-03-20_11L_MLP3x_int6    another preset of the same folder
    ITERATIONS=4826 MAX_WALLCLOCK_SECONDS=0 ./run.sh records/2026-04-29_MLPGateOut    other hardware, same schedule

The folder holds settings.env (what the run sets; variables of the caller win) and published.json (what the authors
wrote). The job itself is started by ./run.sh without arguments. Its figures and the published ones are printed as a
table and written to runs/<RUN_ID>/comparison.json. A folder without published.json, such as one of our own, is run
without a comparison.

Exit status: that of the run, or 2 for a mistake in the arguments, the folder, the settings or the data.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from script import settings_of
from variants import VAL_DOCUMENTS, VARIANTS, find_variant, variant_of

from train_gpt import FIELDS, Config, TokenStream, UserError, load_config, load_validation

COMMAND = ["./run.sh"]  # without arguments: it chooses between torchrun and one process
FIGURES = {  # keys of result.json that are compared, and how they are shown
    "prequant_val_bpb": ".5f",  # averaged weights, before quantisation
    "quantized_val_bpb": ".5f",  # the artifact, windows side by side
    "sliding_val_bpb": ".5f",
    "val_bpb": ".5f",  # the submitted score: the last of the enabled ones
    "total_bytes": ",.0f",  # compressed weights and counted code
    "steps": ",.0f",
    "train_seconds": ",.1f",
    "eval_seconds": ",.1f",
}
FEWER_STEPS = 0.98  # of the published mean: seeds of one system differ by 0.3 %
# Settings that no result depends on. The data are judged by their counts; training depends on ROW_TOKENS a little.
NEUTRAL = settings_of("RUN", "DATA") - {"row_tokens"} | {"seed"}


def read_settings(path: Path) -> dict[str, str]:
    """The KEY=value lines of a settings file; # begins a comment. Raises UserError for any other line."""
    settings = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if text and not re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", text):
            raise UserError(f"{path}, line {number}: {text!r} is not KEY=value; correct it")
        if text:
            key, _, settings[key] = text.partition("=")
    return settings


def read_folder(folder: Path) -> tuple[dict[str, str], dict[str, Any] | None]:
    """(settings, published figures or None) of a folder. Raises UserError when it has no settings."""
    try:
        settings, path = read_settings(folder / "settings.env"), folder / "published.json"
        return settings, json.loads(path.read_text()) if path.exists() else None
    except OSError as error:
        known = ", ".join(sorted(path.parent.name for path in ROOT.glob("records/*/settings.env")))
        raise UserError(f"{error.filename}: no such file; give one of these folders: {known}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder}/published.json: {error}; correct it") from None


def find_table(published: dict[str, Any], preset: str) -> dict[str, Any]:
    """The published table that a preset is to be compared with. Raises UserError when there is none."""
    for table in published["tables"]:
        if preset in table["presets"]:
            return table
    known = ", ".join(name for table in published["tables"] for name in table["presets"])
    raise UserError(f"PRESET={preset}: this folder has figures for {known}; choose one, or unset PRESET")


def check_data(config: Config, name: str) -> str:
    """Reads the data that a run needs: all of validation, the headers and ends of the training shards.

    Returns how it differs from the published variant `name` ("" where it does not): documents, targets, bytes.
    Raises UserError for missing data, with the command that fetches it, and for unusable data.
    """
    stages, folder = config.stage_list, config.dataset_dir
    splits = ["val", "train"] if "train" in stages else ["val"]
    missing = [folder / f"fineweb_{s}_*.bin" for s in splits if not any(folder.glob(f"fineweb_{s}_[0-9]*.bin"))]
    if missing := [*missing, *([] if config.tokenizer_file.is_file() else [config.tokenizer_file])]:
        how = how_to_get(name, Path(config.data_dir))
        raise UserError(f"{missing[0]}: not there; get it with: {how} (or set DATA_PATH and TOKENIZER_PATH)")
    if "train" in stages:
        TokenStream(folder, "train", config.vocab_size)
    validation, (_, variant) = load_validation(config), find_variant(name)
    documents, targets = len(validation.documents), len(validation.tokens) - 1
    num_bytes = int(validation.bytes[1 : variant.val_targets + 1].sum())
    # The published counts leave out a tail of less than a block; the cut may fall inside a character.
    as_published = documents == VAL_DOCUMENTS and 0 <= targets - variant.val_targets < variant.block
    if as_published and abs(num_bytes - variant.val_bytes) <= variant.val_bytes_tolerance + 3:
        return ""
    return f"data is not {name} as published ({documents:,} documents, {targets:,} targets, {num_bytes:,} bytes)"


def data_variant(config: Config) -> str:
    """The row of variants.VARIANTS that a configuration reads. Raises UserError where there is none."""
    name = variant_of(config)
    if name not in VARIANTS:
        raise UserError(f"VOCAB_SIZE={config.vocab_size}: the known data are {', '.join(VARIANTS)}; set one of these")
    return name


def how_to_get(name: str, root: Path) -> str:
    """The command that fetches a variant of the data, or makes it where nobody has published it."""
    place = "" if root == Path("data") else f" --root {root}"
    variant, source = find_variant(name)[1], find_variant("caseops")[1]
    if variant.repository:
        return f"python data/download.py {name}{place}"
    fuse = f"python data/fuse.py {root}/datasets/{source.dataset} --out {root}/datasets/{variant.dataset}"
    return f"python data/download.py caseops{place} && {fuse}"


def launch(command: list[str], env: Mapping[str, str]) -> int:
    """Runs the job to its end and returns its exit status, 128 + n when signal n ended it."""
    job = subprocess.Popen(command, cwd=ROOT, env=env)
    # The job saves its state when it is stopped. It gets a terminal's Ctrl-C by itself, but not a scheduler's SIGTERM.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, frame: job.send_signal(number))
    try:
        status = job.wait()
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    return status if status >= 0 else 128 - status


def differences(result: dict[str, Any], table: dict[str, Any], plain: Config, config: Config) -> list[str]:
    """What was not as in the published run, by the result and the settings (`plain`: those of the folder alone)."""
    found = [] if result["valid"] else ["the run is INVALID (" + "; ".join(result["violations"]) + ")"]
    if not ("8x" in result["hardware"] and "H100" in result["hardware"]):
        found.append(f"hardware {result['hardware']}, not 8xH100")
    if "steps" in result and result["steps"] < FEWER_STEPS * table["mean"].get("steps", 0):
        found.append(f"{result['steps']:,} steps, not {table['mean']['steps']:,.0f}")
    changed = [name for name in FIELDS if getattr(config, name) != getattr(plain, name) and name not in NEUTRAL]
    if changed:
        found.append("set by hand: " + " ".join(f"{name.upper()}={getattr(config, name)}" for name in changed))
    return found


def compare(table: dict[str, Any], result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Figure -> published for the run's seed and as a mean, measured, and measured minus the mean (None: not known).

    A run is compared with the mean, because the same seed does not give the same initial weights in two scripts.
    """
    of_seed, rows = table["seeds"].get(str(result["seed"]), {}), {}
    for figure in FIGURES:
        mean, measured = table["mean"].get(figure), result.get(figure)
        difference = None if mean is None or measured is None else measured - mean
        published = {"published_seed": of_seed.get(figure), "published_mean": mean}
        rows[figure] = published | {"measured": measured, "difference": difference}
    return rows


def show(comparison: dict[str, Any]) -> str:
    """The comparison as text: a verdict on the conditions, one row per figure, and what is not compared."""
    found, seed = comparison["differences"], comparison["seed"]
    head = f"{comparison['preset']} against {comparison['source']}"
    head += "\nNOT the published conditions: " + "; ".join(found) if found else "\nthe published conditions"
    lines = [head, f"{'':18}{'published':>14}{'published':>14}"]
    lines.append(f"{'':18}{f'seed {seed}':>14}{'mean':>14}{'measured':>14}{'minus mean':>14}")
    for figure, row in comparison["figures"].items():
        form = FIGURES[figure]
        values = [row["published_seed"], row["published_mean"], row["measured"]]
        cells = ["-" if value is None else format(value, form) for value in values]
        cells.append("-" if row["difference"] is None else format(row["difference"], "+" + form))
        lines.append(f"{figure:18}" + "".join(f"{cell:>14}" for cell in cells))
    if beside := comparison["not_compared"]:
        figures = " ".join(f"{key} {value}" for key, value in beside["mean"].items())
        lines.append(f"published but not compared ({beside['reason']}): mean {figures}")
    return "\n".join([*lines, *(f"note: {note}" for note in comparison["notes"])])


def reproduce(folder: Path, seed: str | None, caller: Mapping[str, str]) -> int:
    """Checks, runs and compares; returns the exit status of the run. Raises UserError before it has started."""
    settings, published = read_folder(folder)
    env = settings | dict(caller)
    table = find_table(published, env.get("PRESET", "default")) if published else {"seeds": {}}
    env["SEED"] = seed or env.get("SEED") or next(iter(table["seeds"]), str(Config().seed))
    config = load_config(env)[0]
    env["RUN_ID"] = config.run_id or f"{config.preset}-seed{config.seed}"
    other_data = check_data(config, published["data"] if published else data_variant(config))
    print(f"{folder.name}: RUN_ID={env['RUN_ID']} PRESET={config.preset} SEED={config.seed}", flush=True)
    if not published:
        print(f"nothing is published of it{f'; {other_data}' if other_data else ''}", flush=True)
        return launch(COMMAND, env)
    path = ROOT / config.runs_dir / env["RUN_ID"] / "result.json"
    before = path.stat().st_mtime_ns if path.exists() else None
    status = launch(COMMAND, env)
    if not path.exists() or path.stat().st_mtime_ns == before:
        return status  # the run has said why there is no result
    result, plain = json.loads(path.read_text()), load_config(settings | {"PRESET": config.preset})[0]
    found = differences(result, table, plain, config) + [other_data] * bool(other_data)
    comparison = {
        "preset": config.preset,
        "seed": result["seed"],
        "source": published["source"],
        "differences": found + published.get("known_differences", []),
        "figures": compare(table, result),
        "not_compared": table.get("not_compared"),
        "notes": published["notes"],
    }
    path.with_name("comparison.json").write_text(json.dumps(comparison, indent=1) + "\n")
    print("\n" + show(comparison))
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs a published system again and compares the figures.")
    parser.add_argument("folder", type=Path, help="records/YYYY-MM-DD_Name with settings.env and published.json")
    parser.add_argument("seed", nargs="?", help="default: SEED, or the first published seed")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    os.chdir(ROOT)  # paths in settings are relative to the repository
    try:
        return reproduce(folder, options.seed, os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
