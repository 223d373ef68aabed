"""records/ladder.py: the scale by rule, the report's arithmetic, and a toy ladder from documents to the picture."""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_documents, train_tokenizer

import train_gpt as tg
from records import ladder

SCALE = ladder.Scale(seconds=90.0, reserve=5.0, steps=200, val_documents=93, val_tokens=60_000)
PRESETS = [*tg.PRESETS]
# The script as the ladder sees it: writes what its environment asks for, or fails.
STUB = """
import json, os
from pathlib import Path
env = os.environ
folder, seed, stages = Path(env["RUNS_DIR"]) / env["RUN_ID"], int(env["SEED"]), env["STAGES"].split(",")
with open(folder / "starts", "a") as file:
    file.write(env["OMP_NUM_THREADS"] + os.environ.get("MATRIX_LR", "") + "\\n")
if env["PRESET"] == "default" and seed == 2:
    raise SystemExit("out of luck")
bpb = 2.0 - 0.1 * (env["PRESET"] == "tiny") + 0.01 * seed
result = dict(run_id=env["RUN_ID"], val_bpb=bpb, prequant_val_bpb=bpb - 0.1, quantized_val_bpb=bpb + 0.1, steps=40,
              tokens_per_s=1000.0, train_seconds=11.0, calibration_seconds=1.0, eval_seconds=2.0, total_bytes=5000,
              submitted="ttt", hardware="1xtoy", torch="2", valid=True, violations=[],
              stage_keys={stage: [] for stage in stages})
(folder / "result.json").write_text(json.dumps(result))
"""


def small(name: str, scale: ladder.Scale = SCALE) -> tg.Config:
    """The scaled configuration of a preset."""
    settings = ladder.scaled(ladder.load_preset(name), scale)
    return tg.load_config({"PRESET": name} | settings)[0]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_becomes_a_valid_small_configuration(name: str) -> None:
    """The script accepts it, and what is not scaled by a rule is the preset's own value."""
    full, config = ladder.load_preset(name), small(name)
    assert (config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim) == (128, 4, 2, 32)
    assert (config.train_batch_tokens, config.train_row_tokens) == (1024, 512)
    kept = ("num_layers", "num_loops", "mlp_mult", "xsa_last_n", "matrix_lr", "muon_wd", "embed_bits", "logit_softcap",
            "enable_looping_at", "beta2", "vocab_size", "ttt_enabled", "min_lr")  # fmt: skip
    assert {key: getattr(config, key) for key in kept} == {key: getattr(full, key) for key in kept}
    assert config.rope_dims / config.head_dim == full.rope_dims / full.head_dim


# Fields that are the same for all by design, or have a test of their own.
COMMON = ("preset", "train_batch_tokens", "gptq_reserve_seconds", "ttt_batch_seqs", "ttt_chunk_tokens")


def test_differences_between_presets_survive() -> None:
    """Where two full-size presets differ, their small ones do; a number of steps is compared as a share of them."""
    names = [name for name in PRESETS if name != "tiny"]  # which is no published system: its sizes are small already
    full, scaled = [{name: f(name) for name in names} for f in (ladder.load_preset, small)]
    for first, second in itertools.combinations(names, 2):
        for field in tg.FIELDS.keys() - COMMON:
            here = {"warmdown_iters": "warmdown_frac"}.get(field, field)
            if getattr(full[first], field) != getattr(full[second], field):
                values = [getattr(scaled[name], here) for name in (first, second)]
                capped = field == "gptq_calibration_batches" and min(values) == ladder.MOST_CALIBRATION_ROWS
                assert values[0] != values[1] or capped, f"{field} of {first} and {second}: {values}"


def test_scaled_values_of_one_preset_by_hand() -> None:
    """PR #1941 at 200 of its 4,826 steps, and on 93 of the challenge's 50,000 documents."""
    config = small("pr1941")
    assert (config.rope_dims, config.train_seq_len, config.eval_seq_len, config.eval_stride) == (8, 256, 256, 32)
    assert config.muon_momentum_warmup_steps == round(1500 * 200 / 4826) == 62
    assert (1 / (1 - config.ema_decay)) / 200 == pytest.approx((1 / (1 - 0.9965)) / 4826, rel=1e-4)
    assert (config.ttt_lora_rank, config.ttt_lora_alpha, config.ttt_lora_lr) == (16, 18.0, 0.003)
    assert config.phased_ttt_prefix_docs == round(2000 * 8 * 93 / 50_000) == 30
    assert (config.max_wallclock_seconds, config.gptq_reserve_seconds) == (90.0, 5.0)


def test_a_warmdown_in_steps_becomes_the_same_share_of_the_run() -> None:
    baseline = small("baseline")
    assert baseline.warmdown_iters == 0
    assert baseline.warmdown_frac == pytest.approx(1200 / 13_780, rel=1e-5)


def test_small_presets_keep_their_sizes() -> None:
    """Only the budget and what is counted in steps changes for a preset that is small already."""
    full, config = ladder.load_preset("tiny"), small("tiny")
    assert config.train_seq_len == full.train_seq_len and config.ttt_lora_rank == full.ttt_lora_rank
    assert config.muon_momentum_warmup_steps == round(170 * 200 / 560)


@pytest.mark.parametrize("name", ["pr489", "fork5", "pr1880"])
@pytest.mark.parametrize("val_tokens", [2_000, 20_000, 200_000, 62_021_632])
def test_chunks_follow_the_published_proportions(name: str, val_tokens: int) -> None:
    """Whole windows, several chunks, as many updates per chunk as published where there are windows for them."""
    full = ladder.load_preset(name)
    config = small(name, dataclasses.replace(SCALE, val_tokens=val_tokens))
    assert config.ttt_chunk_tokens % config.eval_seq_len == 0 and config.ttt_chunk_tokens % config.eval_stride == 0
    windows = val_tokens // config.eval_seq_len
    assert config.ttt_chunk_tokens <= max(val_tokens / ladder.FEWEST_CHUNKS, config.eval_seq_len)
    if val_tokens > 10_000_000:  # all of the challenge's text: the published number of chunks
        targets = ladder.variants.VARIANTS[ladder.variant_of(full)].val_targets
        assert val_tokens / config.ttt_chunk_tokens == pytest.approx(targets / full.ttt_chunk_tokens, rel=0.05)
    published = max(round(full.ttt_chunk_tokens / (8 * full.ttt_batch_seqs * full.eval_seq_len)), 1)
    updates = math.ceil(config.ttt_chunk_tokens / config.eval_seq_len / (8 * config.ttt_batch_seqs))
    if windows >= 8 * published * ladder.FEWEST_CHUNKS:
        assert updates == published


def test_an_unknown_full_size_preset_is_named() -> None:
    odd = dataclasses.replace(ladder.load_preset("pr1941"), preset="odd")
    with pytest.raises(ladder.LadderError, match="preset odd: its published number of steps is unknown"):
        ladder.scaled(odd, SCALE)


def test_arithmetic_of_the_report_by_hand() -> None:
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, variance 14 / 2 = 7. Differences to 3, 5, 4: -2, -3, 2: mean
    -1, squared deviations 1 + 4 + 9 = 14, variance 7, standard error sqrt(7 / 3)."""
    assert ladder.mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, math.sqrt(7))
    assert ladder.mean_and_deviation([1.5]) == (1.5, None)
    mine, theirs = {1: 1.0, 2: 2.0, 3: 6.0, 9: 100.0}, {3: 4.0, 1: 3.0, 2: 5.0, 8: -100.0}
    mean, error, pairs = ladder.paired_difference(mine, theirs)
    assert (mean, pairs) == (-1.0, 3) and error == pytest.approx(math.sqrt(7 / 3))
    assert ladder.paired_difference({1: 2.0}, {1: 1.0}) == (1.0, None, 1)
    assert ladder.paired_difference({1: 2.0}, {2: 1.0}) is None


def test_pilot_decides_steps_and_reserve() -> None:
    """100 steps in 12.5 - 2.5 s are 10 a second; 1.5 * 2.5 s are kept: (60 - 3.8) * 10 steps."""
    pilot = {"steps": 100, "train_seconds": 12.5, "calibration_seconds": 2.5, "run_id": "a-pilot"}
    scale = ladder.measured(SCALE, pilot, 60.0)
    assert (scale.seconds, scale.reserve, scale.steps) == (60.0, 3.8, 562)
    with pytest.raises(ladder.LadderError, match="calibration takes"):
        ladder.measured(SCALE, pilot, 3.0)


# ---------------------------------------------------------------------------------------------------------------------
# From documents to the picture


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that prepare has made, with toy tokenizers of the names that it asks for."""
    root = tmp_path_factory.mktemp("ladder")
    train, val = toy_documents(300, seed=1), [text for text in toy_documents(80, seed=2) if text.count(" ") > 10]
    sentences = [*train, "The Cat and the RED Dog"]
    for name in ladder.DATA_VARIANTS:
        variant = ladder.variants.VARIANTS[name]
        options = {"user_defined_symbols": [*ladder.caseops.OPERATORS]} if variant.caseops else {}
        train_tokenizer(root / variant.tokenizer, sentences, 96, **options)
    val_lines = ["two  blanks are folded", "Eine Frage", *dict.fromkeys(val)]
    status = ladder.main(
        ["prepare", "--docs", str(write_documents(root / "train.jsonl", train)), "--out", str(root / "data"),
         "--val-docs", str(write_documents(root / "val.jsonl", val_lines)), "--tokenizers", str(root),
         "--train-mb", "0.01", "--val-kb", "0.5"]
    )  # fmt: skip
    assert status == 0
    return root / "data"


def test_prepare_takes_the_same_bytes_for_every_tokenizer(data: Path) -> None:
    """Whole documents, as many bytes as asked for, equal however they are tokenized; folded blanks are left out."""
    summary = json.loads((data / ladder.DATA_FILE).read_text())
    assert {row["val_bytes"] for row in summary["variants"].values()} == {summary["val"]["text_bytes"]}
    assert {row["val_documents"] for row in summary["variants"].values()} == {summary["val"]["documents"]}
    assert 500 <= summary["val"]["text_bytes"] < 1000 and summary["train"]["text_bytes"] >= 10_000
    assert summary["val"]["left_out"] >= 1
    texts = [json.loads(line)["text"] for line in (data / ladder.DOCUMENTS_FILE).read_text().splitlines()]
    kept = texts[: summary["val"]["documents"]]
    assert "two  blanks are folded" not in texts
    assert sum(len(text.encode()) for text in kept) == summary["val"]["text_bytes"]
    digest = ladder.hashlib.sha256("".join(text + "\n" for text in kept).encode()).hexdigest()
    assert digest == summary["val"]["text_sha256"]


def test_prepare_says_when_there_is_too_little_text(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data.parent
    arguments = ["prepare", "--docs", str(root / "train.jsonl"), "--val-docs", str(root / "val.jsonl"), "--tokenizers",
                 str(root), "--out", str(root / "none"), "--val-kb", "1000"]  # fmt: skip
    assert ladder.main(arguments) == 2
    assert "bytes of usable text" in capsys.readouterr().err and not (root / "none").exists()


def options(data: Path, out: Path, *words: str) -> argparse.Namespace:
    return ladder.parse_options(["run", "--data", str(data), "--out", str(out), *words])


@pytest.fixture
def stub(tmp_path: Path) -> list[str]:
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return [sys.executable, str(path)]


def starts(out: Path) -> dict[str, int]:
    """How often each run has been started."""
    return {path.parent.name: len(path.read_text().splitlines()) for path in out.glob("*/starts")}


def states(outcomes: list[ladder.Outcome]) -> dict[str, bool]:
    return {outcome.job.name: outcome.result is not None for outcome in outcomes}


def test_runs_resume_and_failures_stay_alone(
    data: Path, tmp_path: Path, stub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pilot per preset, then every seed; what failed is tried again, what is there is not, and nothing leaks in."""
    monkeypatch.setenv("MATRIX_LR", "0.5")
    out = tmp_path / "runs"
    wanted = options(data, out, "--presets", "default,tiny", "--seeds", "1,2", "--seconds", "30", "--threads", "3")
    first = states(ladder.run(wanted, stub))
    assert first == {"default-seed1": True, "default-seed2": False, "tiny-seed1": True, "tiny-seed2": True}
    assert (out / "tiny-seed1" / "starts").read_text() == "3\n"
    assert states(ladder.run(wanted, stub)) == first
    once = dict.fromkeys(("default-pilot", "tiny-pilot", "default-seed1", "tiny-seed1", "tiny-seed2"), 1)
    assert starts(out) == once | {"default-seed2": 2}
    about = json.loads((out / "tiny-seed1" / ladder.RUN_FILE).read_text())
    assert about["expected_steps"] == round(40 / 10 * (30 - 1.5)) and about["settings"]["MAX_WALLCLOCK_SECONDS"] == "30"


def test_a_run_of_other_settings_is_never_taken(data: Path, tmp_path: Path, stub: list[str]) -> None:
    """Neither as the result nor as something to overwrite."""
    out = tmp_path / "runs"
    ladder.run(options(data, out, "--presets", "tiny", "--seeds", "1", "--steps", "5"), stub)
    (outcome,) = ladder.run(options(data, out, "--presets", "tiny", "--seeds", "1", "--steps", "6"), stub)
    assert outcome.result is None and "other settings (ITERATIONS" in outcome.message
    assert starts(out) == {"tiny-seed1": 1}


def test_unknown_presets_are_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--data", str(data), "--out", str(tmp_path / "runs"), "--presets", "odd", "--steps", "2"]
    assert ladder.main(arguments) == 2
    assert "PRESET=odd: unknown" in capsys.readouterr().err


def test_report_shows_what_the_runs_say(data: Path, tmp_path: Path, stub: list[str]) -> None:
    """Rows in ladder order, mean and deviation, the paired difference, and the run that is missing."""
    out, table, picture = tmp_path / "runs", tmp_path / "a" / "ladder.md", tmp_path / "a" / "ladder.png"
    ladder.run(options(data, out, "--presets", "tiny,default", "--seeds", "1,2,3", "--steps", "5"), stub)
    assert ladder.main(["report", "--runs", str(out), "--table", str(table), "--picture", str(picture)]) == 0
    text = table.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines] == 2 * ["preset", "default", "tiny"]
    rows = dict(zip(("default", "tiny"), lines[1:3], strict=True))
    assert "**2.0200 ± 0.0141** | – | 1.9200 ± 0.0141" in rows["default"]  # seeds 1 and 3: 2.01, 2.03
    assert "**1.9200 ± 0.0100** | -0.1000 ± 0.0000 |" in rows["tiny"]
    assert "not finished: default-seed2" in text and "budget: 5 steps" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_report_refuses_runs_that_do_not_compare(data: Path, tmp_path: Path, stub: list[str]) -> None:
    out = tmp_path / "runs"
    for steps, seed in (("5", "1"), ("6", "3")):
        ladder.run(options(data, out, "--presets", "tiny", "--seeds", seed, "--steps", steps), stub)
    with pytest.raises(ladder.LadderError, match="runs with different budget"):
        ladder.report(argparse.Namespace(runs=out, table=tmp_path / "t.md", picture=tmp_path / "p.png"))


def test_the_real_script_runs_end_to_end(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One preset, three steps, at toy size and with the toy tokenizer, through a table."""
    size = json.loads((data / "sp1024" / "manifest.json").read_text())["vocab_size"]
    toy: dict[str, Any] = dict(VOCAB_SIZE=size, MODEL_DIM=32, ROPE_DIMS=4, NUM_LAYERS=2)
    rule = ladder.scaled
    monkeypatch.setattr(ladder, "scaled", lambda *a: rule(*a) | {key: str(value) for key, value in toy.items()})
    out = tmp_path / "runs"
    (outcome,) = ladder.run(options(data, out, "--presets", "baseline", "--seeds", "1", "--steps", "3"))
    assert outcome.result is not None, outcome.message
    assert outcome.result["steps"] == 3 and math.isfinite(outcome.result["val_bpb"])
    summary = json.loads((data / ladder.DATA_FILE).read_text())
    assert outcome.result["scored_bytes"] == summary["val"]["text_bytes"]
    text = ladder.report(argparse.Namespace(runs=out, table=tmp_path / "t.md", picture=tmp_path / "p.png"))
    assert f"{outcome.result['val_bpb']:.4f}" in text
