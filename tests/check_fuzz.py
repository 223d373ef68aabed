"""Random settings through the check, and runs of all stages of what it lets pass: nothing may fail late.

    python tests/check_fuzz.py [SETTINGS [RUNS [SEED]]]     2,000 settings, 150 runs

Settings are drawn from the ranges that Config declares, with a liking for their edges, on top of a preset at toy size.
A run that diverges after silly learning rates is a result; one that takes too long is stopped; both are counted apart.
"""

import collections
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import QUIET, ToyData, build_toy_data, preset_env

import train_gpt as tg

SECONDS_PER_RUN = 180  # a toy run takes one or two, on a quiet machine
KEPT = ("run_id", "runs_dir", "stages", "data_dir", "data_path", "tokenizer_path", "compile")
# Of these a larger value only takes longer: iterations, and what is repeated or waited for.
LONG = dict(
    iterations=4, max_wallclock_seconds=2.0, warmup_steps=2, ttt_epochs=3, gptq_calibration_batches=8,
    num_loops=4, num_layers=8, phased_ttt_num_phases=20, lqer_rank=16, train_batch_tokens=1024, model_dim=64,
    bigram_vocab_size=4096, bigram_dim=64, mlp_mult=8.0, ttt_lora_rank=64, swa_every=100,
)  # fmt: skip
TEXTS = dict(
    fp16_keep_name_patterns=["", "tok_emb", "blocks.{last}.attn.k", "blocks", "mlp.up,bigram", "x"],
    ttt_chunk_steps=["", "8:2", "8:2,16:4", "1:1", "100:32", "3:5,2:1"],
    token_document_orders=["", "4,3", "2", "64,2", "16,8,4,2"],
)


class TooLong(BaseException):
    """A run was stopped by its alarm."""


def stop(*_: Any) -> None:
    raise TooLong


def draw_value(dice: random.Random, name: str, for_a_run: bool) -> Any:
    """A value of a setting from its declared range: an edge, close to one, near the default, or anywhere between."""
    field = tg.FIELDS[name]
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if name in TEXTS:
        return dice.choice(TEXTS[name])
    if field.type is bool:
        return dice.randrange(2)
    if choices:
        return dice.choice(choices)
    low = -tg.LARGEST_NUMBER if low is None else low
    high = tg.LARGEST_NUMBER if high is None else high
    if for_a_run and name in LONG:
        high = min(high, LONG[name])
    kind, span = dice.randrange(5), high - low
    if field.type is int:
        near = low + dice.randrange(0, 5)
        small = dice.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 33, 64, 96, 128, 256])
        value = [low, near, small, max(field.default, 1), low + int(span ** dice.random())][kind]
        value = high if dice.random() < 0.07 else value
        return min(max(value, low), high)
    tiny = dice.choice([1e-30, 1e-12, 1e-3]) * (1 if span > 1e-3 else 0)
    wide = low + dice.random() * min(span, 1.0)
    return [low, min(low + tiny, high), wide, high if dice.random() < 0.3 else wide, field.default][kind]


Env = dict[str, str]


def draw_env(dice: random.Random, data: ToyData, runs: Path, for_a_run: bool = False) -> tuple[Env, Env]:
    """A preset at toy size with one to six settings drawn anew, and these alone."""
    preset = dice.choice([name for name in tg.PRESETS if name != "tiny"])
    env = preset_env(preset, DATA_PATH=data.folder, TOKENIZER_PATH=data.tokenizer, RUNS_DIR=runs, CASEOPS_ENABLED=0)
    env |= dict(RUN_ID="fuzz", ITERATIONS="2")
    names = dice.sample([name for name in tg.FIELDS if name not in KEPT], dice.choice([1, 2, 3, 4, 6]))
    drawn = {name.upper(): str(draw_value(dice, name, for_a_run)) for name in names}
    return env | drawn, dict(PRESET=preset) | drawn


def own_frames(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " > ".join([f"{f.name}:{f.lineno}" for f in frames if f.filename.endswith("train_gpt.py")][-3:])


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(env: Env) -> tuple[str, str]:
    """What the check says about these settings: passed, refused, or failed, which is a defect; and details."""
    try:
        with limited(SECONDS_PER_RUN):
            config, _ = tg.load_config(env)
            tg.check(config, tg.Run(), QUIET)
        return "passed", ""
    except tg.UserError as error:
        return "refused", str(error)
    except BaseException as error:  # noqa: BLE001 - whatever else comes out is what is looked for
        return "failed", f"{type(error).__name__}: {str(error)[:200]} at {own_frames(error)}"


def run(env: Env) -> tuple[str, str]:
    """All stages with settings that the check lets pass: ended, diverged, stopped; failed is a defect."""
    config, _ = tg.load_config(env)
    begun = []
    loop = tg.Trainer.loop

    def noted(trainer: tg.Trainer) -> None:
        begun.append(True)
        loop(trainer)

    tg.Trainer.loop = noted
    try:
        with limited(SECONDS_PER_RUN), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            result = tg.main(config, tg.Run())
        good = np.isfinite(result["val_bpb"]) and result["scored_tokens"] == result["val_targets"]
        return ("ended", "") if good else ("failed", f"result {result['val_bpb']}, {result['scored_tokens']} targets")
    except tg.TrainingDiverged as error:
        return "diverged", str(error)
    except TooLong:
        return "stopped", ""
    except BaseException as error:  # noqa: BLE001
        text = f"{type(error).__name__}: {str(error)[:300]} at {own_frames(error)}"
        return "failed", f"{'late' if begun else 'early'}: {text}"
    finally:
        tg.Trainer.loop = loop


def campaign(root: Path, settings: int, runs: int, seed: int, data: ToyData | None = None) -> dict[str, Any]:
    """Counts of outcomes of both parts, and the descriptions of all defects."""
    data = data or build_toy_data(root)
    defects, counts = [], {"check": collections.Counter(), "run": collections.Counter()}
    dice, begin = random.Random(f"{seed} settings"), time.monotonic()
    for _ in range(settings):
        env, drawn = draw_env(dice, data, root / "runs")
        outcome, text = check(env)
        counts["check"][outcome] += 1
        if outcome == "failed":
            defects.append(f"check: {text}; {drawn}")
    assert not (root / "runs").exists(), "the check has written something"
    dice = random.Random(f"{seed} runs")
    while counts["run"].total() < runs:
        env, drawn = draw_env(dice, data, root / f"runs{counts['run'].total()}", for_a_run=True)
        if check(env)[0] == "refused":
            counts["check"]["refused before a run"] += 1
            continue
        outcome, text = run(env)
        counts["run"][outcome] += 1
        if outcome in ("failed", "stopped"):
            print(outcome, text, drawn, flush=True)
        if outcome == "failed":
            defects.append(f"run: {text}; {drawn}")
    return dict(counts=counts, defects=defects, seconds=time.monotonic() - begin)


def main() -> int:
    given = [int(word) for word in sys.argv[1:]]
    settings, runs, seed = given + [2000, 150, 1][len(given) :]
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(Path(folder), settings, runs, seed)
    for kind, count in report["counts"].items():
        print(f"{kind}: {dict(count)}")
    print(f"defects: {len(report['defects'])}, seconds: {report['seconds']:.0f}")
    print("\n".join(report["defects"]))
    return bool(report["defects"])


if __name__ == "__main__":
    sys.exit(main())
