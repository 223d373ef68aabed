"""records/check.py and records/logs.py: made-up record folders in every log format, clean and with known defects."""

import json
import math
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from records import check, logs
from records import folder as records_folder

TARGETS, TEXT_BYTES = 40_540_160, 151_078_222  # of the sp8192 export
SEEDS = {1: 1.2304, 2: 1.2301, 3: 1.2310}  # invented scores, bits per byte
TOTALS = {1: 15_900_111, 2: 15_900_222, 3: 15_900_333}
STEPS = {1: 4001, 2: 4002, 3: 4003}
SCRIPT = 'import torch\n\n\ndef main():\n    print("example")\n\n\nif __name__ == "__main__":\n    main()\n'


def nats(bpb: float, text_bytes: float = TEXT_BYTES, targets: int = TARGETS) -> float:
    """Nats per token of a score over a text of so many bytes."""
    return bpb * math.log(2) * text_bytes / targets


def april_log(
    seed: int, bpb: float, loss: float, targets: int = TARGETS, total: int = 0, eval_ms: int = 400_000
) -> str:
    """The style with a block of settings."""
    settings = "\n".join(f"  setting_{i:02}: {i}" for i in range(30)) + f"\n  seed: {seed}\n"
    return (
        f"Hyperparameters:\n{settings}train_shards: 80\nval_tokens: {targets}\nmodel_params:35000000\n"
        "1/20000 train_loss: 9.0000 train_time: 0.0m tok/s: 17000000\n"
        f"{STEPS[seed]}/20000 val_loss: 2.4000 val_bpb: 1.2400\n"
        f"stopping_early: wallclock_cap train_time: 590000ms step: {STEPS[seed]}/20000\n"
        "diagnostic pre-quantization post-ema val_loss:2.38000000 val_bpb:1.23500000 eval_time:6000ms\n"
        f"Code size (uncompressed): {len(SCRIPT)} bytes\nCode size (compressed): 30000 bytes\n"
        "GPTQ:collected 67 Hessians in 4.5s\n"
        f"Serialized model quantized+brotli: {total - 30000} bytes\n"
        f"Total submission size quantized+brotli: {total} bytes\n"
        "diagnostic quantized val_loss:2.40000000 val_bpb:1.24500000 eval_time:9000ms\n"
        f"quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:{eval_ms}ms\n"
        f"total_eval_time:{eval_ms / 1000:.1f}s\n"
    )


def march_log(
    seed: int, bpb: float, loss: float, targets: int = TARGETS, total: int = 0, eval_ms: int = 400_000
) -> str:
    """The style with the script at the head and key:value lines."""
    return (
        f"{SCRIPT}\n{'=' * 100}\nRunning Python 3.12.3\nRunning PyTorch 2.9.1+cu128\n{'=' * 100}\n"
        "train_loader:dataset:fineweb10B_sp8192 train_shards:80\n"
        f"val_loader:shards pattern=data/fineweb_val_*.bin tokens:{targets}\nmodel_params:35000000\n"
        "world_size:8 grad_accum_steps:1\n"
        f"train_batch_tokens:524288 train_seq_len:2048 iterations:20000 max_wallclock_seconds:600.000\nseed:{seed}\n"
        "step:1/20000 train_loss:9.0000 train_time:120ms step_avg:120.00ms\n"
        f"step:{STEPS[seed]}/20000 val_loss:2.4000 val_bpb:1.2400 train_time:590000ms step_avg:120.00ms\n"
        f"stopping_early: wallclock_cap train_time:590000ms step:{STEPS[seed]}/20000\n"
        f"Serialized model: 140000000 bytes\nCode size: {len(SCRIPT)} bytes\n"
        f"Total submission size: {140000000 + len(SCRIPT)} bytes\n"
        f"Serialized model int8+zlib: {total - len(SCRIPT)} bytes (payload:17178912 payload_ratio:3.91x)\n"
        f"Total submission size int8+zlib: {total} bytes\n"
        f"final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{eval_ms}ms\n"
        f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n"
    )


def truncated_log(
    seed: int, bpb: float, loss: float, targets: int = TARGETS, total: int = 0, eval_ms: int = 400_000
) -> str:
    """Only the end of the march style, scores with four decimals."""
    text = march_log(seed, bpb, loss, targets, total, eval_ms)
    lines = text[text.index("train_loader:") :].splitlines()
    return "\n".join(line for line in lines if "_exact" not in line) + "\n"


def renamed_log(
    seed: int, bpb: float, loss: float, targets: int = TARGETS, total: int = 0, eval_ms: int = 400_000
) -> str:
    """The march style with other words for the scores."""
    text = march_log(seed, bpb, loss, targets, total, eval_ms)
    text = text.replace("final_int8_zlib_roundtrip_exact val_loss", "ttt_x vl").replace("val_bpb:", "bpb:")
    return text.replace("final_int8_zlib_roundtrip val_loss", "tc[9/9] vl") + f"total_eval_time:{eval_ms / 1000}s\n"


def own_log(seed: int, bpb: float, loss: float, targets: int = TARGETS, total: int = 0, eval_ms: int = 400_000) -> str:
    """The style of this repository's script."""
    import hashlib

    result = {
        "valid": total <= check.CAP_BYTES,
        "violations": [],
        "validity": [{"rule": "documents", "ok": True, "found": 50_000, "limit": 50_000, "source": "#2127"}],
        "seed": seed,
        "val_loss": loss,
        "val_bpb": bpb,
        "steps": STEPS[seed],
        "total_bytes": total,
        "artifact_bytes": total - 30000,
        "code_bytes": 30000,
        "ranks": 8,
        "torch": "2.13.0",
        "hardware": "8xNVIDIA H100 80GB HBM3",
        "train_seconds": 595.0,
        "eval_seconds": eval_ms / 1000,
        "val_targets": targets,
        "scored_tokens": targets,
        "val_documents": 50_000,
    }
    settings = "\n".join(f"  setting_{i:02}: {i}" for i in range(30)) + f"\n  seed: {seed}\n"
    return (
        f"{SCRIPT}\nsource bytes:{len(SCRIPT)} sha256:{hashlib.sha256(SCRIPT.encode()).hexdigest()}\n"
        "versions python:3.12.3 torch:2.13.0 numpy:2.3.5 cuda:12.8\n"
        f"config preset:default run_id:x seed:{seed} stages:train\n"
        f"{settings}data train_tokens:8000000000 val_tokens:{targets + 1} row_tokens:98304\n"
        f"score kind:quantized val_loss:2.4 val_bpb:1.24500000 tokens:{targets} bytes:{TEXT_BYTES} seconds:9\n"
        f"score kind:ttt val_loss:{loss:.6g} val_bpb:{bpb:.8f} tokens:{targets} bytes:{TEXT_BYTES} seconds:9\n"
        f"\nresult {json.dumps(result)}\n"
    )


OTHERS = ("april", "march", "truncated", "renamed")  # a folder of ours in full is in test_records_pack.py
STYLES = {"april": april_log, "march": march_log, "truncated": truncated_log, "renamed": renamed_log, "own": own_log}


def make_record(
    root: Path,
    style: str = "april",
    name: str = "2030-01-01_Example",
    scores: dict[int, float] | None = None,
    logged: Callable[[int], dict[str, Any]] = lambda seed: {},
    **changes: Any,
) -> Path:
    """A complete record folder. `logged` gives arguments of the log of a seed, `changes` keys of submission.json."""
    scores = scores or SEEDS
    folder = root / name
    folder.mkdir(parents=True)
    losses = {seed: nats(bpb) for seed, bpb in scores.items()}
    submission = {
        "author": "example",
        "github_id": "example",
        "name": "Invented values",
        "blurb": "A fixture of the tests.",
        "date": "2030-01-01",
        "track": "10min_16mb",
        "val_bpb": round(statistics.fmean(scores.values()), 8),
        "val_loss": round(statistics.fmean(losses.values()), 8),
        "val_bpb_std": round(statistics.stdev(scores.values()), 8) if len(scores) > 1 else None,
        "seeds": list(scores),
        "seed_results": {
            str(s): {"val_bpb": bpb, "val_loss": losses[s], "artifact_bytes": TOTALS[s], "steps": STEPS[s]}
            for s, bpb in scores.items()
        },
        "bytes_total": max(TOTALS[seed] for seed in scores),
        "hardware": "8xH100 80GB SXM",
        "pytorch_version": "2.9.1",
    }
    (folder / "README.md").write_text(
        f"# Record, on top of #1\n\nval_bpb {submission['val_bpb']:.8f}\n\n{seed_table(scores)}\n"
    )
    (folder / "submission.json").write_text(
        json.dumps({k: v for k, v in (submission | changes).items() if v is not None})
    )
    (folder / "train_gpt.py").write_text(SCRIPT)
    for seed, bpb in scores.items():
        values = dict(bpb=bpb, loss=losses[seed], total=TOTALS[seed]) | logged(seed)
        (folder / f"train_seed{seed}.log").write_text(STYLES[style](seed, **values))
    return folder


def seed_table(scores: dict[int, float]) -> str:
    """The results of the seeds as a README shows them, with their mean and sample deviation."""
    head = "| Seed | Steps | val_bpb | val_loss | Artifact | Train time | Eval time |\n|---|---|---|---|---|---|---|\n"
    rows = [(STEPS[s], bpb, nats(bpb), TOTALS[s]) for s, bpb in scores.items()]
    lines = [
        f"| {s} | {n:,} | {b:.8f} | {loss:.5f} | {t:,} | 590.0s | 400.0s |" for s, (n, b, loss, t) in zip(scores, rows)
    ]
    if len(scores) > 1:
        mean = [statistics.fmean(column) for column in zip(*rows)]
        lines.append(f"| **Mean** | {mean[0]:,.0f} | **{mean[1]:.8f}** | {mean[2]:.5f} | {mean[3]:,.0f} | | 400.0s |")
        lines.append(
            f"| Std | | {statistics.stdev(scores.values()):.5f} | | {statistics.stdev(r[3] for r in rows):,.0f} | | |"
        )
    return head + "\n".join(lines) + "\n"


def statuses(folder: Path, **options: Any) -> dict[str, str]:
    """rule -> status."""
    verdicts = check.check_folder(check.read_folder(folder, options.pop("not_a_record", False)), **options)
    return {verdict.rule.name: verdict.status for verdict in verdicts}


def failing(folder: Path, **options: Any) -> set[str]:
    return {rule for rule, status in statuses(folder, **options).items() if status == "fail"}


@pytest.mark.parametrize("style", OTHERS)
def test_a_clean_record_passes_in_every_log_format(tmp_path: Path, style: str) -> None:
    """No rule fails, and those that need the log are judged."""
    found = statuses(make_record(tmp_path, style))
    assert not [rule for rule, status in found.items() if status == "fail"]
    judged = (
        "implied_bytes",
        "score_in_logs",
        "mean_and_std",
        "seeds",
        "train_time",
        "eval_time",
        "size_logged",
        "steps_in_logs",
    )
    assert {rule: found[rule] for rule in judged} == dict.fromkeys(judged, "ok")


def rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def nothing(folder: Path) -> None:
    pass


# what is wrong, arguments of make_record, a change of the finished folder, rules that must fail (and no others)
DEFECTS: list[tuple[str, dict[str, Any], Callable[[Path], None], set[str]]] = [
    (
        "space counted twice",
        dict(logged=lambda s: dict(loss=nats(SEEDS[s], TEXT_BYTES * 1.17))),
        nothing,
        {"implied_bytes", "loss_in_logs", "parts_in_logs", "readme_tables"},
    ),
    (
        "plain table on CaseOps",
        dict(logged=lambda s: dict(loss=nats(SEEDS[s], 164.6e6))),
        nothing,
        {"implied_bytes", "loss_in_logs", "parts_in_logs", "readme_tables"},
    ),
    ("10,000 documents", dict(logged=lambda s: dict(targets=9_662_464)), nothing, {"implied_bytes", "coverage"}),
    (
        "json of another run",
        dict(val_bpb=1.2, seed_results=None),
        nothing,
        {"score_in_logs", "mean_and_std", "readme_agrees"},
    ),
    (
        "seed of another run",
        dict(),
        rewrite("submission.json", lambda t: t.replace("1.2301", "1.2222")),
        {"score_in_logs", "readme_agrees", "implied_bytes"},
    ),
    ("no val_bpb", dict(val_bpb=None), nothing, {"val_bpb"}),
    ("val_bpb as text", dict(val_bpb="1.2305"), nothing, {"val_bpb"}),
    ("no bytes_total", dict(bytes_total=None), nothing, {"bytes_total"}),
    ("bpb under val_loss", dict(val_loss=1.2305), nothing, {"val_loss_unit", "loss_in_logs", "implied_bytes"}),
    ("no author", dict(author=None), nothing, {"json_fields"}),
    ("date in words", dict(date="May 1"), nothing, {"json_fields"}),
    (
        "log over the cap",
        dict(logged=lambda s: dict(total=16_000_001) if s == 2 else {}),
        nothing,
        {"size_logged", "sizes_in_logs", "readme_tables"},
    ),
    ("artifact over the cap", dict(bytes_total=16_000_001), nothing, {"size_stated", "sizes_in_logs"}),
    ("two seeds", dict(scores={1: 1.2304, 2: 1.2301}), nothing, {"seeds"}),
    ("third log missing", dict(), drop("train_seed3.log"), {"seeds"}),
    ("slow evaluation", dict(logged=lambda s: dict(eval_ms=688_000)), nothing, {"eval_time", "readme_tables"}),
    (
        "slow training",
        dict(),
        rewrite("train_seed1.log", lambda t: t.replace("590000ms", "631000ms")),
        {"train_time", "readme_tables"},
    ),
    (
        "mixed settings",
        dict(),
        rewrite("train_seed1.log", lambda t: t.replace("setting_07: 7", "setting_07: 8")),
        {"same_settings"},
    ),
    (
        "other model",
        dict(),
        rewrite("train_seed1.log", lambda t: t.replace("model_params:35", "model_params:36")),
        {"same_parameters"},
    ),
    (
        "other steps",
        dict(),
        rewrite("train_seed1.log", lambda t: t.replace("4001/", "4011/")),
        {"steps_in_logs", "readme_tables"},
    ),
    (
        "log of another seed",
        dict(),
        rewrite("train_seed1.log", lambda t: t.replace("seed: 1", "seed: 3")),
        {"seed_names", "seeds", "score_in_logs"},
    ),
    ("wrong deviation", dict(val_bpb_std=0.1), nothing, {"mean_and_std"}),
    (
        "score before quantisation",
        dict(scores={1: 1.235, 2: 1.2301, 3: 1.231}, logged=lambda s: dict(bpb=1.25) if s == 1 else {}),
        nothing,
        {"score_in_logs", "implied_bytes", "mean_and_std"},
    ),
    ("one GPU", dict(hardware="1xH100"), nothing, {"hardware"}),
    ("no README", dict(), drop("README.md"), {"files"}),
    ("no script", dict(), drop("train_gpt.py"), {"files"}),
    ("broken script", dict(), rewrite("train_gpt.py", lambda t: "def"), {"script_compiles", "code_size"}),
    (
        "installs packages",
        dict(),
        rewrite("train_gpt.py", lambda t: t + "import subprocess\nsubprocess.run(['pip', 'install', 'x'])\n"),
        {"no_installs", "code_size"},
    ),
    (
        "submission.json cut",
        dict(),
        rewrite("submission.json", lambda t: t[:-9]),
        {"json_fields", "val_bpb", "bytes_total"},
    ),
    ("spaces in the name", dict(name="2030-01-01_A b"), nothing, {"folder_name"}),
    (
        "log cut before the score",
        dict(),
        rewrite("train_seed1.log", lambda t: t[: t.index("diagnostic quantized")]),
        {"score_in_logs", "seeds", "parts_in_logs", "readme_tables"},
    ),
]


@pytest.mark.parametrize("case", DEFECTS, ids=lambda case: case[0].replace(" ", "_"))
def test_each_known_defect_fails_the_rules_that_it_breaks_and_no_other(tmp_path: Path, case: tuple) -> None:
    """One defect at a time in an otherwise clean record."""
    _, arguments, change, expected = case
    folder = make_record(tmp_path, **arguments)
    change(folder)
    assert failing(folder) == expected


def test_small_slips_are_warnings(tmp_path: Path) -> None:
    """The best seed as the headline, a mean of rounded scores, a population deviation, a log without a seed."""
    assert statuses(make_record(tmp_path / "a", val_bpb=1.2301))["score_in_logs"] == "warn"
    exact = {1: 1.23044, 2: 1.23014, 3: 1.23104}
    found = statuses(
        make_record(tmp_path / "b", scores=exact, val_bpb=1.2305, val_bpb_std=statistics.pstdev(exact.values()))
    )
    assert found["score_in_logs"] == "ok" and found["mean_and_std"] == "warn"
    assert statuses(make_record(tmp_path / "c", scores=exact, val_bpb=1.23051))["score_in_logs"] == "warn"
    folder = make_record(tmp_path / "d")
    for seed in SEEDS:
        text = (folder / f"train_seed{seed}.log").read_text().replace(f"  seed: {seed}\n", "")
        (folder / f"train_seed{seed}.log").unlink()
        (folder / f"{'abc'[seed - 1]}.log").write_text(text)
    assert statuses(folder)["seeds"] == "warn" and not failing(folder)


def test_the_causes_of_wrong_byte_counts_are_named(tmp_path: Path) -> None:
    """The two known tables, by the bytes that they imply."""
    for factor, word in ((1.17, "counted twice"), (164.6e6 / TEXT_BYTES, "plain byte table")):
        folder = make_record(tmp_path / word, logged=lambda s: dict(loss=nats(SEEDS[s], TEXT_BYTES * factor)))
        assert word in check.implied_bytes(check.read_folder(folder, False)).found


def test_sources_in_logs_must_be_the_script(tmp_path: Path) -> None:
    """Equal, other comments, another program, another one per seed, a hash that is not that of the text."""
    folder = make_record(tmp_path, "march")
    assert statuses(folder)["same_source"] == "ok"
    (folder / "train_gpt.py").write_text("# a comment\n" + SCRIPT)
    assert statuses(folder)["same_source"] == "warn"
    (folder / "train_gpt.py").write_text(SCRIPT.replace("example", "other"))
    assert statuses(folder)["same_source"] == "fail"
    rewrite("train_seed1.log", lambda text: text.replace("example", "mixed"))(folder)
    assert "2 different sources" in check.same_source(check.read_folder(folder, False)).found
    own = make_record(tmp_path / "own", "own")
    rewrite("train_seed1.log", lambda text: text.replace('print("example")', 'print("edited!")'))(own)
    assert "does not have the hash" in check.same_source(check.read_folder(own, False)).found


def test_settings_that_changed_between_the_stages_of_one_run_are_found(tmp_path: Path) -> None:
    """A log of ours grows when stages are started one by one."""
    folder = make_record(tmp_path, "own")
    log = folder / "train_seed1.log"
    log.write_text(log.read_text() + log.read_text().replace("setting_07: 7", "setting_07: 8"))
    assert "setting_07: 7, 8" in check.same_settings(check.read_folder(folder, False)).found


def test_a_run_that_calls_itself_invalid_fails(tmp_path: Path) -> None:
    """Of our own logs, and one that never came to its result line."""
    folder = make_record(tmp_path, "own")
    rewrite("train_seed1.log", lambda text: text.replace('"ok": true', '"ok": false'))(folder)
    assert "own_report" in failing(folder)
    folder = make_record(tmp_path / "cut", "own")
    rewrite("train_seed1.log", lambda text: text[: text.index("result {")])(folder)
    assert "own_report" in failing(folder)


def test_a_folder_that_is_no_record_is_spared_what_only_records_must_meet(tmp_path: Path) -> None:
    """By its track or by the flag; bytes and agreement are still checked."""
    slow = dict(scores={1: 1.2304, 2: 1.2301}, hardware="1xGPU", logged=lambda s: dict(eval_ms=9_000_000))
    assert failing(make_record(tmp_path, **slow)) == {"seeds", "hardware", "eval_time", "readme_tables"}
    folder = make_record(tmp_path / "b", track="non-record-unlimited-compute-16mb", **slow)
    assert failing(folder) == {"readme_tables"} and statuses(folder)["seeds"] == "waived"
    assert failing(tmp_path / "2030-01-01_Example", not_a_record=True) == {"readme_tables"}
    wrong = make_record(tmp_path / "c", track="non-record", logged=lambda s: dict(targets=9_662_464))
    assert failing(wrong) == {"implied_bytes", "coverage"}


def test_comparison_with_a_reference(tmp_path: Path) -> None:
    """A clear gain passes both tests, a small one only the board's, none neither."""
    reference = check.read_folder(make_record(tmp_path / "old"), False)
    for gain, written, board in ((0.0100, "ok", "ok"), (0.0015, "fail", "ok"), (-0.0010, "fail", "warn")):
        better = {seed: round(bpb - gain, 8) for seed, bpb in SEEDS.items()}
        found = statuses(make_record(tmp_path / str(gain), scores=better), reference=reference)
        assert (found["record_margin"], found["board_practice"]) == (written, board)


def test_comparison_across_tokenizers_is_in_bpb(tmp_path: Path) -> None:
    """Nats per token do not compare; the margin is converted by the folder's own tokens."""
    targets = 47_851_520
    rows = lambda seed: dict(targets=targets, loss=nats(SEEDS[seed], targets=targets))
    other = check.read_folder(make_record(tmp_path / "caseops", logged=rows), False)
    mine = check.read_folder(make_record(tmp_path / "mine", scores={s: b - 0.01 for s, b in SEEDS.items()}), False)
    found = records_folder.compare(mine, other)
    assert found and found.unit == "bpb"
    assert found.gain_bpb == pytest.approx(0.01) and found.gain_nats == pytest.approx(
        0.01 * math.log(2) * 3.7266, rel=1e-3
    )


def test_welch_equals_the_textbook_formula() -> None:
    """The statistic and its degrees of freedom by hand; one seed gives no test, equal seeds a certain one."""
    new, old, margin = [1.061, 1.0615, 1.0608], [1.067, 1.0664, 1.0668, 1.0671], 0.002
    a, b = statistics.variance(new) / 3, statistics.variance(old) / 4
    t = (statistics.fmean(old) - statistics.fmean(new) - margin) / (a + b) ** 0.5
    df = (a + b) ** 2 / (a**2 / 2 + b**2 / 3)
    found = records_folder.welch(new, old, margin)
    assert found and (found.t, found.df) == pytest.approx((t, df), rel=1e-9)
    assert 0 < found.p < 0.01 < records_folder.welch(new, old, 0.0055).p
    assert records_folder.welch([1.0], old, 0.0) is None
    assert records_folder.welch([1.0, 1.0], [1.1, 1.1], 0.0).p == 0.0


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0, 1, 2; JSON; one clear line for an unusable folder."""
    good, bad = make_record(tmp_path / "good"), make_record(tmp_path / "bad", val_bpb=None)
    assert check.main([str(good)]) == 0
    assert "FAIL: 0" in capsys.readouterr().out
    assert check.main([str(good), str(bad), "--json"]) == 1
    reports = json.loads(capsys.readouterr().out)
    assert [report["passed"] for report in reports] == [True, False]
    assert {"rule", "status", "found", "number", "strength", "source"} <= reports[0]["verdicts"][0].keys()
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "none", tmp_path / "empty"):
        assert check.main([str(place)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and str(place) in error


def test_damaged_folders_never_crash_the_checker(tmp_path: Path) -> None:
    """Any file cut anywhere, bytes changed, JSON values of other types: findings, not exceptions."""
    generator = random.Random(0)
    values = [None, True, "x", [], {}, [1, {}], {"1": None}, {"a": {"val_bpb": "n"}}, float("inf"), -1, 10**30]
    for number in range(60):
        folder = make_record(tmp_path / str(number), generator.choice(list(STYLES)))
        name = generator.choice(["submission.json", "train_seed1.log", "train_gpt.py", "README.md", "keys"])
        if name == "keys":
            submission = json.loads((folder / "submission.json").read_text())
            for key in generator.sample(list(submission), 3):
                submission[key] = generator.choice(values)
            (folder / "submission.json").write_text(json.dumps(submission))
        else:
            data = bytearray((folder / name).read_bytes()[: generator.randrange(4000)])
            for _ in range(len(data) // 50):
                data[generator.randrange(len(data))] = generator.randrange(256)
            (folder / name).write_bytes(data)
        assert len(statuses(folder)) == len(check.RULES)


def test_code_in_a_log_is_not_taken_for_facts() -> None:
    """A script whose text looks like log lines, at the head of a log of ours."""
    import hashlib

    lines = "Total submission size int8+zlib: 99 bytes\nfinal_x val_loss:1.0000 val_bpb:0.5000\nseed: 77"
    script = f'x = """\n{lines}\n"""\n# ä\n'
    digest = hashlib.sha256(script.encode()).hexdigest()
    head = (
        f"{script}\nsource bytes:{len(script.encode())} sha256:{digest}\nconfig preset:tiny run_id:a seed:5 stages:x\n"
    )
    log = logs.parse_log(head + "score kind:ttt val_loss:2.5 val_bpb:1.25000000 tokens:1 bytes:1 seconds:1\n")
    assert log.facts["source_found"] and log.facts["seed"] == 5
    assert "total_bytes" not in log.facts and [score.bpb for score in log.scores] == [1.25]


def test_packed_source_is_found_in_a_log(tmp_path: Path) -> None:
    """Latin-1 bytes, as the packed script is logged."""
    import hashlib

    script = b"#coding:latin1\ns='\xe9\x85\xff\x0b'\n"
    path = tmp_path / "log.txt"
    head = script.decode("latin1") + f"\nsource bytes:{len(script)} sha256:{hashlib.sha256(script).hexdigest()}\n"
    path.write_bytes(head.encode())
    assert logs.logged_source(path) == script


@pytest.mark.parametrize(
    ("line", "kind", "bpb"),
    [
        ("step:100/20000 val_loss:2.1000 val_bpb:1.2000 train_time:1ms", "running", 1.2),
        ("100/20000 val_loss: 2.1000 val_bpb: 1.2000", "running", 1.2),
        ("  ttt_chunk [1/99] bpb=1.200000 time=1.0s", "running", 1.2),
        ("DIAGNOSTIC post_ema val_loss:2.1 val_bpb:1.2 eval_time:9ms", "averaged", 1.2),
        ("pre-quantization post-ema val_loss:2.10000000 val_bpb:1.20000000 eval_time:9ms", "averaged", 1.2),
        ("quantized val_loss:2.10000000 val_bpb:1.20000000 eval_time:9ms", "quantized", 1.2),
        ("final_int6_zstd_roundtrip_exact val_loss:2.10000000 val_bpb:1.20000000", "quantized", 1.2),
        ("final_sliding_window val_loss:2.1 val_bpb:1.2 eval_time:9ms stride:64", "final", 1.2),
        ("legal_ttt_exact val_loss:2.10000000 val_bpb:1.20000000", "final", 1.2),
        ("ttt_sliding:done val_loss=2.100000 val_bpb=1.200000 elapsed=9.0s", "final", 1.2),
        ("ttt_x vl:2.10000000 bpb:1.20000000", "final", 1.2),
        ("Final BPB: 1.2000", "final", 1.2),
        ("Quantized BPB (no XSA): 1.200000", "quantized", 1.2),
    ],
)
def test_score_lines_of_all_known_spellings(line: str, kind: str, bpb: float) -> None:
    """Kind and value of single lines."""
    (score,) = logs.parse_log(f"noise\n{line}\n").scores
    assert (score.kind, score.bpb) == (kind, bpb)


# ------------------------------------------------------------------------------------------------------------
# WHAT OTHER PEOPLE'S FOLDERS GET WRONG, ONE FIGURE AT A TIME
# ------------------------------------------------------------------------------------------------------------


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Replaces a text that must be there."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text, f"{old!r} is not in {name}"
        (folder / name).write_text(text.replace(old, new))

    return change


def every_log(change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for log in folder.glob("train_seed*.log"):
            log.write_text(change(log.read_text()))

    return apply


def state(**figures: Any) -> dict[str, Any]:
    """Arguments of make_record: figures of each seed in submission.json, beside those that every record states."""
    losses = {seed: nats(bpb) for seed, bpb in SEEDS.items()}
    rows = {
        str(s): {"val_bpb": b, "val_loss": losses[s], "artifact_bytes": TOTALS[s], "steps": STEPS[s]} | figures
        for s, b in SEEDS.items()
    }
    return dict(seed_results=rows)


TWO_PASSES = "quantized_sliding_window val_loss:2.39000000 val_bpb:1.24000000 eval_time:250000ms\nquantized_ttt_phased"
# what is wrong, style, arguments of make_record, a change of the finished folder, the rule that must fail, its words
MISTAKES: list[tuple[str, str, dict[str, Any], Callable[[Path], None], str, str]] = [
    (
        "code of another length",
        "march",
        {},
        edit("train_gpt.py", "main()\n", "main(1)\n"),
        "code_size",
        "bytes of code",
    ),
    (
        "minified code of another length",
        "april",
        {},
        edit("train_gpt.py", "print", "pprint"),
        "code_size",
        "bytes of code",
    ),
    (
        "no code counted",
        "march",
        {},
        every_log(lambda t: t.replace(f"Code size: {len(SCRIPT)}", "Code size: 0")),
        "code_size",
        "0 bytes",
    ),
    (
        "compressed code beyond belief",
        "april",
        {},
        every_log(lambda t: t.replace("(compressed): 30000", "(compressed): 40")),
        "code_size",
        "40 bytes",
    ),
    ("code bytes of submission.json", "march", dict(bytes_code=len(SCRIPT) + 1), nothing, "code_in_logs", "bytes_code"),
    ("table: steps", "april", {}, edit("README.md", "| 2 | 4,002", "| 2 | 4,012"), "readme_tables", "seed 2, steps"),
    ("table: bytes", "april", {}, edit("README.md", "15,900,222", "15,900,322"), "readme_tables", "artifact"),
    (
        "table: score",
        "april",
        {},
        edit("README.md", "| 3 | 4,003 | 1.2310", "| 3 | 4,003 | 1.2311"),
        "readme_tables",
        "val_bpb",
    ),
    ("table: loss", "march", {}, edit("README.md", f"{nats(1.2304):.5f}", "3.17651"), "readme_tables", "val_loss"),
    (
        "table: seconds of training",
        "april",
        {},
        edit("README.md", "| 15,900,111 | 590.0s", "| 15,900,111 | 580.0s"),
        "readme_tables",
        "train time",
    ),
    (
        "table: seconds of evaluation",
        "april",
        {},
        edit("README.md", "590.0s | 400.0s", "590.0s | 300.0s"),
        "readme_tables",
        "eval time",
    ),
    (
        "table: mean",
        "april",
        {},
        edit("README.md", "| 15,900,222 | | 400.0s |", "| 15,900,223 | | 401.0s |"),
        "readme_tables",
        "mean of",
    ),
    (
        "table: deviation",
        "april",
        {},
        edit("README.md", "| Std | | 0.00046", "| Std | | 0.00049"),
        "readme_tables",
        "std of val_bpb",
    ),
    (
        "headline pair",
        "april",
        dict(val_loss=round(nats(1.2305, TEXT_BYTES * 1.17), 5)),
        lambda folder: [log.unlink() for log in folder.glob("*.log")],
        "implied_bytes",
        "bytes per token",
    ),
    (
        "pair in the README",
        "march",
        {},
        edit("README.md", f"{nats(1.2304):.5f}", f"{nats(1.2304, 164.6e6):.5f}"),
        "implied_bytes",
        "README, seed 1",
    ),
    ("artifact_bytes at the top", "april", dict(artifact_bytes=15_800_000), nothing, "sizes_in_logs", "artifact_bytes"),
    (
        "mean of the sizes",
        "april",
        dict(artifact_bytes_mean=15_900_322),
        nothing,
        "sizes_in_logs",
        "artifact_bytes_mean",
    ),
    (
        "total in a line of its own style",
        "march",
        {},
        every_log(lambda t: re.sub(r"Total submission size int8\+zlib: \d+ bytes", "artifact_bytes: 15,900,999", t)),
        "sizes_in_logs",
        "15,900,999",
    ),
    (
        "seed in a line of pairs",
        "march",
        {},
        edit("train_seed1.log", "\nseed:1\n", "\nwall:600s seed:7\n"),
        "seed_names",
        "seed 7",
    ),
    (
        "scores by seed",
        "april",
        dict(seed_results=None, val_bpb_seeds={"1": 1.2304, "2": 1.2399, "3": 1.231}),
        nothing,
        "score_in_logs",
        "seed 2",
    ),
    (
        "scores in a list",
        "april",
        dict(seed_results=None, val_bpb_seeds=[1.2304, 1.2399, 1.231]),
        nothing,
        "score_in_logs",
        "seed 2",
    ),
    ("one seed twice", "april", dict(seeds=[1, 2, 3, 3]), nothing, "seeds", "seed 3 twice"),
    (
        "one key twice",
        "april",
        {},
        edit("submission.json", '"2": {"val_bpb"', '"1": {"val_bpb"'),
        "seeds",
        "seed 1 twice",
    ),
    (
        "one row twice",
        "april",
        dict(seed_results=[dict(seed=s, val_bpb=SEEDS[s]) for s in (1, 2, 3, 3)]),
        nothing,
        "seeds",
        "seed 3 twice",
    ),
    (
        "one seed in two logs",
        "april",
        {},
        lambda folder: (folder / "train_seed3.log").write_text(april_log(2, 1.2302, nats(1.2302), total=TOTALS[3])),
        "seeds",
        "[1, 2, 2]",
    ),
    (
        "one seed in two logs of other names",
        "april",
        {},
        lambda folder: [
            (folder / f"run{i}.txt").write_text(
                (folder / f"train_seed{i}.log").read_text().replace("seed: 3", "seed: 2")
            )
            and (folder / f"train_seed{i}.log").unlink()
            for i in SEEDS
        ],
        "seeds",
        "2 logs with a final score",
    ),
    (
        "one run under two seeds",
        "march",
        dict(logged=lambda s: dict(bpb=1.2304, loss=nats(1.2304), total=TOTALS[1])),
        every_log(lambda t: t.replace("1.2400", "1.2401")),
        "seeds",
        "one run under two seeds",
    ),
    (
        "minutes of training",
        "april",
        {},
        every_log(lambda t: re.sub(r"stopping_early.*", "4001/20000 train_loss: 2.4 train_time: 19.8m tok/s: 1", t)),
        "train_time",
        "1188",
    ),
    (
        "passes of one evaluation",
        "april",
        dict(logged=lambda s: dict(eval_ms=400_000)),
        every_log(lambda t: t.replace("quantized_ttt_phased", TWO_PASSES)),
        "eval_time",
        "quantized_sliding_window + quantized_ttt",
    ),
    ("seconds per seed", "april", state(eval_time_s=300.0), nothing, "times_in_logs", "300"),
    ("milliseconds per step", "march", state(step_avg_ms=130.0), nothing, "times_in_logs", "130"),
    ("mean of the steps", "april", dict(train_steps_mean=4005.0), nothing, "steps_in_logs", "train_steps_mean"),
    ("before quantisation", "april", state(pre_quant_val_bpb=1.2351), nothing, "parts_in_logs", "1.2351"),
    ("quantised", "april", state(quantized_val_bpb=1.2451), nothing, "parts_in_logs", "1.2451"),
    ("deviation of the losses", "april", dict(val_loss_std=0.01), nothing, "loss_std", "0.01"),
]


@pytest.mark.parametrize(
    "line",
    [
        "Total submission size int8+zlib: {} bytes",
        "Total submission size: {} bytes",
        "INT7+zlib model: 15,000,000 bytes | Total submission: {} bytes",
        "final_artifact_bytes: {}",
        "artifact size: {} bytes",
        "submission_artifact_size={}",
        "Total artifact size: {} bytes",
        "total_bytes={}",
        "TOTAL SUBMISSION BYTES (code + model): {}",
    ],
)
def test_total_lines_of_all_known_spellings(line: str) -> None:
    """With and without commas."""
    for text in ("15912345", "15,912,345"):
        assert logs.parse_log(f"noise\n{line.format(text)}\nnoise 15,000,001\n").total_bytes == 15_912_345


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case[0].replace(" ", "_"))
def test_a_wrong_figure_fails_the_rule_that_knows_it(tmp_path: Path, case: tuple) -> None:
    """Each in an otherwise clean folder, with words that say which figure."""
    _, style, arguments, change, rule, words = case
    folder = make_record(tmp_path, style, **arguments)
    change(folder)
    found = {v.rule.name: v for v in check.check_folder(check.read_folder(folder, False))}[rule]
    assert found.status == "fail" and words in found.found


def test_calibration_in_other_words_is_read(tmp_path: Path) -> None:
    """A last read of training data behind the budget is a warning, whatever the line looks like."""
    for line in (
        "gptq:hessians collected 67 layers time=37.5s",
        "gptq:collected hessians for 67 layers in 37.5s",
        "gptq:calibrated 67 layers in 37.5s",
    ):
        log = logs.parse_log(april_log(1, 1.2, 3.0).replace("GPTQ:collected 67 Hessians in 4.5s", line))
        assert log.facts["calibration_s"] == 37.5
    folder = make_record(tmp_path)
    every_log(lambda text: text.replace("in 4.5s", "in 37.5s"))(folder)
    assert statuses(folder)["calibration_time"] == "warn"


def test_figures_that_are_right_in_other_forms_raise_no_alarm(tmp_path: Path) -> None:
    """A score rounded more coarsely in JSON than in the README; settings made from the seed; a budget a second
    shorter; a last step that ends late; a repetition in further logs; a population's deviation; approximate cells."""
    coarse = {1: 1.1060, 2: 1.1061, 3: 1.1062}
    exact = {1: 1.10597186, 2: 1.10612345, 3: 1.10618888}
    folder = make_record(tmp_path / "a", scores=coarse, logged=lambda s: dict(bpb=exact[s], loss=nats(exact[s])))
    (folder / "README.md").write_text(f"#1: val_bpb {statistics.fmean(exact.values()):.8f}\n{seed_table(exact)}")
    assert statuses(folder)["readme_agrees"] == statuses(folder)["readme_tables"] == "ok"
    folder = make_record(tmp_path / "b")
    edit("train_seed1.log", "setting_07: 7", "setting_07: 8")(folder)
    assert "same_settings" in failing(folder)
    (folder / "train_gpt.py").write_text(SCRIPT + "setting_07 = 7 + (seed == 1)\n")
    assert statuses(folder)["same_settings"] == "ok"
    folder = make_record(tmp_path / "c")
    every_log(lambda t: t.replace("  setting_07: 7", "  max_wallclock_seconds: 600.0"))(folder)
    edit("train_seed1.log", "max_wallclock_seconds: 600.0", "max_wallclock_seconds: 599.0")(folder)
    edit("train_seed2.log", "train_time: 590000ms", "train_time: 600200ms")(folder)
    found = statuses(folder)
    assert found["same_settings"] == found["train_time"] == "warn"
    folder = make_record(tmp_path / "d")
    (folder / "rerun_seed2.log").write_text(april_log(2, 1.2299, nats(1.2299), total=15_900_777))
    table = (
        "| Seed | Re-run val_bpb | Artifact | Steps |\n|---|---|---|---|\n| 2 | 1.22990000 | 15,900,777 | ~4,000 |\n"
    )
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\n" + table)
    assert statuses(folder)["readme_tables"] == "ok"
    edit("README.md", "15,900,777", "15,900,778")(folder)
    assert statuses(folder)["readme_tables"] == "fail"
    folder = make_record(tmp_path / "e")
    edit("README.md", "| Std | | 0.00046", f"| Std | | {statistics.pstdev(SEEDS.values()):.5f}")(folder)
    assert statuses(folder)["readme_tables"] == "warn"
    # The mean of the scores at the last step, where the logs also state those after averaging.
    folder = make_record(tmp_path / "f", pre_quant_val_bpb=1.2412)
    for seed, bpb in ((1, "1.2411"), (2, "1.2412"), (3, "1.2413")):
        edit(f"train_seed{seed}.log", "val_bpb: 1.2400", f"val_bpb: {bpb}")(folder)
    assert statuses(folder)["parts_in_logs"] == "ok"
    edit("submission.json", "1.2412", "1.2415")(folder)
    assert statuses(folder)["parts_in_logs"] == "fail"


def test_the_size_of_a_script_that_is_not_that_of_the_logs_fails_one_rule(tmp_path: Path) -> None:
    """bytes_code is right for the file here: code_size says that the logs are of another, code_in_logs warns."""
    longer = SCRIPT + "main()\n"
    folder = make_record(tmp_path, "march", bytes_code=len(longer))
    (folder / "train_gpt.py").write_text(longer)
    assert (statuses(folder)["code_size"], statuses(folder)["code_in_logs"]) == ("fail", "warn")
    edit("submission.json", f'"bytes_code": {len(longer)}', f'"bytes_code": {len(longer) + 1}')(folder)
    assert statuses(folder)["code_in_logs"] == "fail"


def test_a_wrong_figure_is_shown_with_the_nearest_one_of_the_log(tmp_path: Path) -> None:
    """Of all scores that a column may mean."""
    folder = make_record(tmp_path)
    table = "| Seed | Pre-TTT bpb |\n|---|---|\n| 1 | 1.24510 |\n"
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\n" + table)
    found = {v.rule.name: v for v in check.check_folder(check.read_folder(folder, False))}["readme_tables"]
    assert found.status == "fail" and "1.24510; the log says 1.245" in found.found


def test_numbers_without_a_rule_are_looked_up_or_named(tmp_path: Path) -> None:
    """In settings by their name, in the logs by their value, as a mean over them or as a difference of cells."""
    judge = lambda folder: check.unjudged_numbers(check.read_folder(folder, False))
    assert judge(make_record(tmp_path / "plain")).found == "no further numbers"
    further = dict(setting_12=12, model_params=35_000_000, sizes={"model": TOTALS[2] - 30_000}, mean_steps=4002)
    further |= dict(mean_ttt=round(statistics.fmean(SEEDS.values()), 5), eval_ms=400_000, quantized_loss=2.4)
    folder = make_record(tmp_path / "known", **further)
    table = "| Seed | Gain | Before | After |\n|---|---|---|---|\n| 1 | -0.0146 | 1.24500 | 1.23040 |\n"
    rewrite("README.md", lambda text: f"{text}\n{table}")(folder)
    found = judge(folder)
    names = ("mean_steps", "quantized_loss")  # too short to be looked up by their value
    assert found.status == "unknown" and all(name in found.found for name in names)
    assert "logs: 8; not" in found.found and found.found.count(";") == len(names)
    for name, old, new in (
        ("submission.json", '"setting_12": 12', '"setting_12": 13'),
        ("submission.json", str(TOTALS[2] - 30_000), str(TOTALS[2] - 30_001)),
        ("submission.json", '"mean_ttt": 1.2305', '"mean_ttt": 1.2306'),
        ("README.md", "-0.0146", "-0.0156"),
        ("README.md", "| 1.24500 | 1.23040 |", "| 1.24600 | 1.23140 |"),
    ):
        before = (folder / name).read_text()
        edit(name, old, new)(folder)
        assert judge(folder).found.count(";") > len(names)
        (folder / name).write_text(before)
    rewrite("README.md", lambda text: text + "\n| Part | Bytes |\n|---|---|\n| x | 12 |\n")(folder)
    assert "tables of the README without seeds: 1" in judge(folder).found


def test_a_stated_figure_that_no_log_has_is_not_called_right(tmp_path: Path) -> None:
    """Unknown, with its name: of all seeds, of one, and of a mean where a log is missing."""
    judge = lambda folder: check.steps_in_logs(check.read_folder(folder, False))
    folder = make_record(tmp_path, train_steps_mean=4002.0)
    edit("train_seed3.log", "stopping_early", "stopping")(folder)
    edit("train_seed3.log", "4003/20000 val_loss", "4003/20000 loss")(folder)
    assert judge(folder).status == "unknown"
    assert "seed 3: no steps" in judge(folder).found and "train_steps_mean: not every seed" in judge(folder).found
    every_log(lambda text: re.sub(r"stopping_early|\d+/20000 val_loss", "x", text))(folder)
    assert judge(folder).found == "seed 1, seed 2, seed 3, train_steps_mean: no steps in the logs"


def test_files_outside_of_the_folder_are_found_in_a_git_checkout(tmp_path: Path) -> None:
    """--base: one new folder and nothing else, committed or not; without it the rule is not judged."""
    repository = tmp_path / "checkout"
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *words],
        cwd=repository,
        check=True,
        capture_output=True,
    )
    repository.mkdir()
    git("init", "-q", "-b", "main")
    (repository / "train_gpt.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "base")
    folder = make_record(repository / "records" / "track_10min_16mb")
    judge = lambda: check.one_new_folder(check.read_folder(folder, False), "main")
    assert judge().status == "ok" and statuses(folder)["one_new_folder"] == "unknown"
    git("checkout", "-q", "-b", "mine")
    git("add", ".")
    git("commit", "-q", "-m", "record")
    assert judge().status == "ok"
    (repository / "train_gpt.py").write_text("x = 2\n")
    assert judge().status == "fail" and "train_gpt.py" in judge().found
    git("checkout", "-q", "train_gpt.py")
    make_record(repository / "records" / "track_10min_16mb", name="2030-01-02_Another")
    assert judge().status == "fail" and "2030-01-02_Another" in judge().found
    assert check.one_new_folder(check.read_folder(folder, False), "mine").status == "fail"  # there already
    assert "cannot compare" in check.one_new_folder(check.read_folder(folder, False), "nowhere").found


def test_scripts_that_only_a_newer_python_reads_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes inside an f-string of the same kind: Python 3.12 and later. The version that the logs state is tried."""
    if sys.version_info >= (3, 12):
        pytest.skip("this Python reads them")
    folder = make_record(tmp_path, "march")
    script = SCRIPT + "print(f'{'x'}')\n"
    (folder / "train_gpt.py").write_text(script)
    for said, status, words in (
        ("", "warn", "compiles with Python 3.12"),
        ("SyntaxError: y", "fail", "either: SyntaxError"),
        (None, "unknown", "is not here to try"),
    ):
        monkeypatch.setattr(check, "compile_elsewhere", lambda path, python, said=said: said)
        found = check.script_compiles(check.read_folder(folder, False))
        assert found.status == status and words in found.found
    every_log(lambda text: text.replace("Python 3.12.3", "Python 3.11.9"))(folder)
    found = check.script_compiles(check.read_folder(folder, False))
    assert found.status == "fail" and "3.11, which a log states" in found.found


def test_a_script_is_compiled_with_the_older_python_that_a_log_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that one is here; without it, this Python decides."""
    folder = make_record(tmp_path, "march")
    every_log(lambda text: text.replace("Python 3.12.3", "Python 3.9.1"))(folder)
    for said, status in (("SyntaxError: y", "fail"), ("", "ok"), (None, "ok")):
        tried: list[str] = []
        answer = lambda path, python, tried=tried, said=said: tried.append(python) or said
        monkeypatch.setattr(check, "compile_elsewhere", answer)
        assert check.script_compiles(check.read_folder(folder, False)).status == status and tried == ["python3.9"]


def test_another_python_compiles_a_script_without_running_it(tmp_path: Path) -> None:
    """Empty, its complaint, or None where there is no such Python."""
    script = tmp_path / "train_gpt.py"
    script.write_text("import sys; sys.exit(3)\n")
    assert check.compile_elsewhere(script, sys.executable) == ""
    script.write_text("def\n")
    assert "SyntaxError" in (check.compile_elsewhere(script, sys.executable) or "")
    assert check.compile_elsewhere(script, "python0.1") is None
