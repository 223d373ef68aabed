"""records/ladder.py: the scale by rule, the report's arithmetic, and a toy ladder from documents to the picture."""

import argparse
import dataclasses
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import toy_documents, train_tokenizer

import train_gpt as tg
from records import ladder, paired

SCALE = ladder.Scale(seconds=90.0, reserve=5.0, steps=200, val_documents=93, val_tokens=60_000)
PRESETS = [*tg.PRESETS]
# The script as the ladder sees it: writes what its environment asks for, or fails. Its three documents of 100, 200 and
# 300 bytes share the score evenly, but for 3 nats that the first one of "tiny" takes less and the second one more.
STUB = """
import json, math, os
from pathlib import Path
env = os.environ
folder, seed, stages = Path(env["RUNS_DIR"]) / env["RUN_ID"], int(env["SEED"]), env["STAGES"].split(",")
with open(folder / "starts", "a") as file:
    file.write(env["OMP_NUM_THREADS"] + os.environ.get("MATRIX_LR", "") + os.environ.get("EMBED_WD", "") + "\\n")
tiny, other = env["PRESET"] == "tiny", Path(env["DATA_PATH"]).parent.name == "other"
if not tiny and seed == 2:
    raise SystemExit("out of luck")
bpb = 2.0 - 0.1 * tiny + 0.01 * seed + 0.5 * other
result = dict(run_id=env["RUN_ID"], hardware="1xtoy", torch="2", valid=True, violations=[],
              stage_seconds={stage: 1.0 for stage in stages})
if "train" in stages:
    result |= dict(prequant_val_bpb=bpb - 0.1, steps=40, tokens_per_s=1000.0, train_seconds=11.0,
                   calibration_seconds=1.0)
    (folder / "trained.bin").write_text("weights of " + env["RUN_ID"])
if "quantize" in stages:
    (folder / "artifact.bin").write_text((folder / "trained.bin").read_text())
    result |= dict(total_bytes=5000 + 300 * tiny)
trained = "weights of " + env["PRESET"] + "-seed" + env["SEED"]
assert stages == ["train"] or (folder / "artifact.bin").read_text() in (trained, "weights of " + env["RUN_ID"])
result |= dict(val_bpb=bpb, quantized_val_bpb=bpb + 0.1, eval_seconds=2.0 + tiny, submitted="ttt")
rows = [(size, size * bpb * math.log(2) + more) for size, more in ((100, -3.0 * tiny), (200, 3.0 * tiny), (300, 0.0))]
lines = ["position,tokens,bytes,quantized,ttt"] + [f"0,9,{size},0.0,{nats}" for size, nats in rows]
(folder / "documents.csv").write_text("\\n".join(lines) + "\\n")
(folder / "result.json").write_text(json.dumps(result))
"""


def small(name: str, scale: ladder.Scale = SCALE) -> tg.Config:
    """The scaled configuration of a preset or variation."""
    full = ladder.load_preset(name)
    return tg.load_config({"PRESET": full.preset} | ladder.scaled(full, scale))[0]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_becomes_a_valid_small_configuration(name: str) -> None:
    """The script accepts it, and what is not scaled by a rule is the preset's own value."""
    full, config = ladder.load_preset(name), small(name)
    assert (config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim) == (128, 4, 2, 32)
    row_tokens = full.train_row_tokens if name == "tiny" else 512
    assert (config.train_batch_tokens, config.train_row_tokens) == (1024, row_tokens)
    kept = ("num_layers", "num_loops", "mlp_mult", "xsa_last_n", "matrix_lr", "muon_wd", "embed_bits", "logit_softcap",
            "enable_looping_at", "beta2", "vocab_size", "ttt_enabled", "min_lr")  # fmt: skip
    assert {key: getattr(config, key) for key in kept} == {key: getattr(full, key) for key in kept}
    assert config.rope_dims / config.head_dim == full.rope_dims / full.head_dim


# Fields that are the same for all by design, or have a test of their own.
COMMON = ("preset", "train_batch_tokens", "gptq_reserve_seconds", "ttt_batch_seqs", "ttt_chunk_tokens", "fit_artifact")


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
    assert config.muon_momentum_warmup_steps == round(full.muon_momentum_warmup_steps * 200 / full.iterations)


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
    with pytest.raises(paired.RunError, match="preset odd: its published number of steps is unknown"):
        ladder.scaled(odd, SCALE)


def with_fields(name: str, **fields: Any) -> tg.Config:
    """A preset with other values."""
    return dataclasses.replace(ladder.load_preset(name), **fields)


def test_chunks_by_length_keep_their_limits_and_grow_like_the_others() -> None:
    """Times 4/3: 12, 24, 32, 48 become 16, 32, 42.67, 64. Nothing is said where nothing is set, or nobody learns."""
    assert ladder.small_chunk(48) == 64
    preset = with_fields("pr2135", ttt_chunk_steps="256:12, 1024:24,2048:32")
    assert ladder.scaled(preset, SCALE)["TTT_CHUNK_STEPS"] == "256:16,1024:32,2048:43"
    assert "TTT_CHUNK_STEPS" not in ladder.scaled(with_fields("pr2135", ttt_chunk_steps=""), SCALE)
    idle = with_fields("pr2135", ttt_chunk_steps="256:12", ttt_enabled=False)
    assert ladder.scaled(idle, SCALE).get("TTT_CHUNK_STEPS") in (None, "256:12")


def test_a_small_artifact_is_not_filled_up() -> None:
    assert ladder.scaled(with_fields("pr2135", fit_artifact="fill"), SCALE)["FIT_ARTIFACT"] == "1"
    assert "FIT_ARTIFACT" not in ladder.scaled(ladder.load_preset("pr2135"), SCALE)


def test_each_preset_finds_its_tokenizer() -> None:
    assert [ladder.variant_of(ladder.load_preset(name)) for name in ("pr489", "pr1941", "pr2135")] == [
        "sp1024",
        "sp8192",
        "caseops",
    ]
    assert ladder.variant_of(with_fields("pr2135", marker_pair_mode=True)) == "mp3"
    assert ladder.variant_of(with_fields("pr2135", marker_pair_mode=False)) == "caseops"


def test_a_variation_differs_in_what_it_names_and_nothing_else() -> None:
    """With a rule (steps of the momentum ramp) or without; exactly, however many digits."""
    base, varied = [small("pr2135" + more) for more in
                    ("", "+MLP_GATE_OUT=1+EMBED_WD=0.0612345678+MUON_MOMENTUM_WARMUP_STEPS=3000")]  # fmt: skip
    changed = {name for name in tg.FIELDS if getattr(base, name) != getattr(varied, name)}
    assert changed == {"mlp_gate_out", "embed_wd", "muon_momentum_warmup_steps"}
    assert (varied.mlp_gate_out, varied.embed_wd) == (True, 0.0612345678)
    assert varied.muon_momentum_warmup_steps == round(3000 * 200 / 4994) == 120


@pytest.mark.parametrize(
    ("label", "field", "value"),
    [
        ("pr489+BIGRAM_HASH_BUCKETS=4096", "bigram_vocab_size", 1024),
        ("pr1855+SPARSE_ATTN_GATE_ENABLED=0", "attn_gate", "none"),
        ("pr1855+LQER_ENABLED=0", "lqer_rank", 0),
        ("pr1855+TTT_CHUNK_SIZE=24", "ttt_chunk_size", 32),
        ("tiny+EMBED_WD=0.06", "embed_wd", 0.06),
    ],
)
def test_variations_may_use_every_published_name(label: str, field: str, value: Any) -> None:
    assert getattr(small(label), field) == value


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("pr2135+EMBED_WD", "must be NAME"),
        ("pr2135+EMBED_WD=1/2", "must be NAME"),
        ("pr2135+EMBED_WD=1e+3", "must be NAME"),
        ("../pr2135", "must be NAME"),
        ("pr2135+EMBED_WD=0.1+EMBED_WD=0.2", "gives a setting twice"),
        ("pr2135+EMBED_WD=much", "not a number"),
        ("pr2135+EMBD_WD=0.1", "did you mean EMBED_WD"),
        ("odd+EMBED_WD=0.1", "PRESET=odd: unknown"),
        ("pr2135+SEED=3", "SEED cannot be varied"),
        ("pr2135+PRESET=tiny", "PRESET cannot be varied"),
        ("pr2135+NO_SUCH_THING=1", "NO_SUCH_THING cannot be varied"),
        ("pr2135+EMBED_LR=1", "EMBED_LR cannot be varied"),  # accepted by the script, without effect
    ],
)
def test_bad_labels_are_refused_in_one_line(label: str, said: str) -> None:
    with pytest.raises(paired.RunError, match=said) as caught:
        ladder.load_preset(label)
    assert label in str(caught.value) and "\n" not in str(caught.value)


def test_a_change_that_the_small_scale_hides_is_refused() -> None:
    """A size that is equal for all, or the preset's own value; a few steps only hide nothing."""
    few = dataclasses.replace(SCALE, steps=1)
    for label in ("pr2135+MUON_MOMENTUM_WARMUP_STEPS=1400", "pr2135+NUM_HEADS=16+NUM_KV_HEADS=8", "pr2135"):
        ladder.check_changes(label, few)
    for part in ("TRAIN_BATCH_TOKENS=393216", "EMBED_WD=0.085"):
        for label in (f"pr2135+{part}", f"pr2135+MATRIX_LR=0.02+{part}"):
            with pytest.raises(paired.RunError, match=f"{part} changes nothing"):
                ladder.check_changes(label, few)


def test_labels_are_told_from_values_with_commas() -> None:
    text = "pr2135,frontier+TTT_CHUNK_STEPS=256:12,1024:24+EMBED_WD=0.06,tiny"
    assert ladder.split_labels(text) == ["pr2135", "frontier+TTT_CHUNK_STEPS=256:12,1024:24+EMBED_WD=0.06", "tiny"]
    assert ladder.split_labels(",pr489,,tiny,") == ["pr489", "tiny"]


def test_rows_are_in_the_order_of_the_ladder_and_variations_after_their_preset() -> None:
    wanted = [
        "pr489",
        "pr2135",
        "pr2135+EMBED_WD=0.06",
        "pr2135+MLP_GATE_OUT=1",
        "frontier",
        "frontier+A=1",
        "b+A=1",
        "c",
    ]
    assert ladder.ladder_order(set(wanted)) == wanted


def test_arithmetic_of_the_report_by_hand() -> None:
    """1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14, variance 14 / 2 = 7. Differences to 3, 5, 4: -2, -3, 2: mean
    -1, squared deviations 1 + 4 + 9 = 14, variance 7, standard error sqrt(7 / 3)."""
    assert paired.mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, math.sqrt(7))
    assert paired.mean_and_deviation([1.5]) == (1.5, None)
    mine, theirs = {1: 1.0, 2: 2.0, 3: 6.0, 9: 100.0}, {3: 4.0, 1: 3.0, 2: 5.0, 8: -100.0}
    mean, error, pairs = paired.paired_difference(mine, theirs)
    assert (mean, pairs) == (-1.0, 3) and error == pytest.approx(math.sqrt(7 / 3))
    assert paired.paired_difference({1: 2.0}, {1: 1.0}) == (1.0, None, 1)
    assert paired.paired_difference({1: 2.0}, {2: 1.0}) is None


def test_ratio_over_documents_by_hand() -> None:
    """-10 and 6 bits in 100 and 300 bytes: -4 / 400; left over are -10 + 1 and 6 + 3, so sqrt(2 * 162) / 400."""
    mean, error, number = paired.ratio(np.array([-10.0, 6.0]) * math.log(2), np.array([100, 300]))
    assert (mean, error, number) == (pytest.approx(-0.01), pytest.approx(18 / 400), 2)
    assert paired.ratio(np.array([math.log(2)]), np.array([4])) == (pytest.approx(0.25), None, 1)
    assert paired.ratio(np.array([1.0, 3.0]), np.array([10, 30])).error == pytest.approx(0)  # equal per byte


def write_run(out: Path, preset: str, seed: int, documents: list[tuple[int, float]] | None, **result: Any) -> None:
    """A finished run with these documents: bytes, and nats in the submitted score."""
    folder = out / f"{preset}-seed{seed}"
    folder.mkdir(parents=True)
    data = {part: dict(text_bytes=9, documents=2, file="a", text_sha256="0") for part in ("train", "val")}
    machine = dict(cpu="toy", cores=1, system="toy", python="3", numpy="2")
    about = dict(preset=preset, seed=seed, budget={"steps": 5}, data=data, threads=1, jobs=1, machine=machine,
                 script_sha256="0", variant="sp1024", parameters=1)  # fmt: skip
    if documents:
        result |= {"val_bpb": sum(nats for _, nats in documents) / math.log(2) / sum(size for size, _ in documents)}
        rows = [f"7,1,{size},{nats + 5},{nats!r}\n" for size, nats in documents]
        (folder / paired.SCORES_FILE).write_text("position,tokens,bytes,quantized,sliding\n" + "".join(rows))
    plain = dict(run_id=folder.name, submitted="sliding", quantized_val_bpb=3.0, hardware="1xtoy", torch="2")
    (folder / paired.RESULT_FILE).write_text(json.dumps(plain | result))
    (folder / ladder.RUN_FILE).write_text(json.dumps(about))


def make_report(out: Path, against: str | None = None) -> str:
    """The tables alone, since a picture takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "draw", lambda *unused: None)
        return ladder.report(argparse.Namespace(runs=out, table=out / "t.md", picture=out / "p.png", against=against))


def cells(text: str, number: int) -> dict[str, dict[str, str]]:
    """Row and column -> cell, of the first or second table in a report."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    begins = [place for place, line in enumerate(lines) if line[0] == "preset"] + [len(lines)]
    head, *rows = lines[begins[number] : begins[number + 1]]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_differences_by_document_against_a_slow_reference(tmp_path: Path) -> None:
    """Only equal seeds count; the estimate is that of the mean over seeds, the error that of the ratio estimator."""
    generator, sizes = random.Random(5), [40, 900, 300, 77, 500]
    nats = {(name, seed): [size * generator.uniform(1.5, 2.0) for size in sizes]
            for name, seed in (("a", 1), ("a", 2), ("a", 3), ("b", 2), ("b", 3), ("b", 4))}  # fmt: skip
    for (name, seed), values in nats.items():
        write_run(tmp_path, name, seed, list(zip(sizes, values, strict=True)))
    runs = ladder.read_runs(tmp_path)[0]
    a, b = [[run for run in runs if run.about["preset"] == name] for name in "ab"]
    difference, better = paired.document_differences(b, a)
    by_seed = paired.paired_difference(paired.by_seed(b, "val_bpb"), paired.by_seed(a, "val_bpb"))
    assert difference.mean == pytest.approx(by_seed.mean, rel=1e-9)

    drops = [sum(nats["b", seed][i] - nats["a", seed][i] for seed in (2, 3)) / 2 for i in range(len(sizes))]
    rate, squares = sum(drops) / sum(sizes), 0.0
    for drop, size in zip(drops, sizes, strict=True):
        squares += (drop - rate * size) ** 2
    assert difference.error == pytest.approx(math.sqrt(squares * 5 / 4) / sum(sizes) / math.log(2))
    assert (difference.number, better) == (5, sum(drop < 0 for drop in drops)) and 0 < better < 5

    row = cells(make_report(tmp_path, "a"), 0)["b"]
    assert row["minus a"] == f"{by_seed.mean:+.4f} ± {by_seed.error:.4f}"
    assert row["over documents"] == f"{difference.mean:+.4f} ± {difference.error:.4f}"
    assert row["better"] == f"{better} of 5"


def test_every_row_is_compared_with_the_one_asked_for(tmp_path: Path) -> None:
    """2.0, 1.9 and 1.7 bits per byte of 10 bytes, against the middle one; costs too."""
    for name, bits, costs in (
        ("a", 20, dict(train_seconds=90.0, eval_seconds=10.0, total_bytes=5000)),
        ("b", 19, dict(train_seconds=70.0, eval_seconds=10.0, total_bytes=4000)),
        ("c", 17, dict(eval_seconds=10.0)),
    ):
        write_run(tmp_path, name, 1, [(10, bits * math.log(2))], **costs)
    text = make_report(tmp_path, "b")
    scores, costs = cells(text, 0), cells(text, 1)
    assert [scores[name]["minus b"] for name in "abc"] == ["+0.1000", "–", "-0.2000"]
    assert [scores[name]["better"] for name in "abc"] == ["0 of 1", "–", "1 of 1"]
    assert [costs[name]["time"] for name in "abc"] == ["+25.0 %", "–", "–"]
    assert [costs[name]["bytes"] for name in "abc"] == ["+1,000", "–", "–"]
    assert "*over documents*" in text and "*minus b*" in text

    plain = make_report(tmp_path)
    assert [cells(plain, 0)[name]["minus row above"] for name in "abc"] == ["–", "-0.1000", "-0.2000"]
    assert "over documents" not in plain and "| time |" not in plain
    with pytest.raises(paired.RunError, match="--against d: no such row; there is a, b, c"):
        make_report(tmp_path, "d")


def test_runs_without_scores_by_document_leave_their_cells_empty(tmp_path: Path) -> None:
    """One of four runs that are compared is enough."""
    for name, seed in itertools.product("ab", (1, 2)):
        write_run(tmp_path, name, seed, [(10, 20.0), (20, 30.0)])
    (tmp_path / "b-seed2" / paired.SCORES_FILE).unlink()
    row = cells(make_report(tmp_path, "a"), 0)["b"]
    assert (row["minus a"], row["over documents"], row["better"]) == ("+0.0000 ± 0.0000", "–", "–")


def test_scores_by_document_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    """Documents of other bytes; and a file that is not of the result beside it, or not readable."""
    write_run(tmp_path, "a", 1, [(10, 20.0), (20, 40.0)])
    write_run(tmp_path, "b", 1, [(20, 40.0), (10, 20.0)])
    with pytest.raises(paired.RunError, match="b-seed1: its documents have other bytes|a-seed1"):
        make_report(tmp_path, "a")
    path = tmp_path / "b-seed1" / paired.SCORES_FILE
    path.write_text("position,tokens,bytes,sliding\n0,1,10,20.0\n0,1,20,40.001\n")
    with pytest.raises(paired.RunError, match="its sliding is 2.885438 bpb, not 2.885390; delete the folder"):
        make_report(tmp_path, "a")
    for text in ("position,tokens,bytes,quantized\n0,1,10,20.0\n", "bytes,sliding\nten,1\n", "bytes,sliding\n1\n", ""):
        path.write_text(text)
        with pytest.raises(paired.RunError, match="documents.csv: "):
            make_report(tmp_path, "a")


def test_pilot_decides_steps_and_reserve() -> None:
    """100 steps in 12.5 - 2.5 s are 10 a second; 1.5 * 2.5 s are kept: (60 - 3.8) * 10 steps."""
    pilot = {"steps": 100, "train_seconds": 12.5, "calibration_seconds": 2.5, "run_id": "a-pilot"}
    scale = ladder.measured(SCALE, pilot, 60.0)
    assert (scale.seconds, scale.reserve, scale.steps) == (60.0, 3.8, 562)
    with pytest.raises(paired.RunError, match="calibration takes"):
        ladder.measured(SCALE, pilot, 3.0)


# ---------------------------------------------------------------------------------------------------------------------
# From documents to the picture


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def long_documents(seed: int) -> list[str]:
    """Different ones, with words that CaseOps rewrites."""
    return [f"{text} The RED Dog" for text in dict.fromkeys(toy_documents(80, seed=seed)) if text.count(" ") > 10]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that prepare has made, with toy tokenizers of the names that it asks for."""
    root = tmp_path_factory.mktemp("ladder")
    train, val = toy_documents(300, seed=1), long_documents(seed=2)
    sentences = [*train, "The Cat and the RED Dog"]
    for variant in {ladder.variants.VARIANTS[name].tokenizer: ladder.variants.VARIANTS[name]
                    for name in ladder.DATA_VARIANTS}.values():  # fmt: skip
        # Operators and bytes have the ids of the published tokenizer: 4 to 7, and from 8 on.
        options = (
            {"user_defined_symbols": [*ladder.caseops.OPERATORS], "byte_fallback": True} if variant.caseops else {}
        )
        train_tokenizer(root / variant.tokenizer, sentences, 400 if variant.caseops else 96, **options)
    write_documents(root / "train.jsonl", train)
    write_documents(root / "val.jsonl", ["two  blanks are folded", "Eine Frage", *val])
    assert prepare_toys(root, "val.jsonl", "data") == 0
    return root / "data"


def prepare_toys(root: Path, val_docs: str, out: str) -> int:
    """Exports with the toy tokenizers in `root`; the script takes their lone space for that of the published one."""
    model = root / ladder.variants.VARIANTS["mp3"].tokenizer
    space = ladder.caseops.MarkerPairs.of(ladder.shards.load_tokenizer(model)).space
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "SPACE_ID", space, raising=False)
        return ladder.main(
            ["prepare", "--docs", str(root / "train.jsonl"), "--val-docs", str(root / val_docs), "--train-mb", "0.01",
             "--tokenizers", str(root), "--out", str(root / out), "--val-kb", "0.5"]
        )  # fmt: skip


def test_prepare_takes_the_same_bytes_for_every_tokenizer(data: Path) -> None:
    """Whole documents, as many bytes as asked for, equal however they are tokenized; folded blanks are left out."""
    summary = json.loads((data / ladder.DATA_FILE).read_text())
    assert {row["val_bytes"] for row in summary["variants"].values()} == {summary["val"]["text_bytes"]}
    assert {row["val_documents"] for row in summary["variants"].values()} == {summary["val"]["documents"]}
    fused, whole = (summary["variants"][name]["val_tokens"] for name in ("mp3", "caseops"))
    assert fused < whole and summary["variants"].keys() == {"sp1024", "sp8192", "caseops", "mp3"}
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


@pytest.mark.parametrize("width", [64, 96, 256])
def test_width_keeps_the_shares_of_a_head(width: int) -> None:
    """Half the heads at every width; rotary dimensions and LQER's ranks and groups in proportion."""
    for name in ("baseline", "pr489", "pr1941", "frontier"):
        full, config = ladder.load_preset(name), small(name, dataclasses.replace(SCALE, width=width))
        assert (config.model_dim, config.num_heads) == (width, full.num_heads // 2)
        assert config.rope_dims / config.head_dim == full.rope_dims / full.head_dim
        assert config.lqer_rank == math.ceil(full.lqer_rank * width / full.model_dim)
        assert config.num_layers == full.num_layers and config.mlp_mult == full.mlp_mult


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


def test_a_variation_runs_under_its_label(data: Path, tmp_path: Path, stub: list[str]) -> None:
    """In a folder of its own that the script accepts, with its settings; pilots and seeds alike."""
    out, label = tmp_path / "runs", "tiny+EMBED_WD=0.06"
    wanted = options(data, out, "--presets", f"tiny,{label}", "--seeds", "1", "--seconds", "30")
    assert states(ladder.run(wanted, stub)) == {"tiny-seed1": True, f"{label}-seed1": True}
    assert (
        (out / f"{label}-seed1" / "starts").read_text() == (out / f"{label}-pilot" / "starts").read_text() == "10.06\n"
    )
    about = json.loads((out / f"{label}-seed1" / ladder.RUN_FILE).read_text())
    assert (about["preset"], about["settings"]["PRESET"]) == (label, "tiny")
    assert tg.load_config(about["settings"] | {"RUN_ID": f"{label}-seed1"})[0].embed_wd == 0.06
    text = make_report(out)
    assert [*cells(text, 0)] == ["tiny", label] and "`NAME+KEY=VALUE` is" in text


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
    arguments[6] = "tiny+WARMUP_STEPS=5"
    assert ladder.main(arguments) == 2
    assert "WARMUP_STEPS=5 changes nothing" in capsys.readouterr().err and not (tmp_path / "runs").exists()


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
    with pytest.raises(paired.RunError, match="runs with different budget"):
        make_report(out)


@pytest.fixture(scope="module")
def other(data: Path) -> Path:
    """The same training text and tokenizers with another validation text."""
    write_documents(data.parent / "other.jsonl", long_documents(seed=3))
    assert prepare_toys(data.parent, "other.jsonl", "other") == 0
    return data.parent / "other"


def again(runs: Path, data: Path, out: Path, *words: str) -> argparse.Namespace:
    return ladder.parse_options(["rescore", "--runs", str(runs), "--data", str(data), "--out", str(out), *words])


def test_artifacts_are_scored_again_on_another_text(data: Path, other: Path, tmp_path: Path, stub: list[str]) -> None:
    """The same artifacts and settings, the other text's score; nothing that training said; and no run twice."""
    runs, out = tmp_path / "runs", tmp_path / "again"
    ladder.run(options(data, runs, "--presets", "tiny,default", "--seeds", "1,2", "--steps", "5"), stub)
    wanted = again(runs, other, out, "--threads", "3")
    for _ in range(2):
        outcomes = ladder.rescore(wanted, stub)
        assert states(outcomes) == {"default-seed1": True, "tiny-seed1": True, "tiny-seed2": True}
    assert starts(out) == dict.fromkeys(("default-seed1", "tiny-seed1", "tiny-seed2"), 1)
    assert (out / "tiny-seed1" / "starts").read_text() == "3\n"
    first, second = (json.loads((folder / "tiny-seed1" / ladder.RUN_FILE).read_text()) for folder in (runs, out))
    assert second["settings"] == first["settings"] and second["parameters"] == first["parameters"]
    theirs = json.loads((other / ladder.DATA_FILE).read_text())
    assert second["data"] == theirs | {"train": first["data"]["train"]} and theirs["val"] != first["data"]["val"]

    scores, costs = (cells(make_report(out, "default"), number) for number in (0, 1))
    assert scores["tiny"]["final bpb"] == "**2.4150 ± 0.0071**" and scores["tiny"]["minus default"] == "-0.1000"
    assert (scores["tiny"]["before quantisation"], scores["tiny"]["better"]) == ("–", "3 of 3")
    assert [costs["tiny"][key] for key in ("steps", "train s", "eval s", "time", "bytes")] == ["–", "–", "3", "–", "–"]
    text = make_report(out)
    assert "artifacts of the runs in runs, scored again" in text and "not finished" not in text
    assert first["data"]["train"]["text_sha256"][:16] in text and theirs["val"]["text_sha256"][:16] in text


def test_finished_runs_are_scored_again_under_other_settings(data: Path, tmp_path: Path, stub: list[str]) -> None:
    """A change of scoring takes the artifacts, one of quantisation the weights; one of training is refused, and one
    that changes nothing."""
    runs, out = tmp_path / "runs", tmp_path / "again"
    ladder.run(options(data, runs, "--presets", "tiny,default", "--seeds", "1", "--steps", "5"), stub)
    for change, stages in (("TTT_LORA_LR=0.001", "evaluate"), ("MATRIX_BITS=5+TTT_LORA_LR=0.001", "quantize,evaluate")):
        (outcome,) = ladder.rescore(again(runs, data, out, "--presets", "tiny", "--change", change), stub)
        assert outcome.result and outcome.job.name == f"tiny+{change}-seed1"
        assert outcome.job.places["STAGES"] == stages
        first, second = (json.loads((folder / ladder.RUN_FILE).read_text()) for folder in
                         (runs / "tiny-seed1", out / outcome.job.name))  # fmt: skip
        wanted = dict(part.split("=") for part in change.split("+"))
        assert second["settings"] == first["settings"] | wanted and second["preset"] == f"tiny+{change}"
    for change, said in (("MATRIX_LR=1", "MATRIX_LR belongs to the training"), ("EVAL_STRIDE=64", "changes nothing")):
        with pytest.raises(paired.RunError, match=said):
            ladder.rescore(again(runs, data, out, "--presets", "tiny", "--change", change), stub)


def test_scoring_again_spoils_no_earlier_run(data: Path, other: Path, tmp_path: Path, stub: list[str]) -> None:
    """Neither the runs themselves nor scores on another text; what is missing is named, and what failed stays alone."""
    runs, out = tmp_path / "runs", tmp_path / "again"
    ladder.run(options(data, runs, "--presets", "tiny", "--seeds", "1,2", "--steps", "5"), stub)
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    with pytest.raises(paired.RunError, match="holds the runs themselves"):
        ladder.rescore(again(runs, other, runs), stub)
    copied = tmp_path / "copied"
    ladder.run(options(data, copied, "--presets", "tiny", "--seeds", "1", "--steps", "5"), stub)
    one = {outcome.job.name: outcome for outcome in ladder.rescore(again(runs, data, copied), stub)}
    assert one["tiny-seed1"].result is None and "other rescored_from" in one["tiny-seed1"].message
    assert {path: path.read_bytes() for path in before} == before

    (runs / "tiny-seed1" / ladder.ARTIFACT_FILE).unlink()
    found = {outcome.job.name: outcome for outcome in ladder.rescore(again(runs, other, out), stub)}
    assert found["tiny-seed2"].result and "No such file" in found["tiny-seed1"].message
    stale = {outcome.job.name: outcome for outcome in ladder.rescore(again(runs, data, out), stub)}
    assert stale["tiny-seed2"].result is None and "other data" in stale["tiny-seed2"].message
    summary = json.loads((other / ladder.DATA_FILE).read_text())
    poor = tmp_path / "poor"
    poor.mkdir()
    (poor / ladder.DATA_FILE).write_text(json.dumps(summary | {"variants": {}}))
    with pytest.raises(paired.RunError, match="--data: no sp1024"):
        ladder.rescore(again(runs, poor, out), stub)
    (runs / ladder.SCRIPT_FILE).unlink()
    with pytest.raises(paired.RunError, match="missing, the script that made the runs"):
        ladder.rescore(again(runs, other, out), stub)


def test_the_real_script_runs_end_to_end(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One preset, three steps, at toy size and with the toy tokenizer, through a table; and its artifact once more."""
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
    assert f"{outcome.result['val_bpb']:.4f}" in make_report(out)
    (same,) = ladder.rescore(again(out, data, tmp_path / "again"))  # on the same text: the same score
    assert same.result is not None, same.message
    assert same.result["val_bpb"] == outcome.result["val_bpb"] and "steps" not in same.result
    table, picture = tmp_path / "t.md", tmp_path / "p.png"
    arguments = ["report", "--runs", str(tmp_path / "again"), "--table", str(table), "--picture", str(picture)]
    assert ladder.main([*arguments, "--against", "baseline"]) == 0 and picture.exists()
    assert f"**{outcome.result['val_bpb']:.4f}**" in table.read_text()
    (run,), _ = ladder.read_runs(tmp_path / "again")
    documents = paired.read_documents(run)  # None from a script without them; others must add up to the score
    assert documents is None or documents.bytes.tolist() == document_sizes(data)


def document_sizes(data: Path) -> list[int]:
    """UTF-8 bytes of each validation document."""
    count = json.loads((data / ladder.DATA_FILE).read_text())["val"]["documents"]
    lines = (data / ladder.DOCUMENTS_FILE).read_text().splitlines()[:count]
    return [len(json.loads(line)["text"].encode()) for line in lines]
