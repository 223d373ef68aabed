"""records/report.py: every figure of a page is that of the run's files, for one run and for several."""

import functools
import html
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ToyData, toy_documents
from test_data_helpers import sample_texts, toy_model, write_documents

import train_gpt as tg
from records import paired, report

KINDS = ("prequant", "quantized", "sliding", "ttt")


@pytest.fixture(scope="module")
def runs(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A whole toy run; its weights quantised to fewer bits and scored without adaptation; and what only trained."""
    root = tmp_path_factory.mktemp("runs")
    env = toy_data.env(RUNS_DIR=root, RUN_ID="whole", SLIDING_WINDOW_ENABLED=1, TTT_LORA_LR=0.001, GLOBAL_TTT_LR=0.003)
    for name, changes in (
        ("whole", {}),
        ("coarse", {"STAGES": "quantize,evaluate", "MATRIX_BITS": 4, "TTT_ENABLED": 0}),
    ):
        if changes:
            shutil.copytree(root / "whole", root / name)
        config, origins = tg.load_config(env | {"RUN_ID": name} | {key: str(value) for key, value in changes.items()})
        tg.main(config, tg.Run(), origins)
    shutil.copytree(root / "whole", root / "trained")
    for name in ("artifact.bin", "documents.csv", "positions.csv", "tensors.csv"):
        (root / "trained" / name).unlink()
    config = tg.load_config(env | {"RUN_ID": "trained"})[0]
    parts = tg.earlier_parts(root / "whole" / "result.json", config, tg.Run())
    result = tg.summary({"train": parts["train"]}, config, tg.Run())
    (root / "trained" / "result.json").write_text(json.dumps(result))
    return [root / name for name in ("whole", "coarse", "trained")]


class Figures(html.parser.HTMLParser):
    """The marked figures of a page as (key, full value, text), its ids, and what it refers to."""

    def __init__(self, page: str):
        super().__init__()
        self.figures: list[list[str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.inside = "figure" if "data-key" in values else "data" if values.get("type") == "application/json" else ""
        if self.inside == "figure":
            self.figures.append([values["data-key"], values["data-value"], ""])
        self.ids += [values["id"]] if "id" in values else []
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "figure":
            self.figures[-1][2] += data
        elif self.inside == "data":
            self.data += data


@functools.cache
def page_of(*folders: Path) -> str:
    return report.make_page([report.read_run(folder) for folder in folders])


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def check_figures(figures: list[list[str]], results: list[dict[str, Any]]) -> set[str]:
    """Each figure is, to the digits that it shows, the value of its key; of several runs in the order of the runs.
    Returns the keys."""
    seen: dict[str, int] = {}
    for key, full, text in figures:
        value: Any = results[seen.get(key, 0) % len(results)]
        for part in key.split("."):
            value = value[part]
        seen[key] = seen.get(key, 0) + 1
        shown = text.replace(",", "")
        digits = len(shown.partition(".")[2])
        assert float(full) == value and f"{value:.{digits}f}" == shown, (key, full, text, value)
    return set(seen)


def test_every_figure_of_a_page_is_that_of_the_result(runs: list[Path]) -> None:
    """All that is marked, and nothing important is missing; the result itself is in the page."""
    result, parsed = result_of(runs[0]), Figures(page_of(runs[0]))
    keys = check_figures(parsed.figures, [result])
    wanted = {f"{kind}_val_{unit}" for kind in KINDS for unit in ("bpb", "loss")}
    wanted |= set("val_bpb val_loss total_bytes artifact_bytes code_bytes steps tokens_per_s seed ranks".split())
    wanted |= {"train_seconds", "eval_seconds", "peak_memory_mib", *(f"stage_seconds.{stage}" for stage in tg.STAGES)}
    assert keys >= wanted
    assert json.loads(parsed.data) == result


def test_a_wrong_figure_would_be_noticed(runs: list[Path]) -> None:
    """The check above refuses a page in which one digit is another one."""
    figures = Figures(page_of(runs[0])).figures
    place = next(n for n, figure in enumerate(figures) if figure[0] == "val_bpb")
    text = figures[place][2]
    figures[place][2] = text[:-1] + str((int(text[-1]) + 1) % 10)
    with pytest.raises(AssertionError, match="val_bpb"):
        check_figures(figures, [result_of(runs[0])])


def test_every_figure_of_a_comparison_is_that_of_its_run(runs: list[Path]) -> None:
    """Each row has the figures of its own run; the results are in the page."""
    parsed = Figures(page_of(*runs[:2]))
    results = [result_of(folder) for folder in runs[:2]]
    assert check_figures(parsed.figures, results) >= {
        "val_bpb",
        "total_bytes",
        "steps",
        *(f"{k}_val_bpb" for k in KINDS),
    }
    assert json.loads(parsed.data) == results and len([key for key, *_ in parsed.figures if key == "val_bpb"]) == 2
    assert results[0]["val_bpb"] != results[1]["val_bpb"]


def test_pages_need_nothing_but_themselves(runs: list[Path]) -> None:
    """No address but data and places in the page; ids are used once; the policy forbids the rest; no script."""
    for folders in (runs[:1], runs[:2], runs[2:]):
        page = page_of(*folders)
        parsed = Figures(page)
        assert all(link.startswith(("#", "data:")) for link in parsed.links)
        assert len(parsed.ids) == len(set(parsed.ids))
        assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
        assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(parsed.ids)
        assert "default-src 'none'" in page and 'name="viewport"' in page
        assert re.findall(r"<script[^>]*>", page) == [f'<script type="application/json" id="{parsed.ids[-1]}">']
        assert len(page) < 400_000


def test_the_bar_of_scores_leads_from_the_first_to_the_submitted_one(runs: list[Path]) -> None:
    """Each step begins where the one before ended; with an artifact over the limit, the cost of fitting is apart."""
    result = result_of(runs[0])
    for kinds in (list(KINDS), ["prequant", "oversize", "quantized", "ttt"]):
        first, *steps, last = report.score_bars(result | {"oversize_val_bpb": 9.0}, kinds)
        assert first.end == steps[0].begin and all(a.end == b.begin for a, b in zip(steps, steps[1:]))
        assert steps[-1].end == last.end == result["val_bpb"]
        assert first.end + sum(step.end - step.begin for step in steps) == pytest.approx(result["val_bpb"])
    assert [step.label for step in steps] == ["quantisation", "made to fit", "test-time training"]


def test_kinds_of_tensor_account_for_the_artifact(runs: list[Path]) -> None:
    """Bytes add up to the file; weights are all parameters but the small ones; bits per weight by hand."""
    run = report.read_run(runs[0])
    classes = {entry.name: entry for entry in report.tensor_classes(run.tensors)}
    assert sum(entry.total for entry in classes.values()) == pytest.approx(run.result["artifact_bytes"])
    assert all(entry.total == pytest.approx(entry.codes + entry.scales) for entry in classes.values())
    assert list(classes) == ["embedding", *report.MATRIX_ORDER, "gates, gains, lambdas", "header"]
    assert classes["mlp.up"].numbers == 4 * 64 * 32 and classes["embedding"].numbers == 64 * 32
    bits, kinds = report.by_layer(run.tensors, "bits")
    assert kinds == list(report.MATRIX_ORDER) and bits.shape == (4, 6)
    column = bits[:, kinds.index("mlp.up")]
    assert column.mean() == pytest.approx(classes["mlp.up"].bits)
    errors, _ = report.by_layer(run.tensors, "output_error")
    at = list(run.tensors["array"]).index("blocks.2.mlp.down.codes")
    assert errors[2, kinds.index("mlp.down")] == run.tensors["output_error"][at] > 0
    kept = {key: values.copy() for key, values in run.tensors.items()}  # that matrix in half precision
    kept["array"][at], kept["output_error"][at], kept["weight_error"][at] = "blocks.2.mlp.down", np.nan, np.nan
    shown, weighted = report.matrix_errors(kept)
    assert weighted and np.count_nonzero(shown != errors) == 1 and shown[2, kinds.index("mlp.down")] == 0
    kept["output_error"][:] = np.nan  # a quantiser without Hessians
    shown, weighted = report.matrix_errors(kept)
    assert not weighted and shown.max() == np.nanmax(report.by_layer(kept, "weight_error")[0])


def test_documents_are_listed_by_their_score_with_their_text(runs: list[Path]) -> None:
    """Best and worst first, with the text of that very document; without the shards the lists have no text."""
    run, texts = report.read_run(runs[0]), toy_documents(26, seed=2)
    bpb = run.documents["ttt"] / math.log(2) / run.documents["bytes"]
    for best in (True, False):
        listed = report.extremes(run, best)
        assert [entry.final for entry in listed] == sorted((entry.final for entry in listed), reverse=not best)
        assert listed[0].final == (bpb.min() if best else bpb.max()) and len(listed) == report.EXTREMES
        for entry in listed:
            assert entry.text and texts[entry.number - 1].startswith(entry.text[: report.EXCERPT_CHARS])
            assert entry.bytes == run.documents["bytes"][entry.number - 1]
    for settings in ({}, run.settings | {"data_path": "elsewhere"}, run.settings | {"tokenizer_path": "elsewhere"}):
        assert {entry.text for entry in report.extremes(run._replace(settings=settings), True)} == {""}
    other = run._replace(result=run.result | {"val_targets": 7})  # shards of another text
    assert {entry.text for entry in report.extremes(other, True)} == {""}


@pytest.mark.parametrize("mp3", [False, True])
def test_text_of_case_transformed_data_is_the_original(tmp_path: Path, mp3: bool) -> None:
    """Of CaseOps data, with and without fused markers, wherever the excerpt is cut."""
    import export
    import shards

    texts = [f"{text} {text.title()}" for text in sample_texts()[:50]]
    write_documents(tmp_path / "docs.jsonl", texts)
    (tmp_path / "model").write_bytes(toy_model(with_operators=True))
    options = dict(docs=[tmp_path / "docs.jsonl"], val_docs=40, tokenizer=tmp_path / "model", caseops=True, mp3=mp3)
    export.export(export.Options(out=tmp_path / "shards", **options))
    tokens = shards.read_split(tmp_path / "shards", "val")
    starts = np.flatnonzero(tokens == shards.BOS_ID)
    documents = {"position": starts, "tokens": np.diff(np.append(starts, len(tokens)))}
    settings = dict(vocab_size="800", data_dir="", data_path=str(tmp_path / "shards"), marker_pair_mode=str(mp3))
    settings["tokenizer_path"] = str(tmp_path / "model")
    result = {"val_targets": len(tokens) - 1}
    run = report.RunFiles(tmp_path, result, settings, {}, {}, None, None, documents, None)
    with pytest.MonkeyPatch.context() as patch:
        for length in (30, 31, 32, 33, 360):
            patch.setattr(report, "EXCERPT_CHARS", length)
            beginning = report.text_reader(run)
            for number, text in enumerate(texts[:40]):
                shown = beginning(number)
                assert shown and " ".join(text.split()).startswith(" ".join(shown.split()))


@pytest.mark.parametrize("env", [{}, {"CASEOPS_ENABLED": "1"}, {"CASEOPS_ENABLED": "1", "MARKER_PAIR_MODE": "1"}])
def test_texts_are_read_from_the_data_that_a_run_without_paths_reads(
    tmp_path: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shards

    config, asked = tg.load_config({"DATA_DIR": str(tmp_path), **env})[0], []

    def read_split(folder: Path, split: str) -> np.ndarray:
        asked.append(folder)
        return np.zeros(10, np.int64)

    monkeypatch.setattr(shards, "read_split", read_split)
    monkeypatch.setattr(shards, "load_tokenizer", asked.append)
    monkeypatch.setattr("caseops.MarkerPairs.of", lambda tokenizer: None)
    settings = {name: str(getattr(config, name)) for name in tg.FIELDS}
    report.text_reader(report.RunFiles(tmp_path, {"val_targets": 0}, settings, {}, {}, None, None, {}, None))
    assert asked == [config.dataset_dir, config.tokenizer_file]


def test_short_documents_do_not_fill_the_lists_where_there_are_others(runs: list[Path]) -> None:
    run = report.read_run(runs[0])
    sizes = np.where(np.arange(26) < 22, report.FEWEST_BYTES, 3.0)
    assert {
        entry.bytes for entry in report.extremes(run._replace(documents=run.documents | {"bytes": sizes}), False)
    } == {100}


def test_a_run_that_only_trained_has_a_page(runs: list[Path]) -> None:
    page = page_of(runs[2])
    check_figures(Figures(page).figures, [result_of(runs[2])])
    assert "not scored yet" in page and "Training" in page
    assert not re.search("Quantisation error|worst documents|Where the bytes", page)


def test_an_older_run_folder_has_a_page(runs: list[Path], tmp_path: Path) -> None:
    """Only result.json: what it says is shown, alone and beside others."""
    shutil.copytree(
        runs[0], tmp_path / "old", ignore=lambda _, names: [name for name in names if name != "result.json"]
    )
    page = page_of(tmp_path / "old")
    assert "val_bpb" in check_figures(Figures(page).figures, [result_of(runs[0])])
    assert "The log of the run is not there." in page
    check_figures(Figures(page_of(runs[0], tmp_path / "old")).figures, [result_of(runs[0])] * 2)


def test_settings_that_differ_from_the_preset_are_shown_with_their_origin(runs: list[Path]) -> None:
    chosen = {name: (value, origin) for name, value, origin in report.chosen_settings(report.read_run(runs[1]))}
    assert chosen["MATRIX_BITS"] == ("4", "environment") and chosen["MODEL_DIM"] == ("32", "environment")
    assert "MUON_WD" not in chosen
    assert ("matrix_bits", ["6", "4"]) in report.differing_settings([report.read_run(folder) for folder in runs[:2]])


def write_run(folder: Path, preset: str, seed: int, documents: list[tuple[int, float]], **settings: str) -> Path:
    """A run with nothing but a submitted score on documents of (bytes, nats), and its settings."""
    folder.mkdir(parents=True)
    size, nats = (sum(column) for column in zip(*documents))
    result = dict(preset=preset, run_id=folder.name, seed=seed, stage_seconds={}, validity=[], valid=True)
    result |= dict(submitted="ttt", val_bpb=nats / math.log(2) / size, ttt_val_bpb=nats / math.log(2) / size)
    (folder / "result.json").write_text(json.dumps(result))
    lines = [f"0,9,{size},{value!r}" for size, value in documents]
    (folder / "documents.csv").write_text("\n".join(["position,tokens,bytes,ttt", *lines]) + "\n")
    values = dict(seed=str(seed), **{f"filler{n}": "0" for n in range(15)}) | settings
    log = [
        f"source bytes:1 sha256:{64 * '0'}",
        *(f"setting name:{name} value:{value} origin:environment" for name, value in settings.items()),
    ]
    (folder / "log.txt").write_text("\n".join([*log, *(f"  {name}: {value}" for name, value in values.items())]) + "\n")
    return folder


def test_groups_are_paired_with_the_first_by_seed_and_by_document(tmp_path: Path) -> None:
    """Two settings, two seeds, by hand: differences of 2 and 6 nats over 30 bytes, all in the first document."""
    nats = {("a", 1): 10.0, ("a", 2): 11.0, ("b", 1): 8.0, ("b", 2): 5.0}
    bits = {"a": "7", "b": "5"}
    folders = [
        write_run(tmp_path / f"{n}{seed}", "tiny", seed, [(10, x), (20, 20.0)], embed_bits=bits[n], iterations="9")
        for (n, seed), x in nats.items()
    ]
    runs = [report.read_run(folder) for folder in folders]
    first, second = report.make_groups(runs)
    assert (first.label, second.label) == ("tiny+EMBED_BITS=7", "tiny+EMBED_BITS=5")
    assert [run.name for run in second.runs] == ["b1", "b2"]
    unit = 1 / math.log(2) / 30
    assert (first.by_seed, second.by_seed) == (paired.NOTHING, f"{-4 * unit:+.4f} ± {2 * unit:.4f}")
    assert second.seeds == 2 and second.better == "1 of 2"
    # -4 nats in 10 bytes and 0 in 20: residuals -8/3 and 8/3
    assert second.by_document == f"{-4 * unit:+.4f} ± {math.sqrt(2 * 2 * (8 / 3) ** 2) * unit:.4f}"
    assert report.against_first(runs[3], runs[0])[1] == "1 of 2"
    page = report.make_page(runs)
    for cell in (second.by_seed, second.by_document, second.final):
        assert cell in html.unescape(page)


def test_runs_on_other_text_or_seeds_are_compared_as_far_as_possible(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", "tiny", 1, [(10, 9.0), (20, 20.0)]),
               write_run(tmp_path / "b", "baseline", 1, [(20, 9.0), (10, 20.0)]),
               write_run(tmp_path / "c", "pr489", 2, [(10, 9.0), (20, 21.0)])]  # fmt: skip
    runs = [report.read_run(folder) for folder in folders]
    groups = report.make_groups(runs)
    assert [group.label for group in groups] == ["tiny", "baseline", "pr489"]
    assert groups[1].by_document == "other text" and groups[1].by_seed == "+0.0000"
    assert groups[2].by_seed == groups[2].by_document == paired.NOTHING  # no equal seeds
    assert report.against_first(runs[1], runs[0])[0] == "other text"
    assert report.against_first(runs[2], runs[0])[0].startswith("+0.0481 ±")  # 1 nat in 30 bytes
    assert report.draw_pair(1, runs[1], runs[0]) is None and report.draw_pair(2, runs[2], runs[0])
    report.make_page(runs)


def test_names_are_no_markup(tmp_path: Path) -> None:
    """A run id may hold what means something to a browser or to matplotlib."""
    first, second = (
        write_run(tmp_path / name, "tiny", 1, [(10, 9.0), (20, n)]) for name, n in (("a", 1.0), ("b", 2.0))
    )
    for folder in (first, second):
        changed = result_of(folder) | {"run_id": "<b>$x^{$</b>&'\"" + folder.name}
        (folder / "result.json").write_text(json.dumps(changed))
    for page in (page_of(first), page_of(first, second)):
        assert "<b>$x" not in page and "&lt;b&gt;$x" in page


def test_curves_and_clouds_stay_small_and_true() -> None:
    """Many points become means over stretches, with the same mean; many documents an image inside the figure."""
    x = np.arange(12_345.0)
    thin = report.thinned(x, x % 7)
    assert len(thin[0]) == len(thin[1]) <= report.MOST_POINTS and thin[0][0] == 5.0
    counts = np.diff(np.append(np.arange(0, len(x), 11), len(x)))
    assert (thin[1] * counts).sum() == pytest.approx((x % 7).sum())
    assert report.smoothed(np.ones(50)).tolist() == [1.0] * 50
    assert report.smoothed(x[:80])[40] == pytest.approx(40) and report.smoothed(x[:80])[0] == pytest.approx(1.0)
    random = np.random.default_rng(0)
    cloud = report.draw_scatter(
        random.random(50_000), random.random(50_000), random.random(50_000), ("x", "y"), "cloud"
    )
    assert "<image" in cloud and len(cloud) < 400_000


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("result.json", None, "result.json: cannot be read"),
        ("result.json", "[]", "not a JSON object"),
        ("result.json", "{}", "has no preset"),
        ("steps.csv", "step,loss\n1\n", "steps.csv: not a table"),
        ("positions.csv", "", "positions.csv: not a table"),
    ],
)
def test_unusable_folders_are_refused_in_one_line(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, said: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[0], folder)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    assert report.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_command_line_writes_beside_the_runs(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(runs[0])]) == 0
    assert (runs[0] / "report.html").read_text() == page_of(runs[0])  # the same files give the same page
    assert report.main([str(runs[0]), str(runs[1])]) == 0 and (runs[0].parent / "comparison.html").exists()
    assert report.main([str(runs[0]), "--out", str(tmp_path / "new" / "page.html")]) == 0
    said = capsys.readouterr().out.splitlines()
    size = (tmp_path / "new" / "page.html").stat().st_size
    assert said[2].startswith(f"report file:{tmp_path / 'new' / 'page.html'} bytes:{size} seconds:")


def test_a_run_calls_the_report_where_it_is_there(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside train_gpt.py; REPORT=0 leaves it out; alone the script says nothing; what fails is one warning."""
    folder = tmp_path / "runs" / "whole"
    shutil.copytree(runs[0], folder, ignore=shutil.ignore_patterns("report.html"))
    settings = report.read_run(folder).origins
    env = {name.upper(): value for name, (value, origin) in settings.items() if origin == "environment"}
    for name in list(env):
        monkeypatch.setenv(name, {"True": "1", "False": "0"}.get(env[name], env[name]))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("STAGES", "quantize")
    for wanted, written in (("0", False), ("1", True)):
        monkeypatch.setenv("REPORT", wanted)
        assert tg.command_line() == 0
        assert (folder / "report.html").exists() is written
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"report file:{folder / 'report.html'} bytes:")
    page = (folder / "report.html").read_text()  # tables of the stage that is outdated now are not shown
    assert "Quantisation error" in page and "not scored yet" in page and "worst documents" not in page
    monkeypatch.setattr(tg, "__file__", str(tmp_path / "train_gpt.py"))
    assert tg.draw_report(folder) == ""
    (tmp_path / "records").mkdir()
    for text, said in (("import sys; sys.exit('out of ink')", "out of ink"), ("raise SystemExit(3)", "without a word")):
        (tmp_path / "records" / "report.py").write_text(text)
        assert tg.draw_report(folder).startswith("warning report:") and said in tg.draw_report(folder)


# ---------------------------------------------------------------------------------------------------------------------
# In a real browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
         " --disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr"
         " --hide-scrollbars --virtual-time-budget=8000 --dump-dom").split()  # fmt: skip
FRAME = """<!DOCTYPE html><iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre></pre>
<script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const figures = [...page.querySelectorAll("[data-key]")].map(e => [e.dataset.key, e.dataset.value, e.textContent]);
  const inside = [...page.querySelectorAll("main *")].filter(e => !e.closest(".scroll"));
  document.querySelector("pre").textContent = JSON.stringify({{
    figures, width: root.clientWidth, content: root.scrollWidth, drawings: page.querySelectorAll("svg").length,
    right: Math.max(...inside.map(e => e.getBoundingClientRect().right)) }});
}};
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1400])
@pytest.mark.parametrize("count", [1, 2])
def test_pages_open_in_a_browser(runs: list[Path], tmp_path: Path, width: int, count: int) -> None:
    """No message on the console, nothing wider than the window, and the figures that are drawn are the result's."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs Chromium")
    (tmp_path / "page.html").write_text(page_of(*runs[:count]))
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = json.loads(html.unescape(re.search("<pre>(.*)</pre>", done.stdout)[1]))
    assert found["width"] == found["content"] == width and found["right"] <= width
    assert found["drawings"] >= 6
    assert "val_bpb" in check_figures(found["figures"], [result_of(folder) for folder in runs[:count]])
