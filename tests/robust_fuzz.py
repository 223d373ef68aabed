"""Mutated inputs for every reader of the script. Each is refused by a UserError or leads to a correct run.

A campaign runs in a child process with 2 GiB of memory to spare and a watchdog for each case, because what it looks
for are crashes, hangs and memory that grows with what a small file claims.
"""

import collections
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from conftest import QUIET, ToyData, build_toy_data, write_shard

import train_gpt as tg

SECONDS_PER_CASE = 20  # a whole run takes seven on a busy machine, any other case less than one
MEMORY = 2 * 2**30
ODD_NUMBERS = [0, 1, -1, 2, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, 10**30]
ODD_VALUES = [
    *ODD_NUMBERS, *(-number for number in ODD_NUMBERS), 0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf,
    True, False, None, "", "x", "1", "<f4", "|O", "\ud800", "\n" * 3, "y" * 10_000, [], [[]], {}, [None], {"a": {}},
]  # fmt: skip


LAYOUTS = [  # of an artifact, beside the default one
    dict(compressor="pergroup", lqer_rank=2, lqer_top_k=3, lqer_asym_group=8),
    dict(fp16_keep_name_patterns="blocks.{last}.attn.k,tok_emb", gated_attn_quant_gate=False),
    dict(compressor="rans"),
    dict(compressor="rans", trellis_states=8),
]


class Hang(BaseException):
    """A case took too long."""


def watchdog(*_: Any) -> None:
    raise Hang


class Campaign:
    """Counts what becomes of the cases of each kind; anything but a refusal or a good run is kept as a failure."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter] = {}
        self.failures: list[str] = []
        self.slowest = 0.0

    def case(self, kind: str, label: str, attempt: Callable[[], Any]) -> None:
        outcome, begin = "ran", time.monotonic()
        signal.signal(signal.SIGALRM, watchdog)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
        try:
            attempt()
        except (tg.UserError, tg.TrainingDiverged) as error:
            outcome = "refused"
            if len(" ".join(str(error).split())) < 10:
                self.failures.append(f"{kind} {label}: says only {str(error)!r}")
        except Hang:
            outcome = "failed"
            self.failures.append(f"{kind} {label}: more than {SECONDS_PER_CASE} s")
        except BaseException as error:
            outcome = "failed"
            where = traceback.extract_tb(error.__traceback__)
            own = [f"{frame.name}:{frame.lineno}" for frame in where if frame.filename.endswith("train_gpt.py")]
            self.failures.append(
                f"{kind} {label}: {type(error).__name__}: {str(error)[:200]} at {' > '.join(own[-3:])}"
            )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.slowest = max(self.slowest, time.monotonic() - begin)
        self.counts.setdefault(kind, collections.Counter())[outcome] += 1


# Mutations ----------------------------------------------------------------------------------------------------------


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Bits flipped, stretches cut, copied, overwritten, or the end cut off."""
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        kind, at = dice.randrange(7), dice.randrange(len(data) + 1)
        at = min(at, dice.choice([len(data), 16, 64, 1100]))  # headers come first
        length = dice.choice([1, 2, 4, 8, 100])
        if kind == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = dice.randbytes(length)
        elif kind == 3:
            data[at : at + length] = dice.randbytes(length)
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            data[at : at + 4] = (dice.choice(ODD_NUMBERS) % 2**32).to_bytes(4, "little")
        else:
            data += data[at : at + length]
    return bytes(data)


def mutate_tree(tree: Any, dice: random.Random) -> Any:
    """A JSON value with one place of it replaced, removed, renamed or doubled."""
    tree = copy.deepcopy(tree)
    place = tree
    while True:
        children = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not children:
            return dice.choice(ODD_VALUES)
        deeper = [child for child in children if isinstance(place[child], (dict, list)) and place[child]]
        if deeper and dice.random() < 0.6:
            place = place[dice.choice(deeper)]
            continue
        key = dice.choice(children)
        kind = dice.randrange(6)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[dice.choice(["x", "", "weights/x", "optimizer/x", "a/b/c", str(key) + "x"])] = place.pop(key)
        elif kind == 2 and isinstance(place, list):
            place.insert(key, dice.choice(ODD_VALUES))
        elif kind == 3 and isinstance(place[key], (int, float)):
            place[key] = place[key] + dice.choice([-1, 1, 0.5, 10**6])
        else:
            place[key] = copy.deepcopy(dice.choice(ODD_VALUES))
        return tree


def open_container(data: bytes) -> tuple[dict, list[bytes]]:
    start = 12 + int.from_bytes(data[8:12], "little")
    header, blobs = json.loads(data[12:start]), []
    for entry in header["blobs"]:
        blobs.append(data[start : start + entry["bytes"]])
        start += entry["bytes"]
    return header, blobs


def seal(meta: Any, blobs: list[bytes]) -> bytes:
    """A container whose lengths and checksums are right, whatever it holds."""
    table = [{"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()} for blob in blobs]
    header = json.dumps({"meta": meta, "blobs": table}).encode()
    return tg.CONTAINER_MAGIC + len(header).to_bytes(4, "little") + header + b"".join(blobs)


def odd_arrays(meta: dict, blobs: list[bytes], dice: random.Random) -> bytes:
    """A file of arrays that is consistent in itself, with one array missing, renamed, reshaped or of another type."""
    table = list(copy.deepcopy(meta["arrays"]).items())
    number, kind = dice.randrange(len(table)), dice.randrange(6)
    name, (dtype, shape) = table[number]
    if kind == 0:
        del table[number], blobs[number]
    elif kind == 1:
        table[number] = (
            dice.choice(["x", "", "weights/x", "a/b/c", "history", name + "/", "optimizer/adamw.step.x"]),
            (dtype, shape),
        )
    elif kind == 2:
        table[number] = (name, (dtype, dice.choice([shape[::-1], [1, *shape], [*shape, 1], [math.prod(shape)], [-1]])))
    elif kind == 3:
        item = {"<f4": 4, "<f8": 8, "<i8": 8}
        other = dice.choice(list(item))
        count = len(blobs[number]) // item[other]
        blobs[number] = blobs[number][: count * item[other]]
        table[number] = (name, (other, [count]))
    elif kind == 4:  # fewer rows, or a single number that would spread over all of them
        blobs[number] = blobs[number][: 8 if dtype == "<f8" else 4]
        table[number] = (name, (dtype, dice.choice([[1], [], [1] * len(shape)])))
    else:
        other = dice.randrange(len(table))
        table[number], table[other] = (name, table[other][1]), (table[other][0], table[number][1])
        blobs[number], blobs[other] = blobs[other], blobs[number]
    return seal(meta | {"arrays": dict(table)}, blobs)


def bombs() -> list[bytes]:
    """Streams that expand enormously: 256 MiB of zeros in a few hundred bytes, and the same one after another."""
    import brotli

    zeros = brotli.compress(bytes(2**28), quality=1, lgwin=24)
    return [zeros, zeros + zeros, brotli.compress(bytes(2**16)), brotli.compress(b"")]


def mutated_container(data: bytes, dice: random.Random, more_blobs: list[bytes]) -> bytes:
    """A damaged container, or one that is whole but holds something else."""
    header, blobs = open_container(data)
    if "arrays" in header["meta"] and dice.random() < 0.4:
        return odd_arrays(header["meta"], blobs, dice)
    kind = dice.randrange(6)
    if kind == 0:
        return mutated(data, dice)
    if kind == 1:  # the header says something else, the rest is as it was
        text = json.dumps(mutate_tree(header, dice)).encode()
        return data[:8] + len(text).to_bytes(4, "little") + text + b"".join(blobs)
    if kind == 2:  # a header that is no header
        text = dice.choice(
            [b"[" * 100_000, b"{" * 9, b"null", b"1e999", b"9" * 5000, b"\xff\xfe", b"[1,2]", b'{"meta":{}}']
        )
        return data[:8] + len(text).to_bytes(4, "little") + text
    number = dice.randrange(len(blobs))
    if kind == 3:
        return seal(mutate_tree(header["meta"], dice), blobs)
    if kind == 4 and more_blobs:
        blobs[number] = dice.choice(more_blobs)
    elif dice.random() < 0.3:
        other = dice.randrange(len(blobs))
        blobs[number], blobs[other] = blobs[other], blobs[number]
    elif dice.random() < 0.5 and len(blobs[number]) % 4 == 0 and blobs[number]:
        numbers = np.frombuffer(blobs[number], "<f4").copy()
        numbers[dice.randrange(len(numbers))] = dice.choice([np.nan, np.inf, -1e38, 3e38, 1e-45, -1, 70_000])
        blobs[number] = numbers.tobytes()
    else:
        blobs[number] = mutated(blobs[number], dice)
    return seal(header["meta"], blobs)


# Readers --------------------------------------------------------------------------------------------------------------


class Subjects:
    """A small finished run and the readers of its files."""

    def __init__(self, root: Path):
        self.root, self.data = root, build_toy_data(root)
        env = dict(
            RUNS_DIR=root / "runs", RUN_ID="toy", ITERATIONS=3, CHECKPOINT_SECONDS=1e-9, NUM_LAYERS=2, NUM_LOOPS=0
        )
        env |= dict(MODEL_DIM=16, NUM_HEADS=2, NUM_KV_HEADS=1, PARALLEL_START_LAYER=1, TTT_ENABLED=0, GATE_WINDOW=4)
        self.config = self.data.config(**env)
        self.run, self.folder = tg.Run(), self.config.run_dir
        tg.main(self.config, self.run)
        self.trainer = tg.Trainer(self.config, self.run, QUIET)
        self.validation = tg.load_validation(self.config)
        self.model = tg.GPT(self.config, self.run)
        self.good = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.artifacts = [(self.config, self.good["artifact.bin"]), *map(self.other_artifact, LAYOUTS)]
        self.streams = bombs()

    def other_artifact(self, changes: dict[str, Any]) -> tuple[tg.Config, bytes]:
        """The same weights in a file of another layout."""
        config, path = dataclasses.replace(self.config, **changes), self.root / "other.bin"
        arrays = tg.load_arrays(self.folder / "trained.bin")[1]
        tg.save_artifact(path, tg.quantize(arrays, config, self.run.device), config)
        return config, path.read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def checkpoint(self, dice: random.Random) -> Callable[[], Any]:
        data = mutated_container(self.good["checkpoint.bin"], dice, [])

        def attempt() -> None:
            self.write("checkpoint.bin", data)
            self.trainer.restore_checkpoint()
            if self.trainer.step < 3:
                self.trainer.update(self.trainer.step_rows(self.trainer.step), False, 1.0, 0.9)

        return attempt

    def trained(self, dice: random.Random) -> Callable[[], Any]:
        data = mutated_container(self.good["trained.bin"], dice, [])

        def attempt() -> None:
            self.write("trained.bin", data)
            meta, arrays = tg.load_arrays(self.folder / "trained.bin")
            if meta.get("settings") == self.config.of_stage(tg.TRAIN) and dice.random() < 0.05:
                tg.quantize_stage(self.config, self.run, QUIET, tg.Program(self.config, self.run))
            tg.check_arrays(self.folder / "trained.bin", arrays, tg.trained_shapes(self.config))
            tg.quantize(arrays, self.config, self.run.device)

        return attempt

    def artifact(self, dice: random.Random) -> Callable[[], Any]:
        config, data = dice.choice(self.artifacts)
        if open_container(data)[0]["meta"]["codec"] == "brotli" and dice.random() < 0.3:
            data = self.other_codes(data, dice)
        else:
            data = mutated_container(data, dice, self.streams)

        def attempt() -> None:
            self.write("artifact.bin", data)
            self.model.load(tg.load_artifact(self.folder / "artifact.bin", config))
            if dice.random() < 0.1:
                tg.evaluate_stage(config, self.run, QUIET, tg.Program(config, self.run))

        return attempt

    @staticmethod
    def other_codes(data: bytes, dice: random.Random) -> bytes:
        """An artifact whose streams expand to the right size, with other contents."""
        import brotli

        header, blobs = open_container(data)
        number = dice.randrange(len(blobs))
        stream = bytearray(brotli.decompress(blobs[number]))
        for _ in range(dice.choice([1, 10, 1000])):
            stream[dice.randrange(len(stream))] = dice.choice([0, 0x7C, 0x80, 0xFF, dice.randrange(256)])
        blobs[number] = brotli.compress(bytes(stream), quality=1)
        return seal(header["meta"], blobs)

    def result(self, dice: random.Random) -> Callable[[], Any]:
        good = self.good["result.json"]
        data = mutated(good, dice) if dice.random() < 0.3 else json.dumps(mutate_tree(json.loads(good), dice)).encode()

        def attempt() -> None:
            self.write("result.json", data)
            parts = tg.earlier_parts(self.folder / "result.json", self.config, self.run)
            tg.report(tg.summary(parts, self.config, self.run))

        return attempt

    def shard(self, dice: random.Random) -> Callable[[], Any]:
        folder = self.root / "shards"
        if not folder.exists():
            folder.mkdir()
            tokens = self.data.train_tokens[:600]
            self.shards = {
                "fineweb_train_000000.bin": write_shard(folder / "fineweb_train_000000.bin", tokens[:200]).read_bytes(),
                "fineweb_train_000001.bin": write_shard(folder / "fineweb_train_000001.bin", tokens[200:]).read_bytes(),
                "fineweb_val_000000.bin": write_shard(folder / "fineweb_val_000000.bin", tokens[:300]).read_bytes(),
                "fineweb_val_bytes_000000.bin": write_shard(folder / "side.bin", tokens[:300] % 7).read_bytes(),
            }
            (folder / "side.bin").unlink()
            self.shard_config = self.data.config(DATA_PATH=folder)
        name = dice.choice(list(self.shards))
        data = self.mutated_shard(self.shards[name], dice)

        def attempt() -> None:
            for other, good in self.shards.items():
                if other == name or "bytes" not in other:
                    (folder / other).write_bytes(data if other == name else good)
            try:
                stream = tg.TokenStream(folder, "train", 64)
                for number in (0, 3, 10**9):
                    row = tg.training_row(stream, number, self.shard_config, self.run)
                    assert 0 <= int(row.inputs.min()) and int(row.inputs.max()) < 64
                validation = tg.load_validation(self.shard_config)
                assert len(validation.bytes) == len(validation.tokens) and (validation.documents >= 0).all()
            finally:
                (folder / "fineweb_val_bytes_000000.bin").unlink(missing_ok=True)

        return attempt

    @staticmethod
    def mutated_shard(data: bytes, dice: random.Random) -> bytes:
        if dice.random() < 0.4:
            return mutated(data, dice)
        header, body = np.frombuffer(data[:1024], "<i4").copy(), np.frombuffer(data[1024:], "<u2").copy()
        kind = dice.randrange(5)
        if kind == 0:
            header[dice.choice([0, 1, 2, 2, 2, 3, 255])] = np.int64(dice.choice(ODD_NUMBERS[:12])).astype("<i4")
        elif kind == 1:
            body[dice.randrange(len(body))] = dice.choice([0, 1, 2, 63, 64, 65535])
        elif kind == 2:
            body[:] = dice.choice([0, 1, 3, 63])
        elif kind == 3:
            body = body[: dice.choice([0, 1, 2, 3])]
            header[2] = len(body)
        else:
            body = np.tile(body, 2)
            header[2] = dice.choice([len(body), len(body) + 1, len(body) - 1])
        return header.tobytes() + body.tobytes()

    def settings(self, dice: random.Random) -> Callable[[], Any]:
        """Any value for any setting; what is accepted must be a model that can be described."""
        env = dict(self.data.env()) if dice.random() < 0.6 else {"PRESET": dice.choice([*tg.PRESETS, "x", ""])}
        for _ in range(dice.choice([1, 1, 2, 3, 6])):
            name = dice.choice([*tg.NAMES])
            if dice.random() < 0.05:
                name = name[:-1] + dice.choice("XYZ_")
            env[name] = self.odd_text(dice)

        def attempt() -> None:
            config, _ = tg.load_config(env)
            numbers = [value for value in (getattr(config, name) for name in tg.FIELDS) if isinstance(value, float)]
            assert all(math.isfinite(value) for value in numbers)
            model = tg.GPT(config, self.run, "meta")
            assert sum(p.numel() for p in model.parameters()) < 1.1e9
            assert config.rows_per_step >= 1 and config.mlp_dim >= 1 and config.head_dim >= 1
            [config.run_dir, config.dataset_dir, config.tokenizer_file, config.stage_list, config.train_seconds]
            assert math.isfinite(config.rotary_base) and config.rotary_base > 0
            [tg.lr_multiplier(p, 3, config) + tg.muon_momentum(3, config) for p in (0.0, 0.5, 1.0)]

        return attempt

    def whole(self, dice: random.Random) -> Callable[[], Any]:
        """A whole run with some small settings drawn anew; the wild values of floats include far too large ones."""
        env = self.data.env(RUNS_DIR=self.root / "whole", RUN_ID=str(dice.randrange(10**9)), ITERATIONS=2)
        env |= dict(TTT_EVAL_SEQ_LEN="16", GPTQ_CALIBRATION_BATCHES="2")
        for _ in range(dice.randrange(1, 7)):
            slow = ("compile", "attn_backend", "kernels")
            choices = {name: field.metadata["choices"] for name, field in tg.FIELDS.items()}
            names = [name for name, field in tg.FIELDS.items() if field.type is not str or choices[name]]
            name = dice.choice([name for name in names if name not in slow])
            field = tg.FIELDS[name]
            if choices[name]:
                value: Any = dice.choice(choices[name])
            elif field.type is bool:
                value = dice.randrange(2)
            elif field.type is int:
                value = dice.choice([0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 32, 33, 64, 65, 128, 1000])
            else:
                value = dice.choice([0, 0, 0.5, 1, 2, 1e-30, 1e3, 1e9, dice.random(), -1])
            if name not in ("iterations", "vocab_size", "max_wallclock_seconds", "warmup_steps"):
                env[name.upper()] = str(value)

        def attempt() -> None:
            with mock.patch.object(tg, "counted_code_bytes", lambda: (40_000, False)):
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    result = tg.main(tg.load_config(env)[0], self.run)
            assert math.isfinite(result["val_bpb"]) and result["scored_tokens"] == result["val_targets"]
            shutil.rmtree(self.root / "whole")

        return attempt

    @staticmethod
    def odd_text(dice: random.Random) -> str:
        kind = dice.randrange(7)
        if kind == 0:
            return str(dice.choice(ODD_VALUES))
        if kind == 1:
            return str(dice.choice([-1, 1]) * 10 ** dice.randrange(0, 400))
        if kind == 2:
            return repr(dice.choice([-1, 1]) * 10 ** dice.uniform(-30, 30))
        if kind == 3:
            return str(dice.randrange(0, 600))
        if kind == 4:
            return str(2 ** dice.randrange(0, 70))
        if kind == 5:
            return "".join(
                chr(dice.choice([dice.randrange(1, 128), dice.randrange(0xA0, 0xD800)]))
                for _ in range(dice.randrange(9))
            )
        return dice.choice(
            [
                "0",
                "1",
                "1_0",
                " 1 ",
                "0x10",
                "1e3",
                "١",
                "auto",
                "train",
                "..",
                "a/b",
                "describe",
                "nan",
                "-inf",
                "9" * 5000,
            ]
        )


def limit_memory(size: int = MEMORY) -> None:
    """What is taken from now on may be at most 2 GiB, or `size` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def campaign(root: Path, counts: dict[str, int], seed: int, unchecked: str = "") -> int:
    """To be run in a child: `counts` cases of each kind; writes what became of them to root/campaign.json.

    `unchecked` is a function of the script that does nothing instead, to see that the campaign notices.
    """
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    subjects, results, begin = Subjects(root), Campaign(), time.monotonic()
    limit_memory()
    if unchecked:
        setattr(tg, unchecked, lambda *_: None)
    for kind, count in counts.items():
        dice = random.Random(f"{seed} {kind}")
        for number in range(count):
            results.case(kind, f"{seed}/{number}", getattr(subjects, kind)(dice))
    report = dict(counts=results.counts, failures=results.failures[:50], failed=len(results.failures))
    report |= dict(slowest_s=results.slowest, seconds=time.monotonic() - begin)
    report["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    (root / "campaign.json").write_text(json.dumps(report))
    return 0


# Tokenizers, which a library in C++ reads ----------------------------------------------------------------------


def tokenizers(root: Path, data: ToyData, numbers: range, seed: int) -> int:
    """To be run in a child, which the library may crash: writes the number before a case and the outcome after it."""
    import train_gpt as tg

    good = data.tokenizer.read_bytes()
    limit_memory()
    config = data.config(TOKENIZER_PATH=root / "hostile.model")
    with open(root / "tokenizers.txt", "a", buffering=1) as log:
        for number in numbers:
            dice = random.Random(f"{seed} tokenizer {number}")
            (root / "hostile.model").write_bytes(
                mutated(good, dice) if dice.random() < 0.9 else dice.randbytes(dice.randrange(400))
            )
            log.write(f"{number} ")
            results = Campaign()

            def attempt() -> None:
                tokenizer = tg.load_tokenizer(config)
                table = tg.byte_table(tokenizer)
                counts = tg.target_bytes(data.val_tokens, table)
                assert (counts >= 0).all() and len(table.base) == 64

            results.case("tokenizer", str(number), attempt)
            log.write(f"{next(iter(results.counts['tokenizer']))} {' '.join(results.failures)}\n")
    return 0
