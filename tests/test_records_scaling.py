"""records/scaling.py: differences at several scales, and forecasts from them against what was published."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from records import ladder, paired, scaling


def write_runs(root: Path, width: int, steps: int, scores: dict[str, dict[int, tuple[float, float, float]]]) -> Path:
    """A folder of the ladder: preset -> seed -> bits per byte before quantisation, after it, and final."""
    out = root / f"w{width}n{steps}"
    data = {part: dict(text_bytes=9, documents=2, file="a", text_sha256="0") for part in ("train", "val")}
    machine = dict(cpu="toy", cores=1, system="toy", python="3", numpy="2")
    for preset, seeds in scores.items():
        for seed, (plain, rounded, final) in seeds.items():
            folder = out / f"{preset}-seed{seed}"
            folder.mkdir(parents=True)
            about = dict(preset=preset, seed=seed, budget={"steps": steps}, width=width, expected_steps=steps, data=data,
                         threads=1, jobs=1, machine=machine, script_sha256="0", variant="mp3",
                         parameters=1000 * width)  # fmt: skip
            result = dict(prequant_val_bpb=plain, quantized_val_bpb=rounded, val_bpb=final, submitted="ttt",
                          hardware="1xtoy", torch="2")  # fmt: skip
            (folder / ladder.RUN_FILE).write_text(json.dumps(about))
            (folder / paired.RESULT_FILE).write_text(json.dumps(result))
    (out / ladder.SPEEDS_FILE).write_text(json.dumps({preset: width / 100 for preset in scores}))
    return out


def call(folders: list[Path], *words: str) -> list[str]:
    table, picture = folders[0].parent / "t.md", folders[0].parent / "p.png"
    named = ["--table", str(table), "--picture", str(picture)]
    assert scaling.main(["--runs", *map(str, folders), *named, *words]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    return table.read_text().splitlines()


def rows(lines: list[str], first: str) -> list[dict[str, str]]:
    """The table whose first head is `first`, as dictionaries; columns of one name are numbered."""
    cut = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    begin = next(i for i, line in enumerate(cut) if line[0] == first)
    head = [f"{name}.{cut[begin][:i].count(name)}" if name in cut[begin][:i] else name for i, name in
            enumerate(cut[begin])]  # fmt: skip
    body = []
    for line in cut[begin + 2 :]:
        if len(line) != len(head):
            break
        body.append(dict(zip(head, line)))
    return body


def test_line_forecast_against_a_slow_reference() -> None:
    """The mean response of the textbook: with many draws of noise, the forecast scatters as its error says."""
    assert scaling.line_forecast([1, 2, 3, 3], [5, 7, 9, 9], 10) == pytest.approx((23, 0))
    assert scaling.line_forecast([1, 2], [5, 7], 10) is None and scaling.line_forecast([1, 1, 2], [5, 7, 8], 2) is None
    x, generator = [1.0, 1.0, 2.0, 2.0, 4.0, 4.0], np.random.default_rng(3)
    found = [scaling.line_forecast(x, [2 - v + e for v, e in zip(x, generator.normal(0, 0.1, 6))], 0.0)
             for _ in range(2000)]  # fmt: skip
    assert np.mean([f.value for f in found]) == pytest.approx(2, abs=0.01)
    squares = math.sqrt(np.mean([f.error**2 for f in found]))
    assert np.std([f.value for f in found]) == pytest.approx(squares, rel=0.05)


def test_table_holds_differences_of_equal_seeds(tmp_path: Path) -> None:
    """By hand: at width 64, final -0.2 and -0.4, so -0.3 +- 0.1, 12 % of the mean 2.5; seed 3 has no partner."""
    base = {1: (2.9, 3.0, 2.4), 2: (2.9, 3.0, 2.6)}
    folders = [
        write_runs(tmp_path, 128, 50, {"pr1941": base}),
        write_runs(
            tmp_path, 64, 50, {"pr1941": base, "pr2135": {1: (2.8, 2.9, 2.2), 2: (2.9, 3.0, 2.2), 3: (9, 9, 9)}}
        ),
    ]
    table = rows(call(folders, "--against", "pr1941"), "width")
    assert [(row["width"], row["preset"], row["seeds"]) for row in table] == [
        ("64", "pr1941", "2"), ("64", "pr2135", "3"), ("128", "pr1941", "2")]  # fmt: skip
    mine = table[1]
    assert mine["final minus pr1941"] == "-0.3000 ± 0.1000" and mine["% of it"] == "-12.00"
    assert mine["before quantisation.1"] == "-0.0500 ± 0.0500" and mine["processor s"] == "32"
    assert table[0]["final"] == "2.5000 ± 0.1414" and table[2]["processor s"] == "64"


def laws(width: int, steps: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """Scores in which one difference is a line over pr1941's bits per byte, and another a power of compute."""
    compute = 6 * 1000 * width * steps * ladder.BATCH_TOKENS
    plain = 8 * compute**-0.06
    tax = 40 * compute**-0.2
    other = plain - 0.5 * plain + 0.3
    return {"pr1941": (plain, plain + 2 * tax, plain + tax), "pr2135": (other, other + tax, other)}


def test_back_test_finds_the_laws_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line and a power law without noise are forecast to the digit; errors and shares are against what is published."""
    folders = []
    for width, steps in ((64, 50), (128, 50), (128, 200)):
        scores = {seed: laws(width, steps, seed) for seed in (1, 2)}
        folders.append(write_runs(tmp_path, width, steps, {
            name: {seed: scores[seed][name] for seed in scores} for name in ("pr1941", "pr2135")}))  # fmt: skip
    full = {"pr1941": dict(prequant_val_bpb=1.0, quantized_val_bpb=1.02, val_bpb=1.0),
            "pr2135": dict(prequant_val_bpb=0.9, quantized_val_bpb=0.91, val_bpb=0.9)}  # fmt: skip
    monkeypatch.setattr(scaling, "published_means", lambda: full)
    monkeypatch.setattr(scaling, "full_compute", lambda preset: 1e18)
    table = {row["quantity"]: row for row in rows(call(folders, "--against", "pr1941"), "quantity")}
    training = table["training: pr2135 after pr1941"]
    assert training["line"] == "-200.0 ± 0.0" and training["published"] == "-100.0"  # -0.5 * 1.0 + 0.3
    assert training["error of the line"] == "-100.0"
    tax = table["quantisation of pr2135"]
    assert tax["power law"] == f"{4e4 * 1e18**-0.2:+.1f} ± 0.0" and tax["published"] == "+10.0"
    largest = 1000 * 40 * (6 * 128_000 * 200 * ladder.BATCH_TOKENS) ** -0.2
    assert tax["largest scale"] == f"{largest:+.1f} ± 0.0" and tax["carried over"] == f"{100 * 10 / largest:.0f} %"


def test_a_change_of_sign_has_no_power_law(tmp_path: Path) -> None:
    generator = random.Random(1)
    folders = []
    for width in (64, 128):
        seeds = {seed: (2.0, 2.0 + generator.choice((-1, 1)) * 0.01 * seed, 1.9) for seed in (1, 2, 3)}
        seeds[4] = (2.0, 1.99 if width == 64 else 2.01, 1.9)
        folders.append(write_runs(tmp_path, width, 50, {"pr1941": seeds}))
    table = {row["quantity"]: row for row in rows(call(folders, "--against", "pr1941"), "quantity")}
    assert table["quantisation of pr1941"]["power law"] == "–"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"against": "pr489"}, "--against pr489: no such preset; there is pr1941"),
    ({"twice": True}, "width 64 and 50 steps are there already"),
    ({"missing": True}, "holds no finished run"),
]


@pytest.mark.parametrize(("what", "said"), BAD, ids=[said[:20] for _, said in BAD])
def test_mistakes_are_one_line(what: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_runs(tmp_path, 64, 50, {"pr1941": {1: (2.0, 2.1, 1.9)}})
    folders = [folder, folder] if what.get("twice") else [tmp_path / "none"] if what.get("missing") else [folder]
    words = [
        "--against",
        what.get("against", "pr1941"),
        "--table",
        str(tmp_path / "t"),
        "--picture",
        str(tmp_path / "p"),
    ]
    assert scaling.main(["--runs", *map(str, folders), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and len(error.splitlines()) == 1


def test_published_means_are_those_of_the_folders() -> None:
    """PR #2158: 1.05559, which 0.00855 of quantisation and -0.01165 of adaptation lead to."""
    means = scaling.published_means()
    assert means["pr2158"]["val_bpb"] == pytest.approx(1.05559, abs=5e-6)
    assert means["pr2158"]["quantized_val_bpb"] - means["pr2158"]["prequant_val_bpb"] == pytest.approx(
        0.00855, abs=5e-6
    )
