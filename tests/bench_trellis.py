"""Trellis-coded quantisation against rounding each code alone, on a trained model; prints key:value lines.

    PRESET=tiny RUN_ID=a python tests/bench_trellis.py [--states 8] [--clips 1,2] [--shifts .96,1,1.04] [--tokens N]

The settings are those of the run, whose trained.bin is read. Its clips are multiplied by each of --clips, and by each
of --shifts to have several roundings of the same weights, since a single one is half luck. What is compared:

class: tr(E H E^T) of each class, with the recorded Hessians of the training calibration, in dB at equal bytes: actual
bytes of the code streams on both sides; what they differ by counts 6.02 dB per bit of a code.
model: KL divergence from the unquantised model (nats per token), and bits per byte, on the validation documents. The
clips of the trellis are scaled together to equal bytes; the KL of what they still differ by counts in the same way.

Errors are standard errors over the shifts. These are not independent samples, so it is a rough measure.
"""

import argparse
import dataclasses
import math
import os
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from bench_helpers import tg

CPU = torch.device("cpu")


class Rounded(NamedTuple):
    """One quantisation of all weights."""

    stored: dict[str, tg.Parts]
    sizes: dict[str, int]  # bytes of the code stream of each class
    losses: dict[str, float]  # sum of tr(E H E^T) over the matrices of each class


def bits(size: int, entries: list[tg.Entry]) -> float:
    return 8 * size / sum(entry.size for entry in entries)


def class_entries(config: tg.Config) -> dict[str, list[tg.Entry]]:
    """The codes of each class: stream name -> entries."""
    streams = tg.artifact_streams(config, "rans", (), config.trellis_states)
    return {name: streams[name].entries for name in (*tg.MATRICES, "embedding") if name in streams}


def rounded(arrays: dict[str, np.ndarray], config: tg.Config, factor: float, losses: bool = True) -> Rounded:
    """The weights quantised with all clips multiplied."""
    stored = tg.quantize(arrays, tg.scaled_clips(config, factor), CPU)
    sizes, loss = {}, {}
    hessians = {
        name: f"hessian.{g.hessian}.{i}" for g in tg.quant_groups(config) for i, s in enumerate(g.names) for name in s
    }
    for name, entries in class_entries(config).items():
        codes = [stored[entry.owner]["codes"] for entry in entries]
        sizes[name] = len(tg.rans_encode(codes, config.trellis_states))
        for entry in entries if losses else ():
            E = (tg.matrix_of(arrays, entry.owner, config) - tg.restore(stored[entry.owner])).astype(np.float64)
            loss[name] = loss.get(name, 0.0) + float(np.vdot(E @ arrays[hessians[entry.owner]], E))
    return Rounded(stored, sizes, loss)


class Text:
    """Validation text as packed rows, and the unquantised model's log-probabilities of all ids on it."""

    def __init__(self, config: tg.Config, arrays: dict[str, np.ndarray], tokens: int):
        self.program = tg.Program(config, tg.Run())
        evaluation = tg.Evaluation(self.program, tg.load_validation(config), tg.Log(None))
        windows = tg.windows_inside(evaluation.validation.documents, config.eval_seq_len, config.eval_seq_len)
        kept, total = [], 0
        for window in windows:
            total += window.end - window.begin
            kept += [window] if total <= tokens else []
        self.rows = [evaluation.row(part, 0) for part in tg.fill_rows(kept, 2048)]
        self.bytes = sum(int(evaluation.validation.bytes[positions].sum()) for _, positions in self.rows)
        self.tokens = sum(len(positions) for _, positions in self.rows)
        weights = {name: arrays[name] for name in tg.parameter_shapes(config)}
        self.reference = list(self.log_probabilities(weights))

    @torch.no_grad()
    def log_probabilities(self, weights: dict[str, np.ndarray]) -> Iterator[torch.Tensor]:
        """(tokens, V) of each row."""
        self.program.model.load(weights)
        plan = tg.layer_plan(self.program.config, looping=True)
        ids = torch.arange(self.program.config.vocab_size)
        for row, _ in self.rows:
            every = ids.expand(1, row.inputs.size(1), -1)
            yield -self.program.model(row.inputs, every, plan, row.segments)[0]

    def compare(self, weights: dict[str, np.ndarray]) -> tuple[float, float]:
        """KL to the unquantised model in nats per token, and bits per byte."""
        divergence, nats = 0.0, 0.0
        for (row, _), p, q in zip(self.rows, self.reference, self.log_probabilities(weights)):
            divergence += float((p.exp() * (p - q)).double().sum())
            nats -= float(q.gather(1, row.targets.reshape(-1, 1)).double().sum())
        return divergence / self.tokens, nats / math.log(2) / self.bytes


def error(values: list[float]) -> str:
    """`mean+-standard error`."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.5g}+-{spread:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", default=8, type=int)
    parser.add_argument("--clips", default="1,2")
    parser.add_argument("--shifts", default=".96,.98,1,1.02,1.04")
    parser.add_argument("--tokens", default=20_000, type=int, help="of validation text; 0: the class table alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = tg.load_config(os.environ)[0]
    alone = dataclasses.replace(config, compressor="rans", trellis_states=0, lqer_rank=0)
    trellis = dataclasses.replace(alone, trellis_states=options.states)
    arrays, entries = tg.load_trained(config), class_entries(trellis)
    text = Text(alone, arrays, options.tokens) if options.tokens else None
    count = sum(entry.size for part in entries.values() for entry in part)
    if text:
        reference = text.compare({name: arrays[name] for name in tg.parameter_shapes(alone)})[1]
        print(
            f"codes:{count} tokens:{text.tokens} bytes_of_text:{text.bytes} unquantised_bpb:{reference:.5f}", flush=True
        )
    for clip in map(float, options.clips.split(",")):
        gains: dict[str, list[float]] = {name: [] for name in entries}
        used: dict[str, list[float]] = {name: [] for name in entries}
        ratios, pairs, factor = [], [], 1.0
        for shift in map(float, options.shifts.split(",")):
            one, other = rounded(arrays, alone, clip * shift), rounded(arrays, trellis, clip * shift)
            for name, part in entries.items():
                rates = [bits(each.sizes[name], part) for each in (one, other)]
                used[name].append(rates[0])
                decibels = 10 * math.log10(one.losses[name] / other.losses[name])
                gains[name].append(decibels + 6.02 * (rates[0] - rates[1]))
            if text:
                excess = lambda each: 8 * (sum(each.sizes.values()) - sum(one.sizes.values())) / count  # bits per code
                factor *= 2 ** excess(other) if not pairs else 1
                matched = rounded(arrays, trellis, clip * shift * factor, losses=False)
                found = [text.compare(tg.dequantize(each.stored, config)) for each in (one, matched)]
                pairs.append((*found[0], *found[1], excess(matched)))
                ratios.append(found[1][0] / found[0][0] * 4 ** excess(matched))
        for name in entries:
            print(
                f"clip_x:{clip:g} states:{options.states} class:{name} bits_alone:{statistics.mean(used[name]):.3f} "
                f"gain_db:{error(gains[name])}", flush=True,
            )  # fmt: skip
        if text:
            kl, bpb, kl_trellis, bpb_trellis, excess_bits = map(list, zip(*pairs))
            print(
                f"clip_x:{clip:g} states:{options.states} model: kl:{error(kl)} kl_trellis:{error(kl_trellis)} "
                f"kl_ratio:{error(ratios)} bpb:{error(bpb)} bpb_trellis:{error(bpb_trellis)} "
                f"bpb_difference:{error([b - a for a, b in zip(bpb, bpb_trellis)])} "
                f"bits_more:{statistics.mean(excess_bits):+.5f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
