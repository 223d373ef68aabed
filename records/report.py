#!/usr/bin/env python3
"""Makes a page of one run, or a comparison of several: one HTML file that needs no server and no network.

    python records/report.py runs/a                   # writes runs/a/report.html; so does every run at its end
    python records/report.py runs/a runs/b runs/c     # writes runs/comparison.html: differences from runs/a
    python records/report.py runs/a --out page.html

A page of one run shows what each stage gave or cost, the loss, where the bytes are, how well each matrix was quantised,
bits per byte by position and by document, times, rules and settings. A comparison lays the curves over each other and
pairs the runs, by seed and by document (records/paired.py). Any run folder will do, of any preset and tokenizer;
what a run has not written (a stage that did not run, an older script) is left out.

A figure from result.json carries its key and its full value as attributes (data-key, data-value). The text of documents
is shown if the run's tokenizer and validation shards are still where its settings say.

Exit status: 0 written, 2 a mistake in the arguments or files.
"""

import argparse
import csv
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from script import definitions, settings_of
from variants import VARIANTS, variant_of

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from records.logs import read_log
from records.paired import (
    NOTHING,
    RESULT_FILE,
    SCORES_FILE,
    RunError,
    by_seed,
    document_differences,
    paired_difference,
    read_json,
    run_differences,
    signed,
    with_deviation,
)

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LIMIT_BYTES: int = definitions("ARTIFACT_LIMIT_BYTES")["ARTIFACT_LIMIT_BYTES"]
# file -> a key of result.json without which it is of an earlier run in this folder; in the order of RunFiles
TABLES = {"steps.csv": "steps", "tensors.csv": "artifact_bytes", SCORES_FILE: "submitted", "positions.csv": "submitted"}
# kind of score -> what the page calls it, and the step that leads to it; in the order in which they follow each other
SCORES = {
    "prequant": ("before quantisation", ""),
    "oversize": ("quantised, over the limit", "quantisation"),
    "quantized": ("quantised artifact", "quantisation"),
    "sliding": ("sliding window", "sliding window"),
    "ttt": ("test-time training", "test-time training"),
}
MATRIX_ORDER = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
MOST_PAIRS = 4  # scatter plots in a comparison
EXTREMES, EXCERPT_CHARS = 10, 360  # documents in the lists, and characters of each
FEWEST_BYTES = 100  # of a document in the lists: single bits decide about shorter ones
MOST_POINTS, MOST_CIRCLES = 1200, 1500  # of a curve; of a scatter plot before it becomes an image
# Settings that no result depends on are not compared, except those that change the speed.
SPEED = {"attn_backend", "compile", "kernels", "row_tokens", "val_batch_tokens"}
NOT_COMPARED = settings_of("RUN", "DATA") - SPEED | {"seed"}
# Okabe and Ito's colours, which stay apart for colour-blind readers; grey for what is only reference.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS, GREY, INK = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY), "#8a93a0", "#1f2933"
SCORE_COLOURS = {"oversize": ORANGE, "quantized": GREY, "sliding": GREEN, "ttt": BLUE}
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, sharp and searchable
    "svg.hashsalt": "report",  # the same run gives the same file
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#52606d",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading a run


class RunFiles(NamedTuple):
    """What a run folder says. A table is a dict of columns, (n,) arrays; None where the run did not write it."""

    folder: Path
    result: dict[str, Any]
    settings: dict[str, str]  # all of them, as the log prints them; empty without a log
    origins: dict[str, tuple[str, str]]  # those that are no defaults: value, and preset or environment
    versions: dict[str, str]
    steps: dict[str, np.ndarray] | None
    tensors: dict[str, np.ndarray] | None
    documents: dict[str, np.ndarray] | None
    positions: dict[str, np.ndarray] | None

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def name(self) -> str:
        return str(self.result["run_id"])

    @property
    def kinds(self) -> list[str]:
        """The kinds of score that the run has, in order."""
        return [kind for kind in SCORES if f"{kind}_val_bpb" in self.result]


def read_run(folder: Path) -> RunFiles:
    """Raises RunError for a folder without a usable result.json, and for damaged tables."""
    result = read_json(folder / RESULT_FILE, "give the folder of a run that has finished a stage")
    for key in ("preset", "run_id", "seed", "stage_seconds", "validity", "valid"):
        if key not in result:
            raise RunError(f"{folder / RESULT_FILE}: has no {key}; give the folder of a run of train_gpt.py")
    log = read_log(folder / "log.txt") if (folder / "log.txt").exists() else None
    lines = (folder / "log.txt").read_text(errors="replace") if log else ""
    versions = re.findall(r"^versions (.*)$", lines, re.M)
    tables = {name: read_table(folder / name) if key in result else None for name, key in TABLES.items()}
    return RunFiles(
        folder,
        result,
        log.settings[-1] if log and log.settings else {},
        {name: (value, origin) for name, value, origin in log.facts.get("origins", [])} if log else {},
        dict(pair.split(":", 1) for pair in versions[-1].split()) if versions else {},
        *tables.values(),
    )


def read_table(path: Path) -> dict[str, np.ndarray] | None:
    """The columns of a CSV file by name: numbers as float64 (nan where empty), others as text; None without the file.

    Raises RunError for a file whose lines do not fit its head.
    """
    if not path.exists():
        return None
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    if not rows or not head or any(len(row) != len(head) for row in rows):
        raise RunError(f"{path}: not a table ({len(rows)} lines under {len(head)} columns); run its stage again")
    columns = {}
    for name, values in zip(head, zip(*rows, strict=True), strict=True):
        try:
            columns[name] = np.array([float(value or "nan") for value in values])
        except ValueError:
            columns[name] = np.array(values)
    return columns


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return nats / math.log(2) / np.maximum(sizes, 1)


class Document(NamedTuple):
    """One line of the lists of best and worst documents."""

    number: int
    bytes: int
    plain: float  # bits per byte without adaptation
    final: float  # of the submitted score
    text: str  # its beginning; empty where it cannot be shown


def extremes(run: RunFiles, best: bool) -> list[Document]:
    """The documents with the lowest or highest bits per byte in the submitted score; short ones do not count, if there
    are enough others."""
    table = run.documents
    sizes, submitted = table["bytes"], run.result["submitted"]
    plain, final = (bits_per_byte(table[kind], sizes) for kind in (plain_kind(run), submitted))
    allowed = np.flatnonzero(sizes >= FEWEST_BYTES)
    allowed = allowed if len(allowed) >= 2 * EXTREMES else np.arange(len(sizes))
    chosen = allowed[np.argsort(final[allowed] if best else -final[allowed], kind="stable")][:EXTREMES]
    text = text_reader(run)
    return [Document(int(n) + 1, int(sizes[n]), float(plain[n]), float(final[n]), text(int(n))) for n in chosen]


def plain_kind(run: RunFiles) -> str:
    """The kind of score to which the submitted one is compared by document: without adaptation."""
    kinds = [kind for kind in run.kinds if kind in ("quantized", "sliding") and kind in run.documents]
    others = [kind for kind in kinds if kind != run.result["submitted"]]
    return (others or kinds or [run.result["submitted"]])[-1]


def text_reader(run: RunFiles) -> Callable[[int], str]:
    """A function that gives the beginning of document n; always empty where tokenizer or shards are not there, or not
    those of the run."""
    values = run.settings
    if not values or "val_targets" not in run.result:
        return lambda number: ""
    size, data = values["vocab_size"], Path(values["data_dir"])
    kinds = {name: values.get(name) == "True" for name in ("caseops_enabled", "marker_pair_mode")}
    variant = VARIANTS.get(variant_of(SimpleNamespace(vocab_size=size, **kinds)))
    if not variant and not (values["data_path"] and values["tokenizer_path"]):
        return lambda number: ""
    folder = Path(values["data_path"] or data / "datasets" / variant.dataset)
    model = Path(values["tokenizer_path"] or data / "tokenizers" / variant.tokenizer)
    try:
        import caseops
        import shards

        tokens, tokenizer = shards.read_split(folder, "val"), shards.load_tokenizer(model)
        pairs = caseops.MarkerPairs.of(tokenizer) if kinds["marker_pair_mode"] else None
    except (ValueError, OSError):
        return lambda number: ""
    if len(tokens) != run.result["val_targets"] + 1:
        return lambda number: ""
    operators = caseops.has_operators(tokenizer)

    def beginning(number: int) -> str:
        begin = int(run.documents["position"][number]) + 1
        ids = tokens[begin : begin + min(int(run.documents["tokens"][number]), EXCERPT_CHARS)]
        ids = ids[ids != shards.BOS_ID]
        text = tokenizer.decode((pairs.expand(ids) if pairs else ids).tolist())
        if operators:
            text = caseops.decode(text.rstrip("".join(caseops.OPERATORS)))  # the cut may leave an operator at the end
        return text[:EXCERPT_CHARS].strip()

    return beginning


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


class TensorClass(NamedTuple):
    """What one kind of tensor takes in the artifact."""

    name: str
    numbers: int  # weights; scales and other side information are no weights
    codes: float  # bytes
    scales: float  # bytes of scales, row orders and low-rank corrections
    total: float

    @property
    def bits(self) -> float | None:
        """Per weight, side information included."""
        return 8 * self.total / self.numbers if self.numbers else None


def matrix_of(array: str) -> tuple[str, str, bool]:
    """(layer, kind, whether it holds weights and not side information) of an array of the artifact."""
    layer, name = array.removeprefix("blocks.").split(".", 1) if array.startswith("blocks.") else ("", array)
    side = re.search(r"\.(scale|order|lqer_\w+)$", name)
    name = re.sub(r"\.(codes|scale|order|lqer_\w+)$", "", name)
    return layer, name, not side


def tensor_classes(tensors: dict[str, np.ndarray]) -> list[TensorClass]:
    """By kind, the matrices in the order of the network, then what is left as one class."""
    kinds: dict[str, list[float]] = {}
    for array, stream, numbers, size in zip(*(tensors[key] for key in ("array", "stream", "numbers", "bytes"))):
        _, kind, weights = matrix_of(array)
        shown = kind in MATRIX_ORDER or kind in ("tok_emb.weight", "bigram_emb.weight")
        sums = kinds.setdefault(kind if shown else "header" if not stream else "gates, gains, lambdas", [0, 0, 0])
        sums[0] += numbers * weights
        sums[1 if weights else 2] += size
    names = {"tok_emb.weight": "embedding", "bigram_emb.weight": "bigram"}
    order = ("tok_emb.weight", "bigram_emb.weight", *MATRIX_ORDER, "gates, gains, lambdas", "header")
    return [
        TensorClass(names.get(kind, kind), int(kinds[kind][0]), *kinds[kind][1:], sum(kinds[kind][1:]))
        for kind in order
        if kind in kinds
    ]


def by_layer(tensors: dict[str, np.ndarray], value: str) -> tuple[np.ndarray, list[str]]:
    """(layers, kinds) of one quantity of the matrices, and the kinds. `value`: bits per weight, side information
    included, or a column of errors."""
    rows = [(*matrix_of(array), n) for n, array in enumerate(tensors["array"])]
    kinds = [kind for kind in MATRIX_ORDER if any(row[1] == kind for row in rows)]
    layers = 1 + max(int(row[0]) for row in rows if row[0])
    size, count, error = (np.zeros((layers, len(kinds))) for _ in range(3))
    for layer, kind, weights, n in rows:
        if layer and kind in kinds:
            place = int(layer), kinds.index(kind)
            size[place] += tensors["bytes"][n]
            if weights:
                count[place] += tensors["numbers"][n]
                error[place] = tensors[value][n] if value != "bits" else 0
    return (8 * size / np.maximum(count, 1) if value == "bits" else error), kinds


def matrix_errors(tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, bool]:
    """(layers, kinds) of relative errors, and whether they are errors of outputs, which is so if all quantised matrices
    have one. Matrices in half precision count as exact."""
    weight, output = (by_layer(tensors, f"{of}_error")[0] for of in ("weight", "output"))
    exact = np.isnan(weight)
    weighted = not np.isnan(output[~exact]).any()
    return np.where(exact, 0.0, output if weighted else weight), weighted


# ---------------------------------------------------------------------------------------------------------------------
# Figures: each is an SVG. They are drawn as wide as a phone, and placed beside each other where there is room.


def canvas(height: float, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the common width, and its axes."""
    return pyplot.subplots(rows, figsize=(4.0, height), layout="constrained", **options)


def as_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an element of a page: ids of its own, as wide as its place, `label` for those who cannot see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    pyplot.close(figure)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    head = f'<svg role="img" aria-label="{Markup.escape(label)}" '
    size = re.search(r'viewBox="[^"]*"', text)[0]
    return Markup(
        re.sub(r"<svg [^>]*>", lambda _: f'{head}{size} xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)
    )


def thinned(*columns: np.ndarray) -> list[np.ndarray]:
    """Curves with at most about MOST_POINTS points: means over equal stretches."""
    stretch = math.ceil(len(columns[0]) / MOST_POINTS)
    begins = np.arange(0, len(columns[0]), stretch)
    counts = np.diff(np.append(begins, len(columns[0])))
    return [np.add.reduceat(column, begins) / counts for column in columns]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve around each point; shorter at its ends."""
    half = max(len(values) // 40, 1)
    sums = np.append(0, np.cumsum(values))
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


class Bar(NamedTuple):
    """One row of the bar of scores: a score, or the step from one to the next."""

    label: str
    begin: float
    end: float
    is_score: bool


def score_bars(result: dict[str, Any], kinds: Sequence[str]) -> list[Bar]:
    """First the score before quantisation, then what each stage gave or cost, then the submitted score."""
    values = [result[f"{kind}_val_bpb"] for kind in kinds]
    bars = [Bar(SCORES[kinds[0]][0], 0, values[0], True)]
    for number in range(1, len(kinds)):
        label = "made to fit" if kinds[number - 1] == "oversize" else SCORES[kinds[number]][1]
        bars.append(Bar(label, values[number - 1], values[number], False))
    return [*bars, Bar("submitted", 0, result["val_bpb"], True)] if "val_bpb" in result else bars


def draw_scores(run: RunFiles) -> Markup:
    """Where the submitted bits per byte come from."""
    bars = score_bars(run.result, run.kinds)
    figure, axes = canvas(0.6 + 0.36 * len(bars))
    ends = [bar.end for bar in bars]
    span = max(max(ends) - min(ends), 1e-3)
    left, right = min(ends) - 0.45 * span, max(ends) + 0.55 * span
    for row, bar in enumerate(bars):
        change = bar.end - bar.begin
        colour = INK if bar.is_score else BLUE if change < 0 else RED
        low, high = (left, bar.end) if bar.is_score else sorted((bar.begin, bar.end))
        axes.barh(row, max(high - low, 0.004 * span), left=low, height=0.62, color=colour)
        text = f"{bar.end:.4f}" if bar.is_score else format(change, "+.4f" if abs(change) > 1e-4 else "+.6f")
        axes.annotate(text, (high, row), (5, 0), textcoords="offset points", va="center", color=colour, weight="bold")
        if row:
            axes.vlines(bars[row - 1].end, row - 0.69, row - 0.31, GREY, linewidth=0.8)
    name_rows(axes, [bar.label for bar in bars])
    axes.set(xlim=(left, right), xlabel="bits per byte (axis does not begin at 0)")
    return as_svg(figure, "scores", "Bits per byte after each stage")


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """The rows of a bar chart, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def draw_training(run: RunFiles) -> Markup:
    """Loss above, learning rate below, over steps and seconds; a line where the loops were switched on."""
    steps = run.steps
    figure, (above, below) = canvas(3.3, 2, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    x, loss, rate = thinned(steps["step"], steps["loss"], steps["lr_multiplier"])
    above.plot(x, loss, color=SKY, alpha=0.55, linewidth=0.8)
    above.plot(x, smoothed(loss), color=BLUE)
    below.plot(x, rate, color=ORANGE)
    looped = np.flatnonzero(steps["looped"])
    if len(looped) and looped[0]:
        place = steps["step"][looped[0]]
        for axes in (above, below):
            axes.axvline(place, color=INK, linewidth=0.9, linestyle="--")
        above.annotate(f"loops on, step {place:.0f}", (place, 0.97), (4, 0), xycoords=("data", "axes fraction"),
                       textcoords="offset points", va="top", fontsize=8.5)  # fmt: skip
    above.set_ylabel("nats per token")
    below.set(xlabel="optimizer step", ylabel="lr", ylim=(0, 1.08 * max(rate.max(), 1e-9)))
    seconds_axis(above, steps)
    return as_svg(figure, "training", "Training loss and learning rate over steps and seconds")


def seconds_axis(axes: Axes, steps: dict[str, np.ndarray]) -> None:
    """A second axis on top: the seconds at which a few of the steps began."""
    places = np.linspace(steps["step"][0], steps["step"][-1], 5)
    seconds = np.interp(places, steps["step"], steps["seconds"])
    top = axes.secondary_xaxis("top")
    top.set_xticks(places, [f"{value:,.{0 if seconds[-1] >= 20 else 1}f}" for value in seconds])
    top.set_xlabel("seconds")
    top.spines["top"].set_visible(False)


def draw_bytes(classes: list[TensorClass], code_bytes: int) -> Markup:
    """A bar for each kind of tensor and for the code; codes and side information apart."""
    rows = [(entry.name, entry.codes, entry.scales) for entry in classes] + [("code", code_bytes, 0.0)]
    figure, axes = canvas(0.95 + 0.25 * len(rows))
    names, codes, scales = zip(*rows, strict=True)
    totals = [sum(pair) for pair in zip(codes, scales, strict=True)]
    axes.barh(range(len(rows)), codes, 0.7, color=BLUE, label="weights, code")
    axes.barh(range(len(rows)), scales, 0.7, codes, color=ORANGE, label="scales, corrections")
    for row, total in enumerate(totals):
        axes.annotate(f"{total:,.0f}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    name_rows(axes, names)
    bytes_axis(axes)
    axes.set_xlim(0, 1.3 * max(totals))
    figure.legend(loc="outside lower center", ncols=2)
    return as_svg(figure, "bytes", "Bytes of the artifact by kind of tensor")


def bytes_axis(axes: Axes) -> None:
    axes.set_xlabel("bytes")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M" if x >= 1e6 else f"{x / 1e3:g} k" if x else "0")


def draw_heat(values: np.ndarray, kinds: list[str], form: str, name: str, label: str) -> Markup:
    """Layers against kinds of matrix, each cell with its number; darker is more."""
    figure, axes = canvas(0.7 + 0.24 * len(values))
    middle = (values.max() + values.min()) / 2
    half = max((values.max() - values.min()) / 2, 0.05 * middle, 1e-9)  # no contrast where all are nearly equal
    shades = matplotlib.colormaps["Oranges" if name == "errors" else "Blues"]
    colours = matplotlib.colors.ListedColormap(shades(np.linspace(0.06, 0.58, 256)))  # light enough for dark text
    axes.pcolormesh(values, cmap=colours, edgecolors="white", linewidth=1.2, vmin=middle - half, vmax=middle + half)
    for (layer, kind), value in np.ndenumerate(values):
        axes.text(kind + 0.5, layer + 0.52, format(value, form), ha="center", va="center", fontsize=8)
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=8.5)
    axes.set_yticks(np.arange(len(values)) + 0.5, range(len(values)))
    axes.set(ylim=(len(values), 0), ylabel="layer")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return as_svg(figure, name, label)


def octave_means(positions: dict[str, np.ndarray], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(middle of each octave of positions, bits per byte there)."""
    return positions["first"] * math.sqrt(2), bits_per_byte(positions[kind], positions["bytes"])


def draw_positions(run: RunFiles) -> Markup:
    """Bits per byte by position in the document, a curve for each kind of score."""
    figure, axes = canvas(2.9)
    curves = {kind: octave_means(run.positions, kind) for kind in run.kinds if kind in run.positions}
    for kind, (x, y) in curves.items():
        axes.plot(x, y, "o-", markersize=3.5, color=SCORE_COLOURS[kind], label=SCORES[kind][0])
    positions_axes(axes, [y for _, y in curves.values()])
    return as_svg(figure, "positions", "Bits per byte by position in the document")


def positions_axes(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Scales and labels. The first target of a document, which has no context, may lie above the picture."""
    low, high = min(y.min() for y in curves), max(y[1:].max(initial=0) for y in curves)
    first, height = max(y[0] for y in curves), high - low
    if high and first > high + 0.5 * height:
        axes.set_ylim(low - 0.08 * height, high + 0.25 * height)
        axes.text(
            0.19, 0.97, f"first target: {first:.1f}", transform=axes.transAxes, va="top", fontsize=8.5, color=GREY
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set(xlabel="position in the document (targets, by octaves)", ylabel="bits per byte")
    axes.legend(loc="upper right")


def draw_scatter(x: np.ndarray, y: np.ndarray, sizes: np.ndarray, labels: tuple[str, str], name: str) -> Markup:
    """Documents as circles with an area like their bytes; below the diagonal y is better."""
    figure, axes = canvas(3.5)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    edge = 0.05 * max(high - low, 1e-6)
    axes.plot([low - edge, high + edge], [low - edge, high + edge], color=GREY, linewidth=0.9)
    area = np.clip(120 * sizes / max(sizes.max(), 1), 4, None)
    colours = np.where(y <= x, BLUE, RED)
    axes.scatter(x, y, area, colours, alpha=0.6, linewidths=0, rasterized=len(x) > MOST_CIRCLES)
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(low - edge, high + edge), ylim=(low - edge, high + edge))
    axes.set_aspect("equal", "box")
    return as_svg(figure, name, "Bits per byte of each document")


def draw_documents(run: RunFiles) -> Markup | None:
    """The submitted score of each document against the plain one."""
    submitted, plain = run.result["submitted"], plain_kind(run)
    if plain == submitted:
        return None
    x, y = (bits_per_byte(run.documents[kind], run.documents["bytes"]) for kind in (plain, submitted))
    labels = f"{SCORES[plain][0]}, bits per byte", SCORES[submitted][0]
    return draw_scatter(x, y, run.documents["bytes"], labels, "documents")


# ---------------------------------------------------------------------------------------------------------------------
# Figures of several runs


def curve(axes: Axes, number: int, run: RunFiles, x: np.ndarray, y: np.ndarray, **options: Any) -> None:
    """A line in the colour of the run; the line style changes when the colours are used up."""
    style = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
    axes.plot(x, y, color=COLOURS[number % len(COLOURS)], linestyle=style, label=run.name, **options)


def loss_per_byte(run: RunFiles) -> np.ndarray:
    """The training loss in bits per byte, so that tokenizers compare: at the tokens per byte of the validation text."""
    return run.steps["loss"] / math.log(2) * run.result["scored_tokens"] / run.result["scored_bytes"]


def draw_losses(runs: Sequence[RunFiles], over: str) -> Markup | None:
    """Smoothed training loss of all runs over `over`: step or seconds."""
    drawn = [(n, run) for n, run in enumerate(runs) if run.steps and "scored_bytes" in run.result]
    if not drawn:
        return None
    figure, axes = canvas(2.9)
    lows, highs = [], []
    for number, run in drawn:
        x, y = thinned(run.steps[over], loss_per_byte(run))
        curve(axes, number, run, x, smoothed(y))
        lows.append(smoothed(y).min())
        highs.append(np.quantile(smoothed(y), 0.9))
    height = max(highs) - min(lows)
    axes.set_ylim(min(lows) - 0.05 * height, max(highs) + 0.2 * height)  # the first steps would flatten the rest
    axes.set(xlabel="optimizer step" if over == "step" else "seconds", ylabel="bits per byte")
    axes.legend()
    return as_svg(figure, f"losses-{over}", f"Training loss of all runs over {over}")


def draw_stages(runs: Sequence[RunFiles]) -> Markup:
    """The scores of all runs in the order of the stages."""
    kinds = [kind for kind in SCORES if any(kind in run.kinds for run in runs)]
    figure, axes = canvas(2.9)
    for number, run in enumerate(runs):
        x = [kinds.index(kind) for kind in run.kinds]
        curve(axes, number, run, x, [run.result[f"{kind}_val_bpb"] for kind in run.kinds], marker="o", markersize=4)
    axes.set_xticks(range(len(kinds)), [SCORES[kind][0].replace(" ", "\n", 1) for kind in kinds], fontsize=8.5)
    axes.set_ylabel("bits per byte")
    axes.margins(x=0.12)
    axes.legend()
    return as_svg(figure, "stages", "Scores of all runs after each stage")


def draw_all_positions(runs: Sequence[RunFiles]) -> Markup | None:
    """Bits per byte of the submitted score of all runs by position in the document."""
    drawn = [(n, run) for n, run in enumerate(runs) if run.positions]
    if not drawn:
        return None
    figure, axes = canvas(2.9)
    curves: list[np.ndarray] = []
    for number, run in drawn:
        # By bytes, not by tokens: with another tokenizer the same place of a text has another number.
        per_token = run.result["scored_bytes"] / run.result["scored_tokens"]
        x, y = octave_means(run.positions, run.result["submitted"])
        curve(axes, number, run, x * per_token, y, marker="o", markersize=3.5)
        curves.append(y)
    positions_axes(axes, curves)
    axes.set_xlabel("position in the document (bytes, by octaves of targets)")
    return as_svg(figure, "all-positions", "Bits per byte of all runs by position in the document")


def draw_all_bytes(runs: Sequence[RunFiles]) -> Markup | None:
    """Bytes of the artifact by kind of tensor, a bar for each run."""
    drawn = [(n, run, {entry.name: entry.total for entry in tensor_classes(run.tensors)})
             for n, run in enumerate(runs) if run.tensors]  # fmt: skip
    if not drawn:
        return None
    names = list(dict.fromkeys(name for _, _, sizes in drawn for name in sizes))
    figure, axes = canvas(1.0 + max(0.28, 0.065 * (len(drawn) + 1)) * len(names))
    height = 1 / (len(drawn) + 1)
    for place, (number, run, sizes) in enumerate(drawn):
        y = np.arange(len(names)) + (place - (len(drawn) - 1) / 2) * height
        values, colour = [sizes.get(name, 0) for name in names], COLOURS[number % len(COLOURS)]
        axes.barh(y, values, height, color=colour, label=run.name)
    name_rows(axes, names)
    bytes_axis(axes)
    figure.legend(loc="outside lower center", ncols=3)
    return as_svg(figure, "all-bytes", "Bytes of the artifacts by kind of tensor")


def draw_pair(number: int, mine: RunFiles, base: RunFiles) -> Markup | None:
    """Documents of run `number` against those of another one, in their submitted scores; None where they have other
    text."""
    if not (mine.documents and base.documents and np.array_equal(mine.documents["bytes"], base.documents["bytes"])):
        return None
    x, y = (bits_per_byte(run.documents[run.result["submitted"]], run.documents["bytes"]) for run in (base, mine))
    labels = f"{base.name}, bits per byte", f"{mine.name}, bits per byte"
    return draw_scatter(x, y, base.documents["bytes"], labels, f"pair-{number}")


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


class Group(NamedTuple):
    """Runs that differ in nothing but the seed, as far as their settings say, against those of the first group."""

    label: str
    runs: list[RunFiles]
    final: str  # mean and deviation over seeds
    by_seed: str
    seeds: int  # pairs
    by_document: str
    better: str


def difference_label(run: RunFiles, runs: Sequence[RunFiles]) -> str:
    """PRESET+KEY=VALUE+...: what was set for this run, but not for all."""
    given = {name: value for name, (value, origin) in run.origins.items() if origin.startswith("environment")}
    parts = []
    for name, value in sorted(given.items()):
        same = all(other.settings.get(name.lower()) == run.settings.get(name.lower()) for other in runs)
        if name.lower() in run.settings and not same and name.lower() not in NOT_COMPARED:
            parts.append(f"{name.upper()}={value}")
    return "+".join([run.result["preset"], *parts])


def make_groups(runs: Sequence[RunFiles]) -> list[Group]:
    """The runs by label, in the order given, each group paired with the first one."""
    members: dict[str, list[RunFiles]] = {}
    for run in runs:
        members.setdefault(difference_label(run, runs), []).append(run)
    base, groups = next(iter(members.values())), []
    for label, mine in members.items():
        pair = paired_difference(by_seed(mine, "val_bpb"), by_seed(base, "val_bpb")) if mine is not base else None
        try:
            found = document_differences(mine, base) if pair else None
            by_document, better = document_text(found)
        except RunError:
            by_document, better = "other text", NOTHING
        final = with_deviation(by_seed(mine, "val_bpb"))
        groups.append(Group(label, mine, final, signed(pair), pair.number if pair else 0, by_document, better))
    return groups


def document_text(found: Any) -> tuple[str, str]:
    """The cells of a difference by document."""
    if found is None:
        return NOTHING, NOTHING
    return signed(found.difference), f"{found.better:,} of {found.difference.number:,}"


def against_first(run: RunFiles, first: RunFiles) -> tuple[str, str]:
    """Cells of one run against another: difference by document with its error, and documents that became better."""
    if run is first or not ("submitted" in run.result and "submitted" in first.result):
        return NOTHING, NOTHING
    try:
        return document_text(run_differences([(run, first)]))
    except RunError:
        return "other text", NOTHING


def differing_settings(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ, with the value of each; empty where a log is missing."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [run.settings.get(name, NOTHING) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name not in NOT_COMPARED - {"seed"}]


# ---------------------------------------------------------------------------------------------------------------------
# Page


def figure_of(result: dict[str, Any], key: str, form: str = ",") -> Markup:
    """A figure of result.json as text, with its key and its full value."""
    value = result.get(key)
    if value is None:
        return Markup(NOTHING)
    return Markup('<span data-key="{}" data-value="{}">{}</span>').format(key, repr(value), format(value, form))


def short(value: Any) -> str:
    """A value of the validity report for a narrow column."""
    if value is None:
        return NOTHING
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    return value if len(value) <= 24 else value[:12] + "\u2026"


def chosen_settings(run: RunFiles) -> list[tuple[str, str, str]]:
    """(name, value, origin) of what was set otherwise than the preset has it."""
    rows = [(name.upper(), run.settings.get(name, value), origin) for name, (value, origin) in run.origins.items()]
    return [(name, value, origin.replace(",as", ", as ")) for name, value, origin in rows if origin[:6] != "preset"]


def single_page(run: RunFiles) -> dict[str, Any]:
    """What the template shows of one run."""
    drawn: dict[str, Markup | None] = dict.fromkeys(("bytes", "bits", "errors"))
    weighted = False
    drawn["scores"] = draw_scores(run) if run.kinds else None
    drawn["training"] = draw_training(run) if run.steps else None
    classes = tensor_classes(run.tensors) if run.tensors else []
    if run.tensors:
        drawn["bytes"] = draw_bytes(classes, run.result["code_bytes"])
        bits, kinds = by_layer(run.tensors, "bits")
        drawn["bits"] = draw_heat(bits, kinds, ".2f", "bits", "Bits per weight of each matrix")
        errors, weighted = matrix_errors(run.tensors)
        drawn["errors"] = draw_heat(
            100 * errors, kinds, ".1f", "errors", "Quantisation error of each matrix in percent"
        )
    drawn["positions"] = draw_positions(run) if run.positions else None
    scored = run.documents is not None
    drawn["documents"] = draw_documents(run) if scored else None
    lists = [("best", extremes(run, True)), ("worst", extremes(run, False))] if scored else []
    plain = SCORES[plain_kind(run)][0] if drawn["documents"] else ""
    return dict(title=run.name, run=run, drawn=drawn, classes=classes, weighted=weighted, lists=lists, plain=plain,
                chosen=chosen_settings(run))  # fmt: skip


def comparison_page(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """What the template shows of several runs."""
    pairs = [(run.name, draw_pair(n, run, runs[0])) for n, run in enumerate(runs[: 1 + MOST_PAIRS]) if n]
    figures = [
        ("Stages", "Bits per byte after each stage.", draw_stages(runs)),
        ("Training loss over steps", "Smoothed; in bits per byte at the tokens per byte of the validation text.",
         draw_losses(runs, "step")),
        ("Training loss over seconds", "The same over the training clock.", draw_losses(runs, "seconds")),
        ("Position in the document", "The submitted score.", draw_all_positions(runs)),
        ("Bytes", "Of the artifact, by kind of tensor.", draw_all_bytes(runs)),
        *((f"Documents of {name}", "Area is bytes. Blue, below the diagonal: fewer bits than the first run.", pair)
          for name, pair in pairs),
    ]  # fmt: skip
    return dict(
        title=f"Comparison of {len(runs)} runs", runs=runs, groups=make_groups(runs), figures=figures,
        against=[against_first(run, runs[0]) for run in runs], differing=differing_settings(runs), colours=COLOURS,
    )  # fmt: skip


def make_page(runs: Sequence[RunFiles]) -> str:
    """The HTML page of one run, or of several."""
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                               lstrip_blocks=True)  # fmt: skip
    pages.globals.update(
        figure=figure_of, short=short, SCORES=SCORES, NOTHING=NOTHING, LIMIT_BYTES=LIMIT_BYTES, Markup=Markup
    )
    with matplotlib.rc_context(STYLE):
        content = single_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    return pages.get_template(TEMPLATE.name).render(content, single=len(runs) == 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes a page of one run, or a comparison of several.")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; others are compared with the first")
    parser.add_argument("--out", type=Path, help="file to write (RUN/report.html, or comparison.html beside the runs)")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        runs = [read_run(folder) for folder in options.runs]
        single = options.runs[0] / "report.html"
        path = options.out or (single if len(runs) == 1 else options.runs[0].resolve().parent / "comparison.html")
        page = make_page(runs).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".part").write_bytes(page)
        os.replace(path.with_name(path.name + ".part"), path)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report file:{path} bytes:{len(page)} seconds:{time.monotonic() - start:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
