#!/usr/bin/env python3
"""Parameter Golf in one file: train a language model, quantise it, score the artifact in bits per byte.

The task (OpenAI's Parameter Golf): the best language model whose code and compressed weights together fit in
16,000,000 bytes, trained in 600 s on 8xH100, scored in another 600 s on the FineWeb validation documents.

    ./run.sh                                                        everything, on whatever this machine has
    SEED=42 torchrun --standalone --nproc_per_node=8 train_gpt.py   the full-size system on eight GPUs
    STAGES=evaluate RUN_ID=my-run python train_gpt.py               score an artifact that exists already
    STAGES=describe python train_gpt.py                             sizes, FLOPs, forecasts; needs no data
    STAGES=check python train_gpt.py                                tries what all stages will need; writes nothing

Every setting is an environment variable (section CONFIG); precedence is default < PRESET < environment.

The file is read once, from top to bottom, in the order in which the data moves:

    CONFIG    environment -> one immutable Config
    RUN       processes, devices, logging, containers on disk
    DATA      uint16 shards -> packed rows of documents
    KERNELS   functions that exist twice: the plain definition, and beside it the same numbers faster (Triton)
    MODEL     tokens -> nats per token: ONE forward pass for training, scoring, calibration and adaptation
    OPTIMIZER summed gradients -> updated weights (Muon for matrices, AdamW for the rest)
    SCORE     model + validation text -> nats, tokens, bytes: every target exactly once
    HINTS     text seen before -> guesses for the next token, and how far they are believed (the n-gram tilt)
    TRAIN     the timed loop, the moving average, the calibration statistics
    CODER     integer codes <-> bytes, by adaptive contexts and interleaved rANS
    COMPRESS  weights + Hessians -> int6 codes -> artifact file -> weights again
    ADAPT     the score again, learning from what is already scored (test-time training)
    CHECK     what would fail late is tried first: files, packages, device, memory, disk
    MAIN      stages, report, exit status

Dimensions: B rows, T time, D model_dim, H query heads, K key/value heads, d head_dim, F mlp width, V vocabulary,
L physical layers, R LoRA rank. Linear maps are y = x W^T with W of shape (out, in).
"""

import ast
import contextlib
import dataclasses
import enum
import fcntl
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

# A thread of GNU OpenMP that waits for the others spins this often before it sleeps. Its own choice, 30 times as often,
# makes a run on a CPU many times slower as soon as another process is busy; without one, both are equally fast.
# Must be set before PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.optim.adamw import adamw

ARTIFACT_LIMIT_BYTES = 16_000_000  # decimal megabytes: compressed weights + counted code (challenge README)
TIME_LIMIT_S = 600.0  # for training, and again for evaluation, on 8xH100
CHALLENGE_DOCUMENTS = 50_000  # validation is the first 50,000 documents of the frozen list
CHALLENGE_BYTES = (151_070_000, 151_090_000)  # their text, within the tails that loaders of published logs drop
BOS_ID = 1  # begin-of-document token of every tokenizer of the challenge; there is no end token
NORM_EPS = 2.0**-23  # explicit, because torch's default changed between releases and differs for bfloat16
COUNTED_TOKENS = 2**22  # of the training stream, for the frequencies of tokens
LARGEST_NUMBER = 10**9  # of settings without a limit of their own: no product of two overflows a float32
SPACE_ID = 8133  # the piece of a lone space in the CaseOps tokenizer (#1729)
FUSED_MARKERS = {8: 4, 9: 5, 10: 6}  # MP3 data (#2109): id of a space with a case marker behind it -> id of the marker
TTT_TRACKS = 8  # test-time training is dealt to this many tracks, whatever the number of ranks
ROUND_BATCHES = 32  # batches of documents in a round of it; with 8, scoring would take a fifth longer


class UserError(ValueError):
    """A mistake in the settings or files of a run. Its message is one line: what, where, found, and the fix."""


# ------------------------------------------------------------------------------------------------------------
# CONFIG
#
# A Config is made once, from a mapping (normally os.environ), checked as a whole, and never changes. Field names
# are the published environment names in lower case. Nothing below reads the environment again.
# ------------------------------------------------------------------------------------------------------------


class Stage(enum.Flag):
    """What a setting decides. A file is refused by a run in which a setting that decided it has another value."""

    RUN = enum.auto()  # files, devices, log and speed: no result depends on it
    DATA = enum.auto()  # where data lie, and rows that fit the memory: a checkpoint keeps what they come to
    TRAIN = enum.auto()  # the weights and statistics of trained.bin
    ARTIFACT = enum.auto()  # the forward pass or the layout of artifact.bin
    QUANTIZE = enum.auto()  # the codes in artifact.bin
    EVALUATE = enum.auto()  # scores


RUN, DATA, TRAIN, ARTIFACT, QUANTIZE, EVALUATE = Stage
MODEL, LAYOUT = TRAIN | ARTIFACT, QUANTIZE | ARTIFACT


def setting(
    stage: Stage, default: Any, low: float = -LARGEST_NUMBER, high: float = LARGEST_NUMBER, choices: tuple = ()
) -> Any:
    """A Config field: what it decides, its default, and the range of a number (inclusive) or the choices of a text."""
    return dataclasses.field(default=default, metadata=dict(stage=stage, low=low, high=high, choices=choices))


def number_pairs(text: str) -> list[tuple[int, int]]:
    """`256:12,1024:24` as pairs of numbers; ValueError for other text."""
    return [(int(a), int(b)) for a, b in (pair.split(":") for pair in text.replace(" ", "").split(",") if pair)]


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. The defaults are PR #1941 plus the BOS-masked SmearGate of PR #1855."""

    # run
    preset: str = "default"  # which row of PRESETS the values come from
    run_id: str = setting(RUN, "")  # folder under runs_dir; empty: made from the time and the seed
    runs_dir: str = setting(RUN, "runs")  # everything that a run writes goes to runs_dir/run_id
    stages: str = setting(RUN, "train,quantize,evaluate")  # comma list, in this order; or describe, or check
    seed: int = setting(TRAIN | EVALUATE, 1337, 0, 2**32 - 1)  # of weights and adapters; never of the data's order
    compile: str = setting(RUN, "auto", choices=("auto", "0", "1"))  # torch.compile; auto: on a GPU only
    attn_backend: str = setting(RUN, "auto", choices=("auto", "fa3", "varlen", "sdpa"))  # auto: the first that can run
    kernels: str = setting(RUN, "auto", choices=("auto", "triton", "plain"))  # auto: Triton where it agrees with plain
    checkpoint_seconds: float = setting(RUN, 0.0, 0)  # save the training state this often; 0: never (timed record runs)
    report: bool = setting(RUN, True)  # at the end records/report.py, where it is there, writes report.html

    # data
    data_dir: str = setting(DATA, "./data/")  # holds datasets/ and tokenizers/
    data_path: str = setting(DATA, "")  # dataset folder; empty: data_dir/datasets/fineweb10B_sp{vocab_size}
    tokenizer_path: str = setting(DATA, "")  # SentencePiece; empty: data_dir/tokenizers/fineweb_{vocab_size}_bpe.model
    vocab_size: int = setting(MODEL, 8192, 8, 65536)  # must equal the tokenizer's size
    train_batch_tokens: int = setting(TRAIN, 786_432, 1, 2**25)  # targets per optimizer step, over all ranks
    row_tokens: int = setting(DATA, 0, 0, 2**24)  # length of a packed row (the micro-batch); 0: train_batch_tokens / 8
    train_seq_len: int = setting(TRAIN, 2048, 2)  # longest attention segment in training
    loader: str = setting(TRAIN, "stream", choices=("stream", "coprime"))  # rows in stream order, or spread windows
    varlen_attn: bool = setting(TRAIN | EVALUATE, True)  # attention ends at documents; 0: windows of the plain stream
    caseops_enabled: bool = setting(TRAIN | EVALUATE, False)  # the CaseOps export of the data and its tokenizer (#1729)
    marker_pair_mode: bool = setting(TRAIN | EVALUATE, False)  # CaseOps data that fuse a space and the marker behind it
    val_batch_tokens: int = setting(RUN, 524_288, 1, 2**27)  # in scoring; a row holds an eighth, adaptation a quarter
    eval_seq_len: int = setting(EVALUATE, 2048, 2, 2**20)  # longest context in scoring

    # schedule (progress runs from 0 to 1 over the time budget, or over iterations where there is none)
    iterations: int = setting(TRAIN, 20_000, 1)  # hard limit of optimizer steps
    max_wallclock_seconds: float = setting(TRAIN | EVALUATE, 600.0, 0)  # of training; 0: no clock, steps count
    gptq_reserve_seconds: float = setting(TRAIN, 8.0, 0)  # part of the budget kept for the calibration pass (#1868)
    warmup_steps: int = setting(RUN, 20, 0)  # throw-away steps that only compile; everything they change is undone
    warmdown_frac: float = setting(TRAIN, 0.75, 0, 1)  # last fraction of progress in which the learning rate falls
    warmdown_iters: int = setting(TRAIN, 0, 0)  # the same as a number of steps, at the speed so far; 0: the fraction
    min_lr: float = setting(TRAIN, 0.10, 0, 1)  # floor of the learning-rate multiplier
    train_log_every: int = setting(RUN, 500, 1)  # steps between loss lines
    val_loss_every: int = setting(RUN, 0, 0)  # steps between validations, which training time excludes; 0: none

    # model
    num_layers: int = setting(MODEL, 11, 2, 256)
    model_dim: int = setting(MODEL, 512, 2, 2**14)
    num_heads: int = setting(MODEL, 8, 1)
    num_kv_heads: int = setting(MODEL, 4, 1)
    mlp_mult: float = setting(MODEL, 4.0, 0.1, 64)  # hidden width = int(mlp_mult * model_dim)
    leaky_relu_sq_slope: float = setting(MODEL, 0.5, 0, 1)  # MLP activation leaky_relu(x, slope)^2; 0: ReLU^2
    ln_scale: bool = setting(MODEL, True)  # norm outputs of layer l times 1 / sqrt(l + 1) (#315)
    resid_scale_depth_init: bool = setting(TRAIN, False)  # attn_scale, mlp_scale begin at 1 / sqrt(l + 1), not 1 (#489)
    init_scheme: str = setting(TRAIN, "ortho", choices=("ortho", "default"))  # q, k, v, MLP up; default: 1/sqrt(fan_in)
    qk_gain_init: float = setting(TRAIN, 5.0)  # initial query gain of each head, after the q/k norm
    rope_dims: int = setting(MODEL, 16, 0)  # rotated channels of each head; the others carry no position
    rope_base: float = setting(TRAIN, 1e4, 1)
    rope_train_seq_len: int = setting(TRAIN, 0, 0)  # NTK: the base grows where train_seq_len exceeds this; 0: never
    xsa_last_n: int = setting(MODEL, 11, 0)  # exclusive self-attention on the last n layers
    attn_gate: str = setting(MODEL, "dense", choices=("none", "dense", "sparse", "two_sigma"))  # see attn_gate()
    gated_attn_init_std: float = setting(TRAIN, 0.005, 0)  # initial spread of the dense attention gates
    sparse_attn_gate_scale: float = setting(MODEL, 1.0, 0)  # factor inside the sigmoid of the sparse attention gates
    gate_window: int = setting(MODEL, 12, 1)  # channels that the narrow gates look at
    mlp_gate_out: bool = setting(MODEL, True)  # a factor per token on the MLP's output (#1941)
    mlp_gate_bias: float = setting(TRAIN, 5.0)  # sigmoid(5) = 0.993: the MLP output gate starts almost open (#1941)
    smear_gate_enabled: bool = setting(MODEL, True)  # mix the previous token's embedding in (#1667, BOS mask of #1855)
    smear_gate_pos: str = setting(MODEL, "pre_norm", choices=("pre_norm", "post_norm"))  # around the embedding norm
    smear_perdim_enabled: bool = setting(MODEL, False)  # the same with one constant factor per channel (#489)
    bigram_vocab_size: int = setting(MODEL, 0, 0, 2**24)  # BigramHash: rows of a table for hashed token pairs; 0: none
    bigram_dim: int = setting(MODEL, 128, 1, 2**14)
    skip_gates_enabled: bool = setting(MODEL, True)  # U-Net skips blend with the stream; 0: they are added
    num_loops: int = setting(MODEL, 2, 0, 64)  # extra passes over layers loop_start..loop_end
    loop_start: int = setting(MODEL, 3, 0)
    loop_end: int = setting(MODEL, 5, 0)  # inclusive
    enable_looping_at: float = setting(TRAIN, 0.35, 0, 1)  # progress at which the extra passes begin
    parallel_start_layer: int = setting(MODEL, 8, 0)  # first layer with separate attention and MLP lanes; 0: none
    parallel_residual_start: int = setting(MODEL, -1, -1)  # first layer whose MLP reads its attention's input; -1: none
    tied_embed_init_std: float = setting(TRAIN, 0.005, 0)
    logit_softcap: float = setting(MODEL, 30.0, 1e-3)

    # optimizer
    matrix_lr: float = setting(TRAIN, 0.026, 0)  # Muon
    scalar_lr: float = setting(TRAIN, 0.02, 0)  # AdamW, everything that is neither a matrix nor the embedding
    tied_embed_lr: float = setting(TRAIN, 0.03, 0)  # AdamW, the tied embedding
    muon_momentum: float = setting(TRAIN, 0.97, 0, 1)
    muon_momentum_warmup_start: float = setting(TRAIN, 0.92, 0, 1)
    muon_momentum_warmup_steps: int = setting(TRAIN, 1500, 0)
    muon_backend_steps: int = setting(TRAIN, 5, 1, 5)  # Newton-Schulz iterations
    polar_express_ns: bool = setting(TRAIN, True)  # their coefficients change from step to step (arXiv:2505.16932)
    muon_row_normalize: bool = setting(TRAIN, True)  # rows of an update get unit length first (MuonEq-R)
    muon_per_head: bool = setting(TRAIN, False)  # each head of q, k and v is orthogonalised as a matrix of its own
    beta1: float = setting(TRAIN, 0.9, 0, 0.9999)
    beta2: float = setting(TRAIN, 0.95, 0, 0.99999)
    adam_eps: float = setting(TRAIN, 1e-8, 0)
    muon_wd: float = setting(TRAIN, 0.095, 0)  # decoupled weight decay: per step w *= 1 - lr * wd
    adam_wd: float = setting(TRAIN, 0.02, 0)
    embed_wd: float = setting(TRAIN, 0.085, 0)
    grad_clip_norm: float = setting(TRAIN, 0.3, 0)  # global norm of the gradient averaged over all ranks; 0: off
    ema_decay: float = setting(TRAIN, 0.9965, 0, 0.999999)  # of the averaged weights, which are quantised; 0: none
    swa_enabled: bool = setting(TRAIN, False)  # instead the mean of the weights collected late in training
    swa_start_frac: float = setting(TRAIN, 0.4, 0, 1)  # collecting begins at a learning-rate multiplier below this
    swa_every: int = setting(TRAIN, 50, 1)  # steps between two collected weights

    # quantisation
    quant_scheme: str = setting(TRAIN | QUANTIZE, "gptq", choices=("gptq", "gptq_lite", "intn_row", "int8_clip"))
    matrix_bits: int = setting(QUANTIZE, 6, 2, 8)
    mlp_bits: int = setting(QUANTIZE, 0, 0, 8)  # of the MLP matrices, 2 to 8; 0: matrix_bits
    quant_scale_floor: float = setting(QUANTIZE, 0.0, 0, 1)  # smallest step of MATRIX_BITS codes; it saves bytes
    embed_bits: int = setting(QUANTIZE, 7, 2, 8)
    attn_clip_sigmas: float = setting(QUANTIZE, 13.0, 1)  # row scale = clip * std(row) / (2^(bits-1) - 1)
    mlp_clip_sigmas: float = setting(QUANTIZE, 12.0, 1)
    embed_clip_sigmas: float = setting(QUANTIZE, 15.0, 1)
    embed_damping: float = setting(QUANTIZE, 0.0, 0, 1)  # added to the embedding's Hessian, in means of its diagonal
    embed_freq_power: float = setting(QUANTIZE, 0.0, 0, 1)  # finer rows for frequent tokens: step ~ frequency^-this
    trellis_states: int = setting(QUANTIZE, 0, 0, 16)  # trellis-coded quantisation with 4, 8 or 16 states; 0: none
    gptq_calibration_batches: int = setting(TRAIN, 16, 1, 100_000)  # training rows behind the Hessians, over all ranks
    mag_prune_frac: float = setting(QUANTIZE, 0.0, 0, 0.99)  # share of each matrix, the smallest weights, set to 0
    fp16_keep_name_patterns: str = setting(LAYOUT, "")  # comma list; matrices with one of these in their name stay fp16
    gated_attn_quant_gate: bool = setting(LAYOUT, True)  # attention gates as int8 rows instead of fp16
    lqer_rank: int = setting(LAYOUT, 0, 0, 64)  # rank of the correction of the worst matrices (#1797); 0: none
    lqer_top_k: int = setting(QUANTIZE, 3, 0, 1000)  # how many matrices are corrected
    lqer_left_bits: int = setting(QUANTIZE, 2, 2, 8)  # of a left factor
    lqer_asym_group: int = setting(LAYOUT, 64, 1)  # entries of a right factor that share a scale
    compressor: str = setting(LAYOUT, "brotli", choices=("brotli", "rans", "zlib", "zstd", "pergroup"))
    fit_artifact: str = setting(QUANTIZE, "1", choices=("0", "1", "fill"))  # clips rise until it fits, or fall too

    # scoring and test-time training (the last enabled one of plain, sliding, TTT is the submitted score)
    sliding_window_enabled: bool = setting(EVALUATE, False)
    eval_stride: int = setting(EVALUATE, 64, 1)  # new targets per sliding window
    eval_max_seconds: float = setting(EVALUATE, 580.0, 0)  # with a training clock: chunks grow rather than exceed this
    eval_chunk_factors: str = setting(EVALUATE, "")  # round:factor list: how chunks grow, instead of by the clock
    ttt_enabled: bool = setting(EVALUATE, True)
    ttt_kind: str = setting(EVALUATE, "lora_phased", choices=("lora_phased", "chunk_sgd", "pre_eval_illegal"))
    ttt_chunk_size: int = setting(EVALUATE, 48, 1)  # targets scored between two adapter updates
    ttt_chunk_steps: str = setting(EVALUATE, "")  # for short documents: list of "longest:chunk", in targets (#2014)
    ttt_eval_seq_len: int = setting(EVALUATE, 2048, 2, 2**16)
    ttt_batch_size: int = setting(EVALUATE, 64, 1, 2**16)  # documents adapted side by side
    ttt_lora_rank: int = setting(EVALUATE, 128, 1, 2**14)
    ttt_lora_alpha: float = setting(EVALUATE, 144.0, 0)  # the low-rank product is scaled by alpha / rank
    ttt_lora_lr: float = setting(EVALUATE, 1e-4, 0)
    ttt_beta1: float = setting(EVALUATE, 0.0, 0, 0.9999)
    ttt_beta2: float = setting(EVALUATE, 0.999, 0, 0.99999)
    ttt_weight_decay: float = setting(EVALUATE, 2.0, 0)
    ttt_k_lora: bool = setting(EVALUATE, True)  # adapters on the key maps too
    phased_ttt_prefix_docs: int = setting(EVALUATE, 2000, 0)  # scored documents before the last global update
    phased_ttt_num_phases: int = setting(EVALUATE, 3, 1, 1000)
    global_ttt_lr: float = setting(EVALUATE, 1e-3, 0)
    global_ttt_momentum: float = setting(EVALUATE, 0.9, 0, 0.9999)
    global_ttt_chunk_tokens: int = setting(EVALUATE, 32_768, 2, 2**27)  # targets per global SGD step
    global_ttt_grad_clip: float = setting(EVALUATE, 1.0, 0)  # of every update of all weights during scoring
    ttt_chunk_tokens: int = setting(EVALUATE, 32_768, 2, 2**27)  # chunk_sgd: targets scored between rounds of updates
    ttt_epochs: int = setting(EVALUATE, 3, 1, 1000)  # passes over each scored chunk
    ttt_lr: float = setting(EVALUATE, 0.005, 0)
    ttt_momentum: float = setting(EVALUATE, 0.9, 0, 0.9999)
    ttt_batch_seqs: int = setting(EVALUATE, 32, 1, 2**16)  # windows per update for each of 8 (also absent) ranks
    chunk_ttt_optimizer: str = setting(EVALUATE, "sgd", choices=("sgd", "adamw"))
    ngram_tilt_enabled: bool = setting(EVALUATE, False)  # raise the token that followed here before (#1145)
    token_order: int = setting(EVALUATE, 16, 2, 64)  # length of such a repetition, the token itself included
    token_threshold: float = setting(TRAIN | EVALUATE, 0.8, 0, 1)  # share of earlier occurrences that it followed
    token_boost: float = setting(EVALUATE, 2.625, 0, 100)  # what is added to its logit
    token_document_orders: str = setting(MODEL, "")  # comma list: hints from the document itself, learnt boosts

    def of_stage(self, stage: Stage) -> dict[str, Any]:
        """The settings that decide a stage."""
        return {name: getattr(self, name) for name, field in FIELDS.items() if stage in field.metadata["stage"]}

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def train_row_tokens(self) -> int:
        return self.row_tokens or self.train_batch_tokens // 8

    @property
    def rows_per_step(self) -> int:
        return self.train_batch_tokens // self.train_row_tokens

    @property
    def score_row_tokens(self) -> int:
        return max(self.val_batch_tokens // 8, self.eval_seq_len)

    @property
    def adapt_tokens(self) -> int:
        """Most tokens in a pass of test-time training with adapters; larger batches are passed in parts."""
        return max(self.val_batch_tokens // 4, self.ttt_eval_seq_len)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_id

    @property
    def dataset_dir(self) -> Path:
        variant = "_lossless_caps_caseops_v1_reserved" if self.caseops_enabled else ""
        variant = "_caseops_marker_pair_v3" if self.marker_pair_mode else variant
        return Path(self.data_path or f"{self.data_dir}/datasets/fineweb10B_sp{self.vocab_size}{variant}")

    @property
    def tokenizer_file(self) -> Path:
        variant = "_lossless_caps_caseops_v1_reserved" if self.caseops_enabled else ""
        return Path(self.tokenizer_path or f"{self.data_dir}/tokenizers/fineweb_{self.vocab_size}_bpe{variant}.model")

    @property
    def rotary_base(self) -> float:
        """ROPE_BASE, raised by the NTK rule base (T / T0)^(r / (r - 2)) where training is longer than its reference."""
        ratio = self.train_seq_len / self.rope_train_seq_len if self.rope_train_seq_len else 1.0
        return self.rope_base * max(ratio, 1.0) ** (self.rope_dims / (self.rope_dims - 2) if self.rope_dims > 2 else 0)

    @property
    def document_orders(self) -> list[int]:
        """TOKEN_DOCUMENT_ORDERS, the longest first; ValueError for anything but distinct orders from 2 to 64."""
        orders = [int(order) for order in self.token_document_orders.replace(" ", "").split(",") if order]
        if len(set(orders)) < len(orders) or not all(2 <= order <= 64 for order in orders):
            raise ValueError(orders)
        return sorted(orders, reverse=True)

    @property
    def chunk_factors(self) -> dict[int, int]:
        """Round -> factor of chunks from there on; ValueError for anything else in EVAL_CHUNK_FACTORS."""
        pairs = number_pairs(self.eval_chunk_factors)
        factors = dict(pairs)
        if len(factors) < len(pairs) or not all(number >= 0 and factor >= 1 for number, factor in pairs):
            raise ValueError(pairs)
        return factors

    @property
    def chunk_steps(self) -> list[tuple[int, int]]:
        """(longest document, its chunk), both in targets; ValueError for anything else in TTT_CHUNK_STEPS."""
        steps = number_pairs(self.ttt_chunk_steps)
        limits = [limit for limit, _ in steps]
        if limits != sorted({*limits}) or min((number for step in steps for number in step), default=1) < 1:
            raise ValueError(steps)
        return steps

    @property
    def stage_list(self) -> list[str]:
        return [stage for stage in self.stages.replace(" ", "").split(",") if stage]

    @property
    def train_seconds(self) -> float:
        """Length of the training loop in seconds; infinite where the schedule runs by steps."""
        budget = self.max_wallclock_seconds
        return budget - self.gptq_reserve_seconds if budget else math.inf


FIELDS = {field.name: field for field in dataclasses.fields(Config) if field.name != "preset"}

PRESETS: dict[str, dict[str, Any]] = {"default": {}}
# The published systems, from the first baseline to the last leader (records/ has a folder for each). Where an original
# breaks a hard rule or cannot work, its preset does the right thing: the folder's README says what and why.
PRESETS["baseline"] = dict(  # NaiveBaseline
    vocab_size=1024, train_seq_len=1024, eval_seq_len=1024, train_batch_tokens=524_288, varlen_attn=False,
    num_layers=9, mlp_mult=2.0, leaky_relu_sq_slope=0.0, ln_scale=False, init_scheme="default", qk_gain_init=1.5,
    rope_dims=64, xsa_last_n=0, attn_gate="none", mlp_gate_out=False, smear_gate_enabled=False,
    skip_gates_enabled=False, num_loops=0, parallel_start_layer=0,
    tied_embed_lr=0.05, matrix_lr=0.04, scalar_lr=0.04, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=500, polar_express_ns=False, muon_row_normalize=False, muon_wd=0.0, adam_wd=0.0,
    embed_wd=0.0, grad_clip_norm=0.0, ema_decay=0.0, warmdown_frac=0.0, warmdown_iters=1200, min_lr=0.0,
    gptq_reserve_seconds=0.0, quant_scheme="int8_clip", matrix_bits=8, embed_bits=8, quant_scale_floor=1 / 127,
    compressor="zlib", ttt_enabled=False,
)  # fmt: skip
PRESETS["pr489"] = PRESETS["baseline"] | dict(
    num_layers=7, mlp_mult=3.0, train_seq_len=4096, eval_seq_len=4096, logit_softcap=15.0, qk_gain_init=1.0,
    rope_dims=16, bigram_vocab_size=2048, smear_perdim_enabled=True, resid_scale_depth_init=True,
    tied_embed_lr=0.01, matrix_lr=0.03, muon_wd=0.04, muon_momentum=0.99, warmdown_iters=6000,
    sliding_window_enabled=True, ttt_enabled=True, ttt_kind="chunk_sgd", chunk_ttt_optimizer="adamw",
    ttt_chunk_tokens=1_048_576, ttt_epochs=5, ttt_lr=5e-4, ttt_batch_seqs=4,
)  # fmt: skip
PRESETS["fork5"] = PRESETS["baseline"] | dict(
    num_layers=11, mlp_mult=3.0, train_seq_len=2048, eval_seq_len=2048, train_batch_tokens=786_432, rope_dims=16,
    rope_train_seq_len=1024, ln_scale=True, init_scheme="ortho", xsa_last_n=4, bigram_vocab_size=2048,
    smear_perdim_enabled=True, muon_wd=0.02, grad_clip_norm=0.3, warmdown_iters=3500, ema_decay=0.997,
    quant_scheme="gptq_lite", matrix_bits=6, quant_scale_floor=1 / 31, mag_prune_frac=0.05,
    fp16_keep_name_patterns="blocks.{last}.attn.k", compressor="zstd",
    sliding_window_enabled=True, ttt_enabled=True, ttt_kind="chunk_sgd",
    ttt_chunk_tokens=1_048_576, ttt_epochs=20, ttt_lr=0.008,
)  # fmt: skip
# The same with the rates of its public twin (#398, #287): its author may have listed defaults that never ran.
PRESETS["fork5_twin"] = PRESETS["fork5"] | dict(
    tied_embed_lr=0.035, matrix_lr=0.025, scalar_lr=0.025, muon_momentum=0.99, muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500, muon_wd=0.04, adam_wd=0.04, embed_wd=0.04, mag_prune_frac=0.0,
)  # fmt: skip
# The run behind the log that fork5 shipped (#180).
PRESETS["fork5_10l"] = PRESETS["fork5_twin"] | dict(
    num_layers=10, xsa_last_n=0, rope_dims=64, rope_train_seq_len=0, ln_scale=False, bigram_vocab_size=10_240,
    tied_embed_lr=0.03, matrix_lr=0.02, scalar_lr=0.02, warmdown_iters=3000, ema_decay=0.0, swa_enabled=True,
    quant_scheme="intn_row", mlp_bits=5, quant_scale_floor=0.0, mag_prune_frac=0.03,
    fp16_keep_name_patterns="tok_emb,blocks.{last}.attn.k", ttt_enabled=False,
)  # fmt: skip
PRESETS["pr1880"] = dict(
    loader="coprime", varlen_attn=False, attn_gate="two_sigma", mlp_gate_out=False, smear_gate_pos="post_norm",
    parallel_start_layer=0, parallel_residual_start=7, logit_softcap=15.0, matrix_lr=0.022, muon_momentum=0.99,
    polar_express_ns=False, warmdown_frac=0.72, min_lr=0.0, gptq_reserve_seconds=12.0, embed_bits=8,
    attn_clip_sigmas=12.85, mlp_clip_sigmas=12.85, embed_clip_sigmas=20.0, gptq_calibration_batches=64,
    gated_attn_quant_gate=False, sliding_window_enabled=True, ttt_kind="chunk_sgd",
)  # fmt: skip
PRESETS["pr1941"] = dict(smear_gate_enabled=False)
PRESETS["pr1855"] = dict(
    caseops_enabled=True, attn_gate="sparse", sparse_attn_gate_scale=0.5, mlp_gate_out=False, beta2=0.99,
    warmdown_frac=0.85, mlp_clip_sigmas=11.5, embed_clip_sigmas=14.0, lqer_rank=4, compressor="pergroup",
    ttt_lora_rank=80, ttt_beta2=0.99, ttt_weight_decay=0.5, phased_ttt_prefix_docs=2500,
)  # fmt: skip
PRESETS["pr2135"] = PRESETS["pr1855"] | dict(
    matrix_lr=0.028, lqer_asym_group=32, gptq_calibration_batches=32, gated_attn_quant_gate=False,
    eval_seq_len=2560, ttt_eval_seq_len=2560, phased_ttt_num_phases=1, ttt_lora_lr=8e-5, ttt_weight_decay=2.0,
    ttt_k_lora=False, ngram_tilt_enabled=True,
)  # fmt: skip
PRESETS["pr2158"] = PRESETS["pr2135"] | dict(marker_pair_mode=True)  # opened after the deadline: never on the board
# Our own: the best published system and what won in records/ablation.md, of published levers that nobody has put
# together and of new ones.
PRESETS["frontier"] = PRESETS["pr2158"] | dict(
    muon_per_head=True, attn_clip_sigmas=11.5, mlp_clip_sigmas=12.25, embed_clip_sigmas=25.0, embed_bits=8,
    embed_damping=0.04, embed_freq_power=0.25, lqer_left_bits=4, trellis_states=16, compressor="rans",
    fit_artifact="fill", ttt_chunk_steps="256:12,2048:16", ttt_lora_lr=1e-4, token_threshold=0.5,
    token_document_orders="16,8,6,4,3,2",
)  # fmt: skip
# The whole system at a size that two CPU cores train in two minutes, on the corpus of data/embedded.py. Its own values
# where the published ones assume thousands of steps: the average spans 5 % of the steps, the momentum ramp 30 %.
PRESETS["tiny"] = dict(
    data_path="./data/datasets/embedded_sp1024", tokenizer_path="./data/tokenizers/embedded_1024_bpe.model",
    vocab_size=1024, model_dim=128, num_heads=4, num_kv_heads=2, num_layers=7, loop_start=2, loop_end=3,
    parallel_start_layer=5, xsa_last_n=7, train_batch_tokens=1024, row_tokens=1024, train_seq_len=256, eval_seq_len=256,
    val_batch_tokens=65_536, iterations=420, max_wallclock_seconds=0.0, warmup_steps=0, train_log_every=20,
    muon_momentum_warmup_steps=125, ema_decay=0.95, gptq_calibration_batches=16, ttt_eval_seq_len=256,
    ttt_chunk_size=64, ttt_batch_size=8, ttt_lora_rank=16, ttt_lora_alpha=18.0, ttt_lora_lr=3e-3,
    phased_ttt_prefix_docs=16, phased_ttt_num_phases=2, global_ttt_lr=1e-2, global_ttt_chunk_tokens=2048,
)  # fmt: skip


class Name(NamedTuple):
    """The meaning of a name in the environment: a field, on or off for a value of a field, or something built in."""

    field: str = ""
    on: Any = None  # the value for 1; None: the text is the value
    off: Any = None  # the value for 0; where it is a zero, any other amount is on as well
    built_in: str | None = None  # the only value that is accepted where there is no field; None: any
    advice: str = ""  # why the name is refused, and what to set instead

    def is_on(self, value: Any) -> bool:
        return value == self.on if self.off else value != self.off


NAMES = {name.upper(): Name(name) for name in FIELDS}
NAMES |= {  # other published names of the same quantity
    "ATTN_OUT_GATE_WIDTH": Name("gate_window"),
    "SMEAR_GATE_WIDTH": Name("gate_window"),
    "GATE_WIDTH": Name("gate_window"),
    "BIGRAM_HASH_BUCKETS": Name("bigram_vocab_size"),
    "PRUNE_FRAC": Name("mag_prune_frac"),
    "SMEAR_GATE": Name("smear_gate_enabled"),
    "VAL_BATCH_SIZE": Name("val_batch_tokens"),
}
NAMES |= {  # published on/off names
    "ATTN_OUT_GATE_ENABLED": Name("attn_gate", on="two_sigma", off="none"),
    "GATE_ATTN_OUT": Name("attn_gate", on="two_sigma", off="none"),  # #1667's name
    "GATED_ATTN_ENABLED": Name("attn_gate", on="dense", off="none"),
    "SPARSE_ATTN_GATE_ENABLED": Name("attn_gate", on="sparse", off="none"),
    "INT5_ALL": Name("matrix_bits", on=5, off=6),
    "EMA_ENABLED": Name("ema_decay", on=0.9965, off=0.0),
    "LQER_ENABLED": Name("lqer_rank", on=4, off=0),
}
NAMES |= {  # published names with a meaning of its own in each record, or with one that is not offered
    "GATE_MLP_OUT": Name(advice="#1667's gate is not #1941's MLP_GATE_OUT, and in no preset; unset it"),
    "SWA_CHECKPOINTS": Name(advice="set SWA_START_FRAC and SWA_EVERY"),
    "TTT_NUM_CHUNKS": Name(advice="set TTT_CHUNK_TOKENS"),
    "WEIGHT_DECAY": Name(advice="it meant Muon's decay (#489, fork5), AdamW's (#180, #267) or both (#179);"
                         " set MUON_WD, ADAM_WD, EMBED_WD"),
}  # fmt: skip
# Published names that are not a choice here. They are accepted so that published commands run as they are. These had no
# effect on the result: the two caps of ASYM_LOGIT_RESCALE received no gradient, the BOS mask of the SmearGate is always
# on here.
NAMES |= dict.fromkeys(
    """ARTIFACT_DIR ASYM_LOGIT_RESCALE COMPILE_SHAPE_WARMUP CONTROL_TENSOR_NAME_PATTERNS EMBED_LR
    EVAL_BATCH_SEQS FUSED_CE_ENABLED GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_WARMUP_START_LR GPTQ_CALIBRATION_MODE HEAD_LR
    LATE_QAT_THRESHOLD LOGIT_RESCALE_OFFSET LOGIT_RESCALE_SCALE LOGIT_RESCALE_STEEPNESS LQER_FACTOR_BITS MUON_BETA2
    PHASED_TTT_ENABLED QAT_THRESHOLD SMEAR_GATE_BOS_FIX TTT_GRAD_STEPS_CLEAN WITHIN_TAU WORD_NORMALIZE WORD_ORDER
    WORD_TAU""".split(),
    Name(),
)
# Of these only the built-in value is accepted. MATRIX_CLIP_SIGMAS is for the matrices of the ATTN and MLP clips.
NAMES |= {key: Name(built_in=value) for key, value in dict(
    AGREE_ADD_BOOST="0", ALIAS_PREV_SMEAR_SCALE="1", ATTN_OUT_GATE_SRC="proj", AWQ_LITE_ENABLED="0",
    EMBEDDING_DIM="512", EVAL_INCLUDE_TAIL="1",
    GLOBAL_TTT_EPOCHS="1", GLOBAL_TTT_OPTIMIZER="sgd", GLOBAL_TTT_RESPECT_DOC_BOUNDARIES="1",
    GLOBAL_TTT_WARMUP_CHUNKS="0", LATE_QAT="0", LOGIT_RESCALE_MODE="tanh", LQER_ASYM_ENABLED="1",
    MARKER_PAIR_W_SPACE="0.4", MARKER_PAIR_W_TITLE="0.6", MATRIX_CLIP_SIGMAS="12.85", MUON_HUBER_WD="0",
    NGRAM_HINT_PRECOMPUTE_OUTSIDE="0", OPTROT_ENABLED="0",
    PARALLEL_FINAL_LANE="mean", PREQUANT_ONLY="0", QK_GAIN_INIT_SCHEDULE="", ROPE_YARN="0", SMEAR_BOS_TOKEN_ID="1",
    SPARSE_ATTN_GATE_INIT_STD="0", TIE_EMBEDDINGS="1", TTT_EVAL_BATCHES="", TTT_EVAL_ONLY="0", TTT_FREEZE_BLOCKS="0",
    TTT_FREEZE_LAYERS="0", TTT_GRAD_STEPS="1", TTT_LORA_EMA_DECAY="0", TTT_MLP_LORA="1", TTT_O_LORA="1",
    TTT_OPTIMIZER="adam", TTT_UPDATE_EVERY="1", TTT_WARM_START_A="1", VAL_DOC_FRACTION="1", WITHIN_BOOST="0",
    WORD_BOOST="0",
).items()}  # fmt: skip


def shown(value: Any) -> str:
    """A value as it is typed, on one line: what is long is cut, and what cannot be printed is escaped."""
    value = int(value) if isinstance(value, bool) else value
    text = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def need(condition: Any, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def load_config(env: Mapping[str, str]) -> tuple[Config, dict[str, str]]:
    """The configuration that `env` asks for, and the origin of every value that is not a default.

    Raises UserError for an unknown preset, a value that does not parse or is out of range, two names that contradict
    each other, a choice that is built in otherwise, and a name that is one typo away from a real one.
    """
    preset = env.get("PRESET", "default")
    need(preset in PRESETS, f"PRESET={shown(preset)}: unknown; choose one of {', '.join(PRESETS)}")
    values = {name: field.default for name, field in FIELDS.items()} | PRESETS[preset]
    origins, chosen_by = dict.fromkeys(PRESETS[preset], f"preset {preset}"), {}
    demands: dict[str, Callable[[Any], bool]] = {}  # name -> whether a value of its field is what it asks for
    for key, text in env.items():
        if key not in NAMES:
            check_typo(key, text)
        elif not (field := NAMES[key].field):
            check_built_in(key, text)
            origins[key] = f"environment, without effect here (value {shown(text)})"
        else:
            value, demands[key] = read_demand(key, text)
            if NAMES[key].on is None or not demands[key](values[field]):
                values[field], chosen_by[field] = value, key
                origins[field] = "environment" if key.lower() == field else f"environment, as {key}"
    for key, fits in demands.items():  # two names may ask for different values of one field
        other = chosen_by.get(NAMES[key].field, "")
        message = f"{key}={shown(env[key])}: {other}={shown(env.get(other))} says otherwise; unset one"
        need(fits(values[NAMES[key].field]), message)
    config = Config(preset=preset, **values)
    validate(config)
    return config, origins


def read_demand(key: str, text: str) -> tuple[Any, Callable[[Any], bool]]:
    """What a variable asks of its field: a value, and whether another one would do. Raises UserError for other text."""
    name = NAMES[key]
    if name.on is None:
        value = parse_value(key, text)
        return value, lambda current: current == value
    need(text.strip() in ("0", "1"), f"{key}={shown(text)}: not 0 or 1; for example {key}=1")
    on = text.strip() == "1"
    return name.on if on else name.off, lambda current: name.is_on(current) == on


def parse_value(key: str, text: str) -> Any:
    """The text of a variable as the type of its field, in the field's range."""
    field, given = FIELDS[NAMES[key].field], f"{key}={shown(text)}"
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    try:
        value = {"0": False, "1": True}[text.strip()] if field.type is bool else field.type(text)
    except (ValueError, KeyError):
        wanted = {bool: "0 or 1", int: "a whole number", float: "a number"}[field.type]
        raise UserError(f"{given}: not {wanted}; for example {key}={shown(field.default)}") from None
    if field.type in (int, float):
        limits = f"must be at least {low} and at most {high}; the default is {field.default}"
        need(low <= value <= high, f"{given}: {limits}")
    need(not choices or value in choices, f"{given}: unknown; choose one of {', '.join(choices)}")
    return value


def check_built_in(key: str, text: str) -> None:
    """Raises UserError for a refused name, and for another value than the one that is built in."""
    built_in, advice = NAMES[key].built_in, NAMES[key].advice
    need(not advice, f"{key}={shown(text)}: {advice}")
    same = built_in is None or text == built_in
    with contextlib.suppress(TypeError, ValueError):  # not numbers: only the exact text counts
        same = same or float(text) == float(built_in)
    need(same, f"{key}={shown(text)}: this script has {key}={built_in or 'empty'} built in; unset it")


def check_typo(key: str, text: str) -> None:
    """Raises UserError for a foreign name that is almost one of ours."""
    near = next((name for name in sorted([*NAMES, "PRESET"]) if one_typo_apart(key, name)), None)
    need(not near, f"{key}={shown(text)}: no such setting; did you mean {near}? Rename or unset it")


def one_typo_apart(a: str, b: str) -> bool:
    """True when one inserted, missing, replaced or swapped character turns `a` into `b`."""
    if a == b or abs(len(a) - len(b)) > 1 or min(len(a), len(b)) < 4:
        return False
    first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    swapped = a[first + 1 : first + 2] + a[first : first + 1] + a[first + 2 :]
    return (
        a[first + 1 :] == b[first:]
        or a[first:] == b[first + 1 :]
        or a[first + 1 :] == b[first + 1 :]
        or swapped == b[first:]
    )


Rule = tuple[Any, str, str]  # what must hold, the settings that it is about, and what is wrong with the fix


def validate(config: Config) -> None:
    """Checks what involves several settings. Raises UserError with the keys, the values and the fix."""
    for holds, names, message in itertools.chain(model_rules(config), row_rules(config), stage_rules(config)):
        need(holds, f"{shown_settings(config, names)}: {message}")


def shown_settings(config: Config, names: str) -> str:
    """`KEY=value, KEY=value` of these fields, whose names are separated by blanks."""
    return ", ".join(f"{name.upper()}={shown(getattr(config, name))}" for name in names.split())


def model_rules(c: Config) -> Iterator[Rule]:
    yield c.model_dim % c.num_heads == 0, "model_dim num_heads", "the first must be divisible by the second; change one"
    yield c.num_heads % c.num_kv_heads == 0, "num_heads num_kv_heads", "must be divisible by the second; change one"
    layer_numbers = 2 * c.model_dim**2 + 2 * c.model_dim * (c.num_kv_heads * c.head_dim + c.mlp_dim)
    count = c.num_layers * layer_numbers + c.vocab_size * c.model_dim
    message = f"{c.mlp_dim} hidden channels, {count} parameters; need at least 1 and at most {LARGEST_NUMBER}"
    yield c.mlp_dim > 0 and count <= LARGEST_NUMBER, "num_layers model_dim mlp_mult", message
    message = f"must be even and at most MODEL_DIM / NUM_HEADS = {c.head_dim}"
    yield c.rope_dims % 2 == 0 and c.rope_dims <= c.head_dim, "rope_dims", message
    yield c.gate_window <= c.model_dim, "gate_window model_dim", "wider than the model; lower it"
    message = "this vocabulary is not that of CaseOps; set VOCAB_SIZE=8192"
    yield not c.marker_pair_mode or c.vocab_size > SPACE_ID, "marker_pair_mode vocab_size", message
    message = f"need 0, or 2 and more rows, and at most {LARGEST_NUMBER // 4} numbers; change one"
    fits = c.bigram_vocab_size != 1 and c.bigram_vocab_size * c.bigram_dim <= LARGEST_NUMBER // 4
    yield fits, "bigram_vocab_size bigram_dim", message
    message = "exclude each other; set the first to -1 or the second to 0"
    one_kind = not c.parallel_start_layer or c.parallel_residual_start < 0
    yield one_kind, "parallel_residual_start parallel_start_layer", message
    message = "need LOOP_START <= LOOP_END < NUM_LAYERS; change one"
    yield not c.num_loops or c.loop_start <= c.loop_end < c.num_layers, "loop_start loop_end num_layers", message
    message = "layers with lanes must come last, after all looped layers and the first half; raise it, or 0 for none"
    first = max(c.num_layers // 2, c.loop_end + 1 if c.num_loops else 0)
    yield not c.parallel_start_layer or c.parallel_start_layer >= first, "parallel_start_layer num_layers", message


def row_rules(c: Config) -> Iterator[Rule]:
    batch, row = "train_batch_tokens row_tokens", f"a row of {c.train_row_tokens} tokens"
    yield c.row_tokens or c.train_batch_tokens % 8 == 0, batch, "not divisible by 8; change it or set ROW_TOKENS"
    holds = c.train_row_tokens > 0 and c.train_batch_tokens % c.train_row_tokens == 0
    yield holds, batch, f"not a multiple of {row}; change one"
    yield c.rows_per_step <= 2**16, batch, f"{c.rows_per_step} rows, need at most {2**16}; raise ROW_TOKENS"
    yield c.train_seq_len <= c.train_row_tokens, "train_seq_len row_tokens", f"longer than {row}; lower it"
    holds = c.loader != "coprime" or c.train_row_tokens % c.train_seq_len == 0
    yield holds, "loader row_tokens train_seq_len", f"{row} is not a multiple of TRAIN_SEQ_LEN; change one"
    yield c.eval_stride <= c.eval_seq_len, "eval_stride eval_seq_len", "longer than the context; lower it"
    yield c.ttt_chunk_size <= c.ttt_eval_seq_len, "ttt_chunk_size ttt_eval_seq_len", "longer than the context; lower it"
    message = "need longest:chunk pairs of positive numbers whose limits must rise, for example 256:12,1024:24"
    yield parses(c, "chunk_steps"), "ttt_chunk_steps", message
    message = "need round:factor pairs of whole numbers, for example 12:2,40:4; 0:1 never lets chunks grow"
    yield parses(c, "chunk_factors"), "eval_chunk_factors", message
    message = "need distinct numbers from 2 to 64, for example 16,8,4"
    yield parses(c, "document_orders"), "token_document_orders", message
    holds = all(chunk <= c.ttt_eval_seq_len for _, chunk in c.chunk_steps)
    yield holds, "ttt_chunk_steps ttt_eval_seq_len", "a chunk is longer than the context; lower it"


def parses(config: Config, name: str) -> bool:
    """Whether a property of Config can be read from its setting."""
    try:
        getattr(config, name)
        return True
    except ValueError:
        return False


def stage_rules(c: Config) -> Iterator[Rule]:
    message = "exclude each other; set one to 0"
    yield not (c.warmdown_frac and c.warmdown_iters), "warmdown_iters warmdown_frac", message
    yield not (c.swa_enabled and c.ema_decay), "swa_enabled ema_decay", message
    holds = not c.max_wallclock_seconds or c.gptq_reserve_seconds < c.max_wallclock_seconds
    yield holds, "gptq_reserve_seconds max_wallclock_seconds", "the reserve must be less than the budget; lower it"
    yield c.trellis_states in TRELLIS_RULES, "trellis_states", f"choose one of {', '.join(map(str, TRELLIS_RULES))}"
    holds = not c.trellis_states or (c.quant_scheme == "gptq" and c.compressor == "rans")
    message = "the trellis is part of gptq and of the coder rans; set them, or TRELLIS_STATES=0"
    yield holds, "trellis_states quant_scheme compressor", message
    yield c.mlp_bits != 1, "mlp_bits", "one bit has no levels; give 2 to 8, or 0 for MATRIX_BITS"
    order, picked = ["train", "quantize", "evaluate"], c.stage_list
    alone = picked in (["describe"], ["check"])
    holds = alone or (picked and picked == [stage for stage in order if stage in picked])
    yield holds, "stages", f"give a comma list of {', '.join(order)} in this order, or describe, or check"
    message = "without train it needs RUN_ID, the run whose files it continues from"
    yield alone or "train" in picked or c.run_id, "stages", message
    plain = c.run_id not in (".", "..") and Path(c.run_id).name == c.run_id
    yield plain, "run_id", "must be a plain folder name"


# ------------------------------------------------------------------------------------------------------------
# RUN
#
# What surrounds the model: the processes of a run and how they exchange tensors, the log, and the one container
# format for everything on disk. One process is the same code without communication.
# ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """This process among its peers. Collective methods must be called by every rank, in the same order."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """Activations, gradient exchange and Muon: bfloat16 on a GPU, float32 on a CPU. Weights are float32."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def padded(self) -> bool:
        """Whether rows are padded to one shape, which is compiled once, and segments are left to a variable-length
        attention kernel. A CPU saves the work on padding, and its attention wants tables of indices: see Segments."""
        return self.device.type == "cuda"

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_shards(self, full: Tensor) -> tuple[Tensor, Any]:
        """The sum of `full` (n, ...) over ranks, of which each rank gets its own n / world_size rows: see arrived()."""
        if self.world_size == 1:
            return full, None
        shard = full.new_empty((len(full) // self.world_size, *full.shape[1:]))
        return shard, dist.reduce_scatter_tensor(shard, full, async_op=True)

    def gather_shards(self, shard: Tensor) -> tuple[Tensor, Any]:
        """All ranks' shards stacked: see arrived()."""
        if self.world_size == 1:
            return shard, None
        full = shard.new_empty((len(shard) * self.world_size, *shard.shape[1:]))
        return full, dist.all_gather_into_tensor(full, shard.contiguous(), async_op=True)

    def share(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; host objects and small arrays."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """The value of work() on rank 0, on every rank; so is its UserError, since no rank may go on alone."""
        value, error = None, None
        if self.is_main:
            try:
                value = work()
            except UserError as mistake:
                error = mistake
        value, error = self.share((value, error))
        if error:
            raise error
        return value

    def agree(self, error: Exception | None) -> None:
        """Raises the error of the first rank that has one, on every rank. Collective."""
        errors = [error]
        if self.world_size > 1:
            errors = [None] * self.world_size
            dist.all_gather_object(errors, error)
        for error in filter(None, errors):
            raise error

    def share_weights(self, model: nn.Module) -> None:
        """Rank 0's parameters on every rank."""
        if self.world_size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, 0)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read next is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# What PyTorch leaves to MKL on a CPU (aten/src/ATen/cpu/vml.h)
VECTOR_MATH = "acos asin atan cos erf erfc exp expm1 log log10 log1p log2 sin sqrt tan tanh".split()


def settle_vector_math() -> None:
    """Calls each function of VECTOR_MATH once, on one number.

    MKL looks up its code for such a function in the first call. Where several threads share that call, one of them may
    run code with errors of 1e-4 (pytorch/pytorch #188792; MKL 2024.2): 3 of 30 runs began with such cosines in their
    rotary tables, and such a run ends with another score.
    """
    for name in VECTOR_MATH:
        for dtype in (torch.float32, torch.float64):
            getattr(torch, name)(torch.ones(1, dtype=dtype))


def start_run(env: Mapping[str, str]) -> Run:
    """Joins the process group that torchrun's variables describe; without them, a run of one process."""
    settle_vector_math()
    try:
        rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        cuda, local_rank = torch.cuda.is_available(), int(env.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            if local_rank >= torch.cuda.device_count():
                raise ValueError(f"LOCAL_RANK={local_rank}, but this host has {torch.cuda.device_count()} GPU(s)")
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if world_size > 1:
            # After a restart torchrun's store still holds the addresses of the lost processes: use other keys then.
            # Several hosts may count restarts differently, so only on one host.
            one_host = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
            attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0") if one_host else "0"
            store = dist.PrefixStore(attempt, next(rendezvous("env://"))[0])
            backend, used = ("nccl", device) if cuda else ("gloo", None)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=used)
    except ValueError as error:
        raise UserError(f"processes of this run: {error}; start them with torchrun, one per GPU") from None
    return Run(rank, world_size, device)


def arrived(tensor: Tensor, handle: Any) -> Tensor:
    """A tensor on its way between ranks, once it is there; None is the handle of what never left."""
    if handle is not None:
        handle.wait()
    return tensor


class Graphs(NamedTuple):
    """What torch.compile has done in this process, by PyTorch's own counters."""

    compiled: int = 0  # graphs, those of recompilations included
    fallbacks: int = 0  # functions, or parts of them, that it gave up on: they run uncompiled
    seconds: float = 0.0

    def since(self, earlier: "Graphs") -> "Graphs":
        return Graphs(*(now - before for now, before in zip(self, earlier)))


class CompileWatch:
    """Counts graphs, and the seconds between the beginning and the end of each compilation."""

    def __init__(self) -> None:
        self.seconds, self.began = 0.0, 0.0

    def start(self, _: Any) -> None:
        self.began = time.monotonic()

    def end(self, _: Any) -> None:
        self.seconds += time.monotonic() - self.began

    def listen(self) -> None:
        from torch._dynamo.callback import callback_handler

        if self.start not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self.start)
            callback_handler.register_end_callback(self.end)

    def graphs(self) -> Graphs:
        if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and the import takes seconds
            return Graphs()
        from torch._dynamo.utils import counters

        given_up = counters["frames"]["total"] - counters["frames"]["ok"] + sum(counters["graph_break"].values())
        return Graphs(counters["stats"]["unique_graphs"], given_up, self.seconds)


COMPILES = CompileWatch()


def compiles(config: Config, run: Run) -> bool:
    return run.device.type == "cuda" if config.compile == "auto" else config.compile == "1"


def maybe_compile(function: Callable, use: str, config: Config, run: Run) -> Callable:
    """`function` through torch.compile where COMPILE says so, for static shapes and a compile cache of its own.

    PyTorch keeps the compiled variants of a code object together, and from the ninth on runs it uncompiled, with a
    warning at most. Each use of a function therefore compiles a copy, whose name in PyTorch's logs tells the use.
    """
    if not compiles(config, run):
        return function
    COMPILES.listen()
    code = function.__code__.replace(co_name=f"{function.__code__.co_name}_{use}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return torch.compile(copy, dynamic=False)


def any_size(tensor: Tensor, *dims: int) -> None:
    """Tells torch.compile that these dimensions vary. A size of 1 is a case of its own to it, compiled separately."""
    dims = [dim for dim in dims if tensor.size(dim) > 1]
    if dims:
        torch._dynamo.mark_dynamic(tensor, dims)


class Log:
    """Writes lines `event key:value ...` to the console and to a file, on the main rank only."""

    def __init__(self, path: Path | None, anew: bool = False):
        self.mark: dict[str, Any] = {}  # what every line says besides
        try:
            self.file = open(path, "wb" if anew else "ab", buffering=0) if path else None
        except OSError as error:
            raise UserError(f"{path}: cannot write ({error.strerror}); set RUNS_DIR or RUN_ID") from None

    def __call__(self, event: str, **values: Any) -> None:
        values |= self.mark
        self.text(" ".join([event, *(f"{key}:{self.show(key, value)}" for key, value in values.items())]))

    def text(self, text: str, console: bool = True) -> None:
        if not self.file:
            return
        line = (text + "\n").encode(errors="backslashreplace")  # a path may hold bytes that are no text
        if console:
            print(line.decode(), end="", flush=True)
        try:
            self.file.write(line)
        except OSError as error:
            what = f"{self.file.name}: cannot write {len(line)} bytes"
            raise UserError(f"{what} ({error.strerror}); free space or set RUNS_DIR") from None

    @staticmethod
    def show(key: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.8f}" if key.endswith("bpb") else f"{value:.6g}"
        return str(value).replace(" ", "")

    def bar(self, items: list, label: str) -> Iterator:
        """Passes `items` through: a progress bar on a terminal, a line every 20 seconds in a log."""
        from tqdm import tqdm

        terminal = self.file is not None and sys.stderr.isatty()
        start = last = time.monotonic()
        for done, item in enumerate(tqdm(items, label, leave=False, disable=not terminal)):
            if not terminal and time.monotonic() - last > 20:
                last = time.monotonic()
                left = (last - start) * (len(items) - done) / max(done, 1)
                self(label, done=f"{done}/{len(items)}", seconds=round(last - start), seconds_left=round(left))
            yield item


def write_file(path: Path, *parts: bytes | memoryview) -> int:
    """Writes a file that appears under its name only when complete; what had that name stays until then.

    Returns its size in bytes. Raises UserError when the disk refuses.
    """
    size, partial = sum(len(part) for part in parts), path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot write {size} bytes ({error.strerror}); free space or set RUNS_DIR") from None
    return size


def write_table(path: Path, head: str, rows: Iterable[Iterable]) -> None:
    """Writes a CSV file; `head` names its columns. Numbers keep all of their digits."""
    write_file(path, ("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n").encode())


def read_file(path: Path, limit: float) -> bytes:
    """The bytes of a regular file. Raises OSError, also for anything that is no file of at most `limit` bytes."""
    size = path.stat().st_size
    if not path.is_file() or size > limit:
        raise OSError(0, f"{size} bytes, expected a file of at most {limit}")
    return path.read_bytes()


CONTAINER_MAGIC = b"PGOLF001"
HEADER_LIMIT = 2**24  # bytes; a header takes about 200 per array


def write_container(path: Path, meta: dict, blobs: list[bytes | memoryview]) -> int:
    """Writes blobs behind a JSON header with their lengths and SHA-256; returns the size of the file in bytes.

    Layout: 8 bytes magic, uint32 header length (little-endian), header, blobs back to back.
    """
    table = [{"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()} for blob in blobs]
    header = json.dumps({"meta": meta, "blobs": table}, separators=(",", ":")).encode()
    return write_file(path, CONTAINER_MAGIC + len(header).to_bytes(4, "little") + header, *blobs)


def read_container(path: Path, limit: float = math.inf) -> tuple[dict, list[memoryview]]:
    """The header's meta and the blobs of a container. Raises UserError when anything does not add up."""
    try:
        data = memoryview(read_file(path, limit))
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}); run the stage before, or set RUN_ID") from None
    try:
        if data[:8] != CONTAINER_MAGIC:
            raise ValueError(f"starts with {bytes(data[:8])!r}")
        start = 12 + int.from_bytes(data[8:12], "little")
        if start > HEADER_LIMIT:
            raise ValueError(f"header of {start} bytes")
        header = json.loads(bytes(data[12:start]))
        blobs = []
        for entry in header["blobs"]:
            blob = data[start : start + entry["bytes"]]
            if len(blob) != entry["bytes"] or hashlib.sha256(blob).hexdigest() != entry["sha256"]:
                raise ValueError(f"blob {len(blobs)} is cut short or changed")
            start += len(blob)
            blobs.append(blob)
        if start != len(data) or not isinstance(header["meta"], dict):
            raise ValueError(f"{len(data) - start} bytes left over")
        return header["meta"], blobs
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a container of this script ({error}); write it again") from None


def save_arrays(path: Path, meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays, uncompressed."""
    table = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
    blobs = [memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)) for array in arrays.values()]
    write_container(path, meta | {"arrays": table}, blobs)


def load_arrays(path: Path, limit: float = math.inf) -> tuple[dict, dict[str, np.ndarray]]:
    """What `save_arrays` wrote. Raises UserError for a file whose table does not fit its bytes."""
    meta, blobs = read_container(path, limit)
    try:
        table = meta.pop("arrays")
        if len(table) != len(blobs) or not all(dtype in ("<f4", "<f8", "<i8") for dtype, _ in table.values()):
            raise ValueError("odd table of arrays")
        arrays = {n: np.frombuffer(b, t).reshape(shape) for (n, (t, shape)), b in zip(table.items(), blobs)}
        return meta, arrays
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: damaged header ({error}); write it again") from None


def check_arrays(path: Path, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple]) -> None:
    """Raises UserError unless the arrays of a file have just these names and shapes, and finite numbers."""
    for name in sorted(arrays.keys() | shapes.keys()):
        found = arrays[name].shape if name in arrays else None
        if found != shapes.get(name):
            raise UserError(f"{path}: {name} has shape {found}, expected {shapes.get(name)}; write it again")
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name} holds a number that is not finite; write it again")


# ------------------------------------------------------------------------------------------------------------
# DATA
#
# Shards of uint16 ids become packed rows: fixed stretches of the token stream with a table of the document
# segments inside. A row is a pure function of its number, so it does not matter which rank asks for it.
# ------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def read_shard(path: Path, vocab_size: int) -> np.ndarray:
    """The uint16 ids of one shard, memory-mapped. Raises UserError for anything but a whole, valid shard."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 256) if size >= SHARD_HEADER_BYTES else np.zeros(256, "<i4")
    fix = "fetch or export this shard again"
    if header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(
            f"{path}: header magic, version = {header[0]}, {header[1]}, expected {SHARD_MAGIC}, {SHARD_VERSION}; {fix}"
        )
    count = int(header[2])
    if count < 1 or size != SHARD_HEADER_BYTES + 2 * count:
        raise UserError(f"{path}: {size} bytes, but its header announces {count} tokens; {fix}")
    tokens = np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, (count,))
    for part in (tokens[:1_000_000], tokens[-1_000_000:]):  # whole small shards, the ends of large ones
        check_ids(part, vocab_size, path)
    return tokens


def check_ids(tokens: np.ndarray, vocab_size: int, where: Any) -> None:
    top = int(tokens.max())
    if top >= vocab_size:
        raise UserError(f"{where}: token id {top}, but VOCAB_SIZE={vocab_size}; set VOCAB_SIZE or DATA_PATH to match")


class TokenStream:
    """All shards of one split as one circular stream of ids, read where needed and never held as a whole."""

    def __init__(self, folder: Path, kind: str, vocab_size: int):
        paths = sorted(folder.glob(f"fineweb_{kind}_[0-9]*.bin"))
        if not paths:
            raise UserError(f"{folder}: no fineweb_{kind}_*.bin shards; prepare the data or set DATA_PATH")
        self.folder, self.vocab_size = folder, vocab_size
        self.shards = [read_shard(path, vocab_size) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells other data: the number of ids, and the CRC-32 of the first 65,536."""
        return f"{len(self)} tokens, crc {zlib.crc32(self.read(0, min(len(self), 2**16))):08x}"

    def read(self, begin: int, count: int) -> np.ndarray:
        """`count` ids (int64) from position `begin`; behind the last shard follows the first one again."""
        parts = []
        while count > 0:
            begin %= len(self)
            shard = int(np.searchsorted(self.ends, begin, side="right"))
            offset = begin - int(self.ends[shard] - len(self.shards[shard]))
            parts.append(self.shards[shard][offset : offset + count])
            begin, count = begin + len(parts[-1]), count - len(parts[-1])
        tokens = np.concatenate(parts).astype(np.int64)
        check_ids(tokens, self.vocab_size, self.folder)
        return tokens


class NoiseStream:
    """Random ids in place of shards: what the compiler is warmed up with, before any data may be read."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return 2**24

    def read(self, begin: int, count: int) -> np.ndarray:
        return np.random.default_rng(begin).integers(0, self.vocab_size, count)


class Segments(NamedTuple):
    """The segments of one packed row of T tokens; attention never leaves a segment."""

    cu_seqlens: Tensor  # (S + 1,) int32: where segments begin, then T
    max_seqlen: int  # upper bound of the segment length, a constant per stage so that nothing recompiles
    positions: Tensor  # (T,) int64: distance from the start of the segment
    gather: tuple[Tensor, ...]  # for the sdpa back-end: segments of similar length as (segments, length) indices
    scatter: Tensor  # (T,) int64: where each token's output lies in the concatenation of those batches; else empty


def pack_segments(lengths: np.ndarray, max_seqlen: int, run: Run) -> Segments:
    """The segment table of a row made of segments of these lengths (all in 1..max_seqlen)."""
    total = int(lengths.sum())
    begins = np.cumsum(lengths) - lengths
    cu_seqlens = np.append(begins, total).astype(np.int32)
    positions = np.arange(total) - np.repeat(begins, lengths)
    gather, scatter, used = [], np.empty(0 if run.padded else total, np.int64), 0
    if not run.padded:
        # Batches of similar length waste little padding. A padded query repeats token 0 of the row: it lies behind
        # the real ones of its segment, which causal attention never looks at, and its output is dropped.
        rounded = np.minimum(1 << np.ceil(np.log2(np.maximum(lengths, 16))).astype(int), max_seqlen)
        for width in np.unique(rounded):
            members = np.flatnonzero(rounded == width)
            columns = np.arange(width)
            index = begins[members, None] + columns
            inside = columns < lengths[members, None]
            scatter[index[inside]] = used + np.flatnonzero(inside)
            used += inside.size
            gather.append(torch.from_numpy(np.where(inside, index, 0)))
    return Segments(
        move(torch.from_numpy(cu_seqlens), run.device),
        max_seqlen,
        move(torch.from_numpy(positions), run.device),
        tuple(gather),
        torch.from_numpy(scatter),
    )


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on the device, without waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Row(NamedTuple):
    """One packed row: token t of `inputs` predicts token t of `targets`."""

    inputs: Tensor  # (1, T) int64
    targets: Tensor  # (1, T) int64
    segments: Segments


def training_row(stream: "TokenStream | NoiseStream", number: int, config: Config, run: Run) -> Row:
    """Row `number` of the endless training stream; rows tile it, so each token is a target exactly once an epoch.

    Segments begin at the first token of a window and, with VARLEN_ATTN, at every BOS; they are cut after
    train_seq_len tokens.
    """
    length = config.train_row_tokens
    windows = [stream.read(begin, size + 1) for begin, size in row_windows(number, len(stream), config)]
    inputs, targets = (np.concatenate([w[part] for w in windows]) for part in (slice(None, -1), slice(1, None)))
    starts = np.cumsum([0] + [len(window) - 1 for window in windows[:-1]])
    if config.varlen_attn:
        starts = np.union1d(starts, np.flatnonzero(inputs == BOS_ID))
    stretches = np.diff(np.append(starts, length))
    segments = pack_segments(cut_lengths(stretches, config.train_seq_len), config.train_seq_len, run)
    return Row(*(move(torch.from_numpy(tokens)[None], run.device) for tokens in (inputs, targets)), segments)


def row_windows(number: int, total: int, config: Config) -> list[tuple[int, int]]:
    """(first token, length) of the stretches of the stream that make up row `number`.

    LOADER=stream takes them in order, as one stretch. LOADER=coprime (#1060) cuts the stream into windows of
    train_seq_len and visits them at a stride that has no common divisor with their number, so that a row mixes
    distant texts and an epoch still has every window once; each epoch draws its own stride, start and phase. The
    original keeps such a cursor for every shard and draws shards; one cursor over the whole stream needs no state.
    """
    length, size = config.train_row_tokens, config.train_seq_len
    if config.loader == "stream":
        return [(number * length, length)]
    count, windows = max(total // size, 1), []
    for index in range(number * length // size, (number + 1) * length // size):
        epoch, place = divmod(index, count)
        random = np.random.default_rng(epoch)
        phase, start = int(random.integers(size)), int(random.integers(count))
        stride = next(s for s in iter(lambda: int(random.integers(1, count + 1)), 0) if math.gcd(s, count) == 1)
        windows.append((phase + (start + place * stride) % count * size, size))
    return windows


def cut_lengths(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Each length as pieces of `limit` and a rest: [5, 12] with limit 5 gives [5, 5, 5, 2]."""
    pieces = -(-lengths // limit)
    cut = np.full(pieces.sum(), limit)
    cut[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * limit
    return cut


def prefetch(make: Callable[[int], list[Row]], numbers: Iterable[int], device: torch.device) -> Iterator[list[Row]]:
    """Yields make(number) for each number, prepared one ahead by a background thread."""

    def use_device() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is a property of the thread

    with ThreadPoolExecutor(1, initializer=use_device) as pool:
        waiting = None
        for number in numbers:
            following = pool.submit(make, number)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


class ByteTable(NamedTuple):
    """UTF-8 bytes that a target stands for, by token id (V,)."""

    base: np.ndarray  # int32: bytes of the piece without its leading space marker
    leading_space: np.ndarray  # bool: the piece begins with the space marker: one byte more, unless after a boundary
    boundary: np.ndarray  # bool: control, unknown and unused ids
    split_space: tuple[int, ...]  # the byte pieces of the marker, where it has no piece of its own; else empty


def load_tokenizer(config: Config) -> Any:
    """The SentencePiece processor of the run. Raises UserError if it is missing, damaged or of another size."""
    import sentencepiece

    path = config.tokenizer_file
    try:
        tokenizer = sentencepiece.SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(read_file(path, 2**26))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot load this tokenizer ({error}); set TOKENIZER_PATH or fetch it again") from None
    if tokenizer.vocab_size() != config.vocab_size:
        raise UserError(
            f"VOCAB_SIZE={config.vocab_size}: {path} has {tokenizer.vocab_size()} pieces;"
            " set VOCAB_SIZE or TOKENIZER_PATH to match"
        )
    return tokenizer


def byte_table(tokenizer: Any) -> ByteTable:
    """Byte counts of all pieces of a SentencePiece tokenizer; every space marker inside a piece is one byte."""
    size = tokenizer.vocab_size()
    base, leading, boundary = np.zeros(size, np.int32), np.zeros(size, bool), np.zeros(size, bool)
    for token in range(size):
        if tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token):
            boundary[token] = True
        elif tokenizer.is_byte(token):
            base[token] = 1
        else:
            piece = tokenizer.id_to_piece(token).replace("\u2581", " ")
            leading[token] = piece.startswith(" ")
            base[token] = len(piece.encode()) - leading[token]
    pieces = [f"<0x{byte:02X}>" for byte in "\u2581".encode()]
    own_piece = not tokenizer.is_unknown(tokenizer.piece_to_id("\u2581"))
    return ByteTable(base, leading, boundary, () if own_piece else tuple(map(tokenizer.piece_to_id, pieces)))


def target_bytes(tokens: np.ndarray, table: ByteTable) -> np.ndarray:
    """Bytes (int32, same length) that each token stands for as a target; the first token is none, so 0.

    Bytes are those of the text as the tokenizer sees it. The space before the first word of a document costs
    nothing, and a space spelled as the three byte pieces of its marker costs one byte in all.
    """
    after_boundary = np.append(True, table.boundary[tokens[:-1]])
    counts = table.base[tokens] + (table.leading_space[tokens] & ~after_boundary)
    if table.split_space and len(tokens) > 2:
        first, second, third = table.split_space
        at = np.flatnonzero((tokens[:-2] == first) & (tokens[1:-1] == second) & (tokens[2:] == third))
        counts[at], counts[at + 1], counts[at + 2] = ~after_boundary[at], 0, 0
    counts[0] = 0
    return counts.astype(np.int32)


def has_case_markers(tokenizer: Any) -> bool:
    """Whether it is one of CaseOps."""
    return not tokenizer.is_unknown(tokenizer.piece_to_id("\ue001"))


def decoded_bytes(tokens: np.ndarray, tokenizer: Any) -> int:
    """UTF-8 bytes of the text that the targets of these tokens (n,) spell, by the tokenizer's own decoder: a count that
    shares nothing with `byte_table`. The space before the first word of a document costs nothing, case markers neither.
    """
    kinds = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused)
    plain = np.array([not any(kind(token) for kind in kinds) for token in range(tokenizer.vocab_size())])[tokens]
    letter = next(t for t in range(tokenizer.vocab_size()) if tokenizer.id_to_piece(t).isalnum())
    length = len(tokenizer.id_to_piece(letter))
    # The space marker; the case markers of CaseOps, which are letters like others (for private use) anywhere else.
    ignored = {0x2581: " "} | dict.fromkeys(range(0xE001, 0xE005) if has_case_markers(tokenizer) else (), "")

    def size(rows: list[np.ndarray]) -> int:
        for fused, marker in FUSED_MARKERS.items() if tokenizer.vocab_size() > SPACE_ID else ():
            pairs = [np.flatnonzero(ids == fused) for ids in rows]
            rows = [np.insert(np.where(ids == fused, marker, ids), at, SPACE_ID) for ids, at in zip(rows, pairs)]
        # With a letter in front, since the decoder drops a space at the very beginning.
        texts = tokenizer.decode([[letter, *ids.tolist()] for ids in rows], num_threads=os.cpu_count())
        return sum(len(text[length:].translate(ignored).removeprefix(" ").encode()) for text in texts)

    begins = np.flatnonzero(plain & ~np.append(False, plain[:-1]))
    ends = np.flatnonzero(plain & ~np.append(plain[1:], False)) + 1
    parts = [tokens[begin:end] for begin, end in zip(begins, ends)]
    first = [tokens[:1]] if plain[0] else []  # no target
    return sum(size(parts[at : at + 1000]) for at in range(0, len(parts), 1000)) - size(first)


def check_fusion(tokens: np.ndarray, caseops: Any, config: Config) -> None:
    """Raises UserError if MARKER_PAIR_MODE does not match the data, whose ids are `tokens` (n,).

    `caseops` is the tokenizer where it is one of CaseOps, else None.
    """
    key, markers = f"MARKER_PAIR_MODE={config.marker_pair_mode:d}", list(FUSED_MARKERS.values())
    fits = caseops is not None and [caseops.piece_to_id(piece) for piece in "\u2581\ue001\ue002\ue003"]
    if config.marker_pair_mode and fits != [SPACE_ID, *markers]:
        raise UserError(f"{key}: {config.tokenizer_file} is not the CaseOps tokenizer; set CASEOPS_ENABLED=1")
    pairs = (tokens[:-1] == SPACE_ID) & np.isin(tokens[1:], markers)
    if config.marker_pair_mode and pairs.any():
        raise UserError(f"{key}: {config.dataset_dir} holds CaseOps shards as they are; fuse them with data/fuse.py")
    fused = fits == [SPACE_ID, *markers] and not pairs.any() and np.isin(tokens, list(FUSED_MARKERS)).any()
    if fused and not config.marker_pair_mode:
        raise UserError(f"{key}: {config.dataset_dir} holds fused shards; set MARKER_PAIR_MODE=1 or other data")


class Validation(NamedTuple):
    """The validation split: N tokens, of which tokens 1..N-1 are targets."""

    tokens: Tensor  # (N,) int64
    bytes: Tensor  # (N,) int64, aligned with the tokens
    documents: np.ndarray  # (n, 2): position of the first input, number of targets (the next BOS is the last one)


def load_validation(config: Config) -> Validation:
    """Reads the validation shards and, unless they come with a byte side-car, the tokenizer.

    A side-car (CaseOps data, #1736) holds the bytes of the original text; the table would count the case markers.
    Raises UserError for unusable files.
    """
    folder = config.dataset_dir
    stream = TokenStream(folder, "val", config.vocab_size)
    tokens = stream.read(0, len(stream))
    if len(tokens) < 2:
        raise UserError(
            f"{folder}: the validation stream has {len(tokens)} token(s), it needs 2 or more; export it again"
        )
    tokenizer = load_tokenizer(config)
    caseops = tokenizer if has_case_markers(tokenizer) else None
    if sorted(folder.glob("fineweb_val_bytes_[0-9]*.bin")):
        sidecar = TokenStream(folder, "val_bytes", 65536)
        if len(sidecar) != len(tokens):
            raise UserError(f"{folder}: {len(sidecar)} side-car entries for {len(tokens)} tokens; export both again")
        counts = sidecar.read(0, len(sidecar))
    elif caseops:
        raise UserError(f"{folder}: CaseOps tokenizer without fineweb_val_bytes_*.bin; fetch or export the side-car")
    else:
        counts = target_bytes(tokens, byte_table(tokenizer))
    check_fusion(tokens, caseops, config)
    starts = np.union1d([0], np.flatnonzero(tokens == BOS_ID))
    ends = np.append(starts[1:], len(tokens) - 1)
    documents = np.stack([starts, ends - starts], 1)
    documents = documents[documents[:, 1] > 0]  # a BOS as the very last token predicts nothing
    return Validation(torch.from_numpy(tokens), torch.from_numpy(counts.astype(np.int64)), documents)


# ------------------------------------------------------------------------------------------------------------
# KERNELS
#
# Functions of MODEL and OPTIMIZER that exist twice: the plain one is the definition, the fused one (CUDA, most of them
# in Triton) computes the same with fewer passes over memory, which tests/bench_traffic.py counts. Sums are float32 and
# every result is rounded once, to the dtype of its input. Triton is optional and imported when the fused functions are
# asked for: a kernel is an ordinary function until `jit` takes it. Names: M, N, K of a matrix product; everything else
# as in the legend above.
# ------------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    """x divided by the root of its mean square over the last axis; no weight; same dtype in and out."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first channels of (B, T, heads, d); channel j is paired with j + rope_dims / 2."""
    half = cos.size(-1)
    if not half:
        return x
    u, v = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.addcmul(u * cos, v, sin), torch.addcmul(v * cos, u, sin, value=-1)
    return torch.cat([*(part.to(x.dtype) for part in turned), x[..., 2 * half :]], -1)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention: y (..., H, d) without its component along the token's own value v (..., K, d)."""
    direction = F.normalize(v.float(), dim=-1).unsqueeze(-2)  # (..., K, 1, d)
    grouped = y.float().unflatten(-2, (v.size(-2), -1))  # query head h belongs to value head h // (H / K)
    grouped = grouped - (grouped * direction).sum(-1, keepdim=True) * direction
    return grouped.flatten(-3, -2).to(y.dtype)


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    """leaky_relu(x, slope)^2: x^2 above zero, (slope x)^2 below."""
    return F.leaky_relu(x, slope).square()


tl: Any = types.SimpleNamespace(constexpr="tl.constexpr")  # stands in for triton.language, which `jit` puts here

# Blocks of the matrix products by hardware: ROWS, COLUMNS (ROWS again if not given) and DEPTH of a step along
# the summed dimension; num_stages steps are loaded ahead. 128 x 256 x 64 is the tile of PR #1941. "few" is for
# symmetric products too few to fill the GPU with larger tiles; "cpu" is Triton's interpreter, in the tests.
TILES = {
    ("hopper", "up"): dict(ROWS=128, COLUMNS=256, DEPTH=64, num_warps=8, num_stages=4),
    ("hopper", "slope"): dict(ROWS=128, COLUMNS=256, DEPTH=64, num_warps=8, num_stages=3),
    ("hopper", "many"): dict(ROWS=128, DEPTH=64, num_warps=8, num_stages=4),
    ("hopper", "few"): dict(ROWS=64, DEPTH=64, num_warps=4, num_stages=4),
    ("other", "up"): dict(ROWS=128, COLUMNS=128, DEPTH=32, num_warps=8, num_stages=3),
    ("other", "slope"): dict(ROWS=128, COLUMNS=128, DEPTH=32, num_warps=8, num_stages=3),
    ("other", "many"): dict(ROWS=128, DEPTH=32, num_warps=8, num_stages=3),
    ("other", "few"): dict(ROWS=64, DEPTH=32, num_warps=4, num_stages=3),
    ("cpu", "up"): dict(ROWS=32, COLUMNS=16, DEPTH=16),
    ("cpu", "slope"): dict(ROWS=16, COLUMNS=32, DEPTH=16),
    ("cpu", "many"): dict(ROWS=32, DEPTH=16),
    ("cpu", "few"): dict(ROWS=16, DEPTH=16),
}
VOCABULARY_BLOCK = 1024  # logits that a program holds at once
ELEMENT_BLOCK = 2048  # elements of a tensor that a program of the other element-wise kernels holds at once


def tile_set(x: Tensor) -> str:
    """Key of TILES for a tensor; float32 does not fit into the large tiles."""
    if not x.is_cuda:
        return "cpu"
    return "hopper" if torch.cuda.get_device_capability(x.device)[0] == 9 and x.element_size() == 2 else "other"


def multiprocessors(x: Tensor) -> int:
    """How many programs surely run at once."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def block_size(wanted: int) -> int:
    """The smallest power of two that is not below `wanted`, as Triton demands."""
    return 1 << max(wanted - 1, 0).bit_length()


@functools.cache
def jit(kernel: Callable) -> Any:
    """A kernel in Triton's hands; it is compiled at its first launch with given dtypes and constants."""
    global tl
    import triton

    tl = triton.language
    return triton.jit(kernel)


def launch(kernel: Callable, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Runs a grid of programs of a kernel; an empty grid, which CUDA refuses, does nothing."""
    if math.prod(grid):
        jit(kernel)[grid](*arguments, **constants)


# MLP: y = phi(x up^T) down^T with phi(p) = leaky_relu(p, slope)^2. One kernel multiplies, with phi as the epilogue
# of the forward pass and phi' as that of the backward pass (PR #1530, without its transposed copy of `down`).


def plain_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """leaky_relu(x up^T, slope)^2 down^T: x (..., D), up (F, D), down (D, F) -> (..., D). Slope 0 is ReLU^2."""
    return F.linear(leaky_relu_squared(F.linear(x, up), slope), down)


def mlp_kernel(
    left, right, pre, out, slope, M, N, K, BACKWARD: tl.constexpr, TMA: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Forward: pre = left (M, K) right (N, K)^T and out = phi(pre). Backward: out = (left right (K, N)) * phi'(pre).

    The matrices are TMA descriptors, or pointers to contiguous memory. PROGRAMS programs walk over the tiles,
    columns first, so that the rows of `left` are still in the L2 cache for the next tile.
    """
    tiles_across = tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS) * tiles_across, PROGRAMS, flatten=True):
        row, column = tile // tiles_across * ROWS, tile % tiles_across * COLUMNS
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, DEPTH):
            if TMA:  # zeros beyond the edges
                a = left.load([row, k])
                b = right.load([k, column]) if BACKWARD else right.load([column, k]).T
            else:
                depth = k + tl.arange(0, DEPTH)
                at_a = rows.to(tl.int64)[:, None] * K + depth[None, :]
                at_b = depth[:, None] * N + columns[None, :] if BACKWARD else depth[:, None] + columns[None, :] * K
                a = tl.load(left + at_a, mask=(rows < M)[:, None] & (depth < K)[None, :], other=0.0)
                b = tl.load(right + at_b, mask=(depth < K)[:, None] & (columns < N)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        # In halves: a whole tile of results does not fit into shared memory beside the operands.
        halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            begin = column + half * (COLUMNS // 2)
            at = begin + tl.arange(0, COLUMNS // 2)
            inside = (rows < M)[:, None] & (at < N)[None, :]
            at = rows.to(tl.int64)[:, None] * N + at[None, :]
            if BACKWARD:
                p = (pre.load([row, begin]) if TMA else tl.load(pre + at, mask=inside, other=0.0)).to(tl.float32)
                result = (halves[half] * tl.where(p > 0, 2 * p, 2 * slope * slope * p)).to(DTYPE)
            else:
                rounded = halves[half].to(DTYPE)  # phi sees what the backward pass will see
                p = rounded.to(tl.float32)
                leaky = tl.where(p > 0, p, slope * p)
                result = (leaky * leaky).to(DTYPE)
                if TMA:
                    pre.store([row, begin], rounded)
                else:
                    tl.store(pre + at, rounded, mask=inside)
            if TMA:
                out.store([row, begin], result)
            else:
                tl.store(out + at, result, mask=inside)


def mlp_product(left: Tensor, right: Tensor, pre: Tensor, out: Tensor, slope: float, kind: str, tma: bool) -> None:
    """Launches mlp_kernel, forward ("up") or backward ("slope"), on contiguous matrices of one dtype."""
    (M, K), N, tile, backward = left.shape, out.size(1), TILES[tile_set(left), kind], kind == "slope"
    rows, columns, depth = tile["ROWS"], tile["COLUMNS"], tile["DEPTH"]
    count = min(multiprocessors(left), -(-M // rows) * -(-N // columns))
    operands = [left, right, pre, out]
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = [[rows, depth], [depth, columns] if backward else [columns, depth], *[[rows, columns // 2]] * 2]
        operands = [TensorDescriptor.from_tensor(*pair) for pair in zip(operands, blocks)]
    dtype = getattr(tl, str(left.dtype).removeprefix("torch."))
    constants = dict(BACKWARD=backward, TMA=tma, DTYPE=dtype, PROGRAMS=count) | tile
    launch(mlp_kernel, (count,), *operands, slope, M, N, K, **constants)


def tma_fits(*matrices: Tensor) -> bool:
    """Whether TMA can address these contiguous matrices: on Hopper, aligned to 16 bytes, row by row."""
    aligned = (m.data_ptr() % 16 == 0 and m.size(-1) * m.element_size() % 16 == 0 for m in matrices)
    return tile_set(matrices[0]) == "hopper" and all(aligned)


def mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, pre, h): the result, and for the backward pass the hidden layer (tokens, F) before and after phi."""
    flat, up = x.contiguous().view(-1, x.size(-1)), up.contiguous()
    pre, h = x.new_empty(len(flat), len(up)), x.new_empty(len(flat), len(up))
    mlp_product(flat, up, pre, h, slope, "up", tma_fits(flat, up, pre, h))
    return F.linear(h, down).view(x.shape), pre, h


def mlp_slope(g: Tensor, down: Tensor, pre: Tensor, slope: float) -> Tensor:
    """Gradient of pre: (g down) * phi'(pre), g (tokens, D)."""
    g, down, out = g.contiguous(), down.contiguous(), torch.empty_like(pre)
    mlp_product(g, down, pre, out, slope, "slope", tma_fits(g, down, pre, out))
    return out


def mlp_gradients(ctx: Any, g: Tensor, *unused: None) -> tuple:
    x, up, down, pre, h = ctx.saved_tensors
    g = g.reshape(-1, g.size(-1))
    dpre = torch.ops.parameter_golf.mlp_slope(g, down, pre, *ctx.numbers)
    return (dpre @ up).view(x.shape), dpre.T @ x.reshape(-1, x.size(-1)), g.T @ h, None


# plain_nll. softcap * tanh(x / softcap) + softcap = 2 softcap * sigmoid(2 x / softcap) = z, and the shift cancels
# in log-sum-exp minus target. The logits stay in their dtype in memory; float32 exists only in registers (PR #1787).


def plain_nll(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Nats of each target under softmax(softcap * tanh(logits / softcap)), in float32.

    logits (B, T, V); targets (B, T), or (B, T, n) to price n ids at each position; the result has their shape.
    """
    capped = softcap * torch.tanh(logits.float() / softcap)
    total = torch.logsumexp(capped, -1, keepdim=True)
    choices = targets if targets.dim() == logits.dim() else targets.unsqueeze(-1)
    return (total - capped.gather(-1, choices)).view(targets.shape)


def nll_kernel(logits, targets, nats, total, softcap, V, BLOCK: tl.constexpr):
    """One row: log-sum-exp of z in one pass, with running maximum and sum, and the nats of the target."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * V
    peak, mass = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
        z = tl.where(columns < V, 2 * softcap * tl.sigmoid(2 / softcap * x), float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 0))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), 0)
        peak = higher
    # An id outside the vocabulary costs NaN nats, which stops a run, instead of reading from another row.
    x = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    log_mass = peak + tl.log(mass)
    tl.store(total + row, log_mass)
    tl.store(nats + row, log_mass - 2 * softcap * tl.sigmoid(2 / softcap * x))


def nll_slope_kernel(logits, targets, total, g, out, softcap, V, BLOCK: tl.constexpr):
    """One row of the logits' gradient, g (exp(z - total) - [column = target]) 4 u (1 - u) with u the sigmoid."""
    row = tl.program_id(0).to(tl.int64)
    target, log_mass, above = tl.load(targets + row), tl.load(total + row), tl.load(g + row)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        u = tl.sigmoid(2 / softcap * tl.load(logits + row * V + columns, mask=columns < V, other=0.0).to(tl.float32))
        slope = tl.exp(2 * softcap * u - log_mass) - tl.where(columns == target, 1.0, 0.0)
        tl.store(out + row * V + columns, above * slope * 4 * u * (1 - u), mask=columns < V)


def nll(logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Nats and log-sum-exp of z, both float32 of the shape of targets; logits (..., V)."""
    nats, total = (logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))
    logits, targets, V = logits.contiguous(), targets.contiguous(), logits.size(-1)
    block = min(block_size(V), VOCABULARY_BLOCK)
    launch(nll_kernel, (targets.numel(),), logits, targets, nats, total, softcap, V, BLOCK=block)
    return nats, total


def nll_slope(logits: Tensor, targets: Tensor, total: Tensor, g: Tensor, softcap: float) -> Tensor:
    """Gradient of the logits, in their dtype, from the gradient g of the nats."""
    logits, out, V = logits.contiguous(), logits.new_empty(logits.shape), logits.size(-1)
    arguments = (logits, targets.contiguous(), total, g.contiguous(), out, softcap, V)
    launch(nll_slope_kernel, (targets.numel(),), *arguments, BLOCK=min(block_size(V), VOCABULARY_BLOCK))
    return out


# Queries and keys come from one product, which reads its input once. Then norm and rotation of every head and the gain
# of the queries are one kernel.


def plain_joint_linear(x: Tensor, *weights: Tensor) -> Tensor:
    """x W^T of several weights (rows, D) side by side: x (..., D) -> (..., all rows)."""
    return torch.cat([F.linear(x, weight) for weight in weights], -1)


def fused_joint_linear(x: Tensor, *weights: Tensor) -> Tensor:
    """The same from one product. Values stay out of it: joining their gradient to the others' would cost 4 passes."""
    return F.linear(x, torch.cat(weights))


def plain_heads(qk: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys that attention takes, from products qk (B, T, H + K, d): normed, rotated, times gain (H,)."""
    q, k = rotate(rms(qk), cos, sin).split([len(gain), qk.size(2) - len(gain)], 2)
    return q * gain.to(q.dtype).unsqueeze(-1), k


def heads_kernel(
    qk, gain, cos, sin, q, k, out, dgain, eps, N, T, H, K, d, half,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Forward: results into q and k. Backward: their gradients are there; that of qk into out, a share of dgain each.

    With u = x / rms(x), y = gain (u cos + u' sin), where u' is the channel's partner and sin has the sign of its side:
    du = gain (dy cos - dy' sin), dx = (du - u mean(du u)) / rms(x).
    """
    heads, channels = tl.arange(0, HEADS)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    left, turned = channels < half, channels < 2 * half
    partner, angle = tl.where(left, channels + half, channels - half), tl.where(left, channels, channels - half)
    factor = tl.load(gain + heads, mask=heads < H, other=1.0).to(qk.dtype.element_ty).to(tl.float32)
    total = tl.zeros((1, HEADS, 1), tl.float32)
    for start in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
        inside = (rows < N) & (channels < d)
        in_q, in_k = inside & (heads < H), inside & (heads >= H) & (heads < H + K)
        both = in_q | in_k
        at, at_q, at_k = (rows * (H + K) + heads) * d, (rows * H + heads) * d, (rows * K + heads - H) * d
        at_angle = rows % T * half + angle
        c = tl.load(cos + at_angle, mask=(rows < N) & turned, other=1.0)
        s = tl.load(sin + at_angle, mask=(rows < N) & turned, other=0.0) * tl.where(left, 1.0, -1.0)
        x = tl.load(qk + at + channels, mask=both, other=0.0).to(tl.float32)
        x_partner = tl.load(qk + at + partner, mask=both & turned, other=0.0).to(tl.float32)
        inverse = 1 / tl.sqrt(tl.sum(x * x, 2, keep_dims=True) / d + eps)
        y = inverse * (x * c + x_partner * s)
        if BACKWARD:
            dy = tl.load(q + at_q + channels, mask=in_q, other=0.0).to(tl.float32)
            dy += tl.load(k + at_k + channels, mask=in_k, other=0.0).to(tl.float32)
            dy_partner = tl.load(q + at_q + partner, mask=in_q & turned, other=0.0).to(tl.float32)
            dy_partner += tl.load(k + at_k + partner, mask=in_k & turned, other=0.0).to(tl.float32)
            total += tl.sum(tl.sum(dy * y, 2, keep_dims=True), 0, keep_dims=True)
            u, du = x * inverse, factor * (dy * c - dy_partner * s)
            tl.store(out + at + channels, inverse * (du - u * tl.sum(du * u, 2, keep_dims=True) / d), mask=both)
        else:
            tl.store(q + at_q + channels, factor * y, mask=in_q)
            tl.store(k + at_k + channels, factor * y, mask=in_k)
    if BACKWARD:
        tl.store(dgain + tl.program_id(0) * H + heads, total, mask=heads < H)


def launch_heads(
    qk: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, out: Tensor | None = None
) -> Tensor:
    """Launches heads_kernel, backward where there is an `out`. Returns every program's share of dgain."""
    (H, K, d), N = (q.size(2), k.size(2), q.size(3)), q.numel() // (q.size(2) * q.size(3))
    block = dict(BACKWARD=out is not None, HEADS=block_size(H + K), WIDTH=block_size(d))
    rows = max(ELEMENT_BLOCK // (block["HEADS"] * block["WIDTH"]), 1)
    # Several programs per multiprocessor hide each other's loads; in the backward pass each sums up a share of dgain.
    count = -(-N // rows) if out is None else min(16 * multiprocessors(q), -(-N // rows))
    dgain = torch.empty(0 if out is None else count, H, dtype=torch.float32, device=q.device)
    inputs = (tensor.contiguous() for tensor in (qk, gain, cos, sin))
    sizes = (NORM_EPS, N, qk.size(1), H, K, d, cos.size(-1))
    launch(heads_kernel, (count,), *inputs, q, k, out, dgain, *sizes, ROWS=rows, **block)
    return dgain


def heads(qk: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k."""
    B, T, both, d = qk.shape
    q, k = qk.new_empty(B, T, len(gain), d), qk.new_empty(B, T, both - len(gain), d)
    launch_heads(qk, gain, cos, sin, q, k)
    return q, k


def heads_slope(qk: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of qk and gain. The order of the sums is fixed for a GPU: equal inputs give equal bits."""
    out = qk.new_empty(qk.shape)
    dgain = launch_heads(qk, gain, cos, sin, dq.contiguous(), dk.contiguous(), out)
    return out, dgain.sum(0).to(gain.dtype)


# Exclusive self-attention and head gate. Query head h belongs to value head h // G, G = H / K, so contiguous
# y (N, H, d) is (N K, G, d) beside v (N K, d): the kernel knows only pairs of a token and a value head.


def plain_exclusive_gate(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """(y - <y, v^> v^) * gate with v^ = v / |v|: y (..., H, d), v (..., K, d), gate (..., H) -> (..., H, d)."""
    return remove_own_value(y, v) * gate.to(y.dtype).unsqueeze(-1)


def exclusive_gate_kernel(
    y, v, gate, g, out, dv, dgate, PAIRS, G, d,
    BACKWARD: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS pairs with their G query heads each: forward the result into out, backward the gradient of y there.

    With z = gate g, a = <y, v^>, b = <z, v^>: dy = z - b v^, dgate = <g, y - a v^>, dv^ = -sum over heads of
    (b y + a z), and dv is the part of dv^ across v, divided by |v|.
    """
    pairs = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    heads, channels = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    in_v, in_gate = (pairs < PAIRS)[:, None] & (channels < d)[None, :], (pairs < PAIRS)[:, None] & (heads < G)[None, :]
    in_y = in_gate[:, :, None] & (channels < d)[None, None, :]
    at_v, at_gate = pairs[:, None] * d + channels[None, :], pairs[:, None] * G + heads[None, :]
    at_y = at_gate[:, :, None] * d + channels[None, None, :]
    value = tl.load(v + at_v, mask=in_v, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, 1))
    floored = tl.maximum(length, 1e-12)[:, None]
    flat = value / floored
    direction = flat[:, None, :]  # (ROWS, 1, WIDTH)
    opening = tl.load(gate + at_gate, mask=in_gate, other=0.0).to(tl.float32)[:, :, None]
    x = tl.load(y + at_y, mask=in_y, other=0.0).to(tl.float32)
    a = tl.sum(x * direction, 2)[:, :, None]
    left = x - a * direction
    if BACKWARD:
        above = tl.load(g + at_y, mask=in_y, other=0.0).to(tl.float32)
        z = above * opening
        b = tl.sum(z * direction, 2)[:, :, None]
        turn = -tl.sum(b * x + a * z, 1)  # gradient of v^, (ROWS, WIDTH)
        along = tl.where(length > 1e-12, tl.sum(turn * flat, 1), 0.0)  # below, v^ is v / 1e-12
        tl.store(out + at_y, z - b * direction, mask=in_y)
        tl.store(dv + at_v, (turn - along[:, None] * flat) / floored, mask=in_v)
        tl.store(dgate + at_gate, tl.sum(above * left, 2), mask=in_gate)
    else:
        tl.store(out + at_y, left * opening, mask=in_y)


def launch_exclusive_gate(*tensors: Tensor | None, backward: bool) -> None:
    """Launches exclusive_gate_kernel on its seven contiguous tensors."""
    y, v = tensors[:2]
    G, d = y.size(-2) // v.size(-2), y.size(-1)
    block = dict(HEADS=block_size(G), WIDTH=block_size(d))
    rows, pairs = max(ELEMENT_BLOCK // (block["HEADS"] * block["WIDTH"]), 1), v.numel() // d
    block |= dict(BACKWARD=backward, ROWS=rows)
    launch(exclusive_gate_kernel, (-(-pairs // rows),), *tensors, pairs, G, d, **block)


def exclusive_gate(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The gated rest of y."""
    y, v, gate, out = y.contiguous(), v.contiguous(), gate.contiguous(), y.new_empty(y.shape)
    launch_exclusive_gate(y, v, gate, None, out, None, None, backward=False)
    return out


def exclusive_gate_slope(y: Tensor, v: Tensor, gate: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, v and gate."""
    inputs = [tensor.contiguous() for tensor in (y, v, gate, g)]
    outputs = tuple(torch.empty_like(tensor) for tensor in inputs[:3])
    launch_exclusive_gate(*inputs, *outputs, backward=True)
    return outputs


# Newton-Schulz: the two products of an iteration that are known to be symmetric, at little more than half the work.


def plain_symmetric(a: Tensor, base: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha a a^T + beta base: a (n, r, c), base (n, r, r) symmetric. With a = base = S that is beta S + alpha S^2."""
    return alpha * (a @ a.mT) if base is None else torch.baddbmm(base, a, a.mT, beta=beta, alpha=alpha)


def symmetric_kernel(
    a, base, out, alpha, beta, R, C, step_n, step_r, step_c,
    BASE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One square tile on or below the diagonal, stored there and, mirrored, above it."""
    tiles = tl.cdiv(R, ROWS)
    row, column, batch = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    if column > row:
        return
    rows, columns = row * ROWS + tl.arange(0, ROWS), column * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, ROWS), tl.float32)
    a += batch * step_n
    for k in range(0, C, DEPTH):
        depth = k + tl.arange(0, DEPTH)
        at, inside = rows[:, None] * step_r + depth[None, :] * step_c, (rows < R)[:, None] & (depth < C)[None, :]
        left = tl.load(a + at, mask=inside, other=0.0)
        at, inside = depth[:, None] * step_c + columns[None, :] * step_r, (depth < C)[:, None] & (columns < R)[None, :]
        total = tl.dot(left, tl.load(a + at, mask=inside, other=0.0), total, input_precision="ieee")
    total *= alpha
    inside = (rows < R)[:, None] & (columns < R)[None, :]
    at = batch * R * R + rows[:, None] * R + columns[None, :]
    if BASE:
        total += beta * tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(out + at, result, mask=inside)
    if column < row:  # a tile on the diagonal is written once: its two halves may differ in the last bit
        at = batch * R * R + columns[:, None] * R + rows[None, :]
        tl.store(out + at, tl.trans(result), mask=(columns < R)[:, None] & (rows < R)[None, :])


def symmetric(a: Tensor, base: Tensor | None, alpha: float, beta: float) -> Tensor:
    """The product; `a` with any strides, so that a transposed view needs no copy."""
    (n, R, C), out = a.shape, a.new_empty(len(a), a.size(1), a.size(1))
    many, few = (TILES[tile_set(a), kind] for kind in ("many", "few"))
    across = -(-R // many["ROWS"])
    tile = many if n * across * (across + 1) // 2 >= multiprocessors(a) else few
    arguments = (a, None if base is None else base.contiguous(), out, alpha, beta, R, C, *a.stride())
    launch(symmetric_kernel, ((-(-R // tile["ROWS"])) ** 2, n), *arguments, BASE=base is not None, **tile)
    return out


# Trellis-coded quantisation (section CODER): the Viterbi algorithm down the columns of matrices. Plain and fused add
# and compare the same float32 numbers in the same order, so they choose the same path.

UNREACHABLE = 1e30  # cost of the states in which no column begins


def plain_trellis(costs: Tensor, branches: Tensor) -> Tensor:
    """The cheapest paths through a trellis: costs (N, L, 4) float32 of the classes in each row -> classes (N, L) int64.

    All N columns begin in state 0 and may end in any. branches (2, 2, states) int64: the two states before each state,
    and the classes of the steps from there. Of equal sums the first branch wins, and the lowest last state. In NumPy on
    the CPU, because the operations are so small that calling PyTorch would take twice as long.
    """
    (N, L), (before, classes) = costs.shape[:2], branches.flatten(1).cpu().numpy()  # (2 states,) each
    steps = np.ascontiguousarray(costs.cpu().numpy().transpose(1, 2, 0)[:, classes])  # (L, 2 states, N)
    states = len(before) // 2
    best = np.full((states, N), UNREACHABLE, np.float32)
    best[0] = 0
    second, sums = np.empty((L, states, N), bool), np.empty_like(steps[0])  # whether the second branch is better
    for step, better in zip(steps, second):
        np.take(best, before, 0, out=sums, mode="clip")
        sums += step
        np.less(sums[states:], sums[:states], out=better)
        np.minimum(sums[:states], sums[states:], out=best)
    branch = (np.arange(states)[:, None] + states * second).reshape(L, -1)  # index of `before`
    previous = before[branch] * N + np.tile(np.arange(N), states)  # index of (state, column) one row up
    place = best.argmin(0) * N + np.arange(N)
    places = np.empty((L, N), np.int64)
    for row in reversed(range(L)):
        places[row] = place
        place = previous[row].take(place)
    return torch.from_numpy(classes[np.take_along_axis(branch, places, 1)].T.copy()).to(costs.device)


def trellis_kernel(costs, branches, decisions, path, L, STATES: tl.constexpr):
    """One column: forward, keeping a bit per row and state for the better branch; back from the best last state."""
    column, branch = tl.program_id(0).to(tl.int64) * L, tl.arange(0, 2 * STATES)
    before, classes = tl.load(branches + branch), tl.load(branches + 2 * STATES + branch)
    states = tl.arange(0, STATES)
    best = tl.where(states == 0, 0.0, 1e30)  # UNREACHABLE
    for row in range(L):
        sums = tl.gather(best, before, 0) + tl.load(costs + 4 * (column + row) + classes)
        sums = tl.reshape(sums, (2, STATES))
        tl.store(decisions + column + row, tl.sum(tl.argmin(sums, 0) << states, 0))
        best = tl.min(sums, 0)
    tl.debug_barrier()  # what one thread has stored is read by all
    state = tl.argmin(best, 0)
    for row in range(L - 1, -1, -1):
        chosen = (tl.load(decisions + column + row) >> state & 1) * STATES + state
        tl.store(path + column + row, tl.load(branches + 2 * STATES + chosen))
        state = tl.load(branches + chosen)


def trellis(costs: Tensor, branches: Tensor) -> Tensor:
    """The classes of the cheapest paths."""
    (N, L), costs, branches = costs.shape[:2], costs.contiguous(), branches.to(torch.int32).contiguous()
    decisions, path = (torch.empty(N, L, dtype=torch.int32, device=costs.device) for _ in range(2))
    launch(trellis_kernel, (N,), costs, branches, decisions, path, L, STATES=branches.size(-1), num_warps=1)
    return path.long()


def stored(x: Tensor) -> Tensor:
    """x itself, which torch.compile now has to keep in memory. Otherwise it makes x anew wherever it is read, here
    from a float32 tensor of twice the size."""
    return x.clone()


def register(function: Callable, shapes: Callable, gradients: Callable | None = None, saved: tuple = ()) -> None:
    """Makes a function an operator of PyTorch; `saved` are the places of the tensors that its gradients need.

    Places count the inputs first, then the outputs. A custom operator and not an autograd.Function around a launch:
    torch.compile keeps it in the full graph as one opaque call, whatever its release knows of Triton's launches and
    descriptors (PyTorch 2.9 to 2.13), and never traces this section. The price: nothing is fused into it.
    """

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors = (*inputs, *(output if isinstance(output, tuple) else [output]))
        ctx.save_for_backward(*(tensors[i] for i in saved))
        ctx.numbers = [number for number in inputs if isinstance(number, float)]
        ctx.set_materialize_grads(function is heads)  # no zeros as gradients of pre, h and total

    registered = torch.library.custom_op(f"parameter_golf::{function.__name__}", function, mutates_args=())
    registered.register_fake(shapes)
    if gradients:
        registered.register_autograd(gradients, setup_context=save)


class Kernels(NamedTuple):
    """The functions that exist twice. A model holds one of these, as it holds its attention back-end."""

    mlp: Callable
    nll: Callable
    joint_linear: Callable
    heads: Callable
    exclusive_gate: Callable
    symmetric: Callable
    stored: Callable
    trellis: Callable


PLAIN = Kernels(
    plain_mlp, plain_nll, plain_joint_linear, plain_heads, plain_exclusive_gate, plain_symmetric, lambda x: x,
    plain_trellis,
)  # fmt: skip


@functools.cache
def fused_kernels() -> Kernels:
    """The fused functions, for CUDA tensors of bfloat16 or float32. Raises ImportError without Triton."""
    jit(mlp_kernel)  # imports Triton now, not at the first training step
    ops = torch.ops.parameter_golf

    def like(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)

    def hidden(x: Tensor, up: Tensor, down: Tensor, slope: float) -> tuple[Tensor, ...]:
        pre = x.new_empty(x.numel() // x.size(-1), len(up))
        return *like(x), *like(pre, pre)

    def two_kinds(qk: Tensor, gain: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        B, T, both, d = qk.shape
        return qk.new_empty(B, T, len(gain), d), qk.new_empty(B, T, both - len(gain), d)

    def nll_gradients(ctx: Any, g: Tensor, unused: None) -> tuple:
        return ops.nll_slope(*ctx.saved_tensors, g, *ctx.numbers), None, None

    def heads_gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:
        return *ops.heads_slope(*ctx.saved_tensors, dq, dk), None, None

    def gate_gradients(ctx: Any, g: Tensor) -> tuple:
        return ops.exclusive_gate_slope(*ctx.saved_tensors, g)

    def symmetric_gradients(ctx: Any, g: Tensor) -> tuple:
        (a,), (alpha, beta) = ctx.saved_tensors, ctx.numbers
        return alpha * (g + g.mT) @ a, beta * g if ctx.needs_input_grad[1] else None, None, None

    register(mlp, hidden, mlp_gradients, saved=(0, 1, 2, 5, 6))
    register(mlp_slope, lambda g, down, pre, slope: like(pre)[0])
    register(nll, lambda logits, targets, softcap: like(*[targets.float()] * 2), nll_gradients, saved=(0, 1, 4))
    register(nll_slope, lambda logits, *rest: like(logits)[0])
    register(heads, two_kinds, heads_gradients, saved=(0, 1, 2, 3))
    register(heads_slope, lambda qk, gain, *rest: like(qk, gain))
    register(stored, lambda x: like(x)[0], lambda ctx, g: g)
    register(exclusive_gate, lambda y, *rest: like(y)[0], gate_gradients, saved=(0, 1, 2))
    register(exclusive_gate_slope, lambda y, v, gate, g: like(y, v, gate))
    register(symmetric, lambda a, *rest: a.new_empty(*a.shape[:2], a.size(1)), symmetric_gradients, saved=(0,))

    def fused_nll(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
        several = targets.dim() == logits.dim()  # the n-gram tilt and the probes price several ids per position
        return plain_nll(logits, targets, softcap) if several else ops.nll(logits, targets, softcap)[0]

    return Kernels(
        lambda x, up, down, slope: ops.mlp(x, up, down, slope)[0],
        fused_nll,
        fused_joint_linear,
        ops.heads,
        ops.exclusive_gate,
        lambda a, base=None, alpha=1.0, beta=0.0: ops.symmetric(a, base, alpha, beta),
        ops.stored,
        trellis,
    )


@torch.enable_grad()  # the first model may be asked for by a scorer, which has none
def disagreement(fused: Kernels, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """The largest |fused - plain| / |plain| among results and gradients of all kernels on small odd-sized inputs."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype).requires_grad_()

    targets = torch.randint(1100, (150,), generator=random).to(device)
    angles = torch.rand(150, 1, 8, generator=random).to(device)
    x, worst = draw(150, 72), 0.0
    cases = [
        ("mlp", (x, draw(304, 72), draw(72, 304)), (0.5,)),
        ("nll", (draw(150, 1100),), (targets, 30.0)),
        ("joint_linear", (x, draw(304, 72), draw(40, 72)), ()),
        ("heads", (draw(1, 150, 12, 64), draw(8)), (angles.cos(), angles.sin())),
        ("exclusive_gate", (draw(150, 8, 64), draw(150, 4, 64), draw(150, 8)), ()),
        ("symmetric", (draw(3, 150, 72),), ()),
        ("symmetric", (draw(64, 150, 24),), ()),  # enough for the large tiles
        ("trellis", (), (torch.rand(5, 150, 4, generator=random).to(device), trellis_of(8).branches.to(device))),
    ]
    for name, tensors, rest in cases:
        values, upstream = [], None
        for function in (getattr(fused, name), getattr(PLAIN, name)):
            result = function(*tensors, *rest)
            results = result if isinstance(result, tuple) else (result,)
            upstream = upstream or [torch.randn(r.shape, generator=random).to(device, r.dtype) for r in results]
            gradients = torch.autograd.grad(results, tensors, upstream) if tensors else ()
            values.append([value.detach().double() for value in (*results, *gradients)])
        errors = torch.stack([(a - b).norm() / b.norm() for a, b in zip(*values)])
        worst = max(worst, float(errors.nan_to_num(math.inf).max()))
    return worst


@functools.cache
def choose_kernels(wanted: str, device: torch.device) -> tuple[str, Kernels]:
    """What to log and which functions to use; `wanted` is auto, plain or triton.

    The fused ones are taken on a GPU where a small launch of each agrees with the plain one. Raises UserError when they
    are demanded and cannot be had.
    """
    reason = "there is no CUDA device" if device.type != "cuda" else ""
    if wanted == "plain":
        return "plain", PLAIN
    try:
        if not reason and (error := disagreement(fused_kernels(), device)) > 0.03:
            reason = f"they differ from the plain functions by {error:.2g}"
    except Exception as error:  # noqa: BLE001 - no Triton, another Triton, too small a GPU: only speed is at stake
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason and wanted == "triton":
        raise UserError(f"KERNELS=triton: the fused kernels cannot be used: {reason}; set KERNELS=auto")
    if reason:
        return f"plain ({reason})", PLAIN
    return "triton", fused_kernels()


# ------------------------------------------------------------------------------------------------------------
# MODEL
#
# Token ids become nats per token. The stack is a plan of visits to physical layers; the sub-layers exist once
# and return only their scaled contribution; a wiring says what they read and where it is added. Every product
# with a weight goes through `project`, which can add a low-rank delta (ADAPT) or feed a Hessian (COMPRESS).
# Weights of equal shape live in banks of shape (n, out, in), which is what Muon shards over ranks.
# ------------------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """Where one kind of weight lies and how it is treated."""

    bank: str  # attribute of GPT
    half: int  # layer i is row half * num_layers + i of the bank
    hessian: str  # the kind whose recorded inputs this one shares
    role: str  # key of `precision`: clip and bits of its quantisation
    drawn: bool  # its first value is drawn as INIT_SCHEME says; the others are 0: a block starts as the identity


MATRICES = {
    "attn.q": Matrix("qo_bank", 0, "attn.q", "attn", drawn=True),
    "attn.k": Matrix("kv_bank", 0, "attn.q", "attn", drawn=True),
    "attn.v": Matrix("kv_bank", 1, "attn.q", "attn", drawn=True),
    "attn.o": Matrix("qo_bank", 1, "attn.o", "attn", drawn=False),
    "mlp.up": Matrix("mlp_up_bank", 0, "mlp.up", "mlp", drawn=True),
    "mlp.down": Matrix("mlp_down_bank", 0, "mlp.down", "mlp", drawn=False),
}
BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


class Visit(NamedTuple):
    """One pass through one physical layer."""

    slot: int  # place in the plan; adapters are per slot, so a repeated layer adapts per pass
    layer: int  # physical layer
    wiring: str  # key of WIRINGS
    push: bool  # its output is kept for a skip connection
    skip: int | None  # skip connection that enters before it


def layer_plan(config: Config, looping: bool) -> tuple[Visit, ...]:
    """The visits of one forward pass. With the defaults and looping on: 0-5, 3-5, 3-5, 6-10, i.e. 17 visits.

    The first half of the visits push their outputs; the second half take them back, last first, through the skip
    connections (U-Net). The number of connections is that of the looped plan, so they are the same parameters
    in both; an unlooped plan uses the first few.
    """
    physical = list(range(config.num_layers))
    loop = physical[config.loop_start : config.loop_end + 1]
    looped = physical[: config.loop_start] + loop * (config.num_loops + 1) + physical[config.loop_end + 1 :]
    looped = looped if config.num_loops else physical
    order = looped if looping else physical
    first_half = len(order) // 2
    skips = min(len(looped) // 2, len(looped) - len(looped) // 2, first_half)
    plan = []
    for slot, layer in enumerate(order):
        wiring = "parallel" if 0 <= config.parallel_residual_start <= layer else "serial"
        wiring = "two_lane" if 0 < config.parallel_start_layer <= layer else wiring
        position = slot - first_half
        skip = position if 0 <= position < skips else None
        plan.append(Visit(slot, layer, wiring, slot < first_half, skip))
    return tuple(plan)


class AttnGate(NamedTuple):
    """One factor per head and token on the attention result: multiplier * sigmoid(scale * W n[:width])."""

    width: int  # channels of the normed input n that it looks at
    scale: float
    multiplier: float
    init_std: float  # of W; 0: zeros


def attn_gate(config: Config) -> AttnGate | None:
    """The attention gate of a configuration."""
    return {
        "none": None,
        "dense": AttnGate(config.model_dim, 1.0, 1.0, config.gated_attn_init_std),  # #1886
        "sparse": AttnGate(config.gate_window, config.sparse_attn_gate_scale, 1.0, 0.0),  # #1787
        "two_sigma": AttnGate(config.gate_window, 1.0, 2.0, 0.0),  # #1667
    }[config.attn_gate]


First = float | Callable[[Tensor, torch.Generator], Any]  # a first value: constant, or what sets it in place


def normal(std: float) -> First:
    return lambda parameter, random: parameter.normal_(0, std, generator=random)


class Parameter(NamedTuple):
    """What is decided about a parameter before training."""

    shape: tuple[int, ...]
    group: str  # matrix (Muon), embed or scalar (AdamW); fitted: set once, after the last step; or unused: published
    # files hold it, GPT has none
    first: First
    stream: str = ""  # of its codes, if it is quantised; empty: never. For the matrices in banks it is their kind


@functools.cache
def parameter_table(c: Config) -> Mapping[str, Parameter]:
    """Every parameter by name, in the order of GPT.named_parameters. GPT.init_weights draws matrices over their 0."""
    d, L, V, kv_dim = c.model_dim, c.num_layers, c.vocab_size, c.num_kv_heads * c.head_dim
    table = {
        "qo_bank": Parameter((2 * L, d, d), "matrix", 0.0),
        "kv_bank": Parameter((2 * L, kv_dim, d), "matrix", 0.0),
        "mlp_up_bank": Parameter((L, c.mlp_dim, d), "matrix", 0.0),
        "mlp_down_bank": Parameter((L, d, c.mlp_dim), "matrix", 0.0),
    }
    if c.smear_gate_enabled:
        table["smear_gate_w"] = Parameter((1, c.gate_window), "scalar", 0.0)
        table["smear_lambda"] = Parameter((1,), "scalar", 0.0)
    if c.smear_perdim_enabled:
        table["smear_perdim"] = Parameter((d,), "scalar", 0.0)
    if c.bigram_vocab_size:
        table["bigram_bank"] = Parameter((1, d, c.bigram_dim), "matrix", 0.0)
        table["bigram_scale"] = Parameter((1,), "scalar", 0.05)
    if c.document_orders:
        table["hint_prior"] = Parameter((len(c.document_orders), 2), "fitted", 0.0)  # first weights of Boosts
    table["tok_emb.weight"] = Parameter((V, d), "embed", functools.partial(first_embedding, c), "embedding")
    for layer in range(L):
        table |= {f"blocks.{layer}.{name}": row for name, row in layer_parameters(c, layer).items()}
    # One parameter per connection: those that a plan does not use get no gradient and no decay.
    skips = sum(visit.skip is not None for visit in layer_plan(c, looping=True))
    table |= {f"skip_weights.{i}": Parameter((d,), "scalar", 1.0) for i in range(skips)}
    if c.skip_gates_enabled:
        table |= {f"skip_gates.{i}": Parameter((d,), "scalar", 0.0) for i in range(skips)}
    if c.bigram_vocab_size:
        table["bigram_emb.weight"] = Parameter((c.bigram_vocab_size, c.bigram_dim), "embed", 0.0, "bigram")
    return types.MappingProxyType(table)


def layer_parameters(c: Config, layer: int) -> dict[str, Parameter]:
    """The rows of parameter_table for one physical layer, without its matrices."""
    d, H, gate = c.model_dim, c.num_heads, attn_gate(c)
    scale = 1 / math.sqrt(layer + 1) if c.resid_scale_depth_init else 1.0
    table = {
        "q_gain": Parameter((H,), "scalar", c.qk_gain_init),
        "attn_scale": Parameter((d,), "scalar", scale),
        "mlp_scale": Parameter((d,), "scalar", scale),
        # At first all of the stream and none of the embedding.
        "resid_mix": Parameter((2, d), "scalar", lambda mix, random: mix.copy_(torch.tensor([[1.0], [0.0]]))),
    }
    if gate:
        table["attn_gate_w"] = Parameter((H, gate.width), "scalar", normal(gate.init_std), "gates")
    if c.mlp_gate_out:
        table["mlp_gate_w"] = Parameter((1, c.gate_window), "scalar", 0.0)
        table["mlp_gate_b"] = Parameter((1,), "scalar", c.mlp_gate_bias)
    if 0 < c.parallel_start_layer < c.num_layers:
        used = "scalar" if c.parallel_start_layer <= layer else "unused"  # #1941 has them in all layers
        table["post_lambdas"] = Parameter((2, 2), used, 1.0)  # from attention, MLP (rows) into each lane
        table["resid_lambdas"] = Parameter((2,), used, 1.1)
    return table


def first_embedding(c: Config, table: Tensor, random: torch.Generator) -> None:
    """Normal; a fused marker is .4 of the space and .6 of its marker, as long as the marker (#2109)."""
    table.normal_(0, c.tied_embed_init_std, generator=random)
    for fused, marker in FUSED_MARKERS.items() if c.marker_pair_mode else ():
        both = 0.4 * table[SPACE_ID] + 0.6 * table[marker]
        table[fused] = both * (table[marker].norm() / both.norm().clamp_min(1e-9))


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of GPT by name."""
    return {name: row.shape for name, row in parameter_table(config).items() if row.group != "unused"}


class Lora(NamedTuple):
    """Low-rank deltas for a batch of B rows: delta(x) = scale * (x A^T) B^T, one A and B per row, weight and visit."""

    scale: float
    factors: dict[str, tuple[Tensor, Tensor]]  # kind of weight -> A (B, slots, R, in), B (B, slots, out, R), float32

    def by_slot(self, dtype: torch.dtype) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """The factors of each visit, cast once per forward call: kind of weight -> per slot (A, B)."""
        return {name: list(zip(a.to(dtype).unbind(1), b.to(dtype).unbind(1))) for name, (a, b) in self.factors.items()}


class Taps:
    """Sums x x^T over the inputs x of each kind of weight and layer: the Hessians that GPTQ wants."""

    def __init__(self) -> None:
        self.hessians: dict[tuple[str, int], Tensor] = {}

    def add(self, name: str, layer: int, x: Tensor) -> None:
        x = x.reshape(-1, x.size(-1)).float()
        if (name, layer) not in self.hessians:
            self.hessians[name, layer] = x.new_zeros(x.size(-1), x.size(-1))
        self.hessians[name, layer].addmm_(x.T, x)


class Call(NamedTuple):
    """What one forward call hands to its sub-layers."""

    weights: dict[str, tuple[Tensor, ...]]  # kind -> one matrix per layer, in the activation dtype
    segments: Segments | None  # None: every row of the batch is one segment
    cos: Tensor  # (T, 1, rope_dims / 2) float32, as sin
    sin: Tensor
    lora_scale: float
    lora: dict[str, list[tuple[Tensor, Tensor]]] | None  # as from Lora.by_slot
    taps: Taps | None
    kernels: "Kernels"
    bare: bool  # no adapters, no taps: products with weights are nothing but products, and kernels may take them in


def project(
    x: Tensor, name: str, call: Call, layer: int = 0, slot: int = 0, lora_input: Tensor | None = None
) -> Tensor:
    """x W^T for the weight `name` of a layer: (..., in) -> (..., out). The one place where weights are used.

    With adapters, adds the low-rank delta of the visit `slot`, which may read another input than the weight does. The
    tied head exists once, as layer 0 and slot 0.
    """
    if call.taps is not None and (name == "head" or MATRICES[name].hessian == name):
        call.taps.add(name, layer, x)
    y = F.linear(x, call.weights[name][layer])
    if call.lora is not None and name in call.lora:
        a, b = call.lora[name][slot]
        low = torch.bmm(x if lora_input is None else lora_input, a.mT)  # (B, T, in) -> (B, T, R)
        y = torch.baddbmm(y, low, b.mT, alpha=call.lora_scale)  # -> (B, T, out)
    return y


def previous(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, T, D) one token later: 0 at the first position of a segment."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1] * (positions > 0).unsqueeze(-1).to(x.dtype)


def bigram_hash(inputs: Tensor, positions: Tensor, rows: int) -> Tensor:
    """Row (B, T) of the bigram table for each token and the one before; the last row where there is none (#162)."""
    mixed = torch.bitwise_xor(36313 * inputs, 27191 * F.pad(inputs, (1, 0))[:, :-1])
    return torch.where(positions > 0, mixed % (rows - 1), rows - 1)


# Attention back-ends: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d), causal, scale 1/sqrt(d), query head h
# reads key/value head h // (H / K). With segments, B = 1 and attention stays inside the segments.


def attend_fa3(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, dense: Callable, varlen: Callable) -> Tensor:
    """FlashAttention-3: its functions for dense rows and for packed ones, from where find_fa3() has them."""
    if segments is None:
        out = dense(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out
    cu, longest = segments.cu_seqlens, segments.max_seqlen
    out = varlen(q[0], k[0], v[0], cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
    return (out[0] if isinstance(out, tuple) else out).unsqueeze(0)


# FlashAttention-3 as Hugging Face builds it, for PyTorch 2.9 and later with CUDA 12.6 to 13.0; modded-nanogpt takes it.
FA3_KERNEL, FA3_KERNEL_VERSION = "kernels-community/flash-attn3", 1


@functools.cache
def fetch_fa3() -> tuple[Any, str]:
    """FA3_KERNEL through the package `kernels`, downloaded at first use, and its name; or None and what happened."""
    try:
        from kernels import get_kernel

        return get_kernel(FA3_KERNEL, version=FA3_KERNEL_VERSION), FA3_KERNEL
    except Exception as error:  # noqa: BLE001 - no network, no build for this PyTorch, another `kernels`
        return None, f"cannot be fetched from {FA3_KERNEL}: {type(error).__name__}: {error}".splitlines()[0]


def find_fa3(may_fetch: bool) -> tuple[Any, str]:
    """The module with FlashAttention-3's functions, and where it comes from; or None and why there is none."""
    error = import_error("flash_attn_interface")
    if not error:
        return importlib.import_module("flash_attn_interface"), "flash_attn_interface"
    return fetch_fa3() if may_fetch and not import_error("kernels") else (None, error)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, causal: dict[str, Any]) -> Tensor:
    """PyTorch's own variable-length attention (2.10 and later; FlashAttention-2 inside). Dense rows go to SDPA."""
    from torch.nn.attention.varlen import varlen_attn

    if segments is None:
        return attend_sdpa(q, k, v, None)
    group = q.size(2) // k.size(2)  # repeated, because 2.10 has no grouped heads
    k, v = k[0].repeat_interleave(group, 1), v[0].repeat_interleave(group, 1)
    cu, longest = segments.cu_seqlens, segments.max_seqlen
    return varlen_attn(q[0], k, v, cu, cu, longest, longest, **causal).unsqueeze(0)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """PyTorch's scaled_dot_product_attention; packed rows as batches of segments of similar length."""
    if segments is not None:
        batches = []
        for index in segments.gather:  # (S, T'): where in the row the tokens of S segments are
            pieces = [x[0].index_select(0, index.flatten()).unflatten(0, index.shape) for x in (q, k, v)]
            batches.append(attend_sdpa(*pieces, None).flatten(0, 1))
        return torch.cat(batches).index_select(0, segments.scatter).unsqueeze(0)
    group = q.size(2) // k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, d)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def choose_attention(config: Config, device: torch.device) -> tuple[str, Callable]:
    """Name and function of the attention back-end for this device; auto takes the first that can run.

    sdpa is for a CPU: the rows of a GPU have no table of gathered segments. In brackets, the name tells where
    FlashAttention-3 comes from, or why auto went on without it on Hopper. Raises UserError when the wanted back-end
    cannot run.
    """
    on_gpu, d = device.type == "cuda", config.head_dim
    generation = torch.cuda.get_device_capability(device)[0] if on_gpu else 0
    head = "" if d % 8 == 0 and d <= 256 else f"MODEL_DIM / NUM_HEADS={d} is not a multiple of 8 up to 256"
    fa3, source = None, "needs a Hopper GPU" if generation != 9 else head
    if not source:
        fa3, source = find_fa3(may_fetch=config.attn_backend != "varlen")
    obstacles = {
        "fa3": "" if fa3 else source,
        "varlen": "needs a GPU from Ampere on" if generation < 8 else head or import_error("torch.nn.attention.varlen"),
        "sdpa": "is for a CPU" if on_gpu else "",
    }
    usable = [name for name, obstacle in obstacles.items() if not obstacle]
    name = next(iter(usable), "auto") if config.attn_backend == "auto" else config.attn_backend
    if name not in usable:
        reasons = "; ".join(f"{each} {obstacle}" for each, obstacle in obstacles.items() if name in (each, "auto"))
        install = "install FlashAttention-3 (on Hopper: pip install kernels) or PyTorch 2.10"
        fix = "set ATTN_BACKEND=auto" if usable else install
        raise UserError(f"ATTN_BACKEND={name}: {reasons} (usable here: {', '.join(usable) or 'none'}); {fix}")
    if name == "fa3":
        functions = dict(dense=fa3.flash_attn_func, varlen=fa3.flash_attn_varlen_func)
        return f"fa3 ({source})", functools.partial(attend_fa3, **functions)
    without = f" (fa3 {source})" if config.attn_backend == "auto" and generation == 9 else ""
    return name + without, attend_sdpa if name == "sdpa" else causal_varlen()


def import_error(module: str) -> str:
    """Why a module cannot be imported; empty when it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"cannot be imported: {error}".splitlines()[0]
    return ""


def causal_varlen() -> Callable:
    """attend_varlen with the causal option of this PyTorch: a flag in 2.10, a window in later releases."""
    from torch.nn.attention.varlen import varlen_attn

    flag = "is_causal" in inspect.signature(varlen_attn).parameters
    return functools.partial(attend_varlen, causal={"is_causal": True} if flag else {"window_size": (-1, 0)})


class Block(nn.Module):
    """One physical layer: its two sub-layers and its rows of layer_parameters. Its matrices are in the banks."""

    def __init__(self, config: Config, layer: int, attend: Callable | None):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.gate_window = config.gate_window
        self.attend, self.slope = attend, config.leaky_relu_sq_slope
        self.depth_scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0
        self.exclusive = layer >= config.num_layers - config.xsa_last_n
        self.gate, self.mlp_gate_out = attn_gate(config), config.mlp_gate_out

    def mix(self, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream with the embedding mixed in again, and what attention reads of it."""
        keep, fresh = self.resid_mix.to(x.dtype)
        m = keep * x + fresh * x0
        return m, rms(m) * self.depth_scale

    def attention(self, n: Tensor, visit: Visit, call: Call) -> Tensor:
        """What attention, reading n (B, T, D), adds to the residual stream."""
        at = visit.layer, visit.slot
        if call.bare:
            qk = call.kernels.joint_linear(n, *(call.weights[name][visit.layer] for name in ("attn.q", "attn.k")))
        else:
            qk = torch.cat([project(n, name, call, *at) for name in ("attn.q", "attn.k")], -1)
        qk = qk.unflatten(-1, (self.num_heads + self.num_kv_heads, -1))  # (B, T, H + K, d)
        q, k = call.kernels.heads(qk, self.q_gain, call.cos, call.sin)
        v = project(n, "attn.v", call, *at).unflatten(-1, (self.num_kv_heads, -1))  # (B, T, K, d)
        y = self.finish(self.attend(q, k, v, call.segments), v, n, call)
        return self.attn_scale.to(y.dtype) * project(y.flatten(2), "attn.o", call, *at, lora_input=n)

    def finish(self, y: Tensor, v: Tensor, n: Tensor, call: Call) -> Tensor:
        """The attention result y (B, T, H, d) without the token's own value, times the gate of each head."""
        if not self.gate:
            return remove_own_value(y, v) if self.exclusive else y
        window = F.linear(n[..., : self.gate.width], self.attn_gate_w.to(n.dtype)).float()  # (B, T, H)
        factor = (self.gate.multiplier * torch.sigmoid(self.gate.scale * window)).to(y.dtype)
        return call.kernels.exclusive_gate(y, v, factor) if self.exclusive else y * factor.unsqueeze(-1)

    def mlp(self, r: Tensor, visit: Visit, call: Call) -> Tensor:
        """What the MLP adds to the residual stream r (B, T, D). Its output gate looks at r itself (#1941)."""
        at = visit.layer, visit.slot
        u = rms(r) * self.depth_scale
        if call.bare:
            up, down = (call.weights[name][visit.layer] for name in ("mlp.up", "mlp.down"))
            y = call.kernels.mlp(u, up, down, self.slope)
        else:
            h = leaky_relu_squared(project(u, "mlp.up", call, *at), self.slope)  # (B, T, F)
            y = project(h, "mlp.down", call, *at, lora_input=u)
        if self.mlp_gate_out:
            window = F.linear(r[..., : self.gate_window], self.mlp_gate_w.to(r.dtype)).float()  # (B, T, 1)
            y = torch.sigmoid(window + self.mlp_gate_b).to(y.dtype) * y
        return self.mlp_scale.to(y.dtype) * y


Lanes = tuple[Tensor, Tensor]  # (attn_lane, mlp_lane), each (B, T, D); the same tensor while the stream is one


def serial(block: Block, lanes: Lanes, x0: Tensor, visit: Visit, call: Call) -> Lanes:
    """Attention, then the MLP, on one stream."""
    m, n = block.mix(lanes[0], x0)
    r = m + block.attention(n, visit, call)
    x = r + block.mlp(r, visit, call)
    return x, x


def parallel(block: Block, lanes: Lanes, x0: Tensor, visit: Visit, call: Call) -> Lanes:
    """Attention and MLP side by side on one stream: both read the same input."""
    m, n = block.mix(lanes[0], x0)
    x = m + block.attention(n, visit, call) + block.mlp(m, visit, call)
    return x, x


def two_lane(block: Block, lanes: Lanes, x0: Tensor, visit: Visit, call: Call) -> Lanes:
    """Attention and MLP side by side, each on its own lane; both write to both lanes."""
    attn_lane, mlp_lane = lanes
    a = block.attention(block.mix(attn_lane, x0)[1], visit, call)
    m = block.mlp(mlp_lane, visit, call)
    post, keep = block.post_lambdas.to(a.dtype), block.resid_lambdas.to(a.dtype)
    return (
        keep[0] * attn_lane + post[0, 0] * a + post[1, 0] * m,
        keep[1] * mlp_lane + post[0, 1] * a + post[1, 1] * m,
    )


WIRINGS = {"serial": serial, "parallel": parallel, "two_lane": two_lane}


class GPT(nn.Module):
    """The network. Parameters are float32; activations have the run's dtype."""

    def __init__(self, config: Config, run: Run, device: torch.device | str | None = None):
        super().__init__()
        c = config
        self.config, self.dtype = config, run.dtype
        on_meta = torch.device(device or "cpu").type == "meta"
        self.kernels = PLAIN if on_meta else choose_kernels(c.kernels, run.device)[1]
        attend = None if on_meta else choose_attention(config, run.device)[1]  # shapes alone need none
        self.tok_emb = nn.Module()
        self.blocks = nn.ModuleList([Block(c, layer, attend) for layer in range(c.num_layers)])
        self.skip_weights, self.skip_gates, self.bigram_emb = nn.ParameterList(), nn.ParameterList(), nn.Module()
        for name, shape in parameter_shapes(c).items():
            # Made on the CPU, so that equal seeds give equal weights on every machine.
            parameter = nn.Parameter(torch.empty(shape, device="meta" if on_meta else "cpu"))
            *path, leaf = name.split(".")
            owner = self.get_submodule(".".join(path))
            if isinstance(owner, nn.ParameterList):
                owner.append(parameter)
            else:
                setattr(owner, leaf, parameter)
        if not on_meta:
            self.init_weights()
            self.to(run.device)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Sets every parameter to its first value; SEED decides what is drawn.

        Of the matrices, those that MATRICES names are drawn as INIT_SCHEME says: orthogonal, or uniform in
        +-1 / sqrt(fan_in); and bigram_bank, whose product with bigram_emb starts at 0 because the latter does.
        """
        c, random = self.config, torch.Generator().manual_seed(self.config.seed)
        for members in reversed(self.groups().values()):
            for name, parameter in members.items():
                first = parameter_table(c)[name].first
                first(parameter, random) if callable(first) else parameter.fill_(first)
        for role in ("attn", "mlp"):
            kinds = [kind for kind in MATRICES.values() if kind.role == role and kind.drawn]
            for layer, kind in itertools.product(range(c.num_layers), kinds):
                matrix = getattr(self, kind.bank)[kind.half * c.num_layers + layer]
                if c.init_scheme == "ortho":
                    nn.init.orthogonal_(matrix, generator=random)
                else:
                    matrix.uniform_(-1, 1, generator=random).div_(math.sqrt(matrix.size(1)))
        if c.bigram_vocab_size:
            nn.init.orthogonal_(self.bigram_bank[0], 1 / math.sqrt(2 * c.num_layers), generator=random)

    def matrices(self) -> dict[str, tuple[Tensor, ...]]:
        """Every weight matrix by kind and layer, cast to the activation dtype once per forward call."""
        # One unbind per bank: its gradient is one stack, where row by row each visit would fill a whole bank.
        rows = {bank: getattr(self, bank).to(self.dtype).unbind(0) for bank in BANKS}
        L = self.config.num_layers
        weights = {name: rows[m.bank][m.half * L : (m.half + 1) * L] for name, m in MATRICES.items()}
        return weights | {"head": (self.tok_emb.weight.to(self.dtype),)}

    def embed(self, inputs: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        """Token ids (B, T) -> (B, T, D) of unit mean square, with what the token before adds inside a segment."""
        c, e = self.config, F.embedding(inputs, table)
        if c.bigram_vocab_size:
            pairs = F.embedding(bigram_hash(inputs, positions, c.bigram_vocab_size), self.bigram_emb.weight)
            e = e + self.bigram_scale.to(e.dtype) * F.linear(pairs.to(e.dtype), self.bigram_bank[0].to(e.dtype))
        if c.smear_gate_enabled and c.smear_gate_pos == "pre_norm":
            e = self.smear(e, inputs, positions)
        e = rms(self.kernels.stored(e))
        if c.smear_gate_enabled and c.smear_gate_pos == "post_norm":
            e = self.smear(e, inputs, positions)
        if c.smear_perdim_enabled:  # a constant mixture of both tokens (#489)
            e = torch.lerp(e, previous(e, positions), torch.sigmoid(self.smear_perdim).to(e.dtype))
        return e

    def smear(self, e: Tensor, inputs: Tensor, positions: Tensor) -> Tensor:
        """Adds the embedding of the token before, as far as a gate on the own one says; not to a BOS (#1667, #1855)."""
        window = F.linear(e[..., : self.config.gate_window], self.smear_gate_w.to(e.dtype)).float()
        gate = torch.sigmoid(window) * self.smear_lambda * (inputs != BOS_ID).unsqueeze(-1)  # (B, T, 1)
        return e + gate.to(e.dtype) * previous(e, positions)

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        plan: tuple[Visit, ...],
        segments: Segments | None = None,
        lora: Lora | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Nats of each target, float32, shape of `targets`. The only forward pass there is.

        inputs (B, T) int64. targets (B, C) or (B, C, n) with C <= T belong to the last C positions. With `segments`,
        B = 1 and the row is packed; without, each row is one segment from position 0.
        """
        positions = torch.arange(inputs.size(1), device=inputs.device) if segments is None else segments.positions
        half = self.config.rope_dims // 2
        steps = torch.arange(half, device=inputs.device, dtype=torch.float32) / max(half, 1)
        angles = positions.float()[:, None, None] * self.config.rotary_base**-steps  # (T, 1, half)
        weights = self.matrices()
        bare = lora is None and taps is None
        deltas = (lora.scale, lora.by_slot(self.dtype)) if lora else (1.0, None)
        call = Call(weights, segments, angles.cos(), angles.sin(), *deltas, taps, self.kernels if bare else PLAIN, bare)

        x0 = self.embed(inputs, weights["head"][0], positions)
        lanes, kept = (x0, x0), []
        for visit in plan:
            if visit.skip is not None:
                x = self.take_skip(visit.skip, kept.pop(), lanes[0])
                lanes = (x, lanes[1] if visit.wiring == "two_lane" else x)
            lanes = WIRINGS[visit.wiring](self.blocks[visit.layer], lanes, x0, visit, call)
            if visit.push:
                kept.append(lanes[0])
        x = rms(0.5 * (lanes[0] + lanes[1]))[:, inputs.size(1) - targets.size(1) :]
        return call.kernels.nll(project(x, "head", call), targets, self.config.logit_softcap)

    def take_skip(self, skip: int, kept: Tensor, x: Tensor) -> Tensor:
        """Brings a kept output into the stream: added, or blended as sigmoid(gate) of x and the rest of the skip."""
        kept = self.skip_weights[skip].to(x.dtype) * kept
        if not self.config.skip_gates_enabled:
            return x + kept
        return torch.lerp(kept, x, torch.sigmoid(self.skip_gates[skip]).to(x.dtype))

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Optimizer group -> name -> parameter; every parameter is in exactly one group."""
        groups: dict[str, dict[str, nn.Parameter]] = {"matrix": {}, "embed": {}, "scalar": {}, "fitted": {}}
        for name, parameter in self.named_parameters():
            groups[parameter_table(self.config)[name].group][name] = parameter
        return groups

    def unused(self, plan: tuple[Visit, ...]) -> set[str]:
        """Names of the parameters that get no gradient: the skip connections of the loops, if a plan has none, and what
        is fitted after training."""
        used = {visit.skip for visit in plan}
        unused = [skip for skip in range(len(self.skip_weights)) if skip not in used]
        names = {f"{kind}.{skip}" for kind in ("skip_weights", "skip_gates") for skip in unused}
        return (names & dict(self.named_parameters()).keys()) | self.groups()["fitted"].keys()

    def arrays(self) -> dict[str, np.ndarray]:
        """Every parameter as a float32 array."""
        return {name: parameter.detach().cpu().numpy() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load(self, arrays: Mapping[str, Tensor | np.ndarray]) -> None:
        """Sets every parameter. Raises UserError when names or shapes do not match this configuration."""
        named = dict(self.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        if {name: tuple(array.shape) for name, array in arrays.items()} != shapes:
            odd = sorted(named.keys() ^ arrays.keys()) or ["shapes"]
            raise UserError(f"weights of another configuration (differing: {', '.join(odd[:4])}); set the same values")
        for name, parameter in named.items():
            parameter.copy_(
                torch.as_tensor(np.array(arrays[name]) if isinstance(arrays[name], np.ndarray) else arrays[name])
            )


class Program:
    """The one model of a process and its forward pass, compiled for each use: PyTorch compiles anew for another model.

    `train` takes packed rows of training text, `score` padded rows of windows without gradients, `adapt` batches of
    windows with adapters. Their arguments are those of GPT.forward. All that they will meet is compiled before a clock
    runs: Trainer.warm_up, warm_up_score, warm_up_adapt.
    """

    def __init__(self, config: Config, run: Run):
        self.config, self.run = config, run
        self.in_clock = 0  # graphs compiled while a clock of the challenge ran

    @functools.cached_property
    def model(self) -> GPT:
        return GPT(self.config, self.run)

    @functools.cached_property
    def train(self) -> Callable:
        return self.compiled("train")

    @functools.cached_property
    def score(self) -> Callable:
        return self.compiled("score")

    @functools.cached_property
    def adapt(self) -> Callable:
        return self.compiled("adapt")

    def compiled(self, use: str) -> Callable:
        if not compiles(self.config, self.run):
            return self.model
        forward = maybe_compile(GPT.forward, use, self.config, self.run)

        def call(
            inputs: Tensor, targets: Tensor, plan: tuple, segments: Segments | None = None, lora: Lora | None = None
        ):
            if segments:
                any_size(segments.cu_seqlens, 0)
            if lora:
                for tensor in (inputs, targets):
                    any_size(tensor, 0, 1)
                for factor in itertools.chain(*lora.factors.values()):
                    any_size(factor, 0)
            return forward(self.model, inputs, targets, plan, segments, lora)

        return call

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """What runs inside should compile nothing; `in_clock` says how much it did."""
        before = COMPILES.graphs()
        yield
        self.in_clock += COMPILES.graphs().since(before).compiled


# ------------------------------------------------------------------------------------------------------------
# OPTIMIZER
#
# Gradients of this rank's rows become updated weights, equal on every rank. Gradients are summed, not averaged:
# the loss is divided by the global number of tokens, so rows may be dealt unevenly. Nothing here depends on the
# number of ranks but the order of floating-point sums.
# ------------------------------------------------------------------------------------------------------------


def lr_multiplier(progress: float, step: int, config: Config) -> float:
    """Factor on all learning rates: 1, then linear to 0 over the last WARMDOWN_FRAC, never below MIN_LR.

    With the defaults: 1 until progress 0.25, 0.5 at 0.625, 0.10 from 0.925 on. WARMDOWN_ITERS is that fraction in
    steps: of as many as there will be in all at the speed so far, step / progress.
    """
    expected = math.inf if config.max_wallclock_seconds else config.iterations  # before a clock has shown the speed
    total = step / progress if step and progress else expected
    frac = config.warmdown_iters / total if config.warmdown_iters else config.warmdown_frac
    if progress < 1 - frac or not frac:
        return 1.0
    return max((1 - progress) / frac, config.min_lr)


def muon_momentum(step: int, config: Config) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over the ramp, by step: 0.92 at 0, 0.97 at 1500."""
    ramp = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps else 1.0
    return (1 - ramp) * config.muon_momentum_warmup_start + ramp * config.muon_momentum


POLAR_EXPRESS = (  # (a, b, c) of each iteration X <- a X + (b S + c S^2) X, S = X X^T (arXiv:2505.16932)
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


CLASSIC = ((3.4445, -4.7750, 2.0315),) * 5  # the same coefficients in each iteration (Muon)


def orthogonalize(
    update: Tensor,
    transposed: Tensor,
    steps: int,
    polar: bool = True,
    unit_rows: bool = True,
    symmetric_product: Callable = plain_symmetric,
) -> Tensor:
    """Each matrix of (n, rows, cols), rows <= cols, with its singular values moved close to 1, in the input's dtype.

    With unit_rows, rows are first brought to unit length (MuonEq-R); a matrix that came in transposed, as `transposed`
    (n,) says, has its columns brought to unit length instead. In exact arithmetic, singular values in [0.003, 1] of the
    Frobenius-normalised matrix end in [0.859, 1.141] after 5 polar steps; those of the classic ones in [0.68, 1.21].
    """
    x = update
    if unit_rows:
        length = torch.where(
            transposed.view(-1, 1, 1), x.float().norm(dim=1, keepdim=True), x.float().norm(dim=2, keepdim=True)
        )
        x = x / length.clamp_min(1e-7).to(x.dtype)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for a, b, c in (POLAR_EXPRESS if polar else CLASSIC)[:steps]:
        s = symmetric_product(x)
        x = torch.baddbmm(x, symmetric_product(s, s, c, b), x, beta=a)
    return x


class Stack(NamedTuple):
    """Banks whose matrices have one shape once those taller than wide are transposed: exchanged together."""

    names: list[str]
    transposed: Tensor  # (n,) bool: which matrices of this rank's share are transposed
    by_head: Tensor  # (m,) numbers of those matrices of the share that are orthogonalised head by head
    whole: Tensor  # (n - m,) numbers of the others
    share: int  # matrices per rank; the last shares are filled up with zero matrices
    momentum: Tensor  # (share, rows, cols) in the run's dtype


class Muon:
    """Momentum, orthogonalised: M <- mu M + G;  X = orthogonal(G + mu M);  W <- (1 - lr wd) W - lr s X, with
    s = sqrt(max(1, rows / cols)).

    A step has three phases. Reduce: gradients are summed over ranks, and each rank gets its share of every stack of
    banks (`gradient_shares`). Compute: it orthogonalises its share (`direction`). Gather: the updates of all ranks come
    together and are applied, each stack's while the next one is computed (`step`).
    """

    def __init__(self, banks: dict[str, nn.Parameter], config: Config, run: Run, symmetric: Callable = plain_symmetric):
        self.banks, self.run, self.config = banks, run, config
        polar, unit_rows = config.polar_express_ns, config.muon_row_normalize
        how = (config.muon_backend_steps, polar, unit_rows, symmetric)
        self.orthogonalize = maybe_compile(
            lambda update, transposed: orthogonalize(update, transposed, *how), "muon", config, run
        )
        shapes: dict[tuple[int, int], list[str]] = {}
        for name, bank in banks.items():
            shapes.setdefault((min(bank.shape[1:]), max(bank.shape[1:])), []).append(name)
        self.stacks = [self.stack(names, shape) for shape, names in shapes.items()]

    def stack(self, names: list[str], shape: tuple[int, int]) -> Stack:
        device = self.banks[names[0]].device
        transposed = torch.tensor([self.is_tall(name) for name in names for _ in self.banks[name]], device=device)
        heads = torch.tensor([headed for name in names for headed in self.has_heads(name)], device=device)
        share = -(-len(transposed) // self.run.world_size)
        transposed, heads = (self.padded(kind, share)[self.run.rank * share :][:share] for kind in (transposed, heads))
        momentum = torch.zeros(share, *shape, dtype=self.run.dtype, device=device)
        return Stack(names, transposed, heads.nonzero()[:, 0], (~heads).nonzero()[:, 0], share, momentum)

    def is_tall(self, name: str) -> bool:
        return self.banks[name].size(1) > self.banks[name].size(2)

    def has_heads(self, name: str) -> list[bool]:
        """Of each matrix of a bank: whether its rows are heads, each to be orthogonalised alone (MUON_PER_HEAD)."""
        kinds = [m.half for kind, m in MATRICES.items() if kind in ("attn.q", "attn.k", "attn.v") and m.bank == name]
        wanted = kinds if self.config.muon_per_head else []
        return [row // self.config.num_layers in wanted for row in range(len(self.banks[name]))]

    def direction(self, update: Tensor, stack: Stack) -> Tensor:
        """This rank's share of a stack (n, rows, cols), orthogonalised; with MUON_PER_HEAD, q, k and v head by head.

        Example: 22 matrices (512, 512), 11 of them queries of 8 heads. Those 11 are cut into 88 matrices (64, 512) that
        are orthogonalised alone and put together again; the other 11 (attention outputs) are orthogonalised whole.
        """
        if not len(stack.by_head):
            return self.orthogonalize(update, stack.transposed)
        heads = update[stack.by_head].unflatten(1, (-1, self.config.head_dim))  # (m, heads, head_dim, cols)
        turned = self.orthogonalize(heads.flatten(0, 1), stack.transposed.new_zeros(heads.shape[:2].numel()))
        result = torch.empty_like(update)
        result[stack.by_head] = turned.unflatten(0, heads.shape[:2]).flatten(1, 2)
        if len(stack.whole):
            result[stack.whole] = self.orthogonalize(update[stack.whole], stack.transposed[stack.whole])
        return result

    def padded(self, full: Tensor, share: int) -> Tensor:
        missing = share * self.run.world_size - len(full)
        return torch.cat([full, full.new_zeros(missing, *full.shape[1:])]) if missing else full

    def join(self, stack: Stack, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors of the banks' shapes, by name -> one tensor (ranks * share, rows, cols)."""
        parts = [tensors[name].mT if self.is_tall(name) else tensors[name] for name in stack.names]
        return self.padded(torch.cat([part.to(self.run.dtype) for part in parts]), stack.share)

    def split(self, stack: Stack, full: Tensor) -> dict[str, Tensor]:
        """The inverse of join."""
        sizes = [len(self.banks[name]) for name in stack.names]
        parts = zip(stack.names, full[: sum(sizes)].split(sizes))
        return {name: part.mT if self.is_tall(name) else part for name, part in parts}

    def gradient_shares(self) -> list[Tensor]:
        """This rank's matrices of the summed gradients, stack by stack."""
        gradients = {name: bank.grad for name, bank in self.banks.items()}
        travelling = [self.run.sum_shards(self.join(stack, gradients)) for stack in self.stacks]
        return [arrived(*shard) for shard in travelling]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], lr: float, momentum: float) -> None:
        """One update; `gradients` as from gradient_shares."""
        travelling = []
        for share, stack in zip(gradients, self.stacks):
            stack.momentum.mul_(momentum).add_(share)
            update = self.direction(share.add(stack.momentum, alpha=momentum), stack)
            travelling.append(self.run.gather_shards(update))  # while the next stack is orthogonalised
        for stack, shards in zip(self.stacks, travelling):
            for name, update in self.split(stack, arrived(*shards)).items():
                bank = self.banks[name]
                scale = math.sqrt(max(1.0, bank.size(1) / bank.size(2)))
                bank.mul_(1 - lr * self.config.muon_wd).add_(update.to(bank.dtype), alpha=-lr * scale)

    def arrays(self) -> dict[str, Tensor]:
        """The momentum of whole banks, float32, whatever the number of ranks. Collective."""
        arrays = {}
        for stack in self.stacks:
            arrays |= self.split(stack, arrived(*self.run.gather_shards(stack.momentum)).float())
        return {name: arrays[name].contiguous() for name in self.banks}

    def load(self, arrays: Mapping[str, Tensor]) -> None:
        for stack in self.stacks:
            full = self.join(stack, {name: torch.as_tensor(arrays[name]) for name in stack.names})
            stack.momentum.copy_(full[self.run.rank * stack.share :][: stack.share])


class Optimizer:
    """All optimizers of a model, the exchange of gradients, and the clipping by their global norm."""

    def __init__(self, model: GPT, config: Config, run: Run):
        groups = model.groups()
        self.config, self.run, self.model = config, run, model
        self.muon = Muon(groups["matrix"], config, run, model.kernels.symmetric)
        self.replicated = groups["embed"] | groups["scalar"]
        embed = dict(params=list(groups["embed"].values()), base_lr=config.tied_embed_lr, weight_decay=config.embed_wd)
        scalar = dict(params=list(groups["scalar"].values()), base_lr=config.scalar_lr, weight_decay=config.adam_wd)
        betas = (config.beta1, config.beta2)
        self.adamw = torch.optim.AdamW([embed, scalar], lr=0.0, betas=betas, eps=config.adam_eps, fused=True)

    @torch.no_grad()
    def exchange(self, plan: tuple[Visit, ...], extra: list[float | Tensor]) -> tuple[list[Tensor], Tensor]:
        """Sums all gradients over ranks and clips them to the global norm; sums the `extra` numbers along.

        A rank without rows contributes zeros. Parameters that `plan` does not use keep no gradient at all, so that
        the optimizer leaves them alone, decay included.
        Returns (this rank's Muon gradients, a vector of the summed extras and the norm before clipping).
        """
        unused = self.model.unused(plan)
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None and name not in unused:
                parameter.grad = torch.zeros_like(parameter)
        shares = self.muon.gradient_shares()
        used = [parameter for parameter in self.replicated.values() if parameter.grad is not None]
        numbers = torch.zeros(len(extra), device=self.run.device)
        for slot, number in zip(numbers, extra):
            slot.fill_(number)  # a copy from the host would wait for the device
        flat = self.run.sum_(torch.cat([*(parameter.grad.flatten() for parameter in used), numbers]))
        for parameter, part in zip(used, flat.split([p.numel() for p in used] + [len(extra)])):
            parameter.grad = part.view_as(parameter)
        numbers_at = len(flat) - len(extra)
        square = self.run.sum_(sum(share.float().square().sum() for share in shares))
        norm = (square + flat[:numbers_at].square().sum()).sqrt()
        if self.config.grad_clip_norm:
            factor = (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(shares, factor.to(self.run.dtype))
            torch._foreach_mul_([parameter.grad for parameter in used], factor)
        return shares, torch.cat([flat[numbers_at:], norm.view(1)])

    def step(self, gradients: list[Tensor], multiplier: float, momentum: float) -> None:
        """Updates every parameter that has a gradient, and drops the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * multiplier
        self.adamw.step()
        self.muon.step(gradients, self.config.matrix_lr * multiplier, momentum)
        self.model.zero_grad(set_to_none=True)

    def arrays(self) -> dict[str, Tensor]:
        """Every buffer by name, the same for any number of ranks. Collective."""
        arrays = {f"muon.{name}": kept for name, kept in self.muon.arrays().items()}
        for name, parameter in self.replicated.items():
            state = self.adamw.state.get(parameter, {})
            arrays |= {f"adamw.{key}.{name}": value for key, value in state.items()}
        return arrays

    def load(self, arrays: Mapping[str, Tensor]) -> None:
        """Sets every buffer; those that are not named start anew."""
        self.muon.load({name: arrays[f"muon.{name}"] for name in self.muon.banks})
        self.adamw.state.clear()
        for name, parameter in self.replicated.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"adamw.step.{name}" in arrays:
                values = [torch.as_tensor(arrays[f"adamw.{key}.{name}"]).clone() for key in keys]
                self.adamw.state[parameter] = {k: v.to(self.run.device) for k, v in zip(keys, values)}


# ------------------------------------------------------------------------------------------------------------
# SCORE
#
# A model and the validation stream become three sums: nats, tokens, bytes. One planner cuts documents into
# windows for plain, sliding and adaptive scoring; every target lies in exactly one window's scored part.
# ------------------------------------------------------------------------------------------------------------


def plan_windows(
    num_targets: int, context: int, stride: int, first: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """Yields (begin, first_scored, end): read inputs begin..end-1, score targets first_scored..end-1.

    The first window scores `first` targets (default: the context), each later one `stride`, the last one what is
    left. A window reads at most `context` inputs and begins where a full window would, so the common part of all
    documents lines up. stride == context is plain scoring, stride < context sliding, first == stride adaptation.
    """
    scored, step = 0, first or context
    while scored < num_targets:
        yield max(0, scored + step - context), scored, min(scored + step, num_targets)
        scored, step = scored + step, stride


OCTAVES = 24  # of positions in a document: 1, 2..3, 4..7 and so on


def position_octave(validation: Validation, positions: np.ndarray) -> np.ndarray:
    """Of stream positions of targets (n,): floor(log2(distance to the begin of the document)), the last one for all
    that lies beyond."""
    starts = validation.documents[:, 0]
    distance = positions - starts[np.searchsorted(starts, positions) - 1]
    return np.minimum(np.frexp(distance)[1] - 1, OCTAVES - 1)


class Tally:
    """What has been scored so far, and a ledger of it: how often each token of the stream was a target."""

    def __init__(self, validation: Validation):
        self.validation = validation
        self.document_nats = np.zeros(len(validation.documents))
        self.octave_nats = np.zeros(OCTAVES)  # by position in the document
        self.times = np.zeros(len(validation.tokens), np.uint8)
        self.learned = 0  # targets that a weight update has used after their score
        self.learned_early = 0  # and before it, which only TTT_KIND=pre_eval_illegal does

    def add(self, nll: Tensor, positions: Tensor | np.ndarray) -> None:
        """Adds nats (n,) of the targets at these stream positions (n,); summed in float64."""
        positions = np.asarray(positions)
        document = np.searchsorted(self.validation.documents[:, 0], positions) - 1  # its first token is no target
        nats = nll.detach().double().cpu().numpy()
        np.add.at(self.document_nats, document, nats)
        self.octave_nats += np.bincount(position_octave(self.validation, positions), nats, OCTAVES)
        np.add.at(self.times, positions, 1)

    def learn_from(self, positions: Tensor | np.ndarray, times: np.ndarray) -> None:
        """To be called before an update, with the targets that it uses: stops the run if `times` has one unscored."""
        positions = np.asarray(positions)
        if not times[positions].all():
            raise RuntimeError(f"rule broken: target {positions[times[positions] == 0][0]} used before its score")
        self.learned += positions.size

    def over_ranks(self, run: Run) -> "Tally":
        """The tally of all ranks together. Collective."""
        total = Tally(self.validation)
        sums = [*self.document_nats, *self.octave_nats, self.learned, self.learned_early]
        summed = run.sum_(torch.tensor(sums, dtype=torch.float64).to(run.device))
        *nats, total.learned, total.learned_early = summed.tolist()
        total.document_nats, total.octave_nats = np.split(np.array(nats), [len(self.document_nats)])
        total.times = run.sum_(torch.from_numpy(self.times).to(run.device, copy=True)).cpu().numpy()
        return total

    @property
    def nats(self) -> float:
        return float(self.document_nats.sum())

    @property
    def tokens(self) -> int:
        return int(self.times.sum(dtype=np.int64))

    @property
    def bytes(self) -> int:
        return int((self.validation.bytes.numpy() * self.times).sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        """Bits per byte of text."""
        return self.nats / math.log(2) / max(self.bytes, 1)


def write_documents(path: Path, tallies: Mapping[str, Tally]) -> None:
    """A line for each validation document, in stream order, so that scores can be compared document by document: its
    first position in the stream, its targets, their bytes, and its nats in each kind of score."""
    validation = next(iter(tallies.values())).validation
    starts, counts = validation.documents.T
    bytes_before = np.append(0, validation.bytes.numpy().cumsum())
    sizes = bytes_before[starts + 1 + counts] - bytes_before[starts + 1]
    rows = zip(starts, counts, sizes, *(tally.document_nats for tally in tallies.values()))
    write_table(path, "position,tokens,bytes," + ",".join(tallies), rows)


def write_positions(path: Path, tallies: Mapping[str, Tally]) -> None:
    """A line for each octave of positions in a document that occurs, the first target having position 1: its first
    position, its targets, their bytes, and their nats in each kind of score, summed over documents."""
    validation = next(iter(tallies.values())).validation
    octaves = position_octave(validation, np.arange(1, len(validation.tokens)))
    tokens = np.bincount(octaves, minlength=OCTAVES)
    sizes = np.bincount(octaves, validation.bytes[1:].numpy(), OCTAVES).astype(np.int64)
    rows = zip(2 ** np.arange(OCTAVES), tokens, sizes, *(tally.octave_nats for tally in tallies.values()))
    write_table(path, "first,tokens,bytes," + ",".join(tallies), [row for row in rows if row[1]])


class Window(NamedTuple):
    """A stretch of the validation stream: inputs begin..end-1 are read, the targets from first_scored on count."""

    begin: int
    first_scored: int
    end: int


def windows_inside(documents: np.ndarray, context: int, stride: int) -> list[Window]:
    """The windows of all documents (n, 2), in stream order and stream positions."""
    return [
        Window(start + begin, start + first, start + end)
        for start, count in documents.tolist()
        for begin, first, end in plan_windows(count, context, stride)
    ]


def fill_rows(windows: list[Window], limit: int) -> list[list[Window]]:
    """Consecutive windows grouped into rows of at most `limit` tokens."""
    rows, room = [], 0
    for window in windows:
        length = window.end - window.begin
        if length > room:
            rows.append([])
            room = limit
        rows[-1].append(window)
        room -= length
    return rows


class Evaluation:
    """A pass over the validation stream: what is scored, by which model, and what has been scored so far."""

    def __init__(self, program: Program, validation: Validation, log: Log):
        self.program, self.validation, self.log = program, validation, log
        self.config, self.run = program.config, program.run
        self.plan, self.tally = layer_plan(program.config, looping=True), Tally(validation)

    @property
    def stretches(self) -> np.ndarray:
        """What windows do not reach across (n, 2): documents, or without VARLEN_ATTN only the ends of the stream."""
        whole = np.array([[0, len(self.validation.tokens) - 1]])
        return self.validation.documents if self.config.varlen_attn else whole

    def row(self, windows: list[Window], pad_to: int) -> tuple[Row, np.ndarray]:
        """Windows as one packed row, one segment each, and the stream positions (T,) of its targets.

        A row is padded to `pad_to` tokens with segments whose targets are at position 0, which is no target.
        """
        tokens, context = self.validation.tokens, self.config.eval_seq_len
        lengths = np.array([window.end - window.begin for window in windows], np.int64)
        padding = max(pad_to - lengths.sum(), 0)
        if padding:
            lengths = np.append(lengths, cut_lengths(np.array([padding]), context))
        inputs = np.concatenate([np.arange(w.begin, w.end) for w in windows] + [np.zeros(padding, np.int64)])
        targets = inputs + 1
        targets[len(targets) - padding :] = 0
        ids = (move(tokens[positions][None], self.run.device) for positions in (inputs, targets))
        return Row(*ids, pack_segments(lengths, context, self.run)), targets

    @torch.no_grad()
    def score_windows(self, windows: Iterable[Window], quiet: bool = False) -> None:
        """Tallies this rank's share of the windows.

        Rows are formed before they are dealt to ranks, so the sums do not depend on the number of ranks.
        """
        run, log = self.run, Log(None) if quiet else self.log
        rows = fill_rows(list(windows), self.config.score_row_tokens)
        for part in log.bar(rows[run.rank :: run.world_size], "score"):
            row, positions = self.row(part, self.config.score_row_tokens if run.padded else 0)
            nll = self.program.score(row.inputs, row.targets, self.plan, row.segments)[0].cpu()
            counted = np.concatenate([np.arange(w.begin, w.end) >= w.first_scored for w in part])
            counted = np.append(counted, np.zeros(len(positions) - len(counted), bool))
            self.tally.add(nll[torch.from_numpy(counted)], positions[counted])

    def score(self, stride: int) -> Tally:
        """Scores every target of the stream once, with windows of EVAL_SEQ_LEN inside its stretches: the tally of all
        ranks."""
        self.score_windows(windows_inside(self.stretches, self.config.eval_seq_len, stride))
        return self.tally.over_ranks(self.run)


def noise_validation(config: Config, documents: int, count: int) -> Validation:
    """A validation split of random ids: documents of `count` targets."""
    tokens = torch.from_numpy(NoiseStream(config.vocab_size).read(0, documents * count + 1))
    table = np.array([[number * count, count] for number in range(documents)])
    return Validation(tokens, torch.zeros_like(tokens), table)


def warm_up_score(program: Program) -> None:
    """Compiles the scoring of a row of windows, on every rank."""
    context, rows = program.config.eval_seq_len, program.run.world_size
    per_row = -(-program.config.score_row_tokens // context)
    Evaluation(program, noise_validation(program.config, rows * per_row, context), Log(None)).score(context)


# ------------------------------------------------------------------------------------------------------------
# HINTS
#
# Text repeats itself. Where the last tokens have stood together before, the token that followed them is a hint, and
# the tilt raises its logit (#1145, #2135). A hint may count only what has been scored before its target: text of its
# own document, and documents of earlier rounds (see ADAPT). How far hints of the own document are believed is learnt.
# ------------------------------------------------------------------------------------------------------------


def window_names(tokens: np.ndarray, length: int) -> np.ndarray:
    """Numbers (n - length + 1,) int32 of all windows of `length` tokens, equal just where the windows are; -1 marks
    windows that occur once, except at length 1.

    Windows grow by joining two shorter ones, which may overlap; a window with a part that occurs once occurs once, so
    each join sorts only what still repeats.
    """
    names, span = tokens.astype(np.int32), 1
    while span < length:
        step = min(span, length - span)
        left, right = names[:-step], names[step:]
        repeated = np.flatnonzero((left >= 0) & (right >= 0))
        keys = left[repeated].astype(np.int64) << 32 | right[repeated]
        order = np.argsort(keys)
        keys = keys[order]
        first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        once = first & np.append(first[1:], True)[: len(keys)]
        names = np.full(len(left), -1, np.int32)
        names[repeated[order]] = np.where(once, -1, np.cumsum(first, dtype=np.int32))
        span += step
    return names


def run_starts(*keys: np.ndarray) -> np.ndarray:
    """Of each element the index of the first one of its run: neighbours that agree in all keys, each (n,)."""
    changes = functools.reduce(np.logical_or, (key[1:] != key[:-1] for key in keys))
    first = np.append(True, changes)[: len(keys[0])]
    return np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))


def leaders(
    start: np.ndarray, count: np.ndarray, least: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each element, from the elements before it in its run: which one has raised the largest count last, and to how
    much. A run begins with the leader `first` and its count `least`; all (n,), `start` as from run_starts.

    Example, one run with least 0 and first -1: counts 1 1 2 1 3 have the leaders -1 0 0 2 2 with counts 0 1 1 2 2.
    """
    index, scale = np.arange(len(count)), len(count) + 1  # one run's heights stay below the next one's
    height = np.maximum.accumulate(start * scale + np.maximum(count, least))
    before = np.where(index > start, np.append(0, height[:-1]) - start * scale, least)
    last = np.append(-1, np.maximum.accumulate(np.where(count > before, index, -1))[:-1])
    return np.where(last >= start, last, first), before


def token_hints(
    ids: np.ndarray, document: np.ndarray, turn: np.ndarray, order: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Guesses for tokens whose last order - 1 predecessors have stood together before (PR #2135, exact tables).

    ids (n,) < 2^31; document (n,), rising along the stream; turn (n,), equal inside a document: the turn in which it is
    scored. order >= 2, threshold in (0, 1]. Returns (k,) ascending positions of targets, and (k,) positions of the
    tokens that are the hints. Of the tokens that followed the same context, the hint is the most frequent one, on ties
    the one that led first; it is given where its share is at least `threshold`. Contexts lie inside a document. What
    counts is what came earlier in the target's own document, and documents of earlier turns, in the order of turns.

    A table is never built. Occurrences are sorted by context, then time; counts are places in runs of equal ones, and
    leaders are running maxima (`leaders`). First as if each occurrence saw all before it: that is right at the begin of
    a turn. Then once more inside each document, from the state at the begin of its turn on.
    """
    length, share = order - 1, Fraction(str(threshold)).limit_denominator()
    assert order >= 2, order
    names = window_names(ids[:-1], length) if len(ids) > length else np.zeros(0, np.int32)
    begin = np.flatnonzero(names >= 0)
    begin = begin[document[begin] == document[begin + length]]
    begin = begin[np.argsort(turn[begin], kind="stable")]
    begin = begin[np.argsort(names[begin], kind="stable")]  # by context, then time
    if not len(begin):
        return begin, begin
    context, target = names[begin].astype(np.int64), begin + length
    turn, document, index = turn[begin], document[begin], np.arange(len(begin))

    pair = context << 31 | ids[target]
    by_pair = np.argsort(pair, kind="stable")
    pairs, turns, documents = pair[by_pair], turn[by_pair], document[by_pair]
    first, in_document = run_starts(pairs), run_starts(pairs, documents)
    seen_by_all, seen = np.empty_like(pair), np.empty_like(pair)  # occurrences of the pair so far, this one included
    seen_by_all[by_pair] = index - first + 1
    seen[by_pair] = run_starts(pairs, turns) - first + index - in_document + 1

    first, in_turn, in_document = run_starts(context), run_starts(context, turn), run_starts(context, document)
    contexts = in_turn - first + index - in_document  # occurrences of the context that count
    leader, before = leaders(first, seen_by_all, np.zeros_like(index), np.full_like(index, -1))
    leader, before = leaders(in_document, seen, before[in_turn], leader[in_turn])
    sure = (contexts > 0) & (share.denominator * before >= share.numerator * contexts)
    positions, hints = target[sure], target[leader[sure]]
    ascending = np.argsort(positions)
    return positions[ascending], hints[ascending]


def hint_sources(config: Config) -> list[tuple[bool, int]]:
    """(inside the document only, order) of each kind of hint. The first one wins: the own document's longest context,
    then shorter ones, then own document and earlier ones together."""
    return [(True, order) for order in config.document_orders] + [(False, config.token_order)]


def hint_table(
    tokens: np.ndarray, document: np.ndarray, turn: np.ndarray, sources: list[tuple[bool, int]], threshold: float
) -> Tensor:
    """For each position the hinted id or -1, and its source as a number of `sources`: (n, 2) int32. Else as
    token_hints."""
    # Other ids in each document, so that no context stands in two.
    own = np.unique(document.astype(np.int64) << 32 | tokens, return_inverse=True)[1]

    def hints(source: tuple[bool, int]) -> tuple[np.ndarray, np.ndarray]:
        inside, order = source
        return token_hints(own if inside else tokens, document, turn, order, threshold)

    table = torch.full((len(tokens), 2), -1, dtype=torch.int32)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(hints, sources))
    for source, (positions, places) in reversed(list(enumerate(found))):
        entries = np.stack([tokens[places].astype(np.int32), np.full(len(places), source, np.int32)], 1)
        table[torch.from_numpy(positions)] = torch.from_numpy(entries)
    return table


def tilt(nll: Tensor, ids: Tensor, boost: float | Tensor) -> Tensor:
    """Nats of a target when the hinted token's logit is raised by `boost` (#1145), one number or one for each target.

    nll, ids (..., 2): of the target and of the hint (id -1: none). p'(v) = p(v) e^(boost [v = hint]) / Z with
    Z = 1 + q (e^boost - 1) and q = p(hint): a distribution again, whatever the target turns out to be, as long as the
    boost does not depend on it.
    """
    target, hint = ids.unbind(-1)
    nats, q = nll[..., 0].double(), torch.exp(-nll[..., 1].double()).clamp(max=1)
    boost = torch.as_tensor(boost, dtype=torch.float64)
    tilted = nats - boost * (target == hint) + torch.log1p(q * torch.expm1(boost))
    return torch.where(hint >= 0, tilted, nats)


def hint_features(nll: Tensor) -> Tensor:
    """Nats of hints (...) -> (..., 2) float64: 1 and the logit of their probability."""
    logq = -nll.double().clamp(1e-6, 40)
    return torch.stack([torch.ones_like(logq), logq - torch.log(-torch.expm1(logq))], -1)


def newton_sums(x: Tensor, boost: Tensor, hit: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradient (groups, 2) and curvature (groups, 2, 2) of the nats of `hit` (n,) under the logistic of logit +
    `boost`, by the weights of the features x (n, 2); `group` (n,) says whose weights."""
    p = 1 / (1 + torch.exp(-x[:, 1] - boost))  # torch.sigmoid's last bit depends on what stands beside an element
    gradient = x.new_zeros(groups, 2).index_add_(0, group, (p - hit.double())[:, None] * x)
    outer = (p * (1 - p))[:, None, None] * x[:, :, None] * x[:, None, :]
    return gradient, x.new_zeros(groups, 2, 2).index_add_(0, group, outer)


PRIOR_HINTS = 10.0  # curvature to begin with: how many hints the first weights are worth
LARGEST_BOOST = 8.0  # of those that are learnt, either way


def fit_boosts(nll: Tensor, sources: Tensor, hit: Tensor, count: int, run: Run) -> Tensor:
    """Weights (count, 2) under which hints would have been believed as far as they came true: a logistic regression
    for each source, by Newton steps on the hints of all ranks.

    nll (n,): nats of hints; sources (n,) < count; hit (n,): whether they came true. Collective. Full steps diverge
    where the model finds unlikely what comes true, so a step that would move boosts by at most r is shortened to
    log(1 + r) / r of its length, with which the loss falls (generalised self-concordance, Sun and Tran-Dinh 2019).
    """
    x, weights = hint_features(nll), torch.zeros(count, 2, dtype=torch.float64)
    ridge = PRIOR_HINTS * torch.eye(2, dtype=torch.float64)
    extremes = hint_features(torch.tensor([0.0, math.inf]))
    for _ in range(30):
        sums = newton_sums(x, (x * weights[sources]).sum(-1), hit, sources, count)
        sums = run.sum_(torch.cat([part.flatten() for part in sums]).to(run.device)).cpu()
        gradient, curvature = sums.split([2 * count, 4 * count])
        step = torch.linalg.solve(curvature.view(count, 2, 2) + ridge, gradient.view(count, 2) + weights @ ridge)
        reach = (step @ extremes.T).abs().amax(1, keepdim=True).clamp(min=1e-12)
        weights -= step * torch.log1p(reach) / reach
    return weights


def row_hints(row: Row, config: Config) -> Tensor:
    """hint_table of the targets of a packed row (T, 2), from its own documents alone."""
    tokens = torch.cat([row.inputs[0], row.targets[0, -1:]]).cpu().numpy()
    document = np.cumsum(tokens == BOS_ID)
    sources = [(True, order) for order in config.document_orders]
    return hint_table(tokens, document, np.zeros_like(document), sources, config.token_threshold)[1:].long()


class Boosts:
    """How far the hints of a batch of documents are believed.

    Those of the own document are raised by w0 + w1 logit(q), q being the hint's own probability: a model that knows how
    to copy needs no boost. Its new probability is the logistic of logit(q) + boost, so each source is a logistic
    regression. The first weights are the artifact's (`fit_boosts`, on training text); then every document learns from
    its own hints that have been scored, by one Newton step after each chunk, with the curvature of all its chunks so
    far. Hints of the stream get TOKEN_BOOST (#2135).
    """

    def __init__(self, config: Config, model: GPT, documents: int):
        first = [*(model.hint_prior.tolist() if config.document_orders else []), [config.token_boost, 0.0]]
        self.sources = len(first)
        self.weights = torch.tensor(first, dtype=torch.float64).repeat(documents, 1, 1)  # (documents, sources, 2)
        curvature = PRIOR_HINTS * torch.eye(2, dtype=torch.float64)
        self.curvature = curvature.repeat(documents * self.sources, 1, 1)

    def learnt(self, sources: Tensor) -> Tensor:
        """Which of these sources (any shape; -1: no hint) have weights that are learnt."""
        return (sources >= 0) & (sources < self.sources - 1)

    def boost(self, nll: Tensor, documents: Tensor, sources: Tensor) -> Tensor:
        """Of hints (...): nats, documents, sources -> what is added to their logits (...)."""
        raised = (hint_features(nll) * self.weights[documents, sources.long()]).sum(-1)
        return torch.where(self.learnt(sources), raised.clamp(-LARGEST_BOOST, LARGEST_BOOST), raised)

    def update(self, nll: Tensor, documents: Tensor, sources: Tensor, hit: Tensor) -> None:
        """One step on hints that have been scored, (n,) each: nats, documents, sources, and whether they came true."""
        boost, weights = self.boost(nll, documents, sources), self.weights.view(-1, 2)
        mine, group = torch.unique(documents * self.sources + sources, return_inverse=True)
        gradient, curvature = newton_sums(hint_features(nll), boost, hit, group, len(mine))
        self.curvature[mine] += curvature
        weights[mine] -= torch.linalg.solve(self.curvature[mine], gradient)


class Hints(NamedTuple):
    """What the n-gram tilt needs for a batch of documents."""

    table: Tensor  # (N, 2) int32: hint_table of the stream
    boosts: Boosts


# ------------------------------------------------------------------------------------------------------------
# TRAIN
#
# Shards become a file with the averaged weights and the Hessians: all that the later stages need, so that they
# never read training data. What reads training data happens inside the time budget.
# ------------------------------------------------------------------------------------------------------------


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


class Interrupted(Exception):
    """A signal ended the run; its number is the only argument. What had been reached is on disk."""


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying from them, so that a step can be finished first."""
    noted: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
    before = {kind: signal.signal(kind, lambda number, frame: noted.append(number)) for kind in kinds}
    try:
        yield noted
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def differing(mine: dict[str, Any], theirs: Any) -> str:
    """The settings of a file that are not mine, as `KEY=theirs (now mine)`; empty when all are the same."""
    theirs = theirs if isinstance(theirs, dict) else {}
    odd = [key for key in mine if mine[key] != theirs.get(key)]
    return ", ".join(f"{key.upper()}={shown(theirs.get(key))} (now {shown(mine[key])})" for key in odd)


class Trainer:
    """The training state and the loop over it."""

    def __init__(self, config: Config, run: Run, log: Log, program: Program | None = None):
        self.config, self.run, self.log = config, run, log
        self.program = program or Program(config, run)
        self.stream = TokenStream(config.dataset_dir, "train", config.vocab_size)
        self.validation = load_validation(config)  # only scored, for the log: nothing is ever fitted to it here
        self.model = self.program.model
        run.share_weights(self.model)
        self.optimizer = Optimizer(self.model, config, run)
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.plans = {looping: layer_plan(config, looping) for looping in (False, True)}
        self.step, self.elapsed, self.looping = 0, 0.0, False
        self.collected = 0  # weights in the mean of SWA
        self.history: list[list[float]] = []  # [step, training loss, seconds]
        self.logged = 0, 0.0  # step and seconds of the last line

    def deal(self, numbers: Iterable[int]) -> Iterator[Row]:
        """This rank's share of numbered rows."""
        for number in itertools.islice(numbers, self.run.rank, None, self.run.world_size):
            yield training_row(self.stream, number, self.config, self.run)

    def step_rows(self, step: int) -> list[Row]:
        """This rank's rows of an optimizer step; the rows of a step are the same for any number of ranks."""
        first = step * self.config.rows_per_step
        return list(self.deal(range(first, first + self.config.rows_per_step)))

    def update(
        self, rows: list[Row], looping: bool, multiplier: float, momentum: float, clock: float = 0.0, stop: int = 0
    ) -> list[float]:
        """One optimizer step. Returns [mean loss over the global batch in nats, rank 0's `clock` in seconds, sum of
        `stop` over ranks, norm of the gradient], alike on all ranks."""
        plan, total = self.plans[looping], torch.zeros((), device=self.run.device)
        for row in rows:
            loss = (
                self.program.train(row.inputs, row.targets, plan, row.segments).sum() / self.config.train_batch_tokens
            )
            loss.backward()
            total += loss.detach()
        gradients, numbers = self.optimizer.exchange(plan, [total, clock if self.run.is_main else 0.0, stop])
        self.optimizer.step(gradients, multiplier, momentum)
        if share := self.average_share(multiplier):
            torch._foreach_lerp_(self.average, [p.data for p in self.model.parameters()], share)
        return numbers.tolist()  # the one host sync of a step

    def average_share(self, multiplier: float) -> float:
        """Share of the new weights in the average: constant (EMA), or 1 / n for the n-th weights collected (SWA)."""
        config = self.config
        if not config.swa_enabled:
            return 1 - config.ema_decay
        if multiplier >= config.swa_start_frac or (self.step + 1) % config.swa_every:
            return 0.0
        self.collected += 1
        return 1 / self.collected

    def progress(self) -> float:
        return progress_at(self.step, self.elapsed, self.config)

    def multiplier(self) -> float:
        return lr_multiplier(self.progress(), self.step, self.config)

    def finished(self) -> bool:
        return self.step >= self.config.iterations or self.elapsed >= self.config.train_seconds

    def loop(self) -> None:
        """Trains until the budget or the iterations are used up.

        Raises TrainingDiverged on a loss or gradient that is no number, and Interrupted after a signal, when the step
        has been finished and saved.
        """
        config, begin, saved = self.config, time.monotonic() - self.elapsed, self.elapsed
        with noted_signals() as signals:
            for rows in prefetch(self.step_rows, range(self.step, config.iterations), self.run.device):
                if self.finished():
                    break
                if not self.looping and self.progress() >= config.enable_looping_at and config.num_loops:
                    self.looping = True
                    self.log("looping", step=self.step, progress=self.progress(), visits=len(self.plans[True]))
                multiplier, momentum = self.multiplier(), muon_momentum(self.step, config)
                clock, stop = time.monotonic() - begin, signals[0] if signals else 0
                numbers = self.update(rows, self.looping, multiplier, momentum, clock, stop)
                loss, self.elapsed, stop, norm = numbers
                self.step += 1
                if not math.isfinite(loss) or not math.isfinite(norm):
                    text = f"loss {loss}, gradient {norm} at step {self.step}; lower MATRIX_LR or TIED_EMBED_LR"
                    raise TrainingDiverged(text)
                self.history.append([self.step, loss, self.elapsed])
                self.log_step(multiplier, time.monotonic() - begin)
                if stop or config.checkpoint_seconds and self.elapsed - saved >= config.checkpoint_seconds:
                    saved = self.elapsed
                    self.save_checkpoint()
                if stop:
                    raise Interrupted(signals[0] if signals else signal.SIGTERM)
                if config.val_loss_every and self.step % config.val_loss_every == 0:
                    paused = time.monotonic()
                    tally = self.validate()
                    self.log("validation", step=self.step, val_loss=tally.loss, val_bpb=tally.bpb)
                    begin += time.monotonic() - paused
            late = torch.tensor(float(signals[0] if signals else 0), device=self.run.device)
            if self.run.sum_(late).item():  # it came during the last step
                self.save_checkpoint()
                raise Interrupted(signals[0] if signals else signal.SIGTERM)
        self.run.synchronize()
        self.elapsed = self.run.share(time.monotonic() - begin)

    def log_step(self, multiplier: float, now: float) -> None:
        """A line for the first steps, every TRAIN_LOG_EVERY steps, after 20 seconds without one, and for the last step:
        speed since the line before, and the seconds that are left at the speed of all steps; `now` is the clock."""
        last, (step, loss, seconds) = self.config.iterations, self.history[-1]
        logged, since = self.logged
        if step > 5 and step % self.config.train_log_every and step != last and now - since < 20:
            return
        speed = (step - logged) * self.config.train_batch_tokens / max(now - since, 1e-9)
        progress = max(self.progress(), step / last)
        left = (1 - progress) / progress * now
        values = {"loss": loss, "lr_multiplier": multiplier, "seconds": seconds, "tokens_per_s": round(speed)}
        self.log("train", step=f"{step}/{last}", **values, seconds_left=round(left))
        self.logged = step, now

    def validate(self) -> Tally:
        """Plain score of the current weights."""
        return Evaluation(self.program, self.validation, self.log).score(self.config.eval_seq_len)

    def warm_up(self) -> None:
        """Compiles both plans by WARMUP_STEPS throw-away steps on noise, then undoes everything."""
        if not self.config.warmup_steps:
            return
        start, noise = time.monotonic(), NoiseStream(self.config.vocab_size)
        before = [{name: torch.as_tensor(a).clone() for name, a in arrays.items()} for arrays in self.state()]
        plans = (False, True) if self.config.num_loops else (False,)
        try:
            for step in range(self.config.warmup_steps * len(plans)):
                row = training_row(noise, step, self.config, self.run)
                self.update([row], plans[step // self.config.warmup_steps], 1.0, 0.9)
        finally:
            self.set_state(*before)
        self.log("warm_up", steps=self.config.warmup_steps * len(plans), seconds=time.monotonic() - start)

    def state(self) -> tuple[dict, dict, dict]:
        """All tensors that training changes: weights, their average, optimizer buffers. Collective."""
        names = [name for name, _ in self.model.named_parameters()]
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return weights, dict(zip(names, self.average)), self.optimizer.arrays()

    def set_state(self, weights: Mapping, average: Mapping, optimizer: Mapping) -> None:
        self.model.load(weights)
        names = [name for name, _ in self.model.named_parameters()]
        for kept, name in zip(self.average, names):
            kept.copy_(torch.as_tensor(average[name]))
        self.optimizer.load(optimizer)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint. Data may have moved, but must be the same."""
        rows = {"train_data": self.stream.fingerprint, "row_tokens": self.config.train_row_tokens}
        return self.config.of_stage(TRAIN) | rows

    def save_checkpoint(self) -> None:
        """Everything a restart needs, whatever the number of ranks. The previous file stays until this one is whole."""
        parts = dict(zip(("weights", "average", "optimizer"), self.state()))
        if self.run.is_main:
            arrays = {
                f"{part}/{n}": torch.as_tensor(t).cpu().numpy() for part, ts in parts.items() for n, t in ts.items()
            }
            arrays["history"] = np.array(self.history, float).reshape(-1, 3)
            meta = {
                "step": self.step,
                "elapsed": self.elapsed,
                "looping": self.looping,
                "collected": self.collected,
                "settings": self.settings(),
            }
            save_arrays(self.config.run_dir / "checkpoint.bin", meta, arrays)
        self.log("checkpoint", step=self.step, seconds=self.elapsed)

    def restore_checkpoint(self) -> None:
        """Continues from a checkpoint of this run, if there is one. Raises UserError if it is of other settings."""
        path = self.config.run_dir / "checkpoint.bin"
        size = sum(parameter.numel() for parameter in self.model.parameters())
        limit = HEADER_LIMIT + 16 * size + 24 * self.config.iterations  # four float32 arrays and the history
        found = self.run.on_main(lambda: load_arrays(path, limit) if path.exists() else None)
        if found is None:
            return
        meta, arrays = found
        if odd := differing(self.settings(), meta.get("settings")):
            raise UserError(f"{path}: made with {odd}; set the same values or choose another RUN_ID")
        step, elapsed, looping, collected = (meta.get(key) for key in ("step", "elapsed", "looping", "collected"))
        fitting = type(step) is int and 0 <= step <= self.config.iterations and type(looping) is bool
        fitting = fitting and type(collected) is int and 0 <= collected <= step
        if not fitting or type(elapsed) is not float or not 0 <= elapsed < 1e9:
            raise UserError(f"{path}: step {step}, seconds {elapsed}, looping {looping}; delete this file")
        check_arrays(path, arrays, self.checkpoint_shapes(arrays, step))
        parts: dict[str, dict] = {"weights": {}, "average": {}, "optimizer": {}}
        self.history = arrays.pop("history").tolist()
        for key, array in arrays.items():
            part, name = key.split("/")
            parts[part][name] = torch.from_numpy(array.copy())
        self.set_state(**parts)
        self.step, self.elapsed, self.looping, self.collected = step, elapsed, looping, collected
        self.logged = step, elapsed
        self.log("resumed", step=self.step, seconds=self.elapsed)

    def checkpoint_shapes(self, arrays: Mapping[str, np.ndarray], step: int) -> dict[str, tuple]:
        """The arrays that a checkpoint of this step must have; AdamW's only where the parameter has had an update."""
        named = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        shapes = {f"{part}/{name}": shape for part in ("weights", "average") for name, shape in named.items()}
        shapes |= {f"optimizer/muon.{name}": named[name] for name in self.optimizer.muon.banks}
        for name in self.optimizer.replicated:
            if f"optimizer/adamw.step.{name}" in arrays:
                shapes[f"optimizer/adamw.step.{name}"] = ()
                shapes |= {f"optimizer/adamw.{key}.{name}": named[name] for key in ("exp_avg", "exp_avg_sq")}
        return shapes | {"history": (step, 3)}

    def use_average(self) -> None:
        """Replaces the weights by their average; everything downstream uses it."""
        if not self.config.swa_enabled or self.collected:
            self.model.load(self.state()[1])

    @torch.no_grad()
    def calibrate(self) -> dict[tuple[str, int], Tensor]:
        """What the rows that follow the last training step tell about the model as it will be scored, with averaged
        weights and the looped plan: sets GPT.hint_prior, and returns X^T X of every kind of weight, summed over ranks
        (only GPTQ wants them)."""
        config, first, orders = self.config, self.step * self.config.rows_per_step, self.config.document_orders
        taps = self.taps() if config.quant_scheme == "gptq" else None
        if taps is None and not orders:
            return {}
        seen = [(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool))]
        for row in self.deal(range(first, first + config.gptq_calibration_batches)):
            if orders:
                seen.append(self.priced_hints(row, taps))
            else:
                self.model(row.inputs, row.targets, self.plans[True], row.segments, taps=taps)
        if orders:
            prior = fit_boosts(*map(torch.cat, zip(*seen)), len(orders), self.run)
            self.model.hint_prior.copy_(prior)
            self.log("hint_prior", **{f"order_{order}": w for order, w in zip(orders, prior.tolist())})
        return {key: self.run.sum_(hessian) for key, hessian in taps.hessians.items()} if taps else {}

    def priced_hints(self, row: Row, taps: Taps | None) -> tuple[Tensor, Tensor, Tensor]:
        """The hints of a row, (n,) each: their nats, their sources, and whether they came true. For fit_boosts."""
        hinted, sources = row_hints(row, self.config).unbind(-1)
        ids = torch.stack([row.targets, move(hinted.clamp(min=0)[None], self.run.device)], -1)
        nll = self.model(row.inputs, ids, self.plans[True], row.segments, taps=taps)[0, :, 1].cpu()
        known = hinted >= 0
        return nll[known], sources[known], (hinted == row.targets[0].cpu())[known]

    def taps(self) -> Taps:
        """Zeros for every Hessian, also on a rank without rows."""
        taps = Taps()
        for name, matrix in MATRICES.items():
            if matrix.hessian == name:
                width = getattr(self.model, matrix.bank).size(-1)
                for layer in range(self.config.num_layers):
                    taps.hessians[name, layer] = torch.zeros(width, width, device=self.run.device)
        taps.hessians["head", 0] = torch.zeros(self.config.model_dim, self.config.model_dim, device=self.run.device)
        return taps

    def token_counts(self) -> dict[str, np.ndarray]:
        """How often each id occurs at the head of the training stream: float32 (V,). Only GPTQ wants it."""
        if self.config.quant_scheme != "gptq":
            return {}
        tokens = self.stream.read(0, min(len(self.stream), COUNTED_TOKENS))
        return {"token_counts": np.bincount(tokens, minlength=self.config.vocab_size).astype(np.float32)}


def progress_at(step: int, elapsed: float, config: Config) -> float:
    """From 0 to 1 over the time budget, by rank 0's clock; without one, over the iterations."""
    limit = config.train_seconds
    return min(elapsed / limit if limit < math.inf else step / config.iterations, 1.0)


def write_steps(path: Path, history: list[list[float]], config: Config) -> None:
    """A line for each optimizer step: its loss in nats per token, when it began in seconds on the clock of the
    schedule, its learning-rate multiplier, and 1 where the layers were looped."""
    rows, elapsed = [], 0.0
    for step, loss, seconds in history:
        progress = progress_at(int(step) - 1, elapsed, config)  # as it was before this step
        multiplier = lr_multiplier(progress, int(step) - 1, config)
        looped = bool(config.num_loops) and progress >= config.enable_looping_at
        rows.append((int(step), loss, seconds, multiplier, int(looped)))
        elapsed = seconds
    write_table(path, "step,loss,seconds,lr_multiplier,looped", rows)


def row_choices(config: Config) -> list[int]:
    """Lengths of a row that may stand for ROW_TOKENS, the longest first."""
    longest, unit = config.train_row_tokens, config.train_seq_len if config.loader == "coprime" else 1
    counts = range(config.rows_per_step, min(config.train_batch_tokens // config.train_seq_len, 2**16) + 1)
    rows = (config.train_batch_tokens // count for count in counts if config.train_batch_tokens % count == 0)
    return [row for row in rows if row <= longest and row % unit == 0]


def warm_up_fitting(trainer: Trainer) -> Config:
    """Trainer.warm_up; where memory runs out all the same, again with rows of half the length or less. Returns the
    configuration that the trainer goes on with.

    Not with several ranks: those that have memory left would wait for the others in an exchange.
    """
    while True:
        config, run = trainer.config, trainer.run
        try:
            trainer.warm_up()
            return config
        except torch.OutOfMemoryError:
            shorter = [row for row in row_choices(config) if 2 * row <= config.train_row_tokens]
            if run.world_size > 1 or not shorter:
                raise
        trainer.config = dataclasses.replace(config, row_tokens=shorter[0])
        trainer.model.zero_grad(set_to_none=True)
        trainer.log("warning", reason="out_of_memory_in_the_warm_up", row_tokens=shorter[0])
        torch.cuda.empty_cache()


def train(config: Config, run: Run, log: Log, program: Program) -> dict[str, Any]:
    """The train stage: writes trained.bin (averaged weights and the statistics that GPTQ wants) and returns its part of
    the result."""
    trainer = Trainer(config, run, log, program)
    config = program.config = warm_up_fitting(trainer)
    log(
        "data",
        train_tokens=len(trainer.stream),
        val_tokens=len(trainer.validation.tokens),
        row_tokens=config.train_row_tokens,
    )
    trainer.restore_checkpoint()
    run.synchronize()
    with program.clock():
        trainer.loop()
        run.synchronize()
        trainer.use_average()
        start = time.monotonic()
        hessians, counts = trainer.calibrate(), trainer.token_counts()
        run.synchronize()
        calibration_s = time.monotonic() - start
    train_s = trainer.elapsed + calibration_s
    log("calibrated", hessians=len(hessians), seconds=calibration_s, last_training_read_s=train_s)
    if config.max_wallclock_seconds and train_s > config.max_wallclock_seconds:
        log(
            "warning",
            late_calibration=f"last read of training data at {train_s:.1f}s of {config.max_wallclock_seconds:g}s",
        )
    if run.is_main:
        arrays = trainer.model.arrays()
        arrays |= {f"hessian.{name}.{layer}": h.cpu().numpy() for (name, layer), h in hessians.items()} | counts
        save_arrays(config.run_dir / "trained.bin", {"settings": config.of_stage(TRAIN)}, arrays)
        write_steps(config.run_dir / "steps.csv", trainer.history, config)
        plot_history(trainer.history, config.run_dir / "loss_curve.png")
    del hessians
    tally = trainer.validate()
    log("diagnostic", weights="averaged", val_loss=tally.loss, val_bpb=tally.bpb)
    return {
        "steps": trainer.step,
        "train_tokens": trainer.step * config.train_batch_tokens,
        "train_seconds": train_s,
        "calibration_seconds": calibration_s,
        "tokens_per_s": trainer.step * config.train_batch_tokens / max(trainer.elapsed, 1e-9),
        "train_loss": trainer.history[-1][1] if trainer.history else None,
        "prequant_val_loss": tally.loss,
        "prequant_val_bpb": tally.bpb,
    }


def trained_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The arrays of trained.bin: parameters and, for GPTQ, token counts and one Hessian per layer and kind of input."""
    shapes = dict(parameter_shapes(config))
    widths = {kind: shapes[matrix.bank][-1] for kind, matrix in MATRICES.items() if matrix.hessian == kind}
    if config.quant_scheme == "gptq":
        shapes |= {"hessian.head.0": (config.model_dim,) * 2, "token_counts": (config.vocab_size,)}
        for kind, width in widths.items():
            shapes |= {f"hessian.{kind}.{layer}": (width,) * 2 for layer in range(config.num_layers)}
    return shapes


def load_trained(config: Config) -> dict[str, np.ndarray]:
    """The arrays of trained.bin. Raises UserError when it is damaged, or of other settings."""
    path, shapes = config.run_dir / "trained.bin", trained_shapes(config)
    meta, arrays = load_arrays(path, HEADER_LIMIT + 4 * sum(map(math.prod, shapes.values())))
    if odd := differing(config.of_stage(TRAIN), meta.get("settings")):
        raise UserError(f"{path}: made with {odd}; set the same values or train again")
    check_arrays(path, arrays, shapes)
    return arrays


def plot_history(history: list[list[float]], path: Path) -> None:
    """The loss curve as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([step for step, _, _ in history], [loss for _, loss, _ in history], linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats/token)", title="Training loss")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    pyplot.close(figure)
    write_file(path, picture.getvalue())


# ------------------------------------------------------------------------------------------------------------
# CODER
#
# Integer codes -> bytes, about 1 % fewer than with brotli. Each code is coded with a histogram chosen by its context:
# the scale and mean of its column so far, or a similar earlier row. Histograms count the codes already coded, so the
# file holds none. Interleaved rANS (arXiv:1311.2540, 1402.3392) turns frequencies and codes into bytes. Writer and
# reader run the same model in integer arithmetic, so the bytes are the same on every machine.
#
# With a trellis (trellis-coded quantisation, Marcellin and Fischer 1990; dependent quantisation in VVC) codes lie on
# two grids of the same step, one shifted by half a step. Which grid a code uses follows from the codes above it in its
# column, so the file does not hold it; the error at equal bytes falls by about 1 dB. Without a trellis the same coder
# codes one grid.
# ------------------------------------------------------------------------------------------------------------

RANS_BITS = 14  # the frequencies of a histogram sum to 2^14
RANS_LOW = 1 << 16  # states of lanes stay in [2^16, 2^32) and move words of 16 bits
RANS_RUN = 1 << 15  # codes per lane: a lane's state takes about 3 bytes of the file, a step of all lanes about 15 us
COLUMN_STEPS = 16  # buckets of a column's scale per factor of two
SCALE_ONE = 64  # a mean |code| of 1 in fixed point
SCALES = 13 * COLUMN_STEPS + 3  # all buckets, with an unused one at either end
PREDICTIONS = 16  # buckets of the predicted |code|, for each grid
KINDS = 4  # 0: the prediction is twice the column's mean; 1 to 3: it is an earlier row, 3 for the most similar rows
LEAST_GAIN = 44  # least cosine^2 * columns of a reference: it saves 32 bits, twice the cost of its row number
ALIKE = ((1, 4), (4, 5))  # least cosine^2 of kinds 2 and 3
FIRST_BLOCK, BLOCK_SHARE = 64, 8  # contexts and histograms are renewed when an eighth more codes are known
TRELLIS_SEGMENT = 256  # rows between two starts in state 0, which cost 0.01 dB at this length (at 64: 0.09)
# States -> what is added (XOR) to the next state when q is 1, and when k is odd. These are classical rate-1/2 codes,
# octal 5/2, 13/4 and 23/4: row t has q[t] = q[t-2] ^ p[t-1], q[t-1] ^ q[t-3] ^ p[t-2], or q[t-1] ^ q[t-4] ^ p[t-2],
# where p = k mod 2. 0 states: one grid.
TRELLIS_RULES = {0: (0, 0), 4: (0, 1), 8: (1, 2), 16: (1, 2)}


class Trellis(NamedTuple):
    """The grids of codes, and the rule that says which of them the next code of a column uses.

    With two grids a code is stored as n = 2 k + q: the point k of grid q, in half steps. A column has a state, 0 at the
    first of every TRELLIS_SEGMENT rows of a matrix. The state gives q = state mod 2 and goes on with the parity of k.
    With one grid n is k in whole steps, q is always 0, and so is the state.
    """

    grids: int  # and units of n in a step
    following: np.ndarray  # (2 states,) int64: the next state, by 2 * state + parity of k

    @property
    def dtype(self) -> type:
        return np.int16 if self.grids == 2 else np.int8

    @property
    def largest(self) -> int:
        """The largest |n|."""
        return 127 * self.grids

    @property
    def contexts(self) -> int:
        """Contexts of one grid."""
        return KINDS * SCALES * self.predictions

    @property
    def predictions(self) -> int:
        """Buckets of the predicted |n|."""
        return PREDICTIONS * self.grids

    @property
    def branches(self) -> Tensor:
        """For `plain_trellis`: the two states before each state (ascending), and n mod 4 of the code between them."""
        order = np.argsort(self.following, kind="stable").reshape(-1, 2).T  # 2 * state + parity, by the next state
        return torch.from_numpy(np.stack([order // 2, order % 2 * 2 + order // 2 % 2]))


@functools.cache
def trellis_of(states: int) -> Trellis:
    """The trellis of this many states, a key of TRELLIS_RULES."""
    if not states:
        return Trellis(1, np.zeros(2, np.int64))
    (if_q, if_odd), state, odd = TRELLIS_RULES[states], *np.divmod(np.arange(2 * states), 2)
    q = state & 1
    return Trellis(2, (state >> 1 | q * states // 2) ^ q * if_q ^ odd * if_odd)


class Histograms:
    """Frequencies of one block of codes, by context: (contexts, symbols) int64, each row summing to 2^RANS_BITS."""

    def __init__(self, freq: np.ndarray) -> None:
        self.freq, self.start = freq, freq.cumsum(1) - freq

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """Symbol by context << RANS_BITS | state mod 2^RANS_BITS. Only readers use it."""
        contexts, symbols = self.freq.shape
        return np.repeat(np.tile(np.arange(symbols, dtype=np.uint8), contexts), self.freq.ravel())

    @functools.cached_property
    def pairs(self) -> np.ndarray:
        """Frequency << 16 | first slot, by context * symbols + symbol. Only readers use it."""
        return (self.freq << 16 | self.start).ravel().astype(np.uint64)


class ColumnModel(NamedTuple):
    """How the codes of a group are predicted: matrices of equal shape side by side. Stored in front of the codes."""

    scale_inertia: int  # the scale of all columns counts as this many rows in the scale of each column
    mean_inertia: int  # a mean of 0 counts as this many rows in the mean of each column
    kinds: np.ndarray  # (rows,), see KINDS
    references: np.ndarray  # (rows,): number of the earlier row that predicts this one; 0 for kind 0


class RansWriter:
    """Collects the frequencies of all codes; `finish` encodes them from the last to the first, as rANS requires."""

    def __init__(self) -> None:
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []

    def code(self, symbols: np.ndarray, rows: np.ndarray, histograms: Histograms) -> np.ndarray:
        index = rows * histograms.freq.shape[1] + symbols
        self.runs.append(tuple(table.astype(np.uint16).ravel()[index] for table in (histograms.freq, histograms.start)))
        return symbols

    def finish(self, lanes: int) -> bytes:
        """The final states of the lanes, then the words in the order of reading."""
        x, words = np.full(lanes, RANS_LOW, np.uint64), []
        for freq, start in reversed(self.runs):
            for begin in reversed(range(0, len(freq), lanes)):
                f = freq[begin : begin + lanes].astype(np.uint64)
                s = x[: len(f)]
                full = np.flatnonzero(s >= f << np.uint64(32 - RANS_BITS))
                words.append(s[full].astype("<u2"))
                s[full] >>= np.uint64(16)
                s += s // f * (np.uint64(1 << RANS_BITS) - f) + start[begin : begin + lanes]
        return x.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


class RansReader:
    """Decodes symbols in the order of writing. Raises ValueError for data that end too early or too late."""

    def __init__(self, data: bytes, lanes: int) -> None:
        # frombuffer raises ValueError for too few bytes. `finish` notices states that were out of range.
        self.x = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
        self.words, self.used = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint64), 0

    def code(self, symbols: np.ndarray, rows: np.ndarray, histograms: Histograms) -> np.ndarray:
        """The next len(rows) symbols, each by the histogram of its row. The values in `symbols` are ignored."""
        slots, pairs, symbols = histograms.slots, histograms.pairs, np.empty(len(rows), np.uint8)
        first_slot, first_pair = rows << RANS_BITS, rows * histograms.freq.shape[1]
        mask, half, bits, sixteen = map(np.uint64, ((1 << RANS_BITS) - 1, 0xFFFF, RANS_BITS, 16))
        for begin in range(0, len(rows), len(self.x)):
            step = slice(begin, begin + len(self.x))  # lane i codes the i-th symbol of a step
            s = self.x[: len(rows) - begin]
            slot = s & mask
            symbols[step] = symbol = slots.take(first_slot[step] + slot.view(np.int64))
            pair = pairs.take(first_pair[step] + symbol)
            s >>= bits
            s *= pair >> sixteen
            s += slot - (pair & half)
            empty = np.flatnonzero(s < RANS_LOW)
            words = self.words[self.used : self.used + len(empty)]
            if len(words) < len(empty):
                raise ValueError("cut short")
            s[empty] = s[empty] << sixteen | words
            self.used += len(empty)
        return symbols

    def finish(self) -> None:
        if self.used != len(self.words) or (self.x != RANS_LOW).any():
            raise ValueError("codes and data do not end together")


@functools.cache
def flat_histogram(bits: int) -> Histograms:
    return Histograms(np.full((1, 1 << bits), (1 << RANS_BITS) >> bits))


def code_numbers(coder: RansWriter | RansReader, numbers: np.ndarray, bits: int) -> np.ndarray:
    """Codes numbers below 2^bits with equal frequencies, 7 bits at a time. Returns them; a reader ignores `numbers`."""
    total = np.zeros(len(numbers), np.int64)
    for shift in range(0, bits, 7):
        flat = flat_histogram(min(7, bits - shift))
        total += coder.code(numbers >> shift & flat.freq.size - 1, 0 * total, flat).astype(np.int64) << shift
    return total


def code_column_model(coder: RansWriter | RansReader, model: ColumnModel) -> ColumnModel:
    """Codes the model of a group. A reader uses only its number of rows. Raises ValueError for impossible values."""
    inertias = code_numbers(coder, np.array(model[:2]), 14)
    kinds, references = np.zeros((2, len(model.kinds)), np.int64)
    if code_numbers(coder, np.array([int(model.kinds.any())]), 1)[0]:
        kinds = code_numbers(coder, model.kinds, 2)
        references[kinds > 0] = code_numbers(coder, model.references[kinds > 0], len(kinds).bit_length())
    if not inertias.all() or (references > np.maximum(np.arange(len(kinds)) - 1, 0)).any() or kinds[0]:
        raise ValueError("a setting is out of range")
    return ColumnModel(*inertias.tolist(), kinds, references)


@functools.cache
def scale_buckets() -> np.ndarray:
    """1 + floor(COLUMN_STEPS * log2(v + 1)) for v up to a mean |code| of 127, in exact arithmetic."""
    return np.array([((v + 1) ** COLUMN_STEPS).bit_length() for v in range(127 * SCALE_ONE + 1)])


def context_of(kind: int, scale: np.ndarray, prediction: np.ndarray, trellis: Trellis) -> np.ndarray:
    """Number of the histogram on the first grid; `trellis.contexts` more on the second. With an earlier row as
    prediction the scale is divided into fewer buckets."""
    row = kind * SCALES + (scale // COLUMN_STEPS if kind else scale)
    return row * trellis.predictions + np.minimum(np.abs(prediction), trellis.predictions - 1)


def histograms_of(counts: np.ndarray, contexts: np.ndarray, trellis: Trellis) -> Histograms:
    """Histograms of the contexts from counts (all contexts, symbols), whose last row is the sum of all.

    Weights: 4 for own counts, 1 for those at the two neighbouring scales, 1 for those of the other grid in the same
    context at the two points half a step away, and a small share of the smoothed sum of all.
    """
    symbols, total, next_scale = counts.shape[1], 1 << RANS_BITS, trellis.predictions
    sums, width = np.append(0, (2 * counts[-1] + 1).cumsum()), symbols // 16
    smooth = sums[np.minimum(np.arange(symbols) + width + 1, symbols)] - sums[np.maximum(np.arange(symbols) - width, 0)]
    weights = 4 * counts[contexts] + counts[contexts - next_scale] + counts[contexts + next_scale]
    if trellis.grids == 2:
        first, second = contexts < trellis.contexts, contexts >= trellis.contexts
        weights[first] += half_step_away(counts[contexts[first] + trellis.contexts], 1)
        weights[second] += half_step_away(counts[contexts[second] - trellis.contexts], -1)
    weights = (weights << 8) + (symbols * smooth << 10) // smooth.sum()
    freq = 1 + weights * (total - symbols) // weights.sum(1, keepdims=True)
    freq[np.arange(len(freq)), freq.argmax(1)] += total - freq.sum(1)
    return Histograms(freq)


def half_step_away(counts: np.ndarray, shift: int) -> np.ndarray:
    """Counts (contexts, symbols) of the other grid at the two points half a step from each point.

    The point k of the second grid lies between k and k + 1 of the first. Shift 1 is for the first grid, -1 for the
    second.
    """
    moved = np.roll(counts, shift, 1)
    moved[:, 0 if shift > 0 else -1] = 0
    return counts + moved


def column_statistics(
    sizes: np.ndarray, sums: np.ndarray, rows: int, model: ColumnModel, trellis: Trellis
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of |n| and of n over the known rows, by column -> buckets of their scales, and their means in half steps."""
    halves = 2 // trellis.grids
    prior = model.scale_inertia * (SCALE_ONE * int(sizes.sum()) // (trellis.grids * max(rows * len(sizes), 1)))
    scale = scale_buckets()[(SCALE_ONE * sizes // trellis.grids + prior) // (rows + model.scale_inertia)]
    return scale, np.sign(sums) * (halves * np.abs(sums) // (rows + model.mean_inertia))


def code_values(
    coder: RansWriter | RansReader,
    values: np.ndarray,
    rows: np.ndarray,
    histograms: Histograms,
    largest: int,
    q: np.ndarray | int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes values k, each by the histogram of its row. Returns them as int16, and their symbols.

    They are within +-largest, on grid q = 1 below `largest`. With 2 top + 1 symbols, symbol top + k stands for k. The
    symbols of -top and top - q also stand for all values beyond, if there are any: then their distance from there
    follows in 7 bits. Example for top = 2, q = 0: -1 is symbol 1; 2 is symbol 4 and then 0; 5 is symbol 4 and then 3.
    """
    top = histograms.freq.shape[1] // 2
    symbols = coder.code(values.clip(-top, top - q) + top, rows, histograms)
    found = symbols.astype(np.int16) - top
    valid = (found <= top - q).all()
    if top < largest:
        outer = np.flatnonzero((found == -top) | (found == top - q))
        negative = found[outer] < 0
        beyond = code_numbers(coder, np.where(negative, -top - values[outer], (values - top + q)[outer]), 7)
        valid = valid and (beyond <= largest - top).all()
        found[outer] += np.where(negative, -1, 1).astype(np.int16) * beyond.astype(np.int16)
    if not valid:
        raise ValueError("a code is out of range")
    return found, symbols


def block_contexts(model: ColumnModel, scale: np.ndarray, mean: np.ndarray, trellis: Trellis) -> np.ndarray:
    """The contexts that codes of a block can have on the first grid, ascending."""
    used = [context_of(0, scale, mean, trellis)]
    if model.kinds.any():
        near = np.unique(scale)[:, None], np.arange(trellis.predictions)
        used += [context_of(kind, *near, trellis) for kind in range(1, KINDS)]
    return np.unique(np.concatenate(used, axis=None))


def code_group(
    coder: RansWriter | RansReader,
    counts: np.ndarray,
    grid: np.ndarray,
    model: ColumnModel,
    largest: int,
    trellis: Trellis,
) -> None:
    """Codes `grid` (rows, cols) int16 row by row; a reader fills it in. Updates `counts`.

    Scales, means and histograms are renewed at the beginning of a block; blocks grow with what is known. Within one, a
    row is coded in one step, or with one grid and no references the whole block: then all rows are coded alike.

    A negative prediction flips the sign of the code, so that both signs share a histogram. Example with one grid: the
    codes of a column have been -1.5 on average, so the prediction is -3; the code -2 is coded as +2, with the histogram
    of the context (kind 0, scale of the column, prediction 3). With two grids the sign of n is flipped, which keeps q:
    n = -5 lies on grid 1 (k = -3); flipped, n = 5 is k = 2, so symbol top + 2 is coded with a histogram of grid 1.
    """
    cols, values, shift = grid.shape[1], grid.reshape(-1), trellis.grids - 1
    sizes, sums, known = *np.zeros((2, cols), np.int64), 0
    state = np.zeros(cols, np.int64)  # of the trellis, by column
    spread = lambda by_column, a, b: np.resize(np.roll(by_column, -(a % cols)), b - a)  # for the codes a to b
    begin = 0
    while begin < len(values):
        end = min(len(values), begin + max(FIRST_BLOCK, begin // BLOCK_SHARE))
        fresh, known = grid[known : begin // cols], begin // cols  # whole rows only
        sizes, sums = sizes + np.abs(fresh).sum(0), sums + fresh.sum(0)
        scale, mean = column_statistics(sizes, sums, known, model, trellis)
        used = block_contexts(model, scale, mean, trellis)
        both = np.concatenate([used + q * trellis.contexts for q in range(trellis.grids)])
        histograms, coded, cuts = histograms_of(counts, both, trellis), [], [begin, end]
        if model.kinds.any() or trellis.grids == 2:
            cuts[1:1] = range((begin // cols + 1) * cols, end, cols)
        place = lambda kind, prediction: np.searchsorted(used, context_of(kind, scale, prediction, trellis))
        by_mean = place(0, mean)
        for a, b in itertools.pairwise(cuts):
            if a % (TRELLIS_SEGMENT * cols) == 0:
                state[:] = 0
            kind, reference = model.kinds[a // cols], model.references[a // cols]
            prediction, q = grid[reference] if kind else mean, state & 1
            rows = spread((place(kind, prediction) if kind else by_mean) + q * len(used), a, b)
            sign, q = (spread(x.astype(np.int16), a, b) for x in (np.where(prediction < 0, -1, 1), q))
            found, symbols = code_values(coder, sign * values[a:b] - q >> shift, rows, histograms, largest, q)
            values[a:b] = sign * ((found << shift) + q)
            coded.append(rows * counts.shape[1] + symbols)
            if trellis.grids == 2:
                here = slice(a % cols, a % cols + b - a)
                state[here] = trellis.following[2 * state[here] + (values[a:b] >> 1 & 1)]
        new = np.bincount(np.concatenate(coded), minlength=counts[both].size).reshape(len(both), -1)
        counts[both] += new
        counts[-1] += new.sum(0)
        begin = end


def similar_rows(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kind and number of the most similar earlier row, for each row of grid (rows, cols).

    Similarity is the cosine between rows after subtracting the columns' means. All products are integers below 2^53,
    so float64 sums are exact in any order.
    """
    (rows, cols), kinds, references = grid.shape, *np.zeros((2, len(grid)), np.int64)
    centred = grid - (2 * grid.sum(0, dtype=np.int64) + rows) // (2 * rows)
    exact, energy = centred.astype(np.float64), np.maximum((centred * centred).sum(1), 1)
    for begin in range(0, rows, 256):
        part = slice(begin, min(begin + 256, rows))
        dots = np.tril(exact[part] @ exact[: part.stop].T, begin - 1).clip(0).astype(np.int64)  # earlier rows only
        shares = dots * dots // energy[: part.stop]  # of the energy of the row
        references[part], share, own = shares.argmax(1), shares.max(1), energy[part]
        alike = sum((share * over >= own * least).astype(np.int64) for least, over in ALIKE)
        kinds[part] = np.where(share * cols >= own * LEAST_GAIN, 1 + alike, 0)
    return kinds, references * (kinds > 0)


def fit_column_model(grid: np.ndarray, search: bool) -> ColumnModel:
    """The model of a group (rows, cols); with `search` also the earlier rows that predict others.

    An inertia is the variance within columns over the variance between them (empirical Bayes).
    """
    (rows, cols), inertias = grid.shape, []
    squares = grid.size * int(np.square(grid, dtype=np.int64).sum())
    sizes = np.abs(grid).sum(0)
    for total, prior in ((sizes, int(sizes.sum()) ** 2), (grid.sum(0), 0)):
        between = cols * int(total @ total) - prior - (squares - prior) // rows
        inertias.append(min(max((squares - prior) // max(between, 1), 1), (1 << 14) - 1))
    return ColumnModel(*inertias, *(similar_rows(grid) if search else np.zeros((2, rows), np.int64)))


def symbol_range(matrices: Sequence[np.ndarray], trellis: Trellis) -> tuple[int, int]:
    """(top, largest): the largest |k|, and the `top` of code_values that costs least."""
    sizes = [-(-np.abs(m).ravel() // trellis.grids) for m in matrices]
    tail = sum(np.bincount(size, minlength=128) for size in sizes)[::-1].cumsum()[::-1]
    largest = int((tail > 0).sum()) - 1
    # In bits << RANS_BITS: codes from `top` on take 7 bits more. One step of `top` adds two symbols, whose frequencies
    # of at least 1 cost each code about 3 / 2^RANS_BITS bits.
    cost = (7 * tail << RANS_BITS) * (np.arange(128) < largest) + 3 * int(tail[0]) * np.arange(128)
    return (int(cost[1 : largest + 1].argmin()) + 1 if largest else 0), largest


def code_stream(coder: RansWriter | RansReader, matrices: list[np.ndarray], trellis: Trellis) -> None:
    """Codes matrices that are not empty, those of equal shape side by side; a reader fills them in."""
    top, largest = code_numbers(coder, np.array(symbol_range(matrices, trellis)), 7).tolist()
    counts = np.zeros((trellis.grids * trellis.contexts + 1, 2 * top + 1), np.int64)
    for shape in dict.fromkeys(m.shape for m in matrices):
        members = [m for m in matrices if m.shape == shape]
        grid = np.concatenate(members, 1).astype(np.int16, order="C")
        # Similar rows occur in embeddings (rare tokens are hardly trained), which are alone in their streams.
        unknown = ColumnModel(1, 1, *np.zeros((2, len(grid)), np.int64))
        model = fit_column_model(grid, len(members) == 1) if isinstance(coder, RansWriter) else unknown
        code_group(coder, counts, grid, code_column_model(coder, model), largest, trellis)
        for member, part in zip(members, np.split(grid, len(members), 1)):
            member[:] = part


def rans_encode(matrices: Sequence[np.ndarray], states: int = 0) -> bytes:
    """Matrices of codes (rows, cols) -> a checksum of 4 bytes, the lanes' states, words; b"" for no codes. `states` are
    those of the trellis.

    The codes are int8 within +-127, with a trellis int16 within +-254. Raises ValueError for other arrays, and for
    codes that break the rule of the trellis.
    """
    trellis = trellis_of(states)
    for m in matrices:
        if m.ndim != 2 or m.dtype != trellis.dtype or (m.size and max(m.max(), -int(m.min())) > trellis.largest):
            raise ValueError(f"codes are {np.dtype(trellis.dtype)} matrices within +-{trellis.largest}")
    filled = [m.copy() for m in matrices if m.size]
    if not filled:
        return b""
    writer = RansWriter()
    code_stream(writer, filled, trellis)
    if not all(np.array_equal(coded, m) for coded, m in zip(filled, (m for m in matrices if m.size))):
        raise ValueError("codes break the rule of the trellis")
    data = writer.finish(rans_lanes(filled))
    return zlib.crc32(data).to_bytes(4, "little") + data


def rans_decode(data: bytes, matrices: Sequence[np.ndarray], states: int = 0) -> None:
    """The inverse of rans_encode: fills in the zero matrices. Raises ValueError for damaged data or other shapes."""
    filled = [m for m in matrices if m.size]
    if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little") or bool(filled) != bool(data):
        raise ValueError("wrong checksum")
    if filled:
        reader = RansReader(data[4:], rans_lanes(filled))
        code_stream(reader, filled, trellis_of(states))
        reader.finish()


def rans_lanes(matrices: Sequence[np.ndarray]) -> int:
    return -(-sum(m.size for m in matrices) // RANS_RUN)


# ------------------------------------------------------------------------------------------------------------
# COMPRESS
#
# Averaged weights and Hessians become one artifact file, from which alone the model is scored: parameters by name ->
# matrices by layer and kind -> parts (codes, scales, ...) -> streams of parts of one kind -> bytes, and back. Matrices
# go through a quantiser, attention gates are rounded to int8 rows, everything else is stored as fp16. Codes are not
# packed: an int6 code takes a byte here (on the trellis two) and about 3.4 bits in the file, by the codec of its
# stream.
# ------------------------------------------------------------------------------------------------------------

ENTROPY_BITS_AT_ONE_SIGMA = 2.047  # log2 sqrt(2 pi e): entropy of a Gaussian row whose step is one std, in bits
FIT_MARGIN_BYTES = 3000  # head-room of a refitted artifact; sizes of equal settings differ by a few kB
FIT_TRIES, FIT_LARGEST_FACTOR = 6, 4.0  # give up then: coarser steps cannot save that much
FILL_SLACK_BYTES, FILL_SMALLEST_FACTOR = 12_000, 0.5  # full enough; below half the clips rows lose their tails


def gptq(
    W: Tensor,
    H: Tensor,
    clip_sigmas: float | Tensor,
    bits: int,
    floor: float = 0.0,
    block: int = 128,
    column_rounding: Callable[[Tensor, int], Callable[[Tensor], Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rounds matrices so that their outputs on the calibration inputs change little (GPTQ, arXiv:2210.17323).

    W (n, rows, cols) float32 and H (n, cols, cols), its summed X^T X -> codes Q (n, rows, cols) int8 within
    +-(2^(bits-1) - 1), and row scales (n, rows) float16 = clip_sigmas * std(row) / (2^(bits-1) - 1) (SDClip), where
    clip_sigmas is one number or one for each row (n, rows).
    Columns are rounded in order of falling H_jj; each rounding error is spread over the columns still to come,
    in proportion to the upper factor U of H^-1 = U^T U.

    With a `column_rounding` (`on_trellis`) the weights of a column are rounded together, to points of two grids: the
    codes are then int16, in half steps.
    """
    n, rows, cols = W.shape
    top = 2 ** (bits - 1) - 1
    scale = half_scale(clip_sigmas * W.std(-1), top).clamp_min(floor)
    H, diagonal = H.clone(), H.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0  # inputs never seen in calibration: their weights become 0
    H.diagonal(dim1=-2, dim2=-1).add_(dead)
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    order = torch.argsort(H.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)  # (n, cols)
    H = H.gather(1, order.unsqueeze(-1).expand(-1, -1, cols)).gather(2, order.unsqueeze(1).expand(-1, cols, -1))
    U = inverse_factor(H, mean)
    columns = W.mT.masked_fill(dead.unsqueeze(-1), 0)  # (n, cols, rows): a column is contiguous
    columns = columns.gather(1, order.unsqueeze(-1).expand(-1, -1, rows)).contiguous()
    step = scale.float()
    nearest = column_rounding(step, top) if column_rounding else lambda x: x.round_().clamp_(-top, top)
    Q = torch.empty_like(columns)
    for begin in range(0, cols, block):
        end = min(begin + block, cols)
        part, errors = columns[:, begin:end].contiguous(), []
        for j in range(end - begin):
            u = U[:, begin + j, begin + j : end]
            q = nearest(part[:, j] / step)
            error = (part[:, j] - q * step) / u[:, :1]
            Q[:, begin + j] = q
            errors.append(error)
            part[:, j + 1 :] -= u[:, 1:, None] * error[:, None]
        if end < cols:
            columns[:, end:] -= torch.bmm(U[:, begin:end, end:].mT, torch.stack(errors, 1))
    Q = torch.empty_like(Q).scatter_(1, order.unsqueeze(-1).expand(-1, -1, rows), Q)
    return (2 * Q.mT).to(torch.int16) if column_rounding else Q.mT.to(torch.int8), scale


def on_trellis(states: int, rows: Sequence[int], path: Callable, step: Tensor, top: int) -> Callable[[Tensor], Tensor]:
    """The rounding of a column for `gptq`: x (n, rows) in steps -> points of both grids within +-top, in steps.

    `rows` are the heights of the stacked matrices. Each is cut into segments, for which `path` (`plain_trellis`) finds
    the points that the trellis allows with the least sum of squared errors; a row counts by the square of its `step`
    (n, rows). Points n form four classes n mod 4; of each class only the point nearest to x is a candidate.
    """
    begins = np.cumsum([0, *rows])
    cuts = [range(begin, end, TRELLIS_SEGMENT) for begin, end in itertools.pairwise(begins)]
    starts = torch.tensor([start for part in cuts for start in part], device=step.device)
    ends = torch.tensor([min(start + part.step, part.stop) for part in cuts for start in part], device=step.device)
    places = starts.unsqueeze(1) + torch.arange(int((ends - starts).max()), device=step.device)  # (segments, L)
    places = places.where(places < ends.unsqueeze(1), begins[-1])  # short segments end with a row of weight 0
    weights = F.pad((step / step.mean(-1, keepdim=True)).square(), (0, 1))[:, places].flatten(0, 1).unsqueeze(-1)
    branches, z = trellis_of(states).branches.to(step.device), torch.arange(4, device=step.device)
    lowest, highest = -((2 * top + z) // 4), (2 * top - z) // 4

    def nearest(x: Tensor) -> Tensor:
        # Bounded, so that sums stay finite: how far x lies beyond the last point decides nothing.
        x = F.pad((2 * x).clamp_(-8 * top, 8 * top), (0, 1))[:, places].flatten(0, 1).unsqueeze(-1)  # (N, L, 1)
        points = 4 * ((x - z) / 4).round_().clamp_(lowest, highest) + z  # (N, L, 4)
        classes = path((x - points).square_() * weights, branches)
        found = step.new_empty(len(step), step.size(1) + 1)
        found[:, places] = points.gather(-1, classes.unsqueeze(-1)).view(len(step), *places.shape)
        return found[:, :-1] / 2

    return nearest


def inverse_factor(H: Tensor, mean: Tensor) -> Tensor:
    """Upper triangular U with H^-1 = U^T U for (n, cols, cols). Each H is damped by 1 % of its mean diagonal, or more
    where that is not enough for a Cholesky factor. With both axes reversed, one factorisation does."""
    damping = torch.full_like(mean, 0.01)  # (n, 1)
    for _ in range(4):
        damped = H.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(-2, -1))
        if not failed.any():
            upper = lower.flip(-2, -1)  # H = upper upper^T
            identity = torch.eye(H.size(-1), device=H.device).expand_as(H)
            return torch.linalg.solve_triangular(upper, identity, upper=True)
        damping = torch.where(failed.bool().unsqueeze(-1), 10 * damping, damping)
    raise TrainingDiverged("a calibration Hessian is not finite or not positive definite; lower the learning rates")


HALF_LEAST, HALF_MOST = 2.0**-24, 65504.0  # positive fp16 numbers: a scale is never 0 and never infinite
INT8_CLIP = 0.9999984  # the percentile of |row| at which the baseline clips
LITE_CLIPS = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # percentiles of |row| that GPTQ-lite tries


def half_scale(largest: Tensor, levels: float) -> Tensor:
    """The step size, as float16, with which `levels` steps reach `largest` (any shape, not negative)."""
    return (largest / levels).half().clamp(HALF_LEAST, HALF_MOST)


def round_to_rows(W: Tensor, clip: Tensor, bits: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rounds rows to the nearest of 2^bits - 1 levels between -clip and clip.

    W (..., rows, cols) and clip (..., rows), both float32 -> codes (..., rows, cols) int8, scale (..., rows) float16.
    The codes are made with the rounded scale, the one they are read with.
    """
    top = 2 ** (bits - 1) - 1
    scale = half_scale(clip, top).clamp_min(floor)
    return (W / scale.float().unsqueeze(-1)).round_().clamp_(-top, top).to(torch.int8), scale


def row_quantiles(x: Tensor, fractions: Sequence[float]) -> list[Tensor]:
    """Quantiles over the last axis with linear interpolation, (..., n) -> (...) for each fraction in [0, 1].

    torch.quantile computes the same but refuses more than 2^24 elements.
    """
    ordered, last = x.sort(-1).values, x.size(-1) - 1
    ranks = [fraction * last for fraction in fractions]
    return [torch.lerp(ordered[..., int(r)], ordered[..., min(int(r) + 1, last)], r - int(r)) for r in ranks]


# Quantisers: W (n, rows, cols) float32, H (n, cols, cols) its summed X^T X, clip_sigmas, bits -> codes (n, rows, cols)
# int8 within +-(2^(bits-1) - 1), scale (n, rows) float16. The three here use neither H nor clip_sigmas.


def int8_clip(W: Tensor, H: Any, clip_sigmas: float, bits: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Round to nearest, clipped at the 99.99984th percentile of |row| (NaiveBaseline, PR #489)."""
    return round_to_rows(W, row_quantiles(W.abs(), [INT8_CLIP])[0], bits, floor)


def intn_row(W: Tensor, H: Any, clip_sigmas: float, bits: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Round to nearest without clipping: the largest |w| of a row takes the last level."""
    return round_to_rows(W, W.abs().amax(-1), bits, floor)


def gptq_lite(W: Tensor, H: Any, clip_sigmas: float, bits: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Round to nearest, each row clipped at that percentile of LITE_CLIPS which leaves the least squared error.

    The published code decides once per matrix, although it says per row. Of equal errors the lower percentile wins.
    """
    clips = torch.stack(row_quantiles(W.abs(), LITE_CLIPS))  # (percentiles, n, rows)
    errors = []
    for clip in clips:
        codes, scale = round_to_rows(W, clip, bits, floor)
        errors.append((W - codes * scale.float().unsqueeze(-1)).square().mean(-1))
    best = torch.stack(errors).argmin(0, keepdim=True)
    return round_to_rows(W, clips.gather(0, best)[0], bits, floor)


def prune(W: Tensor, frac: float) -> Tensor:
    """Sets each |w| below the `frac` quantile of its own matrix to 0. W (..., rows, cols); frac 0 changes nothing."""
    threshold = row_quantiles(W.abs().flatten(-2), [frac])[0]
    return W.masked_fill(W.abs() < threshold[..., None, None], 0)


QUANTIZERS: dict[str, Callable] = {
    "gptq": gptq,
    "gptq_lite": gptq_lite,
    "intn_row": intn_row,
    "int8_clip": int8_clip,
}


# Low-rank correction of the worst matrices (LQER, arXiv:2402.02446, as in #1797): W - codes * scale is approximated by
# A B with A in LQER_LEFT_BITS and B in 4 bits. The levels are asymmetric, -2..1 and -8..7, so the sign of a singular
# pair, which is arbitrary, decides how well it is rounded.


def lqer_shapes(rows: int, cols: int, rank: int, group: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the parts that `lqer_factors` makes. B has one scale per `group` values, counted row by row,
    or one per row if `group` does not divide its size."""
    rank = min(rank, rows, cols)
    group = cols if rank * cols % group else group
    return {
        "lqer_a": ((rows, rank), "i1"),
        "lqer_a_scale": ((1,), "<f2"),
        "lqer_b": ((rank, cols), "i1"),
        "lqer_b_scale": ((rank * cols // group,), "<f2"),
    }


def round_asymmetric(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """x (groups, size) float32 -> codes int8 from -2^(bits-1) to 2^(bits-1) - 1, scale (groups,) float16.

    The largest |x| of a group lies half a step beyond the last positive level.
    """
    half = 2 ** (bits - 1)
    scale = half_scale(torch.from_numpy(np.abs(x).max(1)), half - 0.5).numpy()
    return np.clip(np.round(x / scale.astype(np.float32)[:, None]), -half, half - 1).astype(np.int8), scale


def lqer_factors(E: Tensor, rank: int, group: int, left_bits: int = 2) -> dict[str, np.ndarray]:
    """The residual E (rows, cols) -> parts of `lqer_shapes`, whose product `lqer_product` is near E.

    Start: the truncated SVD with A = U S, B = V^T. Then one pair after the other takes the sign with which the
    quantised product is nearer to E.
    """
    U, S, Vt = torch.linalg.svd(E.float(), full_matrices=False)
    shapes, E = lqer_shapes(*E.shape, rank, group), E.float().cpu().numpy()
    rank, groups = shapes["lqer_b"][0][0], shapes["lqer_b_scale"][0][0]
    A, B = (U[:, :rank] * S[:rank]).cpu().numpy(), Vt[:rank].cpu().numpy()

    def with_signs(signs: np.ndarray) -> dict[str, np.ndarray]:
        a, a_scale = round_asymmetric((A * signs).reshape(1, -1), left_bits)
        b, b_scale = round_asymmetric((B * signs[:, None]).reshape(groups, -1), 4)
        return {
            "lqer_a": a.reshape(A.shape),
            "lqer_a_scale": a_scale,
            "lqer_b": b.reshape(B.shape),
            "lqer_b_scale": b_scale,
        }

    signs = np.ones(rank, np.float32)
    best = with_signs(signs)
    error = np.linalg.norm(E - lqer_product(best))
    for pair in range(rank):
        signs[pair] = -1
        flipped = with_signs(signs)
        new = np.linalg.norm(E - lqer_product(flipped))
        if new < error:
            best, error = flipped, new
        else:
            signs[pair] = 1
    return best


def lqer_product(factors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Parts of `lqer_shapes` -> their product (rows, cols) float32, to be added to codes * scale."""
    A = factors["lqer_a"] * factors["lqer_a_scale"].astype(np.float32)
    groups = factors["lqer_b"].reshape(factors["lqer_b_scale"].size, -1)
    B = groups * factors["lqer_b_scale"].astype(np.float32)[:, None]
    return A @ B.reshape(factors["lqer_b"].shape)


class Entry(NamedTuple):
    """One array of the artifact."""

    owner: str  # a matrix, for example blocks.3.attn.k, or another parameter of GPT
    part: str  # half: fp16 values; or codes (int16: half steps), scale and, for some, order and parts of `lqer_shapes`
    stream: str  # arrays of one stream are compressed together
    shape: tuple[int, ...]
    dtype: str  # the same for all arrays of a stream

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


Parts = dict[str, np.ndarray]  # what is stored of one owner, by part


class Precision(NamedTuple):
    """How finely the matrices of one role are rounded."""

    clip_sigmas: float
    bits: int
    floor: float  # smallest step


def precision(role: str, config: Config) -> Precision:
    """Clip, bits and smallest step of a role: attn, mlp or embed.

    QUANT_SCALE_FLOOR is the smallest step of MATRIX_BITS codes. With other bits the smallest clip, floor times levels,
    stays the same (1 in the published quantisers).
    """
    clip, bits = {
        "attn": (config.attn_clip_sigmas, config.matrix_bits),
        "mlp": (config.mlp_clip_sigmas, config.mlp_bits or config.matrix_bits),
        "embed": (config.embed_clip_sigmas, config.embed_bits),
    }[role]
    return Precision(clip, bits, config.quant_scale_floor * (2 ** (config.matrix_bits - 1) - 1) / (2 ** (bits - 1) - 1))


def stays_half(name: str, config: Config) -> bool:
    """Whether FP16_KEEP_NAME_PATTERNS exempts this matrix from quantisation; {last} is the last layer's number."""
    patterns = config.fp16_keep_name_patterns.replace("{last}", str(config.num_layers - 1)).replace(" ", "")
    return any(pattern in name for pattern in patterns.split(",") if pattern)


SORTED_STREAMS = ("embedding", "attn.q", "mlp.up")  # COMPRESSOR=pergroup brings similar rows together there (#1855)


class BankRow(NamedTuple):
    """Where one matrix lies."""

    kind: str  # key of MATRICES
    bank: str
    row: int


def bank_rows(config: Config) -> dict[str, BankRow]:
    """The matrices in the banks of GPT by name, in file order."""
    places = [(kind, m.bank, layer, m.half) for kind, m in MATRICES.items() for layer in range(config.num_layers)]
    return {f"blocks.{i}.{kind}": BankRow(kind, bank, half * config.num_layers + i) for kind, bank, i, half in places}


TRELLIS_STREAMS = (*MATRICES, "embedding")  # whose codes lie on the grids of the trellis, where there is one


@functools.cache
def artifact_table(config: Config, corrected: tuple[str, ...] = (), states: int = 0) -> tuple[Entry, ...]:
    """The arrays of an artifact in file order; `corrected` are the matrices with a low-rank correction (LQER), `states`
    those of the trellis.

    The configuration determines everything else, so the file does not hold the table.
    """
    shapes, rows, table = parameter_shapes(config), bank_rows(config), []
    owners = {name: shapes[place.bank][1:] for name, place in rows.items()}
    owners |= {name: shapes[name] for name in ("tok_emb.weight", *shapes) if name not in BANKS}
    streams = {name: row.stream for name, row in parameter_table(config).items()}
    streams |= {name: place.kind for name, place in rows.items()}
    for name, shape in owners.items():
        gate, stream = streams[name] == "gates", streams[name]
        if not stream or (not config.gated_attn_quant_gate if gate else stays_half(name, config)):
            table.append(Entry(name, "half", "halves", shape, "<f2"))
            continue
        on_grids = states and stream in TRELLIS_STREAMS
        table.append(Entry(name, "codes", stream, shape, "<i2" if on_grids else "i1"))
        table.append(Entry(name, "scale", "halves", shape[:1], "<f2"))
        if config.compressor == "pergroup" and stream in SORTED_STREAMS:
            table.append(Entry(name, "order", "orders", shape[:1], "<u2"))
        if name in corrected:
            for part, (size, dtype) in lqer_shapes(*shape, config.lqer_rank, config.lqer_asym_group).items():
                table.append(Entry(name, part, "lqer" if dtype == "i1" else "halves", size, dtype))
    return tuple(table)


def quantized_matrices(config: Config) -> list[str]:
    return [entry.owner for entry in artifact_table(config) if entry.part == "codes" and entry.stream != "gates"]


def matrix_of(arrays: Mapping[str, np.ndarray], name: str, config: Config) -> np.ndarray:
    """A matrix, by its name in the artifact, among parameters of GPT by theirs."""
    place = bank_rows(config).get(name)
    return arrays[place.bank][place.row] if place else arrays[name]


class QuantGroup(NamedTuple):
    """Matrices that are quantised in one call because they share their inputs."""

    names: list[list[str]]  # names[i][j]: matrix of layer i, j-th part of the stack
    hessian: str  # hessian.{this}.{i} of trained.bin belongs to the inputs of layer i; empty: not recorded
    role: str  # key of `precision`


def quant_groups(config: Config) -> list[QuantGroup]:
    """All matrices: those of each kind of input (q, k and v together), and the embeddings."""
    groups = []
    for kind in [kind for kind, matrix in MATRICES.items() if matrix.hessian == kind]:
        kinds = [name for name, matrix in MATRICES.items() if matrix.hessian == kind]
        names = [[f"blocks.{layer}.{name}" for name in kinds] for layer in range(config.num_layers)]
        groups.append(QuantGroup(names, kind, MATRICES[kind].role))
    groups.append(QuantGroup([["tok_emb.weight"]], "head", "embed"))
    if config.bigram_vocab_size:
        groups.append(QuantGroup([["bigram_emb.weight"]], "", "embed"))
    return groups


MOST_FINER = 4.0  # steps of embedding rows are at most this many times smaller or larger than their mean


def frequency_steps(counts: Tensor, power: float) -> Tensor:
    """Factors (V,) of the steps of embedding rows, from counts (V,): frequency^-power, with geometric mean 1.

    Errors e_v in the logits cost sum_v p_v e_v^2 / 2 nats, with the probabilities p_v of the tokens. If one more bit
    halved every step, the least cost at equal bytes would be at steps ~ p_v^(-1/2). Coarse rows save less than one bit
    per doubling, so a power of 1/4 is better.
    """
    steps = -power * torch.log(counts + 1)  # + 1: a token that was not seen is not impossible
    bound = math.log(MOST_FINER)
    steps = (steps - steps.mean()).clamp(-bound, bound)
    return torch.exp(steps - steps.mean())


def quantizer_of(config: Config, scheme: str, rows: Sequence[int], device: torch.device) -> Callable:
    """The function of QUANTIZERS for a scheme, with TRELLIS_STATES on the trellis; `rows` of the stacked matrices."""
    if not (config.trellis_states and scheme == "gptq"):
        return QUANTIZERS[scheme]
    path = choose_kernels(config.kernels, device)[1].trellis
    return functools.partial(gptq, column_rounding=functools.partial(on_trellis, config.trellis_states, rows, path))


def quantize_group(
    group: QuantGroup, arrays: Mapping[str, np.ndarray], config: Config, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yields each matrix: name, weights (rows, cols) as quantised, codes (rows, cols) int8, or int16 on the trellis,
    scale (rows,) float16."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(device)

    def weights(name: str) -> Tensor:
        W = tensor(matrix_of(arrays, name, config))
        return prune(W, config.mag_prune_frac) if config.mag_prune_frac else W

    stacks = [[weights(name) for name in stack] for stack in group.names]
    W = torch.stack([torch.cat(stack) for stack in stacks])  # (n, rows, cols)
    clip, bits, floor = precision(group.role, config)
    scheme, H = config.quant_scheme, None
    if scheme == "gptq" and group.hessian:
        H = torch.stack([tensor(arrays[f"hessian.{group.hessian}.{i}"]) for i in range(len(group.names))])
    elif scheme == "gptq":
        scheme = "gptq_lite"
    if H is not None and group.hessian == "head":
        # The tied table is head and lookup. As a lookup all of its columns count alike: the damping stands for that.
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(config.embed_damping * diagonal.mean(-1, keepdim=True))
        if config.embed_freq_power:
            clip = clip * frequency_steps(tensor(arrays["token_counts"]), config.embed_freq_power)[None]
    rows = [len(matrix) for matrix in stacks[0]]
    codes, scale = quantizer_of(config, scheme, rows, device)(W, H, clip, bits, floor)
    for i, names in enumerate(group.names):
        yield from zip(names, *(x[i].split(rows) for x in (W, codes, scale)))


def quantize(
    arrays: Mapping[str, np.ndarray], config: Config, device: torch.device, log: Log = Log(None)
) -> dict[str, Parts]:
    """Weights and Hessians, as in trained.bin -> the arrays of the artifact by owner and part."""
    halves = {entry.owner for entry in artifact_table(config) if entry.part == "half"}
    stored: dict[str, Parts] = {}
    residuals: dict[str, Tensor] = {}
    for group in log.bar(quant_groups(config), "quantize"):
        for name, W, codes, scale in quantize_group(group, arrays, config, device):
            if name in halves:
                stored[name] = {"half": W.cpu().numpy().astype(np.float16)}
                continue
            stored[name] = {"codes": codes.cpu().numpy(), "scale": scale.cpu().numpy()}
            if config.lqer_rank:
                residuals[name] = W - torch.from_numpy(restore(stored[name])).to(device)
    by_error = sorted(residuals, key=lambda name: -float(residuals[name].norm()))
    for name in by_error[: config.lqer_top_k]:
        stored[name] |= lqer_factors(residuals[name], config.lqer_rank, config.lqer_asym_group, config.lqer_left_bits)
    for entry in artifact_table(config):
        if entry.part == "order":
            stored[entry.owner] = sort_rows(stored[entry.owner])
        elif entry.stream == "gates":
            codes, scale = intn_row(torch.from_numpy(arrays[entry.owner].copy())[None], None, 0, 8)
            stored[entry.owner] = {"codes": codes[0].numpy(), "scale": scale[0].numpy()}
        elif entry.part == "half" and entry.owner not in stored:
            stored[entry.owner] = {"half": arrays[entry.owner].astype(np.float16)}
    return stored


def restore(parts: Parts) -> np.ndarray:
    """The float32 values of one owner. Raises ValueError for a row order that does not name each row once."""
    if "half" in parts:
        return parts["half"].astype(np.float32)
    codes = parts["codes"] if "order" not in parts else unsort_rows(parts["codes"], parts["order"])
    step = parts["scale"].astype(np.float32) / (2 if codes.dtype == np.int16 else 1)
    values = codes.astype(np.float32) * step[:, None]
    return values + lqer_product(parts) if "lqer_a" in parts else values


def dequantize(stored: Mapping[str, Parts], config: Config) -> dict[str, np.ndarray]:
    """The arrays of an artifact -> float32 parameters of GPT by name. Raises ValueError as `restore`."""
    rows = bank_rows(config)
    values = {owner: restore(parts) for owner, parts in stored.items() if owner not in rows}
    values |= {bank: np.empty(parameter_shapes(config)[bank], np.float32) for bank in BANKS}
    for name, place in rows.items():
        values[place.bank][place.row] = restore(stored[name])
    return values


def l1_distances(codes: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Sums of absolute differences, (rows, cols) and (cols,) int8 -> (rows,) uint32. Pieces fit into the cache."""
    pieces = []
    for begin in range(0, len(codes), 1024):
        piece = codes[begin : begin + 1024]
        # Differences reach 255: they wrap around in int8, and are right again when read as uint8.
        pieces.append((np.maximum(piece, row) - np.minimum(piece, row)).view(np.uint8).sum(1, dtype=np.uint32))
    return np.concatenate(pieces)


def row_order(codes: np.ndarray) -> np.ndarray:
    """A chain through the rows, each followed by its nearest neighbour among those left.

    codes (rows, cols) int8, rows <= 65,536 -> permutation (rows,) uint16 that begins with row 0. Distance is the sum of
    absolute differences; of equal ones the lowest index wins. Similar neighbours help codecs that look back (PR #1855);
    the order itself costs 2 bytes per row.
    """
    rows, here = len(codes), 0
    order, left, index, used = np.zeros(rows, np.uint16), codes, np.arange(rows), np.zeros(rows, bool)
    for step in range(1, rows):
        row, used[here] = left[here], True
        distance = l1_distances(left, row)
        distance[used] = np.iinfo(np.uint32).max
        here = int(distance.argmin())
        order[step] = index[here]
        if step % 256 == 0:  # drop used rows to save time; the others stay in ascending order
            here -= int(used[:here].sum())
            left, index, used = left[~used], index[~used], np.zeros(int((~used).sum()), bool)
    return order


def sort_rows(parts: Parts) -> Parts:
    """`parts` with the codes along a chain of similar rows, and the order of this chain."""
    order = row_order(parts["codes"])
    return parts | {"codes": parts["codes"][order], "order": order}


def unsort_rows(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The codes before sort_rows. Raises ValueError unless the order names each row once."""
    inverse = np.argsort(order, kind="stable")
    if not np.array_equal(order[inverse], np.arange(len(order))):
        raise ValueError("a row order is no permutation")
    return codes[inverse]


# Codecs. Those of bytes first: pack(data) -> bytes; unpack(data, size) -> exactly `size` bytes, or ValueError for
# damaged data and for another size. Decoders stop after size + 1 bytes; but brotli fills its current block (about twice
# as much), and lrzip is trusted to keep to the size in its header. brotli has no checksum: a changed bit may pass as
# `size` other bytes, so the container keeps a SHA-256.


def expanded(data: bytes, size: int, finished: bool) -> bytes:
    """`data`, if a decoder has finished with the expected size. Raises ValueError otherwise."""
    if len(data) != size or not finished:
        raise ValueError(f"does not expand to {size} bytes")
    return data


def pack_brotli(data: bytes) -> bytes:
    """data -> a brotli stream, quality 10, window 2^22."""
    import brotli

    return brotli.compress(data, quality=10, lgwin=22)  # 11 saves under 0.01 % of these streams, and takes 1/3 longer


def unpack_brotli(data: bytes, size: int) -> bytes:
    """The inverse of pack_brotli."""
    import brotli

    decoder = brotli.Decompressor()
    try:
        found = decoder.process(data, output_buffer_limit=size + 1)
    except brotli.error as error:
        raise ValueError(str(error)) from None
    return expanded(found, size, decoder.is_finished())


def pack_zlib(data: bytes) -> bytes:
    """data -> a zlib stream, level 9, with an Adler-32."""
    return zlib.compress(data, 9)


def unpack_zlib(data: bytes, size: int) -> bytes:
    """The inverse of pack_zlib."""
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    return expanded(found, size, decoder.eof and not decoder.unused_data)


def pack_zstd(data: bytes) -> bytes:
    """data -> a zstd frame, level 22, with its size and a checksum."""
    import zstandard

    return zstandard.ZstdCompressor(level=22, write_checksum=True).compress(data)


def unpack_zstd(data: bytes, size: int) -> bytes:
    """The inverse of pack_zstd."""
    import zstandard

    try:
        # The decoder allocates what the header announces, so that is compared first.
        announced = zstandard.get_frame_parameters(data).content_size
        found = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False) if announced == size else b""
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return expanded(found, size, announced == size)


def run_lrzip(data: bytes, *options: str) -> bytes:
    """What the program lrzip makes of data. Raises ValueError when it is not installed or fails."""
    program = shutil.which("lrzip")
    if program is None:
        raise ValueError("the program lrzip is not installed; install it (Debian: lrzip) or choose another compressor")
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "source"), Path(folder, "result")
        source.write_bytes(data)
        command = [program, *options, "-q", "-f", "-o", str(result), str(source)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode or not result.is_file():
            raise ValueError(f"lrzip failed with status {done.returncode}")
        return result.read_bytes()


def pack_lrzip(data: bytes) -> bytes:
    """data -> an lrzip file, ZPAQ at level 9, with an MD5. Raises ValueError without the program."""
    return run_lrzip(data, "-z", "-L", "9")


def unpack_lrzip(data: bytes, size: int) -> bytes:
    """The inverse of pack_lrzip."""
    announced = int.from_bytes(data[6:14], "little")  # of the 24-byte header: magic, version (2), size (8), ...
    expanded(b"", 0, bytes(data[:4]) == b"LRZI" and announced == size)
    return expanded(run_lrzip(data, "-d"), size, True)


def join_arrays(arrays: Sequence[np.ndarray]) -> bytes:
    """Arrays of one dtype -> bytes. Codes run down the columns, whose statistics differ more than those of rows. Of
    two-byte numbers the low bytes come first, then the high ones."""
    data = b"".join((array.T if array.dtype == np.int8 else array).tobytes() for array in arrays)
    return np.frombuffer(data, np.uint8).reshape(-1, arrays[0].itemsize).T.tobytes()


def split_bytes(data: bytes, arrays: Sequence[np.ndarray]) -> None:
    """The inverse of join_arrays: fills in the arrays."""
    planes = np.frombuffer(data, np.uint8).reshape(arrays[0].itemsize, -1)
    numbers, begin = np.frombuffer(planes.T.tobytes(), arrays[0].dtype), 0
    for array in arrays:
        view = array.T if array.dtype == np.int8 else array
        view[...] = numbers[begin : begin + array.size].reshape(view.shape)
        begin += array.size


class Codec(NamedTuple):
    """A way from arrays of one dtype to bytes and back."""

    encode: Callable[[Sequence[np.ndarray]], bytes]
    decode: Callable[[bytes, Sequence[np.ndarray]], None]  # fills in zero arrays; ValueError for damaged data


def codec_of_bytes(pack: Callable[[bytes], bytes], unpack: Callable[[bytes, int], bytes]) -> Codec:
    return Codec(
        lambda arrays: pack(join_arrays(arrays)),
        lambda data, arrays: split_bytes(unpack(data, sum(array.nbytes for array in arrays)), arrays),
    )


def trellis_codec(states: int) -> Codec:
    return Codec(functools.partial(rans_encode, states=states), functools.partial(rans_decode, states=states))


CODECS = {
    "brotli": codec_of_bytes(pack_brotli, unpack_brotli),
    "rans": Codec(rans_encode, rans_decode),
    "zlib": codec_of_bytes(pack_zlib, unpack_zlib),
    "zstd": codec_of_bytes(pack_zstd, unpack_zstd),
    "lrzip": codec_of_bytes(pack_lrzip, unpack_lrzip),
}


class Stream(NamedTuple):
    """Arrays that are compressed together."""

    codec: Codec  # options of a codec are bound to its functions
    entries: list[Entry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def arrays(self, stored: Mapping[str, Parts]) -> list[np.ndarray]:
        return [stored[entry.owner][entry.part] for entry in self.entries]


def artifact_streams(config: Config, codec: str, corrected: tuple[str, ...], states: int = 0) -> dict[str, Stream]:
    """The streams of an artifact in file order, by name. `codec` is the name in its header; with rans, what is not
    integer codes is left to brotli, and codes in half steps know the trellis."""
    streams: dict[str, Stream] = {}
    codecs = {"i1": CODECS["rans"], "<i2": trellis_codec(states)} if codec == "rans" else {}
    for entry in artifact_table(config, corrected, states):
        used = codecs.get(entry.dtype, CODECS["brotli" if codec == "rans" else codec])
        streams.setdefault(entry.stream, Stream(used, [])).entries.append(entry)
    return streams


def chosen_codec(config: Config) -> str:
    """The codec of an artifact written here: COMPRESSOR=pergroup means lrzip where it is installed, else brotli."""
    pergroup = "lrzip" if shutil.which("lrzip") else "brotli"
    return pergroup if config.compressor == "pergroup" else config.compressor


def save_artifact(path: Path, stored: Mapping[str, Parts], config: Config) -> int:
    """Compresses the streams side by side and writes the artifact. Returns its size in bytes."""
    corrected, codec = corrected_matrices(stored), chosen_codec(config)
    streams = artifact_streams(config, codec, corrected, config.trellis_states)
    longest_first = sorted(streams, key=lambda name: -streams[name].nbytes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blobs = pool.map(lambda name: streams[name].codec.encode(streams[name].arrays(stored)), longest_first)
        packed = dict(zip(longest_first, blobs))
    meta = {"model": artifact_settings(config), "codec": codec, "corrected": corrected}
    meta |= {"trellis": config.trellis_states} if config.trellis_states else {}
    return write_container(path, meta, [packed[name] for name in streams])


def open_artifact(path: Path, config: Config) -> tuple[dict, list[memoryview]]:
    """The header and the packed streams of an artifact. Raises UserError unless it is of the model of `config`."""
    meta, packed = read_container(path, HEADER_LIMIT + 2 * sum(entry.nbytes for entry in artifact_table(config)))
    if odd := differing(artifact_settings(config), meta.get("model")):
        raise UserError(f"{path}: made with {odd}; set the same values")
    return meta, packed


def load_artifact(path: Path, config: Config) -> dict[str, np.ndarray]:
    """The float32 parameters of an artifact file by name. Raises UserError like read_artifact."""
    return read_artifact(path, config)[1]


def read_artifact(path: Path, config: Config) -> tuple[dict[str, Parts], dict[str, np.ndarray], dict[str, int]]:
    """An artifact file: its arrays by owner and part, the float32 parameters, and the bytes of each stream in the file.

    Raises UserError when it is damaged, or of another model than `config` says. Decompression is bounded by the
    sizes that follow from the configuration.
    """
    meta, packed = open_artifact(path, config)
    stored: dict[str, Parts] = {}
    try:
        corrected, codec = corrected_names(meta.get("corrected"), config), str(meta.get("codec"))
        if codec not in CODECS:
            raise ValueError(f"codec {codec[:20]}")
        states = trellis_states(meta, codec)
        streams = artifact_streams(config, codec, corrected, states)
        if len(packed) != len(streams):
            raise ValueError(f"{len(packed)} streams, expected {len(streams)}")
        for entry in artifact_table(config, corrected, states):
            stored.setdefault(entry.owner, {})[entry.part] = np.zeros(entry.shape, entry.dtype)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decode = lambda stream, data: stream.codec.decode(bytes(data), stream.arrays(stored))
            list(pool.map(decode, streams.values(), packed))  # raises what a thread has raised
        return stored, dequantize(stored, config), {name: len(data) for name, data in zip(streams, packed)}
    except ValueError as error:
        raise UserError(f"{path}: damaged artifact ({error}); quantise again") from None


def array_bytes(stored: Mapping[str, Parts], table: Sequence[Entry], packed: Mapping[str, int]) -> dict[Entry, float]:
    """Bytes of the file that each array takes. Arrays of one stream are compressed together: codes share its bytes in
    proportion to their entropy, counted for each array alone, fp16 numbers to their number."""

    def weight(entry: Entry) -> float:
        array = stored[entry.owner][entry.part]
        if entry.dtype not in ("i1", "<i2"):
            return float(array.nbytes)
        shares = np.unique(array, return_counts=True)[1] / array.size
        return float(array.size * (1e-3 - (shares * np.log2(shares)).sum()))  # an array of one value is not free

    weights = {entry: weight(entry) for entry in table}
    totals: dict[str, float] = {}
    for entry in table:
        totals[entry.stream] = totals.get(entry.stream, 0.0) + weights[entry]
    return {entry: packed[entry.stream] * weights[entry] / totals[entry.stream] for entry in table}


def quantisation_errors(
    name: str, arrays: Mapping[str, np.ndarray], restored: Mapping[str, np.ndarray], config: Config
) -> tuple[float, float | None]:
    """Of one matrix W and its value from the artifact: |W - W'| / |W| in Frobenius norm, and the same of its outputs
    on the calibration inputs, sqrt(tr(E H E^T) / tr(W H W^T)); None without a Hessian of its inputs."""
    W, Q = (matrix_of(values, name, config).astype(np.float64) for values in (arrays, restored))
    stacks = [(f"hessian.{group.hessian}.{i}", s) for group in quant_groups(config) for i, s in enumerate(group.names)]
    H, E = arrays.get(next((source for source, names in stacks if name in names), "")), W - Q
    size = float(np.linalg.norm(W)) or 1.0
    if H is None:
        return float(np.linalg.norm(E)) / size, None
    output = max(float(np.vdot(W @ H, W)), 1e-30)
    return float(np.linalg.norm(E)) / size, math.sqrt(max(float(np.vdot(E @ H, E)), 0.0) / output)


def write_tensors(path: Path, artifact: Path, arrays: Mapping[str, np.ndarray], config: Config) -> None:
    """A line for each array of the artifact: its numbers, the bytes of the file that it takes (`array_bytes`; the last
    line is the container's header), and for codes the errors of the matrix (`quantisation_errors`)."""
    stored, restored, packed = read_artifact(artifact, config)
    table, rows = artifact_table(config, corrected_matrices(stored), config.trellis_states), []
    for entry, size in array_bytes(stored, table, packed).items():
        name = entry.owner if entry.part == "half" else f"{entry.owner}.{entry.part}"
        errors = quantisation_errors(entry.owner, arrays, restored, config) if entry.part == "codes" else (None, None)
        rows.append((name, entry.stream, entry.size, size, *("" if error is None else error for error in errors)))
    header = artifact.stat().st_size - sum(packed.values())
    rows.append(("header", "", 0, header, "", ""))
    write_table(path, "array,stream,numbers,bytes,weight_error,output_error", rows)


def corrected_matrices(stored: Mapping[str, Parts]) -> tuple[str, ...]:
    """The matrices with a low-rank correction, in the order of the header."""
    return tuple(sorted(owner for owner, parts in stored.items() if "lqer_a" in parts))


def corrected_names(names: Any, config: Config) -> tuple[str, ...]:
    """The corrected matrices that an artifact names. Raises ValueError unless they are distinct matrices of it."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("no list of corrected matrices")
    known = set(quantized_matrices(config))
    if not known.issuperset(names) or len(set(names)) != len(names) or (names and not config.lqer_rank):
        raise ValueError(f"corrected matrices {str(names)[:80]}")
    return tuple(names)


def trellis_states(meta: Mapping[str, Any], codec: str) -> int:
    """The number of states of the trellis that a header names; 0: none. Raises ValueError for an impossible one."""
    states = meta.get("trellis", 0)
    if type(states) is not int or states not in TRELLIS_RULES or (states and codec != "rans"):
        raise ValueError(f"trellis {str(states)[:20]} with codec {codec[:20]}")
    return states


def use_artifact(model: GPT, path: Path, config: Config, run: Run) -> None:
    """Sets every weight of the model to that of an artifact file, which only the main rank needs to have."""
    run.on_main(lambda: model.load(load_artifact(path, config)))
    run.share_weights(model)


def artifact_settings(config: Config) -> dict[str, Any]:
    """What travels in an artifact: the settings that it depends on, with the base that three others amount to."""
    return config.of_stage(ARTIFACT) | {"rotary_base": config.rotary_base}


PACKED_START = b"#coding:latin1\nimport brotli as B,linecache as C\n"


def without_docstrings(tree: ast.AST) -> ast.AST:
    """The tree itself, its bodies without the text that they begin with."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                body[:1] = [] if len(body) > 1 else [ast.Pass()]
    return tree


@functools.cache  # half a second each time
def packed_script(source: str) -> bytes:
    """The script as it counts and runs: without comments and docstrings, compressed, in a wrapper of four lines.

    The compressed bytes stand in the file as Latin-1 characters, a fifth shorter than base85. The wrapper registers
    the text with linecache, because Triton reads the source of its kernels from there.
    """
    import brotli

    payload = brotli.compress(ast.unparse(without_docstrings(ast.parse(source))).encode(), quality=11)
    for raw, escape in ((b"\\", b"\\\\"), (b"'", b"\\'"), (b"\n", b"\\n"), (b"\r", b"\\r"), (b"\0", b"\\x00")):
        payload = payload.replace(raw, escape)
    return (
        PACKED_START
        + b"s=B.decompress('" + payload + b"'.encode('latin1')).decode();n=__file__+'#'\n"
        + b"C.cache[n]=len(s),None,s.splitlines(1),n;exec(compile(s,n,'exec'))\n"
    )  # fmt: skip


def counted_code_bytes() -> tuple[int, bool]:
    """Bytes of code that count towards the artifact, and whether the running file itself is the packed one."""
    source = Path(__file__).read_bytes()
    packed = source.startswith(PACKED_START)
    return (len(source) if packed else len(packed_script(source.decode()))), packed


def make_artifact(config: Config, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes artifact.bin and returns its sizes and times.

    With FIT_ARTIFACT, an artifact over the limit is quantised again with wider clips (coarser steps, fewer bits) until
    it fits; the first one is kept as oversize.bin, to measure the cost in bpb. With FIT_ARTIFACT=fill, one far below
    the limit is quantised again with narrower clips, to use every byte. The last artifact that fits is kept.

    Example with fill, bytes with the code: 16,900,000 at clips x 1; 15,800,000 at x 1.22; 16,001,000 at x 1.17;
    15,997,000 at x 1.171. The fourth is within FILL_SLACK_BYTES of the limit: it is kept, the first is oversize.bin.
    """
    target, oversize, arrays = config.run_dir / "artifact.bin", config.run_dir / "oversize.bin", load_trained(config)
    attempts: list[tuple[dict[str, Any], bytes]] = []
    factor: float | None = 1.0
    while factor is not None and len(attempts) < FIT_TRIES:
        sizes = write_attempt(target, arrays, config, factor, device, log)
        attempts.append((sizes, target.read_bytes()))
        factor = next_clip_factor(factor, sizes["total_bytes"] - ARTIFACT_LIMIT_BYTES, config)
    fitting = [attempt for attempt in attempts if attempt[0]["total_bytes"] <= ARTIFACT_LIMIT_BYTES]
    sizes, data = (fitting or attempts)[-1]
    write_file(target, data)
    oversize.unlink(missing_ok=True)
    if len(attempts) > 1 and attempts[0] not in fitting:
        write_file(oversize, attempts[0][1])
    write_tensors(config.run_dir / "tensors.csv", target, arrays, config)
    return sizes | {"artifact_sha256": hashlib.sha256(data).hexdigest()}


def write_attempt(
    path: Path, arrays: Mapping[str, np.ndarray], config: Config, factor: float, device: torch.device, log: Log
) -> dict[str, Any]:
    """Quantises with all clips multiplied by a factor, writes the artifact and returns its sizes and times."""
    (code_bytes, packed), start = counted_code_bytes(), time.monotonic()
    stored = quantize(arrays, scaled_clips(config, factor), device, log)
    middle = time.monotonic()
    size = save_artifact(path, stored, config)
    seconds = middle - start, time.monotonic() - middle
    log("artifact", bytes=size, clip_factor=factor, gptq_s=seconds[0], compress_s=seconds[1])
    return {
        "artifact_bytes": size,
        "code_bytes": code_bytes,
        "code_is_packed": packed,
        "total_bytes": size + code_bytes,
        "clip_factor": factor,
        "gptq_seconds": seconds[0],
        "compress_seconds": seconds[1],
    }


def next_clip_factor(factor: float, excess: int, config: Config) -> float | None:
    """The clip factor after one that was `excess` bytes over the limit (negative: under it); None: no further try.

    Clips twice as wide save one bit per code. Example: 36 million codes, 1 MB too many, 3 kB of margin: 0.223 bits per
    code have to go, so the factor grows by 2^0.223 = 1.167.
    """
    if config.fit_artifact == "0" or config.quant_scheme != "gptq":  # the other schemes have no clips to change
        return None
    codes = sum(entry.size for entry in artifact_table(config) if entry.part == "codes")
    wanted = factor * 2 ** min(max(8 * (excess + FIT_MARGIN_BYTES) / codes, -10), 10)
    if excess > 0:
        return wanted if wanted <= FIT_LARGEST_FACTOR else None
    wanted = max(wanted, FILL_SMALLEST_FACTOR)
    enough = config.fit_artifact != "fill" or excess > -FILL_SLACK_BYTES
    return None if enough or wanted == factor else wanted


def scaled_clips(config: Config, factor: float) -> Config:
    """`config` with every quantisation clip multiplied: log2(factor) fewer bits per code."""
    clips = [name for name in FIELDS if name.endswith("_clip_sigmas")]
    return dataclasses.replace(config, **{name: getattr(config, name) * factor for name in clips})


def predicted_artifact_bytes(config: Config) -> dict[str, int]:
    """Forecast of the artifact from the rate model of Gaussian rows, before any training.

    Codes with clip k and range r take 2.047 + log2(r / k) + log2(1 + (k / r)^2 / 12) / 2 bits. Schemes without a clip
    in sigmas put it near the largest of the n numbers of a row, about 0.88 sqrt(2 ln 2n) sigmas. QUANT_SCALE_FLOOR may
    put it higher; what that saves is unknown here. The codec adds about 1.2 % to these streams. Half-precision numbers
    shrink to about 0.85 of their size, codes of LQER to 4 bits, codes of gates to 7.
    """
    corrected = quantized_matrices(config)[: config.lqer_top_k] if config.lqer_rank else []
    bits, halves = 0.0, 0
    for entry in artifact_table(config, tuple(corrected)):
        if entry.dtype != "i1":
            halves += entry.nbytes
        elif entry.stream in ("gates", "lqer"):
            bits += (7.0 if entry.stream == "gates" else 4.0) * entry.size
        else:
            role = MATRICES[entry.stream].role if entry.stream in MATRICES else "embed"
            clip, width, _ = precision(role, config)
            if config.quant_scheme != "gptq":
                clip = 0.88 * math.sqrt(2 * math.log(2 * entry.shape[1]))
            top = 2 ** (width - 1) - 1
            bits += entry.size * (
                ENTROPY_BITS_AT_ONE_SIGMA + math.log2(top / clip) + 0.5 * math.log2(1 + (clip / top) ** 2 / 12)
            )
    weights, code = round(1.012 * bits / 8 + 0.85 * halves), counted_code_bytes()[0]
    return {"artifact_bytes": weights, "code_bytes": code, "total_bytes": weights + code}


# ------------------------------------------------------------------------------------------------------------
# ADAPT
#
# Score-first test-time training (#1530, #1610, #1626): each document gets its own low-rank adapters, which learn
# from a chunk after it has been scored; at a few fixed points all weights learn from the documents scored so far.
# Documents form a queue of batches, the longest first. ROUND_BATCHES of them are a round, whose batches are dealt to
# tracks of about equal work, and the tracks to ranks. All ranks finish a round before the next one begins. What a score
# depends on has been scored in an earlier round or in the own document, so it is the same for any number of ranks.
# ------------------------------------------------------------------------------------------------------------


def adapter_shapes(config: Config, model: GPT) -> dict[str, tuple[int, int, int]]:
    """(visits, out, in) of the adapters of each kind of weight."""
    slots = len(layer_plan(config, looping=True))
    shapes = {name: (slots, *getattr(model, m.bank).shape[1:]) for name, m in MATRICES.items() if name != "mlp.up"}
    shapes["mlp.down"] = (slots, config.model_dim, config.model_dim)  # reads the MLP's input: a path around the MLP
    if not config.ttt_k_lora:
        del shapes["attn.k"]
    shapes["head"] = (1, config.vocab_size, config.model_dim)
    shapes["attn.o"] = (slots, config.model_dim, config.model_dim)  # reads the block's input, not the attention result
    return shapes


class Adapters:
    """LoRA factors for a batch of documents, and the moments of their AdamW. Rows belong to documents: a part of the
    batch is a view, goes through the model and learns alone, and needs no more memory than itself."""

    def __init__(self, config: Config, model: GPT, batch: int):
        c, device = config, model.tok_emb.weight.device
        self.config, self.size, self.scale = config, batch, c.ttt_lora_alpha / c.ttt_lora_rank
        self.factors = {
            name: (
                torch.zeros(batch, n, c.ttt_lora_rank, width, device=device),
                torch.zeros(batch, n, out, c.ttt_lora_rank, device=device),
            )
            for name, (n, out, width) in adapter_shapes(c, model).items()
        }
        self.moments = [[torch.zeros_like(x) for x in itertools.chain(*self.factors.values())] for _ in range(2)]

    def begin(self, kept: list[Tensor] | None, seed: int) -> None:
        """Ready for other documents: no delta and no optimizer history. A is the one that an earlier batch has left
        (warm start, #1886), or where there is none of this size, drawn."""
        random = torch.Generator(self.factors["head"][0].device).manual_seed(seed)
        fits = kept is not None and kept[0].size(0) == self.size
        for number, (a, b) in enumerate(self.factors.values()):
            if fits:
                a.copy_(kept[number])
            else:
                a.uniform_(-1, 1, generator=random).div_(math.sqrt(a.size(-1)))
            b.zero_()
        for moment in itertools.chain(*self.moments):
            moment.zero_()

    def first_factors(self, dtype: torch.dtype) -> list[Tensor]:
        """A copy of every A, for `begin`. On a GPU in bfloat16: where one rank has all tracks they would fill it."""
        return [a.to(dtype, copy=True) for a, _ in self.factors.values()]

    def lora(self, part: slice) -> Lora:
        """The adapters of some documents of the batch: leaves of autograd that share memory with `factors`."""
        leaf = lambda factor: factor[part].requires_grad_()
        return Lora(self.scale, {name: (leaf(a), leaf(b)) for name, (a, b) in self.factors.items()})

    @torch.no_grad()
    def step(self, lora: Lora, part: slice, number: int) -> None:
        """Step `number`, from 0, of `lora(part)`, on its gradients of a chunk that has been tallied."""
        leaves, c = list(itertools.chain(*lora.factors.values())), self.config
        first, second = ([moment[part] for moment in moments] for moments in self.moments)
        steps = [torch.full((), float(number), device=leaf.device) for leaf in leaves]
        adamw(
            leaves, [leaf.grad for leaf in leaves], first, second, [], steps, fused=True, amsgrad=False, maximize=False,
            lr=c.ttt_lora_lr, beta1=c.ttt_beta1, beta2=c.ttt_beta2, eps=1e-10, weight_decay=c.ttt_weight_decay,
        )  # fmt: skip


def chunk_of(count: int, config: Config) -> int:
    """Targets between two updates for a document of `count` targets. Never a matter of its neighbours in a batch."""
    return next((chunk for limit, chunk in config.chunk_steps if count <= limit), config.ttt_chunk_size)


def document_queue(documents: np.ndarray, batch: int, limits: Sequence[int] = ()) -> list[np.ndarray]:
    """Documents (n, 2) in batches of similar length, longest first; inside a batch in order of falling length.

    No batch has documents on both sides of one of the `limits` (ascending, in targets).
    """
    ascending = documents[np.argsort(documents[:, 1], kind="stable")]
    alike = np.split(ascending, np.searchsorted(ascending[:, 1], limits, side="right"))
    return [part[begin : begin + batch][::-1] for part in alike for begin in range(0, len(part), batch)][::-1]


def phase_pauses(queue: list[np.ndarray], config: Config) -> list[int]:
    """Queue positions of the global updates: each after the first batch that completes its share of the documents."""
    done = np.cumsum([len(batch) for batch in queue])
    limit = min(config.phased_ttt_prefix_docs, int(done[-1]))
    shares = [limit * (i + 1) // config.phased_ttt_num_phases for i in range(config.phased_ttt_num_phases)]
    return sorted({int(np.searchsorted(done, share)) + 1 for share in shares if share})


def batch_work(batch: np.ndarray, config: Config) -> int:
    """Tokens that adapting to a batch of documents (n, 2) pushes through the model: much more than it scores."""
    counts, longest = batch[:, 1], int(batch[0, 1])
    chunk = chunk_of(longest, config)
    windows = plan_windows(longest, config.ttt_eval_seq_len, chunk, chunk)
    return sum(int((counts > first).sum()) * (first + chunk - begin) for begin, first, _ in windows)


class Rounds(NamedTuple):
    """Who scores which batch of the queue, and when. Lengths of documents decide that, never what they say."""

    phases: list[tuple[int, int]]  # first batch and end of each phase: between two, all weights learn
    number: list[int]  # of the round of each batch
    track: list[int]  # of each batch; a rank has every world_size-th track
    work: list[int]  # of each round, in tokens


def deal_rounds(queue: list[np.ndarray], config: Config) -> Rounds:
    """Cuts the phases of a queue into rounds, and deals each round: every batch, in order, to the track that has the
    least work in that round so far.

    The first batches take much longer than the others. With rounds of 8 batches, one on each track, eight ranks would
    push a quarter more tokens than with equal shares (PRESET=frontier, 50,000 documents of lengths like FineWeb's:
    tests/bench_eval.py); with 32 it is 4 %.
    """
    pauses = [pause for pause in phase_pauses(queue, config) if pause < len(queue)]
    phases = list(zip([0, *pauses], [*pauses, len(queue)]))
    number, track, work = [], [], []
    for begin, end in phases:
        for first in range(begin, end, ROUND_BATCHES):
            loads = [0] * TTT_TRACKS
            for batch in queue[first : min(first + ROUND_BATCHES, end)]:
                number.append(len(work))
                track.append(loads.index(min(loads)))
                loads[track[-1]] += batch_work(batch, config)
            work.append(sum(loads))
    return Rounds(phases, number, track, work)


class Governor:
    """Keeps an evaluation inside its time by longer chunks: half as many updates, half the work.

    Decides before each round, for all ranks alike, by rank 0's clock and the lengths of documents, never by what they
    say. EVAL_CHUNK_FACTORS repeats the decisions of another run.
    """

    def __init__(self, evaluation: Evaluation, work: list[int]):
        config = evaluation.config
        self.work, self.run, self.log, self.fixed = work, evaluation.run, evaluation.log, config.chunk_factors
        self.start = time.monotonic()
        self.limit = config.eval_max_seconds if config.max_wallclock_seconds and config.eval_max_seconds else math.inf
        self.round, self.factor, self.decisions = -1, 1, []

    def reach(self, number: int) -> None:
        """Goes on to this round, once all ranks have scored all rounds before it. Collective: every rank reaches the
        same rounds."""
        while self.round < number:
            self.round += 1
            elapsed = torch.tensor(time.monotonic() - self.start if self.run.is_main else 0.0, device=self.run.device)
            elapsed = float(self.run.sum_(elapsed))
            factor = self.fixed.get(self.round, self.factor) if self.fixed else self.forecast(elapsed)
            if factor != self.factor:
                self.decisions.append(f"{self.round}:{factor}")
                self.log("governor", round=f"{self.round}/{len(self.work)}", chunk_factor=factor, seconds=elapsed)
            self.factor = factor

    def forecast(self, elapsed: float) -> int:
        """1, or the power of two by which chunks must grow so that all work ends in time."""
        done, left, factor = sum(self.work[: self.round]), sum(self.work[self.round :]), 1
        if self.limit == math.inf or done < 0.05 * (done + left):  # too early to tell
            return factor
        while elapsed * (1 + left / factor / done) > self.limit and factor < 64:
            factor *= 2
        return factor


def stream_hints(evaluation: Evaluation, queue: list[np.ndarray], rounds: Rounds) -> Tensor | None:
    """hint_table of the validation stream, made on the main rank; None where NGRAM_TILT_ENABLED=0. The turn of a
    document is the number of its round: ranks score a round side by side."""
    config, validation, start = evaluation.config, evaluation.validation, time.monotonic()
    if not config.ngram_tilt_enabled:
        return None

    def make() -> Tensor:
        tokens, starts = validation.tokens.numpy(), validation.documents[:, 0]
        turns = np.empty(len(starts), np.int64)
        for batch, number in zip(queue, rounds.number):
            turns[np.searchsorted(starts, batch[:, 0])] = number
        document = np.searchsorted(starts, np.arange(len(tokens)), side="right") - 1
        return hint_table(tokens, document, turns[document], hint_sources(config), config.token_threshold)

    table = evaluation.run.on_main(make)
    evaluation.log("hints", positions=int((table[:, 0] >= 0).sum()), seconds=time.monotonic() - start)
    return table


def adapt_batch(
    evaluation: Evaluation, adapters: Adapters, batch: np.ndarray, chunk: int, hints: Hints | None = None
) -> None:
    """Scores documents (n, 2) in chunks of `chunk` targets; after each chunk the adapters of its documents learn from
    it.

    One forward pass serves both: its losses are tallied first, and only then differentiated. With `hints`, what is
    tallied is the loss under the tilted distribution (`tilt`). A chunk's window begins and ends at the same distance
    into every document, so the chunk is the last columns of the batch; the rest of a document's last chunk is padding
    behind the real tokens. Lengths fall within a batch, so documents that have ended are its last rows and leave it: the
    longest batches would be mostly padding. A batch with too many tokens goes through the model in parts.
    """
    e, config, device = evaluation, evaluation.config, evaluation.run.device
    stream, last = e.validation.tokens, len(e.validation.tokens) - 1
    starts, counts = torch.from_numpy(batch[:, :1].copy()), torch.from_numpy(batch[:, 1].copy())
    windows = plan_windows(int(counts.max()), config.ttt_eval_seq_len, chunk, first=chunk)
    for number, (begin, first, _) in enumerate(windows):
        left = int((counts > first).sum())  # documents that go on
        starts, counts, rows = starts[:left], counts[:left], torch.arange(left)[:, None]
        columns = torch.arange(begin, first + chunk)
        inputs = (starts + columns).clamp(max=last)  # (B, T) stream positions
        targets = (starts + columns[-chunk:] + 1).clamp(max=last)  # (B, chunk)
        real = columns[-chunk:] < counts[:, None]
        learns = counts > first + chunk  # a document's last chunk is not learned from
        tokens = move(torch.where(columns < counts[:, None], stream[inputs], 0), device)
        wanted, sources = stream[targets], torch.full_like(targets, -1)
        if hints:
            hinted, sources = hints.table[targets].long().unbind(-1)
            wanted = torch.stack([wanted, hinted], -1)  # (B, chunk, 2)
        ids, weights, raw = move(wanted.clamp(min=0), device), move(learns, device), []
        size = max(config.adapt_tokens // len(columns), 1)  # of a part; memory depends on it, results do not
        for part in (slice(start, min(start + size, left)) for start in range(0, left, size)):
            lora = adapters.lora(part)
            nll = e.program.adapt(tokens[part], ids[part], e.plan, None, lora)
            scored = nll.detach().cpu()
            raw.append(scored)
            if hints:
                boost = hints.boosts.boost(scored[..., 1], rows[part], sources[part])
                nll, scored = nll[..., 0], tilt(scored, wanted[part], boost)
            e.tally.add(scored[real[part]], targets[part][real[part]])
            if learns[part].any():
                e.tally.learn_from(targets[part][learns[part]], e.tally.times)
                (nll.mean(1) * weights[part]).sum().backward()
                adapters.step(lora, part, number)
        if hints and (known := real & hints.boosts.learnt(sources)).any():
            e.tally.learn_from(targets[known], e.tally.times)
            hit = (wanted[..., 0] == hinted)[known]
            hints.boosts.update(torch.cat(raw)[..., 1][known], rows.expand_as(known)[known], sources[known], hit)


def update_weights(
    evaluation: Evaluation,
    optimizer: torch.optim.Optimizer,
    windows: list[Window],
    lr: float,
    scored: np.ndarray | None,
) -> None:
    """One step of all weights on the mean loss over windows, dealt to ranks and weighted by tokens.

    `scored` (N,) says how often each target has been scored, by all ranks; None asks for the illegal order.
    """
    e, config, run, model = evaluation, evaluation.config, evaluation.run, evaluation.program.model
    total, parameters = sum(window.end - window.begin for window in windows), list(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for part in fill_rows(windows[run.rank :: run.world_size], config.score_row_tokens):
        row, targets = e.row(part, 0)
        if scored is None:
            e.tally.learned_early += len(targets)
        else:
            e.tally.learn_from(targets, scored)
        (model(row.inputs, row.targets, e.plan, row.segments).sum() / total).backward()
    for parameter in parameters:
        run.sum_(parameter.grad)
    if config.global_ttt_grad_clip:
        nn.utils.clip_grad_norm_(parameters, config.global_ttt_grad_clip)
    optimizer.step()
    model.zero_grad(set_to_none=True)


def half_cosine(number: int, count: int) -> float:
    """From 1 at the first of `count` numbers to 0 at the last."""
    return 0.5 * (1 + math.cos(math.pi * number / max(count - 1, 1)))


def global_update(evaluation: Evaluation, documents: np.ndarray) -> int:
    """One pass of SGD over all weights on documents (n, 2) that are fully scored (#1610). Returns its steps.

    Each step takes GLOBAL_TTT_CHUNK_TOKENS targets; the learning rate falls along half a cosine to 0.
    """
    config, model = evaluation.config, evaluation.program.model
    windows = windows_inside(documents, config.eval_seq_len, config.eval_seq_len)
    chunks = fill_rows(windows, max(config.global_ttt_chunk_tokens, config.eval_seq_len))
    optimizer = torch.optim.SGD(model.parameters(), config.global_ttt_lr, momentum=config.global_ttt_momentum)
    scored = evaluation.tally.over_ranks(evaluation.run).times
    for number, chunk in enumerate(chunks):
        update_weights(evaluation, optimizer, chunk, config.global_ttt_lr * half_cosine(number, len(chunks)), scored)
    return len(chunks)


def adapt_documents(evaluation: Evaluation) -> Tally:
    """Scores the whole validation stream with adapters and global phases; changes the model's weights on the way."""
    config, run, log, model = evaluation.config, evaluation.run, evaluation.log, evaluation.program.model
    documents = evaluation.validation.documents
    queue = document_queue(documents, config.ttt_batch_size, [limit for limit, _ in config.chunk_steps])
    rounds = deal_rounds(queue, config)
    governor, table = Governor(evaluation, rounds.work), stream_hints(evaluation, queue, rounds)
    pauses = [end for _, end in rounds.phases[:-1]]
    log("ttt", documents=len(documents), batches=len(queue), rounds=len(rounds.work), pauses=pauses)
    for phase, (begin, end) in enumerate(rounds.phases):
        model.requires_grad_(False)
        adapters, kept = None, {}  # by track: A after its last batch
        mine = [number for number in range(begin, end) if rounds.track[number] % run.world_size == run.rank]
        for number in log.bar(mine, "ttt"):
            governor.reach(rounds.number[number])
            batch, track = queue[number], rounds.track[number]
            if adapters is None or adapters.size != len(batch):
                adapters = Adapters(config, model, len(batch))
            seed = ((config.seed * 1000 + phase) * TTT_TRACKS + track) * 2 + (track in kept)
            adapters.begin(kept.get(track), seed)
            chunk = min(governor.factor * chunk_of(int(batch[0, 1]), config), config.ttt_eval_seq_len)
            hints = None if table is None else Hints(table, Boosts(config, model, len(batch)))
            adapt_batch(evaluation, adapters, batch, chunk, hints)
            kept[track] = adapters.first_factors(run.dtype)
        governor.reach(rounds.number[end - 1])  # also without a batch in it
        model.requires_grad_(True)
        if end < len(queue):
            steps, seconds = global_update(evaluation, np.concatenate(queue[:end])), time.monotonic() - governor.start
            log("global_ttt", phase=f"{phase + 1}/{len(pauses)}", batches=end, steps=steps, seconds=seconds)
    if governor.decisions:
        log("warning", reason="longer chunks", EVAL_CHUNK_FACTORS=",".join(governor.decisions))
    elif governor.limit < math.inf:
        log("governor", chunk_factor=1, EVAL_CHUNK_FACTORS="0:1")  # what repeats this run on a slower machine
    return evaluation.tally.over_ranks(run)


def chunk_optimizer(model: GPT, config: Config) -> torch.optim.Optimizer:
    """Of all weights, for training on chunks; without weight decay."""
    if config.chunk_ttt_optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), config.ttt_lr, weight_decay=0.0)
    return torch.optim.SGD(model.parameters(), config.ttt_lr, momentum=config.ttt_momentum)


def learn_chunk(
    evaluation: Evaluation,
    optimizer: torch.optim.Optimizer,
    span: tuple[int, int],
    lr: float,
    scored: np.ndarray | None,
) -> None:
    """TTT_EPOCHS passes over the inputs begin..end-1 of the stream, in windows of the context beside each other."""
    config, stretches = evaluation.config, evaluation.stretches
    begins, ends = np.maximum(stretches[:, 0], span[0]), np.minimum(stretches.sum(1), span[1])
    inside = np.stack([begins, ends - begins], 1)[ends > begins]
    windows = windows_inside(inside, config.eval_seq_len, config.eval_seq_len)
    count = TTT_TRACKS * config.ttt_batch_seqs
    for _ in range(config.ttt_epochs):
        for begin in range(0, len(windows), count):
            update_weights(evaluation, optimizer, windows[begin : begin + count], lr, scored)


def adapt_chunks(evaluation: Evaluation) -> Tally:
    """Sliding score of the stream in chunks of TTT_CHUNK_TOKENS; all weights learn from each after its score (#549,
    #1413). The optimizer lives through all chunks, whose learning rate falls along half a cosine; the last chunk is
    not learned from."""
    config, run, tally = evaluation.config, evaluation.run, evaluation.tally
    windows = windows_inside(evaluation.stretches, config.eval_seq_len, config.eval_stride)
    in_chunk = itertools.groupby(windows, lambda window: window.first_scored // config.ttt_chunk_tokens)
    chunks, optimizer = [list(chunk) for _, chunk in in_chunk], chunk_optimizer(evaluation.program.model, config)
    evaluation.log("ttt", chunks=len(chunks), epochs=config.ttt_epochs)
    for number, chunk in enumerate(evaluation.log.bar(chunks, "ttt")):
        evaluation.score_windows(chunk, quiet=True)
        if number + 1 < len(chunks):
            begin, end = chunk[0].first_scored, chunk[-1].end
            scored = np.zeros_like(tally.times)
            times = torch.from_numpy(tally.times[begin + 1 : end + 1]).to(run.device, copy=True)
            scored[begin + 1 : end + 1] = run.sum_(times).cpu().numpy()
            lr = config.ttt_lr * half_cosine(number, len(chunks))
            learn_chunk(evaluation, optimizer, (begin, end), lr, scored)
    return tally.over_ranks(run)


def train_before_scoring(evaluation: Evaluation) -> Tally:
    """What #489 and others did: train on the whole validation stream, then score it. Against the rules (#402, #677);
    the result is called invalid everywhere."""
    config, optimizer = evaluation.config, chunk_optimizer(evaluation.program.model, evaluation.config)
    learn_chunk(evaluation, optimizer, (0, len(evaluation.validation.tokens) - 1), config.ttt_lr, None)
    result = evaluation.score(config.eval_stride)
    evaluation.log("ttt", learned_before_score=result.learned_early)
    return result


TTT_KINDS = {"lora_phased": adapt_documents, "chunk_sgd": adapt_chunks, "pre_eval_illegal": train_before_scoring}


def warm_up_adapt(program: Program) -> None:
    """Compiles the adaptive pass: first chunks, where the window is the chunk, and later ones, for a batch of documents
    and for the one that is left of it. Chunks and batches of other sizes run the same graphs."""
    config, chunk, batch = program.config, program.config.ttt_chunk_size, program.config.ttt_batch_size
    program.model.requires_grad_(False)
    noise, adapters = noise_validation(config, batch, 4 * chunk), Adapters(config, program.model, batch)
    chunks = np.array([4] + [2] * (batch - 1))  # a document learns from all but its last one
    documents = np.stack([noise.documents[:, 0], chunk * chunks], 1)
    adapters.begin(None, 0)
    no_hints = torch.full((len(noise.tokens), 2), -1, dtype=torch.int32)
    hints = Hints(no_hints, Boosts(config, program.model, batch)) if config.ngram_tilt_enabled else None
    adapt_batch(Evaluation(program, noise, Log(None)), adapters, documents, chunk, hints)
    program.model.requires_grad_(True)


# ------------------------------------------------------------------------------------------------------------
# CHECK
#
# What a later stage would fail at is tried before the first one starts: packages, files, the device, memory and disk.
# Each item calls what the stages call, on real files and the real device, and says in a few words what it found.
# ------------------------------------------------------------------------------------------------------------


def check(config: Config, run: Run, log: Log) -> None:
    """Tries what the stages of a run need, a line for each item. Raises the first UserError when all items have been
    tried. Collective."""
    failed = None
    for item, attempt in CHECKS.items():
        try:
            ok, detail = True, attempt(config, run)
        except UserError as error:
            ok, detail, failed = False, str(error), failed or error
        if detail:
            log("check", item=item, ok=ok, detail=" ".join(detail.split()).replace(" ", "_"))
    run.agree(failed)


def all_stages(config: Config) -> Config:
    """What STAGES=check and STAGES=describe are about."""
    return dataclasses.replace(config, stages=Config.stages)


def check_packages(config: Config, run: Run) -> str:
    """Libraries that are imported where they are used."""
    names = ["brotli", "sentencepiece", "tqdm"] + ["matplotlib"] * ("train" in config.stage_list)
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{name}: cannot import it ({error}); pip install -r requirements.txt") from None
    return ", ".join(names)


def check_train_data(config: Config, run: Run) -> str:
    if "train" not in config.stage_list:
        return ""
    stream = TokenStream(config.dataset_dir, "train", config.vocab_size)
    return f"{len(stream)} tokens in {len(stream.shards)} shards"


def check_validation(config: Config, run: Run) -> str:
    """The validation shards with their bytes, and the tokenizer."""
    if config.stage_list == ["quantize"]:
        return ""
    validation = load_validation(config)
    return (
        f"{len(validation.tokens)} tokens, {len(validation.documents)} documents, {int(validation.bytes.sum())} bytes"
    )


def check_earlier(config: Config, run: Run) -> str:
    """The file that the first stage continues from, which only the main rank needs to have."""
    first, folder = config.stage_list[0], config.run_dir
    if first == "quantize":
        run.on_main(lambda: bool(load_trained(config)))
        return f"{folder / 'trained.bin'}"
    if first == "evaluate":
        run.on_main(lambda: bool(open_artifact(folder / "artifact.bin", config)))
        return f"{folder / 'artifact.bin'}"
    return ""


def check_attention(config: Config, run: Run) -> str:
    """The attention back-end forward and backward on two segments, which must agree with plain attention on each."""
    name, attend = choose_attention(config, run.device)
    random, lengths, d = torch.Generator().manual_seed(0), [40, 24], config.head_dim
    shapes = [(1, sum(lengths), heads, d) for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    qkv = [torch.randn(shape, generator=random).to(run.device, run.dtype).requires_grad_() for shape in shapes]
    segments = pack_segments(np.array(lengths), max(lengths), run)
    key = f"ATTN_BACKEND={name}: with {d} channels per head (MODEL_DIM / NUM_HEADS)"
    try:
        pieces = zip(*(x.split(lengths, 1) for x in qkv))
        results = [
            attend(*qkv, segments),
            torch.cat([attend_sdpa(*piece, None) for piece in pieces], 1),
            attend(*qkv, None),
        ]
        slopes = [torch.autograd.grad(result.float().square().sum(), qkv)[0] for result in results]
        errors = [float(((a - b).norm() / b.norm()).detach()) for a, b in (results[:2], slopes[:2])]
    except Exception as error:  # noqa: BLE001 - whatever another release of it may raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{key} it fails: {reason}; set another back-end or NUM_HEADS") from None
    need(max(errors) < 0.03, f"{key} it is wrong by {max(errors):.2g}; set another back-end")
    return f"{name}, {d} channels per head"


def check_kernels(config: Config, run: Run) -> str:
    return choose_kernels(config.kernels, run.device)[0]


def check_quantizer(config: Config, run: Run) -> str:
    """The quantiser of each role, and the low-rank correction, on a small matrix on the device."""
    random, found = torch.Generator().manual_seed(0), []
    X, W = (torch.randn(1, rows, 16, generator=random).to(run.device) for rows in (64, 24))
    for role in ("attn", "mlp", "embed"):
        clip, bits, floor = precision(role, config)
        codes, scale = quantizer_of(config, config.quant_scheme, [24], run.device)(W, X.mT @ X, clip, bits, floor)
        parts = {"codes": codes[0].cpu().numpy(), "scale": scale[0].cpu().numpy()}
        rest = W[0] - torch.from_numpy(restore(parts)).to(run.device)
        if config.lqer_rank:
            lqer_factors(rest, config.lqer_rank, config.lqer_asym_group, config.lqer_left_bits)
        need(bool(rest.isfinite().all()), f"QUANT_SCHEME={config.quant_scheme}: {role} at {bits} bits is not finite")
        found.append(f"{role} {bits} bits")
    trellis = f", trellis of {config.trellis_states} states" if config.trellis_states else ""
    return f"{config.quant_scheme}, {', '.join(found)}{trellis}"


def check_artifact(config: Config, run: Run) -> str:
    """The codec that will be used, on a few bytes, and the forecast of the size."""
    codec, states = chosen_codec(config), config.trellis_states
    try:
        streams = artifact_streams(config, codec, (), states).values()
        for used, dtype in {stream.codec: stream.entries[0].dtype for stream in streams}.items():
            # On the trellis these are codes of its first state, which keep it there.
            sample = (4 * np.arange(-60, 60) if dtype == "<i2" else np.arange(-127, 127)).astype(dtype).reshape(2, -1)
            found = np.zeros_like(sample)
            used.decode(used.encode([sample]), [found])
            need(np.array_equal(found, sample), f"COMPRESSOR={config.compressor}: gives back other codes; set another")
    except (ImportError, ValueError) as error:
        raise UserError(f"COMPRESSOR={config.compressor}: {error}; install it or set another") from None
    forecast = predicted_artifact_bytes(config)["total_bytes"]
    used = {"lrzip": "pergroup writes lrzip", config.compressor: codec}.get(
        codec, "pergroup writes brotli without lrzip"
    )
    return f"{used}, {len(artifact_table(config))} arrays, forecast {forecast} of {ARTIFACT_LIMIT_BYTES} bytes"


def check_disk(config: Config, run: Run) -> str:
    """Room for the files of a run, each beside the one that it replaces."""
    folder = next(path for path in (config.run_dir.absolute(), *config.run_dir.absolute().parents) if path.is_dir())
    parameters = sum(map(math.prod, parameter_shapes(config).values()))
    wanted = 3 * ARTIFACT_LIMIT_BYTES
    if "train" in config.stage_list:
        wanted += 4 * sum(map(math.prod, trained_shapes(config).values()))
        wanted += 2 * 16 * parameters * bool(config.checkpoint_seconds)
    free, key = shutil.disk_usage(folder).free, f"RUNS_DIR={config.runs_dir}"
    need(os.access(folder, os.W_OK), f"{key}: cannot write in {folder}; choose another")
    need(free > wanted, f"{key}: {free} bytes free in {folder}, a run writes {wanted}; free space or choose another")
    return f"{wanted} bytes of {free}"


PROBE_TOKENS = 10_007  # a prime: what grows with the row has a number of elements that it divides
USABLE_MEMORY = 0.92  # of a GPU; the rest is for CUDA's context, the buffers of NCCL and cuBLAS, and fragmentation


def kept_per_token(config: Config, plan: tuple[Visit, ...], compiled: bool = True, adapting: bool = False) -> float:
    """Bytes per token that a forward pass on a GPU keeps for its backward pass, counted on fake tensors anywhere.

    Eager: every storage that autograd saves. Compiled: what AOTAutograd passes from the forward to the backward graph;
    its minimum cut computes cheap results anew instead. With `adapting`, only adapters have gradients.
    """
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, int] = {}  # storage -> its bytes

    def keep(tensor: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.numel() % PROBE_TOKENS == 0:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def keep_outputs(graph: Any, inputs: list) -> Any:
        nodes = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        for node in nodes:
            if isinstance(node, torch.fx.Node) and node.op != "placeholder":
                keep(node.meta.get("val"))
        return graph

    with FakeTensorMode():
        model = GPT(config, Run(device=torch.device("cuda")), "meta")
        with contextlib.suppress(ImportError):  # without Triton the plain functions, which keep a little less
            model.kernels = PLAIN if config.kernels == "plain" else fused_kernels()
        for block in model.blocks:
            block.attend = attend_sdpa
        weights = {name: torch.empty(p.shape, requires_grad=not adapting) for name, p in model.named_parameters()}
        inputs, R = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64), config.ttt_lora_rank
        targets = inputs[:, :1] if adapting else inputs
        pairs = {
            name: (torch.empty(1, n, R, width, requires_grad=True), torch.empty(1, n, out, R, requires_grad=True))
            for name, (n, out, width) in adapter_shapes(config, model).items()
        }

        def loss(weights: dict, pairs: dict, inputs: Tensor, targets: Tensor) -> Tensor:
            lora = Lora(1.0, pairs) if adapting else None
            return torch.func.functional_call(model, weights, (inputs, targets, plan), dict(lora=lora)).sum()

        if compiled:
            loss = aot_function(loss, keep_outputs, partition_fn=min_cut_rematerialization_partition)
        with contextlib.nullcontext() if compiled else torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss(weights, pairs, inputs, targets)
    return sum(kept.values()) / PROBE_TOKENS


@functools.cache
def row_bytes_per_token(config: Config) -> dict[str, float]:
    """Bytes per token that a packed row keeps (`train` compiled, `eager`), and a batch of adapted documents (`adapt`).

    Cutting the graph of the whole plan takes a minute; visits of the same kind keep the same, so that each kind is
    counted once, as a second visit. (Against the whole plan: see tests/test_check.py.)
    """
    plan = layer_plan(config, looping=True)
    first = plan[0]._replace(push=True, skip=None)
    base = kept_per_token(config, ())
    one = kept_per_token(config, (first,)) - base
    kind_of = lambda visit: (visit.wiring, visit.layer >= config.num_layers - config.xsa_last_n, visit.skip is None)
    kinds = {kind_of(first): one}
    for visit in plan:
        if kind_of(visit) not in kinds:
            pair = (first, visit._replace(push=False, skip=None if visit.skip is None else 0))
            kinds[kind_of(visit)] = kept_per_token(config, pair) - base - one
    adapting = kept_per_token(config, (first,), adapting=True) * len(plan)
    return dict(
        train=base + sum(kinds[kind_of(visit)] for visit in plan),
        eager=kept_per_token(config, plan, compiled=False),
        adapt=adapting,
    )


def memory_forecast(config: Config, ranks: int = 1, kept: Mapping | None = None) -> dict[str, dict[str, int]]:
    """Bytes on one GPU at the peak of each part of a run, by what they are for.

    Training; scoring; adapting; and learning with all weights from what has been scored, which is not compiled.
    """
    kept = kept or row_bytes_per_token(dataclasses.replace(config, row_tokens=1, val_batch_tokens=1))
    model = GPT(config, Run(), "meta")
    sizes = {group: sum(p.numel() for p in members.values()) for group, members in model.groups().items()}
    total, adamw, muon = sum(sizes.values()), sizes["embed"] + sizes["scalar"], sizes["matrix"]
    hessians = sum(math.prod(shape) for name, shape in trained_shapes(config).items() if name.startswith("hessian"))
    logits = 2 * config.vocab_size  # bytes per token of the logits or of their gradient
    train = dict(
        weights=4 * total, weights_in_bfloat16=2 * total, gradients=4 * total, average=4 * total,
        adamw_moments=8 * adamw, muon_momentum=-(-2 * muon // ranks),
        copy_during_warm_up=8 * total + 8 * adamw + 4 * muon, hessians=4 * hessians,
        row=kept["eager" if config.compile == "0" else "train"] * config.train_row_tokens,
        logits_gradient=logits * config.train_row_tokens,
    )  # fmt: skip
    weights, row = dict(weights=4 * total, weights_in_bfloat16=2 * total), config.score_row_tokens
    forecast = {"train": train, "score": weights | dict(row=(2 * logits + 20 * config.model_dim) * row)}
    if config.ttt_enabled:
        shapes = adapter_shapes(config, model).values()
        columns = config.ttt_lora_rank * config.ttt_batch_size * (config.ttt_kind == "lora_phased")
        numbers = columns * sum(n * (out + width) for n, out, width in shapes)
        firsts = columns * sum(n * width for n, _, width in shapes) * -(-TTT_TRACKS // ranks)
        adapters = dict(adapters=4 * numbers, adapter_moments=8 * numbers, adapters_of_tracks=2 * firsts)
        learning = dict(gradients=4 * total, optimizer=8 * total, row=(kept["eager"] + logits) * row)
        forecast["learn"] = weights | adapters | learning
        whole = config.ttt_batch_size * config.ttt_eval_seq_len
        tokens = min(whole, config.adapt_tokens) if numbers else 0
        part = numbers * tokens // whole  # of the adapters, in one pass
        passing = dict(adapter_gradients=4 * part, adapters_in_bfloat16=2 * part, batch=kept["adapt"] * tokens)
        forecast["adapt"] = weights | adapters | passing
    return {stage: {what: round(size) for what, size in parts.items()} for stage, parts in forecast.items()}


def fit_rows(config: Config, memory: float, ranks: int = 1) -> Config:
    """`config` with ROW_TOKENS, unless it is set, and VAL_BATCH_TOKENS so low that the forecast is at most `memory`
    bytes; where nothing is low enough, the lowest.

    No score depends on VAL_BATCH_TOKENS. Training does depend on ROW_TOKENS a little: the ends of rows cut documents.
    """

    def fits(config: Config, *parts: str) -> bool:
        forecast = memory_forecast(config, ranks)
        return all(sum(forecast[part].values()) <= memory for part in parts if part in forecast)

    if "train" in config.stage_list and not config.row_tokens:
        choices = [dataclasses.replace(config, row_tokens=row) for row in row_choices(config)]
        if not fits(config, "train"):
            config = next((choice for choice in choices if fits(choice, "train")), choices[-1])
    smallest = min(8 * config.eval_seq_len, 4 * config.ttt_eval_seq_len)
    while config.val_batch_tokens > smallest and not fits(config, "score", "learn", "adapt"):
        config = dataclasses.replace(config, val_batch_tokens=max(config.val_batch_tokens // 2, smallest))
    return config


def fit_device(config: Config, run: Run, log: Log) -> Config:
    """fit_rows for the memory of the GPU; a CPU takes the rows as they are."""
    if run.device.type != "cuda" or config.stage_list == ["quantize"]:
        return config
    memory = USABLE_MEMORY * run.share(torch.cuda.get_device_properties(run.device).total_memory)
    fitting = fit_rows(config, memory, run.world_size)
    forecast = {part: sum(sizes.values()) / 2**30 for part, sizes in memory_forecast(fitting, run.world_size).items()}
    rows = dict(row_tokens=fitting.train_row_tokens, val_batch_tokens=fitting.val_batch_tokens)
    log("memory", usable_gib=memory / 2**30, **rows, **{f"{part}_gib": size for part, size in forecast.items()})
    if fitting != config:
        log("warning", reason="rows_are_shorter_because_of_the_memory", **rows)
    return fitting


def check_memory(config: Config, run: Run) -> str:
    """The forecast against the memory of the GPU; on a CPU, what does not depend on rows against all memory."""
    if run.device.type == "cuda":
        usable, kept = USABLE_MEMORY * torch.cuda.get_device_properties(run.device).total_memory, None
    else:
        usable = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        kept = dict(train=0, eager=0, adapt=0)
    forecast = {part: sum(sizes.values()) for part, sizes in memory_forecast(config, run.world_size, kept).items()}
    fixes = dict(train="ROW_TOKENS", score="VAL_BATCH_TOKENS", learn="TTT_BATCH_SIZE", adapt="TTT_BATCH_SIZE")
    if "evaluate" not in config.stage_list:
        forecast = {"train": forecast["train"]} if "train" in config.stage_list else {}
    for part, size in forecast.items():
        key = f"{fixes[part]}={getattr(config, fixes[part].lower())}"
        text = f"{key}: {part} needs {size / 2**30:.1f} GiB of {usable / 2**30:.1f}; lower it, MODEL_DIM or NUM_LAYERS"
        need(size <= usable, text)
    return ", ".join(f"{part} {size / 2**30:.1f} GiB" for part, size in forecast.items())


CHECKS: dict[str, Callable[[Config, Run], str]] = {
    "packages": check_packages,
    "train_data": check_train_data,
    "validation": check_validation,
    "earlier": check_earlier,
    "attention": check_attention,
    "kernels": check_kernels,
    "memory": check_memory,
    "quantizer": check_quantizer,
    "artifact": check_artifact,
    "disk": check_disk,
}


# ------------------------------------------------------------------------------------------------------------
# MAIN
#
# Three stages, each from the file that the one before it wrote: train -> trained.bin, quantize -> artifact.bin,
# evaluate -> result.json. The submitted score is computed last, on an artifact read back from disk.
# ------------------------------------------------------------------------------------------------------------


def quantize_stage(config: Config, run: Run, log: Log, program: Program) -> dict[str, Any]:
    """trained.bin -> artifact.bin, on the main rank. Reads no training data."""
    return run.on_main(lambda: make_artifact(config, run.device, log))


def wanted_scores(config: Config, run: Run) -> list[str]:
    """The kinds of score of a run. Diagnostics come first; the last one is submitted."""
    oversize = run.share((config.run_dir / "oversize.bin").exists())
    wanted = dict(oversize=oversize, quantized=True, sliding=config.sliding_window_enabled, ttt=config.ttt_enabled)
    return [kind for kind, is_wanted in wanted.items() if is_wanted]


def score_artifact(kind: str, program: Program, log: Log) -> tuple[Evaluation, Tally, float]:
    """One kind of score of a file read back from disk, and its seconds from the first read of validation data on.

    Raises TrainingDiverged when the score is no number.
    """
    config, run = program.config, program.run
    file = "oversize.bin" if kind == "oversize" else "artifact.bin"
    use_artifact(program.model, config.run_dir / file, config, run)
    run.synchronize()
    start = time.monotonic()
    with program.clock():
        evaluation = Evaluation(program, load_validation(config), log)
        if kind == "ttt":
            tally = TTT_KINDS[config.ttt_kind](evaluation)
        else:
            tally = evaluation.score(config.eval_stride if kind == "sliding" else config.eval_seq_len)
        run.synchronize()
    seconds, sums = time.monotonic() - start, dict(tokens=tally.tokens, bytes=tally.bytes)
    log("score", kind=kind, val_loss=tally.loss, val_bpb=tally.bpb, **sums, seconds=seconds)
    if not math.isfinite(tally.nats):
        raise TrainingDiverged(f"the {kind} score is {tally.nats}; lower the learning rates and train again")
    return evaluation, tally, seconds


def evaluate_stage(config: Config, run: Run, log: Log, program: Program) -> dict[str, Any]:
    """Scores artifact.bin. Needs the artifact, the tokenizer and the validation shards, nothing else."""
    result, tallies = {}, {}
    for kind in wanted_scores(config, run):
        evaluation, tally, seconds = score_artifact(kind, program, log)
        result |= {f"{kind}_val_loss": tally.loss, f"{kind}_val_bpb": tally.bpb, f"{kind}_seconds": seconds}
        tallies[kind] = tally
    validation, artifact = evaluation.validation, config.run_dir / "artifact.bin"
    run.on_main(lambda: write_documents(config.run_dir / "documents.csv", tallies))
    run.on_main(lambda: write_positions(config.run_dir / "positions.csv", tallies))
    if "oversize" in tallies:
        result["fit_cost_bpb"] = tallies["quantized"].bpb - tallies["oversize"].bpb
        log("fit", cost_bpb=result["fit_cost_bpb"])
    return result | {
        "submitted": kind,
        "val_loss": tally.loss,
        "val_bpb": tally.bpb,
        "scored_tokens": tally.tokens,
        "scored_bytes": tally.bytes,
        "targets_scored": int((tally.times > 0).sum()),
        "most_times_scored": int(tally.times.max()),
        "learned_targets": round(tally.learned),
        "learned_before_score": round(tally.learned_early),
        "val_targets": len(validation.tokens) - 1,
        "val_bytes": int(validation.bytes.sum()),
        "text_bytes": run.on_main(lambda: decoded_bytes(validation.tokens.numpy(), load_tokenizer(config))),
        "byte_sidecar": any(config.dataset_dir.glob("fineweb_val_bytes_[0-9]*.bin")),
        "val_documents": len(validation.documents),
        "parameters": sum(parameter.numel() for parameter in program.model.parameters()),
        "scored_sha256": run.on_main(lambda: hashlib.sha256(artifact.read_bytes()).hexdigest()),
        "eval_seconds": seconds,
    }


def warm_up_evaluation(program: Program, config: Config, run: Run, log: Log) -> None:
    """Runs every kind of forward pass of the evaluation once on noise, before any clock: what cannot run ends the run
    now. The weights stay as they are."""
    if config.stage_list == ["quantize"] or not (compiles(config, run) or run.padded):
        return
    start = time.monotonic()
    warm_up_score(program)
    if "evaluate" in config.stage_list and config.ttt_enabled and config.ttt_kind == "lora_phased":
        warm_up_adapt(program)
    log("warm_up_evaluation", seconds=time.monotonic() - start)


STAGES = {"train": train, "quantize": quantize_stage, "evaluate": evaluate_stage}


def validity(result: dict[str, Any], config: Config) -> list[dict[str, Any]]:
    """The rules of the challenge that a program can check, judged on these results.

    `ok` is None where a rule cannot be judged here: its stage has not run, or it only holds for the challenge's own
    data, clock or hardware. The sources are issues and pull requests of the challenge's repository.
    """
    r, timed = result, bool(config.max_wallclock_seconds)
    documents, size, hardware = r.get("val_documents"), r.get("scored_bytes"), r.get("hardware", "")
    challenge = documents == CHALLENGE_DOCUMENTS

    def at_most(key: str, limit: float, judged: bool = True) -> bool | None:
        return r[key] <= limit if judged and key in r else None

    counted = None if documents is None else size == r["val_bytes"]
    if challenge:  # the same text in every tokenisation; less than 0.01 % of it lies in a dropped tail
        counted = counted and CHALLENGE_BYTES[0] <= size <= CHALLENGE_BYTES[1]
    spelled = None
    if (
        documents is not None
    ):  # a side-car holds the bytes of the original text, which the tokenizer may change a little
        spelled = abs(r["text_bytes"] - r["val_bytes"]) <= r["byte_sidecar"] * r["val_bytes"] / 1000

    def equal(key: str, wanted: Any) -> bool | None:
        return r[key] == wanted if key in r and wanted is not None else None

    rows = [
        ("artifact_bytes", at_most("total_bytes", ARTIFACT_LIMIT_BYTES), "total_bytes", ARTIFACT_LIMIT_BYTES, "#1835"),
        ("train_seconds", at_most("train_seconds", TIME_LIMIT_S, timed), "train_seconds", TIME_LIMIT_S, "#677"),
        ("eval_seconds", at_most("eval_seconds", TIME_LIMIT_S, timed), "eval_seconds", TIME_LIMIT_S, "#1972"),
        (
            "scored_targets",
            equal("targets_scored", r.get("val_targets")),
            "targets_scored",
            r.get("val_targets"),
            "#1017",
        ),
        ("single_pass", equal("most_times_scored", 1), "most_times_scored", 1, "#1017"),
        ("scored_bytes", counted, "scored_bytes", r.get("val_bytes"), "#1719"),
        ("text_bytes", spelled, "text_bytes", r.get("val_bytes"), "#1719"),
        ("documents", True if challenge else None, "val_documents", CHALLENGE_DOCUMENTS, "#2127"),
        ("score_before_update", at_most("learned_before_score", 0), "learned_before_score", 0, "#1017"),
        (
            "weights_from_artifact",
            equal("scored_sha256", r.get("artifact_sha256")),
            "scored_sha256",
            r.get("artifact_sha256"),
            "#2128",
        ),
        ("hardware", True if "8x" in hardware and "H100" in hardware else None, "hardware", "8xH100", "#1317"),
    ]
    return [dict(rule=name, ok=ok, found=r.get(key), limit=limit, source=where) for name, ok, key, limit, where in rows]


def describe(config: Config) -> dict[str, Any]:
    """What a configuration amounts to, without data: parameters, visits, operations, forecast of the artifact."""
    model = GPT(config, Run(), "meta")
    groups = {group: {n: p.numel() for n, p in members.items()} for group, members in model.groups().items()}
    total = sum(sum(sizes.values()) for sizes in groups.values())
    plans = {name: layer_plan(config, looping) for name, looping in (("unlooped", False), ("looped", True))}
    per_layer = sum(getattr(model, m.bank)[0].numel() for m in MATRICES.values())
    head = model.tok_emb.weight.numel()
    return {
        "preset": config.preset,
        "parameters": total,
        "parameters_published_convention": sum(math.prod(row.shape) for row in parameter_table(config).values()),
        "parameters_per_group": {group: sum(sizes.values()) for group, sizes in groups.items()},
        "parameters_per_tensor": groups,
        "visits": {name: [visit.layer for visit in plan] for name, plan in plans.items()},
        "skips": {name: skip_pairs(plan) for name, plan in plans.items()},
        "matrix_flops_per_token": {name: 6 * (len(plan) * per_layer + head) for name, plan in plans.items()},
        "forecast": predicted_artifact_bytes(config),
        "limit_bytes": ARTIFACT_LIMIT_BYTES,
    }


def describe_memory(config: Config) -> dict[str, Any]:
    """The forecast for one GPU, and what rows would be on GPUs of common sizes."""
    config, rows = all_stages(config), {}
    for size in (24, 40, 80):
        fitting = fit_rows(config, USABLE_MEMORY * size * 2**30)
        peak = max(sum(parts.values()) for parts in memory_forecast(fitting).values())
        rows[f"{size} GiB"] = dict(
            row_tokens=fitting.train_row_tokens, val_batch_tokens=fitting.val_batch_tokens, peak_bytes=peak,
            fits=peak <= USABLE_MEMORY * size * 2**30,
        )  # fmt: skip
    return {"bytes": memory_forecast(config), "gpus": rows}


def skip_pairs(plan: tuple[Visit, ...]) -> list[list[int]]:
    """[connection, into layer, from layer] of every skip connection of a plan."""
    kept = [visit.layer for visit in plan if visit.push]
    return [[visit.skip, visit.layer, kept.pop()] for visit in plan if visit.skip is not None]


def report(result: dict[str, Any]) -> str:
    """The final table."""
    rows = []
    for kind, label in (
        ("prequant", "before quantisation"),
        ("oversize", "quantised, over the limit"),
        ("quantized", "quantised artifact"),
        ("sliding", "sliding window"),
        ("ttt", "test-time training"),
    ):
        if f"{kind}_val_bpb" in result:
            mark = "  <- submitted" if kind == result.get("submitted") else ""
            rows.append(
                (label, f"{result[f'{kind}_val_bpb']:.5f} bpb  {result[f'{kind}_val_loss']:.5f} nats/token{mark}")
            )
    if "total_bytes" in result:
        sizes = f"{result['artifact_bytes']:,} weights + {result['code_bytes']:,} code"
        rows.append(("artifact bytes", f"{result['total_bytes']:,} of {ARTIFACT_LIMIT_BYTES:,} ({sizes})"))
    if "steps" in result:
        rows.append(("training", f"{result['steps']} steps, {result['tokens_per_s']:,.0f} tokens/s"))
    spans = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result["stage_seconds"].items())
    rows.append(("seconds", spans))
    rows.append(("peak memory", f"{result['peak_memory_mib']:,} MiB of one process"))
    verdict = "yes" if result["valid"] else "INVALID: " + "; ".join(result["violations"])
    rows.append(("valid", verdict))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def peak_memory_mib(run: Run) -> int:
    if run.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(run.device) / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def hardware(run: Run) -> str:
    """For example `8xNVIDIA H100 80GB HBM3`."""
    cuda = run.device.type == "cuda"
    return f"{run.world_size}x{torch.cuda.get_device_name(run.device) if cuda else platform.machine() + ' CPU'}"


def log_header(config: Config, origins: dict[str, str], run: Run, log: Log) -> None:
    """What ran, where, with which settings: enough to repeat it."""
    source = Path(__file__).read_bytes()
    log.text(source.decode("latin1" if source.startswith(PACKED_START) else "utf-8"), console=False)
    log("source", bytes=len(source), sha256=hashlib.sha256(source).hexdigest())
    log(
        "versions",
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        cuda=torch.version.cuda,
    )
    log("hardware", devices=hardware(run), threads=torch.get_num_threads())
    load, cores = os.getloadavg()[0], os.cpu_count()
    if run.device.type == "cpu" and load > 0.5:
        log("busy", load=load, cores=cores, reason="other_processes_slow_this_run_down")
    log("attention", backend=choose_attention(config, run.device)[0])
    log("config", preset=config.preset, run_id=config.run_id, seed=config.seed, stages=config.stages)
    for name, origin in sorted(origins.items()):
        value = getattr(config, name) if name in FIELDS else ""
        log("setting", name=name, value=value, origin=origin)
    log.text("\n".join(f"  {name}: {getattr(config, name)}" for name in FIELDS), console=False)


def named_run(config: Config, run: Run) -> Config:
    """`config` with a run id, the same on every rank, and its folder in place."""
    if not config.run_id:
        stamp = run.share(time.strftime("%Y%m%d-%H%M%S"))
        config = dataclasses.replace(config, run_id=f"{stamp}-{config.preset}-seed{config.seed}")
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"RUNS_DIR={config.runs_dir}: cannot make {config.run_dir} ({error.strerror}); choose another"
        ) from None
    return config


@contextlib.contextmanager
def claimed(config: Config, run: Run) -> Iterator[None]:
    """Keeps the folder of a run for its processes: a second run in it would mix up log, checkpoint and artifact.

    The claim is a lock that ends with the process, however that ends. Raises UserError when another run holds it.
    """
    folder = os.open(config.run_dir, os.O_RDONLY)

    def claim() -> None:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another run is writing to {config.run_dir}; wait for its end or choose another RUN_ID"
            raise UserError(f"RUN_ID={shown(config.run_id)}: {message}") from None
        except OSError:  # a file system without locks
            pass

    try:
        run.on_main(claim)
        yield
        run.barrier()  # no rank leaves while another one still talks to it
    finally:
        os.close(folder)


def main(config: Config, run: Run, origins: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs the stages of a configuration and returns the record of all results: summary(). Every rank calls it."""
    config = named_run(config, run)
    with claimed(config, run):
        return run_stages(config, run, dict(origins or {}))


def run_stages(config: Config, run: Run, origins: dict[str, str]) -> dict[str, Any]:
    """What main does in a folder of its own."""
    anew = "train" in config.stage_list and not (config.run_dir / "checkpoint.bin").exists()
    log = Log(config.run_dir / "log.txt" if run.is_main else None, anew)
    if config.ttt_enabled and config.ttt_kind == "pre_eval_illegal":
        log.mark = {"valid": "false", "reason": "trains_on_validation_text_before_scoring_it"}
    log_header(config, origins, run, log)
    path, order = config.run_dir / "result.json", list(STAGES)
    parts = earlier_parts(path, config, run)
    config = fit_device(config, run, log)
    check(config, run, log)
    program, before = Program(config, run), COMPILES.graphs()
    warm_up_evaluation(program, config, run, log)
    for stage in config.stage_list:
        parts = {name: part for name, part in parts.items() if order.index(name) < order.index(stage)}
        start = time.monotonic()
        program.in_clock = 0
        figures = STAGES[stage](program.config, run, log, program)
        seconds = time.monotonic() - start
        graphs = compile_report(stage, program, COMPILES.graphs().since(before), run, log)
        before = COMPILES.graphs()
        log("stage", name=stage, seconds=seconds)
        parts[stage] = dict(figures=figures, seconds=seconds, graphs=graphs)
        result = summary(parts, config, run)
        if run.is_main:
            write_file(path, (json.dumps(result | {"stages": parts}, indent=1) + "\n").encode())
    for row in result["validity"]:
        log("validity", **row)
    log.text("\n" + report(result) + "\n")
    log.text("result " + json.dumps(result))
    return result


def compile_report(stage: str, program: Program, graphs: Graphs, run: Run, log: Log) -> dict[str, float]:
    """What a stage has compiled, on all ranks; the seconds are those of this one. Collective."""
    numbers = torch.tensor([graphs.compiled, program.in_clock, graphs.fallbacks], device=run.device)
    compiled, in_clock, fallbacks = run.sum_(numbers).tolist()
    found = dict(compiled_graphs=compiled, compiled_in_clock=in_clock, fallbacks=fallbacks)
    if compiled:
        log("graphs", stage=stage, **found, compile_seconds=graphs.seconds)
    if in_clock or fallbacks:
        log("warning", stage=stage, reason="torch.compile_worked_inside_the_clock_or_gave_up", **found)
    return found | dict(compile_seconds=graphs.seconds)


def draw_report(folder: Path) -> str:
    """Lets records/report.py, beside this file, make a page of a run; a line that says where, or what went wrong.

    A process of its own, since no drawing may cost a finished run its memory or its exit status.
    """
    program = Path(__file__).resolve().parent / "records" / "report.py"
    if not program.exists():
        return ""
    try:
        command = [sys.executable, str(program), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        return f"warning report:{error}"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["ended without a word"]
    return said[-1] if done.returncode == 0 else f"warning report:{said[-1]}"


def earlier_parts(path: Path, config: Config, run: Run) -> dict[str, dict[str, Any]]:
    """The parts that the stages of an earlier run in this folder have in result.json: see summary()."""
    if not path.exists():
        return {}
    try:
        found = json.loads(read_file(path, HEADER_LIMIT))["stages"]
        parts = {stage: found[stage] for stage in STAGES if stage in found}
        report(summary(parts, config, run))  # what cannot be reported is no result
        return parts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a result of this script ({error!r}); delete it") from None


def summary(parts: Mapping[str, dict[str, Any]], config: Config, run: Run) -> dict[str, Any]:
    """One flat record of all results, with the verdict on the rules.

    `parts` has for each stage its `figures`, its `seconds`, and its compiled `graphs`.
    """
    result = {key: value for part in parts.values() for key, value in part["figures"].items()}
    graphs = {stage: part["graphs"] for stage, part in parts.items()}
    result |= {
        "preset": config.preset,
        "run_id": config.run_id,
        "seed": config.seed,
        "ranks": run.world_size,
        "hardware": hardware(run),
        "attn_backend": choose_attention(config, run.device)[0],
        "kernels": choose_kernels(config.kernels, run.device)[0],
        "torch": torch.__version__,
        "peak_memory_mib": peak_memory_mib(run),
        "stage_seconds": {stage: part["seconds"] for stage, part in parts.items()},
        "stage_graphs": graphs,
    }
    for key in ("compiled_graphs", "compiled_in_clock", "compile_seconds"):
        result[key] = sum(row[key] for row in graphs.values())
    rows = validity(result, config)
    broken = [row for row in rows if row["ok"] is False]
    texts = [f"{row['rule']} {row['found']}, limit {row['limit']} ({row['source']})" for row in broken]
    return result | {"validity": rows, "violations": texts, "valid": not broken}


def command_line() -> int:
    """Exit status: 0 done, 1 diverged, a rule broken or a process lost, 2 a mistake in settings or files or no memory
    for them, 128 + n signal n."""
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of each host

    def stopped(number: int) -> str:
        return f"stopped by {signal.Signals(number).name}; the same RUN_ID continues\n" if speaks else ""

    def leave(number: int, frame: Any) -> None:
        # Outside of the training loop there is nothing to finish: files are whole, or have their temporary names.
        os.write(2, stopped(number).encode())
        os._exit(128 + number)

    def fail(status: int, message: str) -> int:
        if speaks:
            print("error:", " ".join(message.split())[:2000], file=sys.stderr, flush=True)
        return status

    before = {kind: signal.signal(kind, leave) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        config, origins = load_config(os.environ)
        if config.stage_list == ["describe"]:
            print(json.dumps(describe(config) | {"memory": describe_memory(config)}, indent=1))
            return 0
        run = start_run(os.environ)
        if config.stage_list == ["check"]:
            log = Log(Path(os.devnull) if run.is_main else None)
            check(fit_device(all_stages(config), run, log), run, log)
            return 0
        # Compiled code stays with the runs: PyTorch's own folder for it is a temporary one.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(config.runs_dir, "compile-cache").resolve()))
        result = main(config, run, origins)
        if run.is_main and config.report and (said := draw_report(Path(config.runs_dir) / result["run_id"])):
            print(said, flush=True)
        return 0 if result["valid"] else 1
    except UserError as error:
        return fail(2, str(error))
    except TrainingDiverged as error:
        return fail(1, str(error))
    except Interrupted as error:
        print(stopped(error.args[0]), end="", file=sys.stderr, flush=True)
        return 128 + error.args[0]
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            return fail(2, f"out of memory ({error}); lower ROW_TOKENS, VAL_BATCH_TOKENS or TTT_BATCH_SIZE")
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return fail(1, f"lost another process ({str(error).split('. ')[0]}); the same RUN_ID continues")
        raise
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


if __name__ == "__main__":
    exit_status = command_line()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk. Leaving without unwinding the libraries, since threads of a process group whose peers are
    # gone can abort a process that has finished its work (seen once, with gloo on PyTorch 2.13).
    os._exit(exit_status)
