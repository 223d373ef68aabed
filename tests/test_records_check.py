"""records/check.py and records/logs.py: made-up record folders in every log format, clean and with known defects."""

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from records import check, logs

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
        "Code size (uncompressed): 150000 bytes\nCode size (compressed): 30000 bytes\n"
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
        "Serialized model: 140000000 bytes\nCode size: 30000 bytes\nTotal submission size: 140030000 bytes\n"
        f"Serialized model int8+zlib: {total - 30000} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)\n"
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
    rows = "\n".join(f"| {s} | {bpb:.8f} | {TOTALS[s]:,} |" for s, bpb in scores.items())
    (folder / "README.md").write_text(f"# Record, on top of #1\n\nval_bpb {submission['val_bpb']:.8f}\n\n{rows}\n")
    (folder / "submission.json").write_text(
        json.dumps({k: v for k, v in (submission | changes).items() if v is not None})
    )
    (folder / "train_gpt.py").write_text(SCRIPT)
    for seed, bpb in scores.items():
        values = dict(bpb=bpb, loss=losses[seed], total=TOTALS[seed]) | logged(seed)
        (folder / f"train_seed{seed}.log").write_text(STYLES[style](seed, **values))
    return folder


def statuses(folder: Path, **options: Any) -> dict[str, str]:
    """rule -> status."""
    verdicts = check.check_folder(check.read_folder(folder, options.pop("not_a_record", False)), **options)
    return {verdict.rule.name: verdict.status for verdict in verdicts}


def failing(folder: Path, **options: Any) -> set[str]:
    return {rule for rule, status in statuses(folder, **options).items() if status == "fail"}


@pytest.mark.parametrize("style", STYLES)
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
        {"implied_bytes", "loss_in_logs"},
    ),
    (
        "plain table on CaseOps",
        dict(logged=lambda s: dict(loss=nats(SEEDS[s], 164.6e6))),
        nothing,
        {"implied_bytes", "loss_in_logs"},
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
        {"score_in_logs", "readme_agrees"},
    ),
    ("no val_bpb", dict(val_bpb=None), nothing, {"val_bpb"}),
    ("val_bpb as text", dict(val_bpb="1.2305"), nothing, {"val_bpb"}),
    ("no bytes_total", dict(bytes_total=None), nothing, {"bytes_total"}),
    ("bpb under val_loss", dict(val_loss=1.2305), nothing, {"val_loss_unit", "loss_in_logs"}),
    ("no author", dict(author=None), nothing, {"json_fields"}),
    ("date in words", dict(date="May 1"), nothing, {"json_fields"}),
    (
        "log over the cap",
        dict(logged=lambda s: dict(total=16_000_001) if s == 2 else {}),
        nothing,
        {"size_logged", "sizes_in_logs"},
    ),
    ("artifact over the cap", dict(bytes_total=16_000_001), nothing, {"size_stated", "sizes_in_logs"}),
    ("two seeds", dict(scores={1: 1.2304, 2: 1.2301}), nothing, {"seeds"}),
    ("third log missing", dict(), drop("train_seed3.log"), {"seeds", "sizes_in_logs"}),
    ("slow evaluation", dict(logged=lambda s: dict(eval_ms=688_000)), nothing, {"eval_time"}),
    ("slow training", dict(), rewrite("train_seed1.log", lambda t: t.replace("590000ms", "631000ms")), {"train_time"}),
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
    ("other steps", dict(), rewrite("train_seed1.log", lambda t: t.replace("4001/", "4011/")), {"steps_in_logs"}),
    (
        "log of another seed",
        dict(),
        rewrite("train_seed1.log", lambda t: t.replace("seed: 1", "seed: 3")),
        {"seed_names", "seeds"},
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
    ("broken script", dict(), rewrite("train_gpt.py", lambda t: "def"), {"script_compiles"}),
    (
        "installs packages",
        dict(),
        rewrite("train_gpt.py", lambda t: t + "import subprocess\nsubprocess.run(['pip', 'install', 'x'])\n"),
        {"no_installs"},
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
        {"score_in_logs", "seeds"},
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
    assert failing(make_record(tmp_path, **slow)) == {"seeds", "hardware", "eval_time"}
    folder = make_record(tmp_path / "b", track="non-record-unlimited-compute-16mb", **slow)
    assert failing(folder) == set() and statuses(folder)["seeds"] == "waived"
    assert failing(tmp_path / "2030-01-01_Example", not_a_record=True) == set()
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
    found = check.compare(mine, other)
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
    found = check.welch(new, old, margin)
    assert found and (found.t, found.df) == pytest.approx((t, df), rel=1e-9)
    assert 0 < found.p < 0.01 < check.welch(new, old, 0.0055).p
    assert check.welch([1.0], old, 0.0) is None
    assert check.welch([1.0, 1.0], [1.1, 1.1], 0.0).p == 0.0


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
