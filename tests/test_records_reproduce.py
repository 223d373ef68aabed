"""records/reproduce.py and the folders of the published systems: figures, commands, data, comparison, exit status."""

import json
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, ToyData, toy_config

import train_gpt as tg
from records import check, reproduce

FOLDERS = sorted(path.parent for path in ROOT.glob("records/*/published.json"))
COMMANDS = sorted(ROOT.glob("records/*/published_command.txt"))
LIBRARIES = {"NCCL_NET", "NCCL_IB_DISABLE", "PYTORCH_CUDA_ALLOC_CONF"}  # read by libraries, not by the script
# What a published command may set otherwise than the preset: places, the log, and the seconds for calibration.
MAY_DIFFER = "seed run_id data_dir data_path tokenizer_path train_log_every val_loss_every gptq_reserve_seconds".split()

# A job that writes the result it is told to write, and what it was given.
STUB = """
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["RUNS_DIR"], os.environ["RUN_ID"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "env.json").write_text(json.dumps(dict(os.environ)))
if os.environ["STUB_RESULT"]:
    (folder / "result.json").write_text(os.environ["STUB_RESULT"])
sys.exit(int(os.environ["STUB_STATUS"]))
"""
AS_PUBLISHED = {
    "hardware": "8xNVIDIA H100 80GB HBM3", "valid": True, "violations": [], "seed": 7, "steps": 1000,
    "quantized_val_bpb": 1.25, "val_bpb": 1.125, "total_bytes": 15_000_000,
}  # fmt: skip
SEEDS = {"7": {"val_bpb": 1.0, "steps": 900}, "8": {"val_bpb": 1.5, "steps": 1100}}
TABLE = {"presets": ["default"], "seeds": SEEDS, "mean": {"val_bpb": 1.25, "steps": 1000}}


def tables() -> list[Any]:
    """(folder, published table) of every shipped folder."""
    texts = [(folder, (folder / "published.json").read_text()) for folder in FOLDERS]
    rows = [(folder, table) for folder, text in texts for table in json.loads(text)["tables"]]
    return [pytest.param(folder, table, id=f"{folder.name}-{table['presets'][0]}") for folder, table in rows]


@pytest.fixture
def toy(tmp_path: Path, toy_data: ToyData, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published system on the toy data whose job is the stub; returns its folder."""
    folder = tmp_path / "2030-01-01_Toy"
    folder.mkdir()
    (folder / "settings.env").write_text("# a system\nPRESET=default\nMATRIX_LR=0.0125  # of the folder\n")
    published = {"source": "PR #0", "data": "sp8192", "tables": [TABLE], "notes": ["made up"]}
    published["known_differences"] = ["it had other documents"]
    (folder / "published.json").write_text(json.dumps(published))
    for name in ("PRESET", "SEED", "RUN_ID", "STAGES"):
        monkeypatch.delenv(name, raising=False)
    stub = {"STUB_RESULT": json.dumps(AS_PUBLISHED), "STUB_STATUS": "0", "OMP_NUM_THREADS": "1"}
    for name, value in (toy_data.env(RUNS_DIR=tmp_path / "runs") | stub).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(reproduce, "COMMAND", [sys.executable, "-c", STUB])
    monkeypatch.chdir(tmp_path)  # main leaves for the repository: this comes back
    return folder


def written(toy: Path, run_id: str = "default-seed7", name: str = "comparison.json") -> dict[str, Any]:
    return json.loads((toy.parent / "runs" / run_id / name).read_text())


# ---------------------------------------------------------------------------------------------------------------------
# The shipped folders


def test_every_published_system_has_one_table() -> None:
    """Each preset but our own three is in exactly one table of one folder."""
    names = [name for table in tables() for name in table.values[1]["presets"]]
    assert sorted(names) == sorted(tg.PRESETS.keys() - {"default", "frontier", "tiny"})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_sets_its_preset_and_nothing_twice(folder: Path) -> None:
    """settings.env names a preset that has figures; what else it sets is not the preset's value already."""
    settings, published = reproduce.read_folder(folder)
    table, plain = reproduce.find_table(published, settings["PRESET"]), tg.load_config({"PRESET": settings["PRESET"]})
    assert settings["PRESET"] in table["presets"] and published["source"] and published["notes"]
    for key in settings.keys() - {"PRESET"}:
        assert tg.load_config({"PRESET": settings["PRESET"], key: settings[key]})[0] != plain[0], key


@pytest.mark.parametrize("folder, table", tables())
def test_figures_are_comparable_and_means_are_means(folder: Path, table: dict[str, Any]) -> None:
    """Keys of our results, one value per seed, the mean of the seeds, sizes and scores in their order of magnitude."""
    for part in (table, *filter(None, [table.get("not_compared")])):
        assert part["mean"].keys() <= reproduce.FIGURES.keys() and all(seed.isdecimal() for seed in part["seeds"])
        for seed, figures in part["seeds"].items():
            assert figures.keys() == part["mean"].keys(), seed
        for figure, mean in part["mean"].items():
            values = [figures[figure] for figures in part["seeds"].values()]
            exact = 5e-9 if figure.endswith("bpb") else 5e-4
            assert mean == pytest.approx(statistics.fmean(values), abs=exact), figure
            low, high = (1.05, 1.25) if figure.endswith("bpb") else (1, 16_000_000)
            assert all(low < value < high for value in values), figure
    assert table["mean"].get("quantized_val_bpb", 2) >= table["mean"].get("prequant_val_bpb", 1)


@pytest.mark.parametrize("folder, table", tables())
def test_invalid_scores_stay_apart(folder: Path, table: dict[str, Any]) -> None:
    """What came after training on the validation set is in a part of its own, with the reason, and in no other."""
    beside = table.get("not_compared")
    assert (beside is not None) == (folder.name.endswith("TTT") or "fork5" in table["presets"])
    if beside:
        assert "validation" in beside["reason"] and not beside["mean"].keys() & table["mean"].keys()
        assert beside["seeds"].keys() == table["seeds"].keys()


@pytest.mark.parametrize("folder, table", tables())
def test_the_preset_reads_the_data_that_the_folder_names(folder: Path, table: dict[str, Any]) -> None:
    """Dataset folder and tokenizer of each preset are those of the named variant."""
    data = reproduce.read_folder(folder)[1]["data"]
    for preset in table["presets"]:
        config, variant = tg.load_config({"PRESET": preset})[0], reproduce.find_variant(data)[1]
        names = config.dataset_dir.name, config.tokenizer_file.name, config.vocab_size
        assert names == (variant.dataset, variant.tokenizer, variant.vocab_size)


@pytest.mark.parametrize("folder, table", tables())
def test_readme_states_the_figures_and_commands(folder: Path, table: dict[str, Any]) -> None:
    """Every score, size and number of steps of published.json, the commands, and that nothing was measured yet."""
    text = (folder / "README.md").read_text()
    for figures in [*table["seeds"].values(), table["mean"], table.get("not_compared", {}).get("mean", {})]:
        for figure, value in figures.items():
            if not figure.endswith("seconds"):
                stated = f"{value:.8f}".rstrip("0") if figure.endswith("bpb") else f"{value:,.0f}"
                assert f"| {stated} |" in text, (figure, stated)
    preset, seed = reproduce.read_folder(folder)[0]["PRESET"], "1337" if folder.name.endswith("Baseline") else "42"
    torchrun = f"PRESET={preset} SEED={seed} torchrun --standalone --nproc_per_node=8 train_gpt.py"
    assert f"./run.sh records/{folder.name} {seed}\n" in text and torchrun in text and seed in table["seeds"]
    assert re.search(r"## Measured by us\n\nNone yet at full size", text)
    for pair in re.findall(r"\b([A-Z][A-Z0-9_]+)=([\w.]+)", text):
        assert is_setting(*pair, preset) or pair[0] == "PRESET" and pair[1] in tg.PRESETS, pair


def is_setting(key: str, value: str, preset: str) -> bool:
    """Whether the script knows the name (a typo of it is refused) and accepts the value."""
    tg.load_config({"PRESET": preset, key: value})
    try:
        tg.load_config({"PRESET": preset, key + "Q": value})
    except tg.UserError as error:
        return "did you mean" in str(error)
    return False


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.parent.name)
def test_published_command_is_the_preset(path: Path) -> None:
    """Every name in it is known, and all of it together changes nothing but places, the log and the reserve."""
    preset = reproduce.read_settings(path.parent / "settings.env")["PRESET"]
    pairs = re.findall(r"\b([A-Z][A-Z0-9_]*)=(\S+)", path.read_text())
    env = {key: value.replace("$SEED", "42") for key, value in pairs}
    assert len(env) == len(pairs) and env
    for key in env.keys() - LIBRARIES:
        assert is_setting(key, env[key], preset), key
    config, plain = tg.load_config(env | {"PRESET": preset})[0], tg.load_config({"PRESET": preset})[0]
    changed = {name: getattr(config, name) for name in tg.FIELDS if getattr(config, name) != getattr(plain, name)}
    assert changed.keys() <= set(MAY_DIFFER), changed


def test_reproductions_cannot_pass_for_records() -> None:
    """They hold no submission.json, which every record does and which tells them apart; the checker rejects them."""
    for folder in FOLDERS:
        assert not (folder / "submission.json").exists()
    verdicts = {v.rule.name: v.status for v in check.check_folder(check.read_folder(FOLDERS[0], False))}
    assert verdicts["files"] == "fail"


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes that end before the job begins: exit status 2 and one line


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a call that must end with status 2."""
    assert reproduce.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("lost", ["fineweb_val_000000.bin", "fineweb_train_*", "folder", "tokenizer"])
def test_missing_data_is_named_with_the_command_that_fetches_it(
    lost: str, toy: Path, toy_data: ToyData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever part is missing: its path and `python data/download.py` with the variant."""
    data = toy.parent / "data"
    shutil.copytree(toy_data.folder, data)
    for path in data.glob(lost):
        path.unlink()
    if lost == "folder":
        shutil.rmtree(data)
    monkeypatch.setenv("DATA_PATH", str(data))
    if lost == "tokenizer":
        monkeypatch.setenv("TOKENIZER_PATH", str(data / "none.model"))
    message = refused([str(toy)], capsys)
    named = {"folder": "fineweb_val_*.bin", "tokenizer": "none.model"}.get(lost, lost.split("0")[0].rstrip("*"))
    assert f"{data}/{named}" in message and "get it with: python data/download.py sp8192" in message
    assert not (toy.parent / "runs").exists()


def test_what_is_scored_only_needs_no_training_shards(toy_data: ToyData, tmp_path: Path) -> None:
    """STAGES=evaluate goes without them; damaged ones are found where they are needed."""
    shutil.copytree(toy_data.folder, tmp_path / "toy")
    (tmp_path / "toy" / "fineweb_train_000001.bin").write_bytes(b"x")
    config = toy_data.config(DATA_PATH=tmp_path / "toy", STAGES="evaluate", RUN_ID="a")
    assert "data is not sp8192" in reproduce.check_data(config, "sp8192")
    with pytest.raises(tg.UserError, match="fineweb_train_000001.bin"):
        reproduce.check_data(toy_data.config(DATA_PATH=tmp_path / "toy"), "sp8192")


def test_bad_words_are_refused(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A seed that is none, a folder that is none, one without figures, a preset without figures, spoilt files."""
    assert "SEED=x: not a whole number" in refused([str(toy), "x"], capsys)
    assert "SEED=-1" in refused([str(toy), "--", "-1"], capsys)
    message = refused([str(toy.parent / "nothing")], capsys)
    assert "settings.env: no such file" in message and FOLDERS[0].name in message
    monkeypatch.setenv("PRESET", "tiny")
    assert "PRESET=tiny: this folder has figures for default" in refused([str(toy)], capsys)
    monkeypatch.delenv("PRESET")
    (toy / "settings.env").write_text("PRESET=default\nexport MATRIX_LR=1\n")
    assert "settings.env, line 2: 'export MATRIX_LR=1' is not KEY=value" in refused([str(toy)], capsys)
    (toy / "settings.env").write_text("PRESET=default\nMATRIX_LRR=1\n")
    assert "did you mean MATRIX_LR?" in refused([str(toy)], capsys)
    (toy / "published.json").write_text("{")
    assert "published.json: " in refused([str(toy)], capsys)
    with pytest.raises(SystemExit) as caught:
        reproduce.main([str(toy), "1", "2"])
    assert caught.value.code == 2 and not (toy.parent / "runs").exists()


def test_our_own_folder_runs_without_a_comparison(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without published.json: the same job, its exit status, and a word that there is nothing to compare."""
    (toy / "published.json").unlink()
    assert "the known data are sp1024" in refused([str(toy)], capsys)  # toy data have a vocabulary of their own
    monkeypatch.setattr(reproduce, "data_variant", lambda config: "sp8192")
    assert reproduce.main([str(toy), "7"]) == 0
    assert "nothing is published of it; data is not sp8192 as published" in capsys.readouterr().out
    assert written(toy, name="result.json")["seed"] == 7
    assert not (toy.parent / "runs/default-seed7/comparison.json").exists()


def test_the_frontier_folder_asks_for_fused_data(tmp_path: Path) -> None:
    """Its settings are the preset's, and its data are made from published ones in two commands."""
    settings, published = reproduce.read_folder(ROOT / "records/2026-11-22_Frontier")
    config = tg.load_config(settings)[0]
    assert settings == {"PRESET": "frontier"} and published is None and reproduce.data_variant(config) == "mp3"
    how = reproduce.how_to_get("mp3", tmp_path)
    assert "download.py caseops" in how and how.endswith(str(tmp_path / "datasets" / config.dataset_dir.name))
    assert reproduce.how_to_get("sp8192", Path("data")) == "python data/download.py sp8192"


# ---------------------------------------------------------------------------------------------------------------------
# Data, differences, arithmetic


def test_published_data_is_told_from_other_data(toy_data: ToyData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents, targets up to the tail, and bytes must all be the published ones."""
    config = toy_data.config()
    validation = tg.load_validation(config)
    targets, documents = len(validation.tokens) - 1, len(validation.documents)
    _, real = reproduce.find_variant("sp8192")

    def told(cut: int = 0, extra_documents: int = 0, extra_bytes: int = 0, block: int = 64) -> str:
        num_bytes = int(validation.bytes[1 : targets - cut + 1].sum()) + extra_bytes
        shape = {"val_targets": targets - cut, "val_bytes": num_bytes, "block": block}
        variant = type(real)(**(real.__dict__ | shape))
        monkeypatch.setattr(reproduce, "find_variant", lambda name: (name, variant))
        monkeypatch.setattr(reproduce, "VAL_DOCUMENTS", documents + extra_documents)
        return reproduce.check_data(config, "sp8192")

    assert told() == told(cut=63) == told(extra_bytes=4) == ""
    for changed in (told(cut=64), told(cut=-1), told(extra_documents=1), told(extra_bytes=5), told(extra_bytes=-5)):
        assert changed.startswith("data is not sp8192 as published") and f"{targets:,} targets" in changed


def test_differences_name_what_was_not_as_published() -> None:
    """Hardware, steps beyond what seeds differ by, settings, an invalid run; nothing where nothing differs."""
    plain = toy_config()

    def found(config: tg.Config = plain, table: dict[str, Any] = TABLE, **changes: Any) -> list[str]:
        return reproduce.differences(AS_PUBLISHED | changes, table, plain, config)

    assert found() == found(steps=980) == found(steps=5000) == found(toy_config(SEED=9, RUN_ID="b", COMPILE=0)) == []
    assert found(hardware="8xNVIDIA H200") == ["hardware 8xNVIDIA H200, not 8xH100"]
    assert found(hardware="1xNVIDIA H100") == ["hardware 1xNVIDIA H100, not 8xH100"]
    assert found(steps=979) == ["979 steps, not 1,000"]
    assert found(steps=1, table=TABLE | {"mean": {}}) == []
    assert found(toy_config(ITERATIONS=3, MATRIX_LR=0.5)) == ["set by hand: ITERATIONS=3 MATRIX_LR=0.5"]
    assert found(valid=False, violations=["a", "b"]) == ["the run is INVALID (a; b)"]


def test_comparison_arithmetic() -> None:
    """Measured minus the published mean, by hand; what either side does not know stays unknown."""
    rows = reproduce.compare(TABLE, AS_PUBLISHED)
    assert list(rows) == list(reproduce.FIGURES)
    val = {"published_seed": 1.0, "published_mean": 1.25, "measured": 1.125, "difference": -0.125}
    assert rows["val_bpb"] == val
    steps = {"published_seed": 900, "published_mean": 1000, "measured": 1000, "difference": 0}
    assert rows["steps"] == steps
    unknown = {"published_seed": None, "published_mean": None, "measured": 1.25, "difference": None}
    assert rows["quantized_val_bpb"] == unknown and rows["eval_seconds"] == unknown | {"measured": None}
    other = reproduce.compare(TABLE, AS_PUBLISHED | {"seed": 9, "val_bpb": None})
    assert other["val_bpb"] == {"published_seed": None, "published_mean": 1.25, "measured": None, "difference": None}


def test_the_table_shows_every_figure_and_says_what_differs() -> None:
    """One row per figure with signs and separators; conditions in the head; invalid figures beside, not inside."""
    comparison = {
        "preset": "default", "source": "PR #0", "seed": 7, "differences": [], "notes": ["made up"],
        "figures": reproduce.compare(TABLE, AS_PUBLISHED | {"train_seconds": 1234.5}), "not_compared": None,
    }  # fmt: skip
    text = reproduce.show(comparison)
    assert "default against PR #0\nthe published conditions\n" in text and text.endswith("note: made up")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[4:-1]}
    assert rows["val_bpb"] == ["1.00000", "1.25000", "1.12500", "-0.12500"]
    assert rows["steps"] == ["900", "1,000", "1,000", "+0"] and rows["total_bytes"] == ["-", "-", "15,000,000", "-"]
    assert rows["train_seconds"] == ["-", "-", "1,234.5", "-"] and list(rows) == list(reproduce.FIGURES)
    beside = {"reason": "trained on it", "seeds": {}, "mean": {"val_bpb": 1.1}}
    text = reproduce.show(comparison | {"differences": ["a", "b"], "not_compared": beside})
    assert "\nNOT the published conditions: a; b\n" in text and "the published conditions\n" not in text
    assert "published but not compared (trained on it): mean val_bpb 1.1\n" in text


# ---------------------------------------------------------------------------------------------------------------------
# The whole way


def test_the_caller_wins_over_the_folder_and_the_folder_over_the_preset(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the job: settings, then the environment, then the word for the seed; defaults of SEED and RUN_ID."""
    assert reproduce.main([str(toy)]) == 0
    env = written(toy, name="env.json")
    assert (env["PRESET"], env["SEED"], env["MATRIX_LR"]) == ("default", "7", "0.0125")
    monkeypatch.setenv("MATRIX_LR", "0.5")
    monkeypatch.setenv("SEED", "8")
    assert reproduce.main([str(toy)]) == 0
    env = written(toy, "default-seed8", "env.json")
    assert (env["SEED"], env["MATRIX_LR"]) == ("8", "0.5")
    monkeypatch.setenv("RUN_ID", "mine")
    assert reproduce.main([str(toy), "9"]) == 0
    assert written(toy, "mine", "env.json")["SEED"] == "9"
    (by_hand,) = [text for text in written(toy, "mine")["differences"] if text.startswith("set by hand: ")]
    assert " MATRIX_LR=0.5 " in by_hand and "RUNS_DIR" not in by_hand


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_the_exit_status_of_the_run_is_passed_on(status: int, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a result there is a comparison, whatever the status; a result of an earlier run is never compared."""
    monkeypatch.setenv("STUB_STATUS", str(status))
    assert reproduce.main([str(toy)]) == status
    assert written(toy)["figures"]["val_bpb"]["difference"] == -0.125
    (toy.parent / "runs/default-seed7/comparison.json").unlink()
    monkeypatch.setenv("STUB_RESULT", "")
    assert reproduce.main([str(toy)]) == status
    assert not (toy.parent / "runs/default-seed7/comparison.json").exists()


def test_a_signal_goes_to_the_job_and_its_end_is_reported() -> None:
    """SIGTERM to us stops the job, which may still save; SIGINT is its own; killed by signal n it gives 128 + n."""
    ours: list[int] = []  # signals that launch did not take; they must kill nobody here
    kinds, main_thread = (signal.SIGINT, signal.SIGTERM), threading.main_thread().ident
    before = [signal.signal(kind, lambda number, frame: ours.append(number)) for kind in kinds]
    job = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); time.sleep(5)"
    timers = [threading.Timer(1 + i / 4, signal.pthread_kill, [main_thread, kind]) for i, kind in enumerate(kinds)]
    try:
        started = time.monotonic()
        for timer in timers:
            timer.start()
        assert reproduce.launch([sys.executable, "-c", job], {}) == 7 and time.monotonic() - started < 4
        assert not ours
    finally:
        for timer, kind, handler in zip(timers, kinds, before, strict=True):
            timer.join()
            signal.signal(kind, handler)
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert reproduce.launch([sys.executable, "-c", killed], {}) == 137


def test_a_real_run_on_toy_data_is_compared(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """train_gpt.py itself: its result meets the published figures, and every difference of the conditions is said."""
    monkeypatch.setattr(reproduce, "COMMAND", [sys.executable, "train_gpt.py"])
    for name, value in {"ITERATIONS": "2", "TTT_ENABLED": "0", "NUM_LOOPS": "0"}.items():
        monkeypatch.setenv(name, value)
    assert reproduce.main([str(toy), "8"]) == 0
    comparison, result = written(toy, "default-seed8"), written(toy, "default-seed8", "result.json")
    assert comparison["figures"]["val_bpb"]["measured"] == result["val_bpb"] > 0 and result["seed"] == 8
    assert comparison["figures"]["val_bpb"]["difference"] == result["val_bpb"] - 1.25
    assert comparison["figures"]["val_bpb"]["published_seed"] == 1.5
    said = "; ".join(comparison["differences"])
    assert "not 8xH100" in said and "2 steps, not 1,000" in said and "ITERATIONS=2" in said
    assert "data is not sp8192 as published" in said and said.endswith("; it had other documents")
    assert "NOT the published conditions" in capsys.readouterr().out
