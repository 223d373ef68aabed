#!/usr/bin/env python3
"""Shows how differences between presets change with scale, and tests what that forecasts of full size.

    python records/scaling.py --runs W64N50 W64N150 W128N50 ... --against pr1941 --table scaling.md --picture scaling.png

Each folder is one that `ladder.py run --width W --steps N` has filled: one width, one length, the same data in all. The
table has the bits per byte of every preset at every scale before quantisation, after it, and in the end; the picture
the differences from one preset, against the processor time of the training and against that preset's own bits per byte.
Where published systems are among the presets, what they published says how good a forecast from these scales would have
been (`back_test`).

Exit status: 0 done, 2 a mistake in the arguments or files.
"""

import argparse
import io
import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import numpy as np
import scipy.stats

import train_gpt as tg
from records.ladder import (
    BATCH_TOKENS,
    SPEEDS_FILE,
    Finished,
    as_markdown,
    facts,
    ladder_order,
    load_preset,
    parameters,
    published_steps,
    read_runs,
)
from records.paired import NOTHING, Difference, RunError, by_seed, paired_difference, read_json, signed, with_deviation

STAGES = {"before quantisation": "prequant_val_bpb", "quantised": "quantized_val_bpb", "final": "val_bpb"}
FINAL = STAGES["final"]


class Point(NamedTuple):
    """The runs of one preset at one scale."""

    width: int
    steps: int
    preset: str
    runs: list[Finished]
    step_seconds: float | None  # processor seconds of a training step, where they were measured

    @property
    def compute(self) -> float:
        """6 x parameters x training tokens, the usual estimate of operations."""
        return 6.0 * self.runs[0].about["parameters"] * self.steps * BATCH_TOKENS

    def values(self, key: str) -> dict[int, float]:
        return by_seed(self.runs, key)

    def mean(self, key: str) -> float:
        return statistics.fmean(self.values(key).values())


Points = dict[tuple[int, int], dict[str, Point]]  # (width, steps) -> preset -> point, in ascending order


def read_points(folders: Sequence[Path]) -> Points:
    """The finished runs of all folders. Raises RunError for two folders of one scale, and for different data."""
    points: Points = {}
    data: dict[str, Any] | None = None
    for folder in folders:
        runs, unfinished = read_runs(folder)
        for name in unfinished:
            print(f"{folder.name}/{name}: not finished, left out")
        about = runs[0].about
        if data is not None and about["data"] != data:
            raise RunError(f"{folder}: its runs read other data than those of {folders[0]}; leave it out")
        data = about["data"]
        scale = runs[0].width, about["expected_steps"]
        if any(run.about["expected_steps"] != scale[1] for run in runs):
            raise RunError(f"{folder}: presets of different lengths; make it with `ladder.py run --steps`")
        if scale in points:
            raise RunError(f"{folder}: width {scale[0]} and {scale[1]} steps are there already; leave one out")
        speeds = read_json(folder / SPEEDS_FILE, "delete it") if (folder / SPEEDS_FILE).exists() else {}
        groups = {name: [run for run in runs if run.about["preset"] == name] for name in ladder_order(presets_of(runs))}
        points[scale] = {name: Point(*scale, name, group, speeds.get(name)) for name, group in groups.items()}
    return dict(sorted(points.items()))


def presets_of(runs: Sequence[Finished]) -> set[str]:
    return {run.about["preset"] for run in runs}


# ---------------------------------------------------------------------------------------------------------------------
# Forecasts from small scales, and what was published


class Quantity(NamedTuple):
    """Something that is measured at every scale and was published at full size: a difference in bits per byte."""

    name: str
    first: tuple[str, str]  # preset and key of result.json
    second: tuple[str, str]  # what is subtracted from it

    def at(self, presets: dict[str, Point]) -> dict[int, float]:
        """By seed, at one scale; empty where a preset was not run."""
        (mine, key), (other, base) = self.first, self.second
        if not {mine, other} <= presets.keys():
            return {}
        ours, theirs = presets[mine].values(key), presets[other].values(base)
        return {seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()}

    def published(self, systems: dict[str, dict[str, float]]) -> float | None:
        """At full size; None where one of both was never published."""
        (mine, key), (other, base) = self.first, self.second
        found = systems.get(mine, {}).get(key), systems.get(other, {}).get(base)
        return None if None in found else found[0] - found[1]


PLAIN, ROUNDED = STAGES["before quantisation"], STAGES["quantised"]


def quantities(presets: Sequence[str]) -> list[Quantity]:
    """What each system gains over the one before it by training, what quantisation costs, what adaptation gains."""
    training = [Quantity(f"training: {b} after {a}", (b, PLAIN), (a, PLAIN)) for a, b in itertools.pairwise(presets)]
    tax = [Quantity(f"quantisation of {name}", (name, ROUNDED), (name, PLAIN)) for name in presets]
    gain = [Quantity(f"adaptation of {name}", (name, FINAL), (name, ROUNDED)) for name in presets]
    return training + tax + gain


def published_means() -> dict[str, dict[str, float]]:
    """Mean scores of the published systems by preset, from published.json of their folders."""
    means: dict[str, dict[str, float]] = {}
    for path in sorted((ROOT / "records").glob("*/published.json")):
        for table in read_json(path, "correct it")["tables"]:
            means |= {preset: table["mean"] for preset in table["presets"]}
    return means


class Forecast(NamedTuple):
    """Of a quantity at full size, with its standard error."""

    value: float
    error: float


def line_forecast(x: Sequence[float], y: Sequence[float], there: float) -> Forecast | None:
    """Least squares through points (x, y), at `there`; None for fewer than three places.

    Error: that of a mean response, s sqrt(1 / n + (there - mean)^2 / sum((x - mean)^2)). It knows the scatter of the
    points; whether the law is a line outside of them, it cannot know.
    """
    if len(set(x)) < 3:
        return None
    fit = scipy.stats.linregress(x, y)
    residual = np.asarray(y) - fit.intercept - fit.slope * np.asarray(x)
    spread = math.sqrt((residual**2).sum() / (len(x) - 2))
    away = (there - np.mean(x)) ** 2 / ((np.asarray(x) - np.mean(x)) ** 2).sum()
    return Forecast(float(fit.intercept + fit.slope * there), spread * math.sqrt(1 / len(x) + away))


def full_compute(preset: str) -> float:
    """6 x parameters x tokens of the published run."""
    config = load_preset(preset)
    size = parameters({"PRESET": config.preset})
    return 6.0 * size * published_steps(config) * config.train_batch_tokens


class Tested(NamedTuple):
    """A quantity at the smallest and largest scale, two forecasts of it, and what was published."""

    quantity: Quantity
    smallest: Difference
    largest: Difference
    by_bpb: Forecast | None  # a line over the other preset's bits per byte
    by_compute: Forecast | None  # a power law: a line in logarithms
    published: float | None


def back_test(points: Points, presets: Sequence[str], against: str) -> list[Tested]:
    """Forecasts each quantity as if full size were not known."""
    systems, tests = published_means(), []
    for quantity in quantities(presets):
        seen = [(scale, found) for scale, at in points.items() if (found := quantity.at(at)) and against in at]
        if not seen:
            continue
        flat = [(scale, value) for scale, found in seen for value in found.values()]
        values = [value for _, value in flat]
        bpb = [points[scale][against].mean(PLAIN) for scale, _ in flat]
        compute = [math.log(points[scale][quantity.first[0]].compute) for scale, _ in flat]
        there = systems.get(against, {}).get(PLAIN)
        sign = math.copysign(1, values[0])
        power = None
        if all(value * sign > 0 for value in values):  # a law of logarithms has one sign
            logs = [math.log(abs(value)) for value in values]
            if found := line_forecast(compute, logs, math.log(full_compute(quantity.first[0]))):
                power = Forecast(sign * math.exp(found.value), math.exp(found.value) * found.error)
        ends = [mean_difference(found) for _, found in (seen[0], seen[-1])]
        line = line_forecast(bpb, values, there) if there else None
        tests.append(Tested(quantity, *ends, line, power, quantity.published(systems)))
    return tests


def mean_difference(values: dict[int, float]) -> Difference:
    found = paired_difference(values, dict.fromkeys(values, 0.0))
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Table and picture


HEAD = """# How the presets compare at several scales

Presets made small as in [ladder.md](ladder.md), at several widths and lengths, on equal text (`ladder.py run --width W
--steps N`, then `scaling.py`). Bits per byte; \u00b1 behind a score is the sample standard deviation over seeds, behind a
difference the standard error of the mean over equal seeds. Seeds differ in initial weights and adapters; the choice of
the validation text is in neither.
"""


def table_text(points: Points, against: str, tests: Sequence[Tested]) -> str:
    scores = [("width", "steps", "preset", "seeds", "parameters", "processor s", *STAGES, f"final minus {against}",
               "% of it", "before quantisation")]  # fmt: skip
    for (width, steps), presets in points.items():
        base = presets.get(against)
        for name, point in presets.items():
            seconds = f"{point.step_seconds * steps:,.0f}" if point.step_seconds else NOTHING
            cells = [with_deviation(point.values(key)) for key in STAGES.values()]
            final = paired_difference(point.values(FINAL), base.values(FINAL)) if base and name != against else None
            plain = paired_difference(point.values(PLAIN), base.values(PLAIN)) if base and name != against else None
            share = f"{100 * final.mean / base.mean(FINAL):+.2f}" if final else NOTHING
            size = f"{point.runs[0].about['parameters']:,}"
            scores.append((str(width), str(steps), name, str(len(point.runs)), size, seconds, *cells, signed(final),
                           share, signed(plain)))  # fmt: skip
    runs = [run for presets in points.values() for point in presets.values() for run in point.runs]
    known = [line for line in facts(runs, []) if not line.startswith("* budget")]
    lines = [HEAD, *known, "", *as_markdown(scores)]
    if tests:
        lines += ["", *back_test_lines(tests, against)]
    return "\n".join(lines) + "\n"


BACK_TEST = """## What a forecast from these scales would have been worth

Each quantity is forecast at full size in two ways, as if nothing were known there: by a line over the bits per byte of
{against} before quantisation, to its published ones, and by a power law in compute (6 x parameters x tokens). Units: mB,
0.001 bits per byte; \u00b1 is the standard error of the fit, which does not know whether its law holds so far outside.
What was measured at fewer than three scales, or changes its sign (power law), has no forecast.
*error* is forecast minus published; *carried over* is published over measured at the largest scale.
"""


def back_test_lines(tests: Sequence[Tested], against: str) -> list[str]:
    rows = [("quantity", "smallest scale", "largest scale", "line", "power law", "published", "error of the line",
             "of the power law", "carried over")]  # fmt: skip
    for test in tests:
        error = [in_mb(f.value - test.published) if f and test.published is not None else NOTHING
                 for f in (test.by_bpb, test.by_compute)]  # fmt: skip
        share = test.published / test.largest.mean if test.published is not None and test.largest.mean else None
        rows.append((
            test.quantity.name, *(in_mb(end.mean, end.error) for end in (test.smallest, test.largest)),
            *(in_mb(*f) if f else NOTHING for f in (test.by_bpb, test.by_compute)),
            NOTHING if test.published is None else in_mb(test.published), *error,
            NOTHING if share is None else f"{100 * share:.0f} %",
        ))  # fmt: skip
    return [BACK_TEST.format(against=against), *as_markdown(rows)]


def in_mb(value: float, error: float | None = None) -> str:
    return f"{1000 * value:+.1f}" + (f" \u00b1 {1000 * error:.1f}" if error is not None else "")


def draw(points: Points, against: str, path: Path) -> None:
    """Left: final bits per byte against processor time. Right: differences against the other preset's bits per byte."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    names = ladder_order({name for presets in points.values() for name in presets})
    colors = dict(zip(names, itertools.cycle(f"C{i}" for i in range(10))))
    for name in names:
        mine = [presets[name] for presets in points.values() if name in presets]
        for width in sorted({point.width for point in mine}):
            line = [point for point in mine if point.width == width]
            seconds = [point.steps * (point.step_seconds or math.nan) for point in line]
            label = name if width == mine[0].width else None
            left.plot(seconds, [point.mean(FINAL) for point in line], "o-", color=colors[name], label=label)
        if name == against:
            continue
        for key, style, text in ((FINAL, "o-", "final"), (PLAIN, "s--", "before quantisation")):
            found = sorted(differences(points, name, against, key))
            x, y, error = zip(*found) if found else ((), (), ())
            right.errorbar(x, y, error, fmt=style, color=colors[name], capsize=2, label=f"{name}, {text}")
    left.set(xscale="log", xlabel="processor seconds of training", ylabel="final bits per byte")
    right.set(xlabel=f"bits per byte of {against} before quantisation", ylabel=f"minus {against}, bits per byte")
    right.axhline(0, color="0.5", linewidth=0.8)
    right.invert_xaxis()  # larger scales on the right on both sides
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.getvalue())


def differences(points: Points, name: str, against: str, key: str) -> Iterator[tuple[float, float, float]]:
    """(bits per byte of the other preset, difference from it, error) at each scale where both were run."""
    for presets in points.values():
        if {name, against} <= presets.keys():
            found = paired_difference(presets[name].values(key), presets[against].values(key))
            if found:
                yield presets[against].mean(PLAIN), found.mean, found.error or 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Shows how differences between presets change with scale.")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of ladder.py run, one a scale")
    parser.add_argument("--against", required=True, help="preset with which the others are compared")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--picture", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args(arguments)
    try:
        points = read_points(options.runs)
        names = ladder_order({name for presets in points.values() for name in presets})
        if options.against not in names:
            raise RunError(f"--against {options.against}: no such preset; there is {', '.join(names)}")
        text = table_text(points, options.against, back_test(points, names, options.against))
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(text)
        draw(points, options.against, options.picture)
        print(text)
        return 0
    except (RunError, tg.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
