"""records/pack.py: three toy seeds become a folder that passes its check and whose packed script repeats its score."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ToyData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt as tg
from records import check, own, pack
from records.logs import RunLog, logged_source, read_log

WORDS = [
    "--name",
    "Toy",
    "--author",
    "example",
    "--github-id",
    "example",
    "--blurb",
    "Three toy seeds.",
    "--not-a-record",
]


def train_toy(data: ToyData, root: Path, seed: int, **changes: object) -> Path:
    """A finished run of the script in this process."""
    config, origins = tg.load_config(data.env(SEED=seed, RUN_ID=f"seed{seed}", RUNS_DIR=root, **changes))
    assert tg.main(config, tg.Run(), origins)["valid"]
    return root / f"seed{seed}"


@pytest.fixture(scope="module")
def runs(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [train_toy(toy_data, root, seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def record(runs: list[Path], toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed folder of the three runs."""
    out = tmp_path_factory.mktemp("records") / "2030-01-01_Toy"
    status = pack.main([*map(str, runs), *WORDS, "--tokenizer", str(toy_data.tokenizer), "--out", str(out)])
    assert status == 0
    return out


def test_three_seeds_make_a_folder_that_passes_its_check(record: Path, runs: list[Path]) -> None:
    """Nothing fails, and what toy hardware and data cannot meet is named as waived or not judged."""
    verdicts = {v.rule.name: v.status for v in check.check_folder(check.read_folder(record, False))}
    assert "fail" not in verdicts.values() and "warn" not in [
        verdicts[n] for n in ("readme_sizes", "versions", "requirements")
    ]
    assert verdicts["hardware"] == "waived" and verdicts["implied_bytes"] == "unknown"
    names = (
        "README.md requirements.txt settings.env submission.json tokenizers train_gpt.py train_gpt_packed.py".split()
    )
    assert sorted(path.name for path in record.iterdir()) == sorted(
        names + [f"train_seed{seed}.log" for seed in (1, 2, 3)]
    )
    for run, seed in zip(runs, (1, 2, 3)):
        assert (record / f"train_seed{seed}.log").read_bytes() == (run / "log.txt").read_bytes()
    assert (record / "train_gpt.py").read_bytes() == Path(tg.__file__).read_bytes()


def test_every_number_comes_from_the_runs(record: Path, runs: list[Path]) -> None:
    """submission.json and the README against result.json; the packed script has the counted length."""
    submission, readme = json.loads((record / "submission.json").read_text()), (record / "README.md").read_text()
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    assert submission["val_bpb"] == round(sum(r["val_bpb"] for r in results) / 3, 8)
    assert submission["bytes_total"] == max(r["total_bytes"] for r in results)
    for result in results:
        row = submission["seed_results"][str(result["seed"])]
        assert row["val_bpb"] == round(result["val_bpb"], 8) and row["artifact_bytes"] == result["total_bytes"]
        assert f"{result['val_bpb']:.8f}" in readme and f"{result['total_bytes']:,}" in readme
    assert {r["code_bytes"] for r in results} == {(record / "train_gpt_packed.py").stat().st_size}
    assert submission["track"] == "non-record-16mb" and submission["compliance"]["score_first_ttt"]
    assert "eval_under_600s" not in submission["compliance"]  # not judged without the clock


def test_the_packed_script_repeats_the_score_from_inside_the_folder(
    record: Path, runs: list[Path], toy_data: ToyData, tmp_path: Path
) -> None:
    """In a copy of the folder, with nothing in the environment but its settings, on the artifact of a seed."""
    folder = tmp_path / record.name
    shutil.copytree(record, folder)
    (folder / "runs" / "again").mkdir(parents=True)
    shutil.copyfile(runs[1] / "artifact.bin", folder / "runs" / "again" / "artifact.bin")
    env = {"PATH": os.defpath, "DATA_PATH": str(toy_data.folder), "OMP_NUM_THREADS": "1", "SEED": "2"}
    command = (
        f"set -a; . ./settings.env; set +a; STAGES=evaluate RUN_ID=again exec {sys.executable} train_gpt_packed.py"
    )
    done = subprocess.run(["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = json.loads((folder / "runs" / "again" / "result.json").read_text())
    first = json.loads((runs[1] / "result.json").read_text())
    assert (again["val_bpb"], again["val_loss"], again["scored_bytes"]) == tuple(
        first[key] for key in ("val_bpb", "val_loss", "scored_bytes")
    )
    log = folder / "runs" / "again" / "log.txt"
    assert logged_source(log) == (record / "train_gpt_packed.py").read_bytes()  # the log holds the bytes that count
    assert read_log(log).final.label == "score kind:ttt"


def test_recorded_settings_are_those_of_the_runs(record: Path, runs: list[Path], toy_data: ToyData) -> None:
    """settings.env, loaded as the README says, gives the same configuration; paths of this machine are not in it."""
    command = "set -a; . ./settings.env; set +a; env -0"
    env = {"PATH": os.defpath, "DATA_PATH": str(toy_data.folder)}
    text = subprocess.run(["sh", "-c", command], cwd=record, env=env, capture_output=True, text=True, check=True).stdout
    values = dict(
        pair.split("=", 1) for pair in text.split("\0") if "=" in pair and pair.split("=")[0].lower() in tg.FIELDS
    )
    loaded, original = tg.load_config(values)[0], toy_data.config(SEED=1)
    places = {"data_dir", "data_path", "tokenizer_path", "seed", "run_id", "runs_dir"}
    assert {n for n in tg.FIELDS if getattr(loaded, n) != getattr(original, n)} <= places
    assert str(toy_data.folder.parent) not in (record / "settings.env").read_text() + (record / "README.md").read_text()


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *said: str, status: int = 2) -> None:
    """The packer stops with one line that says all of this."""
    assert pack.main(words) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(text in error for text in said), error


def test_unusable_runs_are_refused_in_one_line(
    runs: list[Path], toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Duplicate seeds, another configuration, an existing folder, too few seeds, unfinished or edited runs."""
    out = ["--out", str(tmp_path / "2030-01-01_Toy")]
    three = [str(run) for run in runs]
    refused(capsys, [three[0], three[0], three[1], *WORDS, *out], "seeds 1, 1, 2", "once")
    other = train_toy(toy_data, tmp_path / "other", 4, ITERATIONS=5)
    refused(capsys, [*three[:2], str(other), *WORDS, *out], "iterations: 6, 5")
    refused(capsys, [*three[:2], *WORDS[:-1], *out], "2 runs", "3 seeds")
    refused(capsys, [*three, *WORDS, "--out", str(tmp_path / "Toy")], "YYYY-MM-DD")
    (tmp_path / "2030-01-02_There").mkdir()
    refused(capsys, [*three, *WORDS, "--out", str(tmp_path / "2030-01-02_There")], "exists already")
    for name, change, said in (
        ("result.json", lambda text: text.replace('"val_bpb"', '"bpb"'), "lacks val_bpb"),
        ("result.json", lambda text: text.replace('"valid": true', '"valid": false'), "log.txt does not end"),
        ("log.txt", lambda text: text.replace("import ast\n", "import  ast\n", 1), "does not hold its script"),
        ("artifact.bin", lambda text: text[:-1], "not the file that was scored"),
    ):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(runs[2], copy)
        encoding = "latin1" if name == "artifact.bin" else "utf-8"
        (copy / name).write_bytes(change((copy / name).read_bytes().decode(encoding)).encode(encoding))
        refused(capsys, [*three[:2], str(copy), *WORDS, *out], said)
    refused(capsys, [*three[:2], str(tmp_path), *WORDS, *out], "not a finished run")
    assert not (tmp_path / "2030-01-01_Toy").exists() and not list(tmp_path.glob(".packing-*"))


def test_runs_of_different_scripts_are_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log of one run holds another source, with its own right hash."""
    import hashlib

    copy = tmp_path / "copy"
    shutil.copytree(runs[2], copy)
    source = logged_source(copy / "log.txt")
    newer = source + b"# newer\n"
    text = (copy / "log.txt").read_bytes().replace(source, newer, 1)
    text = text.replace(f"bytes:{len(source)}".encode(), f"bytes:{len(newer)}".encode(), 1)
    text = text.replace(hashlib.sha256(source).hexdigest().encode(), hashlib.sha256(newer).hexdigest().encode(), 1)
    (copy / "log.txt").write_bytes(text)
    out = ["--out", str(tmp_path / "2030-01-01_Toy")]
    refused(capsys, [str(runs[0]), str(runs[1]), str(copy), *WORDS, *out], "different scripts")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, runs: list[Path]) -> None:
    """Spares a start of the packed script, which `record` has done."""
    parameters = json.loads((runs[0] / "result.json").read_text())["parameters"]
    monkeypatch.setattr(pack, "start_packed", lambda folder: {"parameters": parameters})


def test_a_script_that_does_not_run_is_not_packed(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line of its error is reported, and nothing is written."""
    monkeypatch.setattr(pack, "settings_file", lambda *_: "NUM_LAYERS=x\n")
    refused(
        capsys, [*map(str, runs), *WORDS, "--out", str(tmp_path / "2030-01-01_Toy")], "does not run", "NUM_LAYERS=x"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("started")
def test_a_toy_run_does_not_pass_as_a_record(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --not-a-record the rules that it breaks are listed, and nothing is written."""
    out = tmp_path / "2030-01-01_Toy"
    assert pack.main([*map(str, runs), *WORDS[:-1], "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert all(f"FAIL {rule}" in error for rule in ("hardware", "coverage", "implied_bytes"))
    assert "nothing was written" in error and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("started")
def test_comparison_with_a_reference_is_in_the_folder(record: Path, runs: list[Path], tmp_path: Path) -> None:
    """Against the folder itself: no gain, and p values of the same test that check.py does."""
    out = tmp_path / "2030-01-02_Again"
    assert pack.main([*map(str, runs), *WORDS, "--reference", str(record), "--out", str(out)]) == 0
    submission = json.loads((out / "submission.json").read_text())
    assert submission["comparison_baseline"] == record.name and submission["delta_vs_leaderboard_bpb"] == 0
    assert 0.5 < submission["p_value"] < 1 and "Welch" in (out / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------------
# TAMPERING
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(record: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to tamper with."""
    folder = tmp_path_factory.mktemp("tampered") / record.name
    shutil.copytree(record, folder)
    return folder


def alarms(folder: Path, wanted: str = "") -> set[tuple[str, str]]:
    """Rules that fail or warn; all of them, or the wanted one if it does."""
    read = check.read_folder(folder, False)
    found = [(rule.name, rule.check(read).status) for rule in check.RULES if wanted in ("", rule.name)]
    return {(name, status) for name, status in found if status in ("fail", "warn")}


def with_file(folder: Path, name: str, data: bytes, wanted: str = "") -> set[tuple[str, str]]:
    """The alarms with other bytes in one file, which is put back."""
    before = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(data)
        return alarms(folder, wanted)
    finally:
        (folder / name).write_bytes(before)


LOG = "train_seed2.log"
# File, pattern of the last match (its first group is replaced; a digit by the next one), replacement, rule that fails.
EDITS = [
    ("train_gpt_packed.py", r"(exec)\(compile", "echo", "packed_script"),
    ("train_gpt_packed.py", r"(B)\.decompress", "C", "packed_script"),
    (LOG, r'"val_bpb": 1\.(\d)', "", "result_in_log"),
    (LOG, r'"train_seconds": \d+\.(\d)', "", "result_in_log"),
    (LOG, r'"learned_before_score": (0)', "", "result_in_log"),
    (LOG, r"^validity rule:score_before_update ok:True found:(0)", "", "result_in_log"),
    (LOG, r"^score kind:ttt .*tokens:(\d)", "", "result_in_log"),
    (LOG, r"^quantised artifact +1\.(\d)", "", "result_in_log"),
    (LOG, r"^  matrix_lr: 0\.0(2)6", "", "same_settings"),
    (LOG, r"^setting name:num_layers value:(4)", "", "result_in_log"),
    (LOG, r"^(train step:3/6.*\n)", "", "result_in_log"),
    (LOG, r"^check item:artifact .*forecast_(\d)", "", "result_in_log"),
    (LOG, r'"kernels": "(p)lain', "P", "result_in_log"),
    (LOG, r'"fallbacks": (0)', "", "result_in_log"),
    ("settings.env", r"^MATRIX_LR=0\.0(2)6", "", "texts_from_logs"),
    ("settings.env", r"^(EMBED_BITS=.*\n)", "", "texts_from_logs"),
    ("requirements.txt", r"^torch==(\d)", "", "texts_from_logs"),
    ("README.md", r"(\d) parameters\.", "", "texts_from_logs"),
    ("README.md", r"`EMA_DECAY=0\.(5)`", "", "texts_from_logs"),
    ("train_gpt.py", r"(# )the ", "## ", "same_source"),
    *(
        ("submission.json", rf'"{key}": \d*\.?(\d)', "", "texts_from_logs")
        for key in (
            "bytes_code artifact_bytes_max artifact_bytes_mean val_loss_std val_bpb_std val_loss step_avg_ms"
            " step_avg_ms_mean pre_quant_val_bpb quantized_val_bpb train_time_s eval_time_s steps train_steps_mean"
        ).split()
    ),
]


@pytest.mark.parametrize("case", EDITS, ids=lambda case: f"{case[0]}:{case[1][:34]}")
def test_an_edit_fails_the_rule_that_knows_better(checked: Path, case: tuple[str, str, str, str]) -> None:
    """One edit at a time of a folder that pack.py wrote."""
    name, pattern, new, rule = case
    data = (checked / name).read_bytes().decode("latin1")
    match = list(re.finditer(pattern, data, re.M))[-1]
    new = str((int(match[1]) + 1) % 10) if match[1].isdigit() else new
    changed = data[: match.start(1)] + new + data[match.end(1) :]
    assert changed != data and (rule, "fail") in with_file(checked, name, changed.encode("latin1"), rule)


def test_lines_are_compared_between_logs_of_as_many_starts() -> None:
    """Stages that were started one by one write some lines again; the free space of the disk may differ."""

    def log(detail: str, starts: int = 1, room: int = 5) -> RunLog:
        lines = f"config preset:x\ncheck item:packages ok:True detail:{detail}\ncheck item:disk ok:True detail:{room}\n"
        return RunLog(Path("log"), "ours", {}, [], [{"seed": "1"}], None, starts * lines)

    found = lambda *logs: [finding.found for finding in own.differences(list(logs))]
    assert not found(log("a"), log("a", room=6)) and not found(log("a"), log("a", 2))
    assert found(log("a"), log("b")) == ["the lines `check` differ between logs"]


# What nothing else in a folder repeats: file, pattern of its line up to the edit, reason. Any line left out is noticed.
UNNOTICED = [
    (r"train_seed\d\.log", r"train step:\d+/\d+ .*", "the loss, rate and speed of a single step"),
    (r"train_seed\d\.log", r"looping step:.*", "when the loops began"),
    (r"train_seed\d\.log", r"busy load:.*", "the load of the machine"),
    (r"train_seed\d\.log", r"(global_ttt|calibrated) .*seconds:[\d.]*", "times of parts of a stage"),
    (r"train_seed\d\.log", r"check item:disk .*", "the free space of the disk"),
    (r"train_seed\d\.log", r"(config .*stages:|  (runs_dir|data_\w+|tokenizer_path): ).*", "places on the machine"),
    (r"train_seed\d\.log", r"setting name:(runs_dir|data_path|tokenizer_path) .*", "places on the machine"),
    (r"train_seed\d\.log", r'result .*"learned_targets": \d*', "said by the result alone"),
    (r"requirements\.txt", r"(?!torch|numpy)[a-z]+==.*", "versions that no log states"),
    (r"submission\.json", r'  "(author|github_id)": .*', "words of the author"),
]


def is_excused(name: str, line: str, column: int, old: str, new: str) -> bool:
    """Whether nothing could notice an edit: by the list, or a digit of the result behind the six of its line."""
    head = line[:column]
    if any(re.fullmatch(file, name) and re.fullmatch(pattern, head) for file, pattern, _ in UNNOTICED):
        return True
    begin = re.search(r"[\d.]*$", head).start()
    number = re.match(r"\d+\.\d+", line[begin:])
    if not line.startswith("result ") or not number:
        return False
    changed = re.match(r"\d*\.?\d*", line[begin:column] + new + line[column + len(old) :])[0]
    return bool(changed.strip(".")) and abs(float(changed) - float(number[0])) < 1e-5 * float(number[0])


@st.composite
def edits(draw: st.DrawFn, folder: Path) -> tuple[str, str, int, str, str]:
    """(file, its text, where, old, new): a digit or a number replaced, or a line left out."""
    name = draw(st.sampled_from(sorted(path.name for path in folder.iterdir() if path.is_file())))
    text = (folder / name).read_bytes().decode("latin1")
    begin = text.rindex("\nsource bytes:") + 1 if name.startswith("train_seed") and draw(st.integers(0, 9)) else 0
    kind = draw(st.sampled_from([r"\d", r"\d+", r"(?m)^.+\n"]))
    found = [match.span() for match in re.finditer(kind, text[begin:])]
    start, end = draw(st.sampled_from(found))
    start, end = begin + start, begin + end
    old = text[start:end]
    new = (
        "" if old.endswith("\n") else str(draw(st.integers(0, 10 ** len(old[:6]) - 1).filter(lambda n: n != int(old))))
    )
    return name, text, start, old, new


def tamper(checked: Path, edit: tuple[str, str, int, str, str], usual: set[tuple[str, str]]) -> None:
    name, text, at, old, new = edit
    found = with_file(checked, name, (text[:at] + new + text[at + len(old) :]).encode("latin1"))
    begin = text.rfind("\n", 0, at) + 1
    line = text[begin : (text + "\n").index("\n", at)]
    excused = not old.endswith("\n") and is_excused(name, line, at - begin, old, new)
    assert found - usual or excused, (
        f"{name}: {old!r} -> {new!r} in {line[max(0, at - begin - 80) : at - begin + 40]!r}"
    )


QUICK = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
THOROUGH = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("depth", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.slow)], ids=["quick", "thorough"])
def test_any_edit_is_noticed_or_on_the_short_list(checked: Path, depth: settings) -> None:
    """A digit, a number or a line of any file of a packed folder."""
    usual = alarms(checked)
    depth(given(edits(checked))(lambda edit: tamper(checked, edit, usual)))()
