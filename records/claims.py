"""The figures that a folder states of its runs, in submission.json and in README tables, against its logs.

QUANTITIES is one table of what can be stated, under which names, and where a log says it. A stated figure has to be
what the log of its seed says, rounded or cut; a mean, deviation or maximum has to be that of the seeds.
"""

import functools
import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from records.finding import Finding, fail, ok, unknown, warn, worst
from records.folder import SEED_ALIASES, Cell, Folder, Table, number, read_cell, table_blocks
from records.logs import RunLog, Score


class Figure(NamedTuple):
    """A number and the unit of its last digit; 0 where it is exact."""

    value: float
    unit: float


class Quantity(NamedTuple):
    """One kind of figure. `logged` gives the figures of a log that have this name: the first is the one that means are
    computed from, the others are further ones that people call by it."""

    name: str
    logged: Callable[[RunLog], list[Figure]]
    column: re.Pattern  # of README tables, lower case
    seed: str = ""  # key of a seed in submission.json (folder.SEED_ALIASES)
    mean: tuple[str, ...] = ()  # keys at the top level
    largest: tuple[str, ...] = ()
    common: tuple[str, ...] = ()  # keys that hold the same number for all seeds, or that of one of them
    std: str = ""
    slack: float = 0.0  # relative tolerance, for clocks that do not start at the same moment


def facts(log: RunLog, *names: str, unit: float = 0.0) -> list[Figure]:
    return [Figure(float(log.facts[name]), unit) for name in names if name in log.facts]


def losses(scores: Iterable[Score]) -> list[Figure]:
    return [Figure(s.loss, 10.0**-s.loss_decimals) for s in scores if s.loss is not None]


def bits(scores: Iterable[Score]) -> list[Figure]:
    return [Figure(s.bpb, 10.0**-s.decimals) for s in scores]


def of_kinds(log: RunLog, *kinds: str) -> list[Score]:
    return [score for score in log.scores if score.kind in kinds]


def before_quantisation(log: RunLog) -> list[Score]:
    return of_kinds(log, "averaged")[::-1] + of_kinds(log, "running")[:-4:-1]


def sizes(log: RunLog) -> list[Figure]:
    """The total, and the model alone, which some call the artifact."""
    total = [] if log.total_bytes is None else [Figure(log.total_bytes, 0.0)]
    return total + facts(log, "model_bytes")


def step_times(log: RunLog) -> list[Figure]:
    """Milliseconds per step: the whole time over all steps, and what step lines say."""
    whole = (
        [1000 * log.facts["train_s"] / log.facts["steps"]] if log.facts.get("steps") and "train_s" in log.facts else []
    )
    return [Figure(value, 0.01) for value in whole] + facts(log, "step_ms", unit=0.01)


def train_times(log: RunLog) -> list[Figure]:
    return facts(log, "train_s", unit=1e-3) + facts(log, "train_s_rounded", unit=6.0)


def eval_times(log: RunLog) -> list[Figure]:
    """Seconds of the evaluation that gave the score, of each pass, and of the last ones together."""
    last = [log.eval_seconds] if log.eval_seconds is not None else []
    sums = []
    for passes in (log.passes, log.timed):
        seconds = [seconds for _, seconds in passes[::-1]]
        sums += [*seconds, *itertools.accumulate(seconds)]
    return [Figure(value, 0.1) for value in [*last, *sums]]


QUANTITIES = {
    "size": Quantity(
        "bytes",
        sizes,
        re.compile(r"artifact|^total$|submission|^size|^total bytes"),
        "artifact_bytes",
        ("artifact_bytes_mean",),
        ("bytes_total", "artifact_bytes_max", "artifact_bytes", "total_bytes"),
    ),
    "code": Quantity(
        "bytes of code",
        lambda log: facts(log, "code_bytes", "source_size"),
        re.compile(r"^code"),
        common=("bytes_code", "code_bytes"),
    ),
    "steps": Quantity(
        "steps",
        lambda log: facts(log, "steps"),
        re.compile(r"^(train(ing)? )?steps( completed)?$"),
        "steps",
        ("train_steps_mean",),
        common=("step_stop", "steps"),
    ),
    "step_ms": Quantity(
        "ms per step",
        step_times,
        re.compile(r"ms/step|step[_ ]?avg|step[_ ](time|ms)"),
        "step_avg_ms",
        ("step_avg_ms_mean",),
        slack=5e-3,
    ),
    "train_s": Quantity(
        "s of training",
        train_times,
        re.compile(r"^train(ing)?[_ ]?(time|s|ms|seconds|wallclock)?\b(?!.*(bpb|loss))"),
        "train_time_s",
        ("train_time_s_mean",),
        common=("train_time_seconds", "wallclock_seconds"),
        slack=2e-3,
    ),
    "eval_s": Quantity(
        "s of evaluation",
        eval_times,
        re.compile(r"^(ttt[_ ])?(ttt|eval(uation)?)[_ ](eval )?(time|s|ms|seconds)\b"),
        "eval_time_s",
        ("eval_time_s_mean",),
        common=("eval_time_seconds",),
        slack=1e-2,
    ),
    "before": Quantity(
        "bpb before quantisation",
        lambda log: bits(before_quantisation(log)),
        re.compile(r"pre[-_ ]?quant.*(bpb|bpp)|post[-_ ]ema bp|bpb before"),
        "pre_quant_val_bpb",
        common=("pre_quant_val_bpb",),
    ),
    "before_loss": Quantity(
        "nats per token before quantisation",
        lambda log: losses(before_quantisation(log)),
        re.compile(r"pre[-_ ]?quant.*loss"),
        common=("pre_quant_val_loss",),
    ),
    "quantised": Quantity(
        "bpb quantised",
        lambda log: bits(of_kinds(log, "quantized", "final")),
        re.compile(r"post[-_ ]?quant.*bp|quant.*bp"),
        "quantized_val_bpb",
    ),
    "bpb": Quantity("bpb", lambda log: bits(log.scores[::-1]), re.compile(r"\bbp[bp]\b|_bpb\b")),
    "loss": Quantity(
        "nats per token",
        lambda log: losses(log.scores[::-1]),
        re.compile(r"loss|\bnats\b"),
        "val_loss",
    ),
}
SKIPPED = re.compile(r"gain|delta|Δ|improvement|\bvs\b|cost|penalty|gap")  # differences of columns


def holds(figure: Figure, known: Iterable[Figure], slack: float = 0.0) -> bool:
    """Whether a figure is one of these, rounded or cut to the digits that both are shown with."""

    def same(k: Figure) -> bool:
        gap, cut = abs(figure.value - k.value), abs(k.value) - abs(figure.value)
        if figure.unit > k.unit:
            return gap <= 0.501 * figure.unit or 0 <= cut < figure.unit
        return gap <= 0.501 * k.unit if figure.unit == k.unit else gap < k.unit

    return any(same(k) or abs(figure.value - k.value) < slack * abs(k.value) for k in known)


def stated_figure(value: float) -> Figure:
    """A number of a JSON file; a whole one may stand for any that rounds to it."""
    text = repr(value)
    return Figure(
        value, 1.0 if isinstance(value, int) else 10.0 ** -len(text.split(".")[1]) if "e" not in text else 1e-8
    )


def stated_in_logs(folder: Folder, *keys: str) -> Finding:
    """What submission.json says of some quantities, against the logs."""
    findings = [finding for key in keys for finding in stated_findings(folder, QUANTITIES[key])]
    return worst(findings, f"no {' and no '.join(QUANTITIES[key].name for key in keys)} in submission.json")


def stated_findings(folder: Folder, quantity: Quantity) -> list[Finding]:
    """One finding for each number that submission.json states of a quantity; unknown where no log has it."""
    logged = {log.facts.get("seed", log.path.name): found for log in folder.logs if (found := quantity.logged(log))}
    stated = {seed: row[quantity.seed] for seed, row in folder.seeds.items() if quantity.seed in row}
    top = {n: v for n in (*quantity.mean, *quantity.largest, *quantity.common) if (v := folder.stated(n)) is not None}
    if not logged:
        names = ", ".join([*(f"seed {seed}" for seed in stated), *top])
        return [unknown(f"{names}: no {quantity.name} in the logs")] if names else []
    findings = []
    for seed, value in stated.items():
        if seed not in logged:
            findings.append(unknown(f"seed {seed}: no {quantity.name} in its log"))
            continue
        finding = one_of(f"seed {seed}", value, logged[seed], quantity)
        if finding.status == "fail" and elsewhere(folder, seed, quantity, stated_figure(value)):
            finding = ok(f"seed {seed}: {show(value)} in another log")
        findings.append(finding)
    claimed = folder.submission.get("seeds")
    whole = len(logged) == len(folder.logs) >= max(len(folder.seeds), len(claimed) if isinstance(claimed, list) else 0)
    everything = [figure for found in logged.values() for figure in found]
    everything += [Figure(statistics.fmean(f.value for f in column), 0.0) for column in zip(*logged.values())]
    for name, value in top.items():
        if name in quantity.common:
            findings.append(one_of(name, value, everything, quantity))
        elif whole:
            findings.append(summary(name, value, logged, list(stated.values()), quantity))
        else:
            findings.append(unknown(f"{name}: not every seed has a log"))
    return findings


def elsewhere(folder: Folder, seed: int, quantity: Quantity, figure: Figure) -> bool:
    """Whether another log of that seed says so."""
    return any(holds(figure, any_figures(quantity, log), quantity.slack) for log in folder.all_logs_of(seed))


def show(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.8g}" if abs(value) >= 100 else f"{value:.8g}"


def one_of(what: str, value: float, known: list[Figure], quantity: Quantity) -> Finding:
    if holds(stated_figure(value), known, quantity.slack):
        return ok(f"{what}: {show(value)} {quantity.name}")
    return fail(f"{what}: {show(value)} {quantity.name} in submission.json, {show(known[0].value)} in the log")


def summary(
    name: str, value: float, logged: dict[int | str, list[Figure]], stated: list[float], quantity: Quantity
) -> Finding:
    """A mean or a maximum: ok where it is that of the logs, or of the figures that are stated of all seeds."""
    figure, mean = stated_figure(value), name in quantity.mean
    over, first = statistics.fmean if mean else max, [found[0] for found in logged.values()]
    made = [over(f.value for f in first)] + ([over(stated)] if len(stated) == len(logged) else [])
    unit = max(f.unit for f in first)
    if holds(figure, [Figure(v, unit) for v in made], quantity.slack):
        return ok(f"{name} {show(value)}")
    text = f"{name} {show(value)}, the logs say {', '.join(show(f.value) for f in first[:3])}"
    if mean:
        return fail(text)
    if holds(figure, [f for found in logged.values() for f in found]):
        return warn(f"{name} {show(value)} is not the largest, {show(made[0])}")
    rounded = value % 10_000 == 0 and any(abs(value - f.value) <= 50_000 for f in first)
    return (warn if rounded else fail)(text)


# ------------------------------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------------------------------


def quantity_of(column: str) -> Quantity | None:
    if SKIPPED.search(column):
        return None
    return next((quantity for quantity in QUANTITIES.values() if quantity.column.search(column)), None)


def readme_tables(folder: Folder) -> Finding:
    """Every number of a table by seeds against the log of its seed; means and deviations against their columns."""
    findings = []
    for table in folder.tables:
        for index, column in enumerate(table.columns):
            quantity = quantity_of(column)
            if "value" in table.rows:
                findings += value_findings(folder, column, quantity, table.rows["value"][index])
            else:
                findings += seed_findings(folder, table, index, quantity)
                findings += summary_findings(folder, table, index, quantity)
    counted = sum(finding.status == "ok" for finding in findings)
    found = worst(findings, "no table of seeds in the README" if folder.readme else "no README")
    return ok(f"{counted} numbers of tables are those of the logs") if found.status == "ok" else found


def any_figures(quantity: Quantity, log: RunLog) -> list[Figure]:
    """The figures that a README column may mean: for scores, whose columns have many names, any score of the log."""
    found = quantity.logged(log)
    return found + bits(log.scores) if quantity.name.startswith("bpb") else found


def in_log(cell: Cell, known: list[Figure], quantity: Quantity) -> bool:
    binary = [Figure(k.value / 1.048576, k.unit) for k in known] if "MB" in cell.text else []
    return holds(Figure(cell.value, cell.unit), [*known, *binary], quantity.slack)


def logged_as(cell: Cell, known: list[Figure], quantity: Quantity) -> str:
    """The figure of the log that a message names: for scores, whose columns have many names, the nearest one."""
    near = min(known, key=lambda k: abs(k.value - cell.value))
    return show((near if quantity.name.startswith("bpb") else known[0]).value)


def seed_findings(folder: Folder, table: Table, index: int, quantity: Quantity | None) -> list[Finding]:
    findings = []
    for seed, cells in table.rows.items():
        log, cell = folder.log_of(int(seed)) if seed.isdigit() else None, cells[index]
        known = any_figures(quantity, log) if quantity and log else []
        if cell and known and quantity:
            text = f"README, seed {seed}, {table.columns[index]}: {cell.text}"
            good = in_log(cell, known, quantity) or any(
                in_log(cell, any_figures(quantity, other), quantity) for other in folder.all_logs_of(int(seed))
            )
            findings.append(ok(text) if good else fail(f"{text}; the log says {logged_as(cell, known, quantity)}"))
    return findings


def value_findings(folder: Folder, column: str, quantity: Quantity | None, cell: Cell | None) -> list[Finding]:
    """A row of a name and a value. The value may be of any run, or the mean of all."""
    if not quantity or not cell:
        return []
    each = [figures for log in folder.logs if (figures := any_figures(quantity, log))]
    known = [figure for figures in each for figure in figures]
    if len(each) > 1:
        known += [Figure(statistics.fmean(f[0].value for f in each), cell.unit)]
    if not known:
        return []
    text = f"README, {column}: {cell.text}"
    if in_log(cell, known, quantity):
        return [ok(text)]
    return [warn(f"{text}; no log says so, {logged_as(cell, known, quantity)}")]


def summary_findings(folder: Folder, table: Table, index: int, quantity: Quantity | None) -> list[Finding]:
    """Mean and sample deviation of a column, from its own cells, or from the logs where these are more exact."""
    column = [cells[index] for seed, cells in table.rows.items() if seed.isdigit()]
    cells = [cell for cell in column if cell]
    if len(cells) < 2 or len(cells) < len(column):
        return []
    name, findings = table.columns[index], []
    exact = [cell.value for cell in cells]
    unit = max(cell.unit for cell in cells)
    if (mean := table.rows.get("mean", [None] * (index + 1))[index]) is not None:
        good = abs(mean.value - statistics.fmean(exact)) < 1.01 * max(mean.unit, unit)
        text = f"README, mean of {name}: {mean.text}"
        findings.append(ok(text) if good else fail(f"{text}; the column's mean is {show(statistics.fmean(exact))}"))
    if (std := table.rows.get("std", [None] * (index + 1))[index]) is not None:
        sample, population = statistics.stdev(exact), statistics.pstdev(exact)
        text, near = f"README, std of {name}: {std.text}", 1.01 * std.unit + 0.75 * unit
        if abs(std.value - sample) < near:
            findings.append(ok(text))
        elif abs(std.value - population) < near:
            findings.append(warn(f"{text} is that of a population, the sample deviation is {sample:.6g}"))
        else:
            findings.append(fail(f"{text}; the column's sample deviation is {sample:.6g}"))
    return findings


# ------------------------------------------------------------------------------------------------------------
# NUMBERS THAT NO OTHER RULE JUDGES
# ------------------------------------------------------------------------------------------------------------

# Keys of submission.json, at the top and of a seed, that rules of their own judge.
RULED = {"val_bpb", "val_bpb_std", "val_loss_std", "seed", *(key for keys in SEED_ALIASES.values() for key in keys)}
RULED |= {key for q in QUANTITIES.values() for key in (*q.mean, *q.largest, *q.common)}
OF_SEEDS = ("seeds", "seed_results", "val_bpb_seeds")
FEWEST_DIGITS = 5  # of a number that is looked up by its value; shorter ones are found by chance
MOST_NAMED = 6


def other_numbers(folder: Folder) -> Finding:
    """The numbers of submission.json and of README tables that have no rule of their own: ok where the logs hold them
    all; unknown, with their names, where they do not."""
    rows = [*other_keys(folder), *other_cells(folder)]
    missing = [text for text, known in rows if not known]
    unread = sum(has_numbers(block) for block in table_blocks(folder.readme)) - len(folder.tables)
    if unread > 0:
        missing.append(f"tables of the README without seeds: {unread}")
    found = f"further numbers in the logs: {sum(known for _, known in rows)}"
    if not missing:
        return ok(found if rows else "no further numbers")
    more = f"; and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    return unknown(f"{found}; not in them: {'; '.join(missing[:MOST_NAMED])}{more}")


def other_keys(folder: Folder) -> Iterator[tuple[str, bool]]:
    """Name and value of each such number of submission.json, and whether the logs hold it."""
    spare = functools.cache(lambda: every_figure(folder.spare_logs))  # slow to read
    pools = (functools.cache(lambda: every_figure(folder.logs)), spare)
    for path, value in leaves(folder.submission):
        of_seed = path[0] in OF_SEEDS and len(path) in (2, 3)
        if path[-1] in RULED and (of_seed or len(path) == 1) or of_seed and len(path) == 2:
            continue
        figure, text = stated_figure(value), repr(value)
        found = in_settings(folder, path[-1], value) or any(looked_up(figure, text, pool()) for pool in pools)
        yield f"{'.'.join(path)} {show(value)}", found


def other_cells(folder: Folder) -> Iterator[tuple[str, bool]]:
    """Place and text of each such number of a README table, and whether the logs hold it or it is a difference."""
    pool = every_figure(folder.logs)
    for table in folder.tables:
        for index, column in enumerate(table.columns):
            for row, cells in table.rows.items() if not quantity_of(column) else ():
                if cell := cells[index]:
                    known = looked_up(Figure(cell.value, cell.unit), cell.text, pool) or is_difference(cell, cells)
                    yield f"README, {row}, {column} {cell.text}", known


def has_numbers(block: list[list[str]]) -> bool:
    return any(read_cell(cell, "") for row in block[1:] for cell in row)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers of a JSON value, each with the keys that lead to it."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, str(key)))
    elif path and number(value) is not None:
        yield path, value


def every_figure(logs: list[RunLog]) -> list[Figure]:
    """All that logs state, and the mean and sample deviation of each kind of figure over them."""
    kinds: dict[str, list[Figure]] = {}
    for log in logs:
        for name, quantity in QUANTITIES.items():
            for place, figure in enumerate(quantity.logged(log)):
                kinds.setdefault(f"{name} {place}", []).append(figure)
        for score in log.scores:
            kinds.setdefault(f"bpb of {score.label}", []).extend(bits([score]))
            kinds.setdefault(f"loss of {score.label}", []).extend(losses([score]))
        for name, value in log.facts.items():
            if number(value) is not None:
                kinds.setdefault(name, []).append(Figure(value, 0.0))
    pool = [figure for figures in kinds.values() for figure in figures]
    for figures in kinds.values():
        if 1 < len(figures) == len(logs):
            values, unit = [figure.value for figure in figures], figures[0].unit
            pool += [Figure(made(values), unit) for made in (statistics.fmean, statistics.stdev)]
    return pool


def looked_up(figure: Figure, text: str, pool: list[Figure]) -> bool:
    """Whether a number of enough digits is one of these, or a thousand times one (milliseconds). Known figures with
    fewer decimals are left out."""
    if len(re.sub(r"\D", "", text).lstrip("0")) < FEWEST_DIGITS:
        return False
    both = figure, Figure(figure.value / 1000, figure.unit / 1000)
    return any(holds(one, [known for known in pool if known.unit <= one.unit]) for one in both)


def in_settings(folder: Folder, key: str, value: float) -> bool:
    """Whether a setting of that name has that value in every log."""
    blocks = [block for log in folder.logs for block in log.settings]
    return bool(blocks) and all(as_float(block.get(key, "")) == value for block in blocks)


def as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def is_difference(cell: Cell, cells: list[Cell | None]) -> bool:
    """Whether a cell is the difference of two others of its row, to their last digits."""
    others = [other for other in cells if other and other is not cell]
    pairs = itertools.permutations(others, 2)
    return any(abs(cell.value - (a.value - b.value)) < 1.01 * (cell.unit + max(a.unit, b.unit)) for a, b in pairs)
