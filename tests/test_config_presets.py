"""CONFIG: every preset holds the published settings of its system; published switches and other names mean the same."""

import re
from typing import Any

import pytest
from conftest import ROOT, preset_env, shallow_env, toy_env

import train_gpt as tg

SWITCHES = {key: name for key, name in tg.NAMES.items() if name.on is not None}
SYSTEMS = "baseline pr489 fork5 fork5_twin fork5_10l pr1880 pr1941 pr1855 pr2135 pr2158".split()

# The published settings, one line each, in the order of SYSTEMS, typed from the records' own tables. A dot repeats the
# value to its left; a dash is a value that was not published or has no effect there.
TABLE = """
VOCAB_SIZE                    1024    .       .       .       .       8192    .       .       .       .
NUM_LAYERS                    9       7       11      .       10      11      .       .       .       .
MODEL_DIM                     512     .       .       .       .       .       .       .       .       .
NUM_HEADS                     8       .       .       .       .       .       .       .       .       .
NUM_KV_HEADS                  4       .       .       .       .       .       .       .       .       .
MLP_MULT                      2       3       .       .       .       4       .       .       .       .
LEAKY_RELU_SQ_SLOPE           0       .       .       .       .       0.5     .       .       .       .
QK_GAIN_INIT                  1.5     1       1.5     .       .       5       .       .       .       .
LOGIT_SOFTCAP                 30      15      30      .       .       15      30      .       .       .
ROPE_DIMS                     64      16      .       .       -       16      .       .       .       .
ROPE_BASE                     10000   .       .       .       .       .       .       .       .       .
ROPE_TRAIN_SEQ_LEN            0       .       1024    .       0       .       .       .       .       .
LN_SCALE                      0       .       1       .       -       1       .       .       .       .
RESID_SCALE_DEPTH_INIT        0       1       0       .       .       .       .       .       .       .
XSA_LAST_N                    0       .       4       .       -       11      .       .       .       .
BIGRAM_VOCAB_SIZE             0       2048    .       .       10240   0       .       .       .       .
BIGRAM_DIM                    -       128     .       .       .       -       .       .       .       .
SMEAR_PERDIM_ENABLED          0       1       .       .       -       0       .       .       .       .
SMEAR_GATE_ENABLED            0       .       .       .       .       1       0       1       .       .
SMEAR_GATE_POS                -       -       -       -       -       post_norm -     pre_norm .      .
SKIP_GATES_ENABLED            0       .       .       .       .       1       .       .       .       .
NUM_LOOPS                     0       .       .       .       .       2       .       .       .       .
LOOP_START                    -       -       -       -       -       3       .       .       .       .
LOOP_END                      -       -       -       -       -       5       .       .       .       .
ENABLE_LOOPING_AT             -       -       -       -       -       0.35    .       .       .       .
PARALLEL_RESIDUAL_START       -1      .       .       .       .       7       -1      .       .       .
PARALLEL_START_LAYER          0       .       .       .       .       .       8       .       .       .
ATTN_GATE                     none    .       .       .       .       two_sigma dense sparse  .       .
ATTN_OUT_GATE_ENABLED         0       .       .       .       .       1       0       .       .       .
GATED_ATTN_ENABLED            0       .       .       .       .       .       1       0       .       .
SPARSE_ATTN_GATE_ENABLED      0       .       .       .       .       .       .       1       .       .
GATE_WINDOW                   -       -       -       -       -       12      .       .       .       .
GATED_ATTN_INIT_STD           -       -       -       -       -       -       0.005   -       -       .
SPARSE_ATTN_GATE_SCALE        -       -       -       -       -       -       -       0.5     .       .
MLP_GATE_OUT                  0       .       .       .       .       .       1       0       .       .
MLP_GATE_BIAS                 -       -       -       -       -       -       5       -       -       .
INIT_SCHEME                   default .       ortho   .       .       .       .       .       .       .
TIED_EMBED_INIT_STD           0.005   .       .       .       .       .       .       .       .       .
CASEOPS_ENABLED               0       .       .       .       .       .       .       1       .       .
MARKER_PAIR_MODE              0       .       .       .       .       .       .       .       .       1

LOADER                        stream  .       .       .       .       coprime stream  .       .       .
VARLEN_ATTN                   0       .       .       .       .       .       1       .       .       .
TRAIN_SEQ_LEN                 1024    4096    2048    .       .       .       .       .       .       .
TRAIN_BATCH_TOKENS            524288  .       786432  .       .       .       .       .       .       .
VAL_BATCH_TOKENS              524288  .       .       .       .       .       .       .       .       .
ITERATIONS                    20000   .       .       .       .       .       .       .       .       .
MAX_WALLCLOCK_SECONDS         600     .       .       .       .       .       .       .       .       .
WARMUP_STEPS                  20      .       .       .       .       .       .       .       .       .
WARMDOWN_ITERS                1200    6000    3500    .       3000    0       .       .       .       .
WARMDOWN_FRAC                 0       .       .       .       .       0.72    0.75    0.85    .       .
MIN_LR                        0       .       .       .       .       .       0.1     .       .       .

TIED_EMBED_LR                 0.05    0.01    0.05    0.035   0.03    .       .       .       .       .
MATRIX_LR                     0.04    0.03    0.04    0.025   0.02    0.022   0.026   .       0.028   .
SCALAR_LR                     0.04    .       .       0.025   0.02    .       .       .       .       .
MUON_MOMENTUM                 0.95    0.99    0.95    0.99    .       .       0.97    .       .       .
MUON_MOMENTUM_WARMUP_START    0.85    .       .       0.92    .       .       .       .       .       .
MUON_MOMENTUM_WARMUP_STEPS    500     .       .       1500    .       .       .       .       .       .
MUON_BACKEND_STEPS            5       .       .       .       .       .       .       .       .       .
MUON_ROW_NORMALIZE            0       .       .       .       .       1       .       .       .       .
POLAR_EXPRESS_NS              0       .       .       .       .       .       1       .       .       .
MUON_WD                       0       0.04    0.02    0.04    .       0.095   .       .       .       .
ADAM_WD                       0       .       -       0.04    .       0.02    .       .       .       .
EMBED_WD                      0       .       -       -       0.04    0.085   .       .       .       .
BETA1                         0.9     .       .       .       .       .       .       .       .       .
BETA2                         0.95    .       .       .       .       .       .       0.99    .       .
ADAM_EPS                      1e-8    .       .       .       .       .       .       .       .       .
GRAD_CLIP_NORM                0       .       0.3     .       .       .       .       .       .       .
EMA_ENABLED                   0       .       1       .       0       1       .       .       .       .
EMA_DECAY                     -       -       0.997   .       -       0.9965  .       .       .       .
SWA_ENABLED                   0       .       .       .       1       0       .       .       .       .
SWA_START_FRAC                -       -       -       -       0.4     -       -       -       -       .
SWA_EVERY                     -       -       -       -       50      -       -       -       -       .

QUANT_SCHEME                  int8_clip .     gptq_lite .     intn_row gptq   .       .       .       .
MATRIX_BITS                   8       .       6       .       .       .       .       .       .       .
MLP_BITS                      0       .       .       .       5       0       .       .       .       .
EMBED_BITS                    8       .       .       .       -       8       7       .       .       .
ATTN_CLIP_SIGMAS              -       -       -       -       -       12.85   13      .       .       .
MLP_CLIP_SIGMAS               -       -       -       -       -       12.85   12      11.5    .       .
EMBED_CLIP_SIGMAS             -       -       -       -       -       20      15      14      .       .
GPTQ_CALIBRATION_BATCHES      -       -       -       -       -       64      16      .       32      .
MAG_PRUNE_FRAC                0       .       0.05    0       0.03    0       .       .       .       .
GATED_ATTN_QUANT_GATE         -       -       -       -       -       0       1       .       0       .
LQER_ENABLED                  0       .       .       .       .       .       .       1       .       .
LQER_RANK                     -       -       -       -       -       -       -       4       .       .
LQER_TOP_K                    -       -       -       -       -       -       -       3       .       .
LQER_ASYM_GROUP               -       -       -       -       -       -       -       64      32      .
COMPRESSOR                    zlib    .       zstd    .       .       brotli  .       pergroup .      .

EVAL_SEQ_LEN                  1024    4096    2048    .       .       .       .       .       2560    .
EVAL_STRIDE                   -       64      .       .       .       .       .       .       .       .
SLIDING_WINDOW_ENABLED        0       1       .       .       .       .       0       .       .       .
TTT_ENABLED                   0       1       .       .       0       1       .       .       .       .
TTT_KIND                      -       chunk_sgd .     .       -       chunk_sgd lora_phased . .       .
CHUNK_TTT_OPTIMIZER           -       adamw   sgd     .       -       sgd     -       -       -       .
TTT_CHUNK_TOKENS              -       1048576 .       .       -       32768   -       -       -       .
TTT_EPOCHS                    -       5       20      .       -       3       -       -       -       .
TTT_LR                        -       0.0005  0.008   .       -       0.005   -       -       -       .
TTT_MOMENTUM                  -       -       0.9     .       -       0.9     -       -       -       .
TTT_BATCH_SEQS                -       4       32      .       -       32      -       -       -       .
TTT_LORA_RANK                 -       -       -       -       -       -       128     80      .       .
TTT_LORA_ALPHA                -       -       -       -       -       -       144     .       .       .
TTT_LORA_LR                   -       -       -       -       -       -       1e-4    .       8e-5    .
TTT_WEIGHT_DECAY              -       -       -       -       -       -       2       0.5     2       .
TTT_BETA1                     -       -       -       -       -       -       0       .       .       .
TTT_BETA2                     -       -       -       -       -       -       0.999   0.99    .       .
TTT_CHUNK_SIZE                -       -       -       -       -       -       48      .       .       .
TTT_EVAL_SEQ_LEN              -       -       -       -       -       -       2048    .       2560    .
TTT_BATCH_SIZE                -       -       -       -       -       -       64      .       .       .
TTT_K_LORA                    -       -       -       -       -       -       1       .       0       .
PHASED_TTT_PREFIX_DOCS        -       -       -       -       -       -       2000    2500    .       .
PHASED_TTT_NUM_PHASES         -       -       -       -       -       -       3       .       1       .
GLOBAL_TTT_LR                 -       -       -       -       -       -       0.001   .       .       .
GLOBAL_TTT_MOMENTUM           -       -       -       -       -       -       0.9     .       .       .
GLOBAL_TTT_CHUNK_TOKENS       -       -       -       -       -       -       32768   .       .       .
GLOBAL_TTT_GRAD_CLIP          -       -       1       .       -       1       .       .       .       .
NGRAM_TILT_ENABLED            0       .       .       .       .       .       .       .       1       .
TOKEN_ORDER                   -       -       -       -       -       -       -       -       16      .
TOKEN_THRESHOLD               -       -       -       -       -       -       -       -       0.8     .
TOKEN_BOOST                   -       -       -       -       -       -       -       -       2.625   .
"""

# Settings of single systems.
OWN = {
    "fork5": {"FP16_KEEP_NAME_PATTERNS": "blocks.{last}.attn.k"},
    "fork5_twin": {"FP16_KEEP_NAME_PATTERNS": "blocks.{last}.attn.k"},
    "fork5_10l": {"FP16_KEEP_NAME_PATTERNS": "tok_emb,blocks.{last}.attn.k"},
    "pr1880": {"GPTQ_RESERVE_SECONDS": "12"},
}


def published(system: str) -> dict[str, str]:
    """The column of a system as environment variables."""
    column, settings = SYSTEMS.index(system), {}
    for line in filter(None, TABLE.splitlines()):
        name, *values = line.split()
        assert len(values) == len(SYSTEMS), line
        meant = [value for value in values[: column + 1] if value != "."][-1]
        if meant != "-":
            settings[name] = meant
    return settings | OWN.get(system, {})


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_settings_change_nothing_in_their_preset(system: str) -> None:
    """With all published settings of a system in the environment, its preset gives the configuration it gives alone."""
    settings = published(system)
    assert len(settings) > 55
    plain = tg.load_config({"PRESET": system})[0]
    given, _ = tg.load_config({"PRESET": system} | settings)
    changed = {name: (getattr(plain, name), getattr(given, name)) for name in tg.FIELDS}
    assert {name: pair for name, pair in changed.items() if pair[0] != pair[1]} == {}


def test_the_table_holds_what_the_presets_set() -> None:
    """Every field that a published preset changes is in the table or a knob of ours; the table names no other thing."""
    names = {line.split()[0] for line in TABLE.splitlines() if line}
    own = {name for settings in OWN.values() for name in settings}
    ours = {"quant_scale_floor", "gptq_reserve_seconds"}  # test_compress_quantizers; the reserve is a matter of rules
    changed = {name for system in SYSTEMS for name in tg.PRESETS[system]}
    fields = {name.lower() for name in names | own} - {key.lower() for key in SWITCHES}
    assert changed - ours <= fields <= set(tg.FIELDS)


def test_deliberate_differences_from_the_published_runs() -> None:
    """The calibration stays inside the budget, the illegal order of two systems is not what their presets do."""
    for system in ("pr1941", "pr1855", "pr2135", "pr2158"):  # published: 0.5 s, and training data to 609 s
        assert tg.load_config({"PRESET": system})[0].gptq_reserve_seconds == 8
    for system in ("pr489", "fork5", "fork5_twin"):  # published: five and twenty passes over all before scoring
        assert tg.load_config({"PRESET": system})[0].ttt_kind == "chunk_sgd"
    for system in ("baseline", "pr489", "fork5", "fork5_twin", "fork5_10l"):  # no Hessians, so nothing to reserve
        assert tg.load_config({"PRESET": system})[0].gptq_reserve_seconds == 0
    twin, stated = (tg.load_config({"PRESET": name})[0] for name in ("fork5_twin", "fork5"))
    assert (stated.adam_wd, stated.embed_wd, twin.embed_wd) == (0, 0, twin.adam_wd)  # not published


def differences(preset: str, base: str) -> dict[str, Any]:
    """The settings of `preset` that are not those of `base`."""
    ours, theirs = (tg.load_config({"PRESET": name})[0] for name in (preset, base))
    return {name: getattr(ours, name) for name in tg.FIELDS if getattr(ours, name) != getattr(theirs, name)}


def test_the_last_published_system_is_the_one_before_on_fused_data() -> None:
    """PR #2158 is #2135 with one change; what that means in the model and the data: test_model, test_data_caseops."""
    assert differences("pr2158", "pr2135") == {"marker_pair_mode": True}
    assert tg.load_config({"PRESET": "pr2158"})[0].vocab_size > tg.SPACE_ID


def test_frontier_differs_from_the_last_published_system_in_what_its_table_lists() -> None:
    """Each KEY=value in the first table of its folder is a setting that it has and pr2158 has not, and all are there."""
    text = (ROOT / "records/2026-11-22_Frontier/README.md").read_text(encoding="utf-8")
    table = re.search(r"\n\|.*?\n\n", text, re.S).group()
    listed = {key.lower(): tg.parse_value(key, value) for key, value in re.findall(r"`([A-Z][A-Z0-9_]*)=(.*?)`", table)}
    assert listed == differences("frontier", "pr2158") and len(listed) > 10
    rules = {"ttt_kind", "gptq_reserve_seconds", "max_wallclock_seconds", "eval_max_seconds", "smear_gate_enabled"}
    assert not listed.keys() & rules


# ------------------------------------------------------------------------------------------------------------
# Other names
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, field, wanted",
    [
        ("GATED_ATTN_ENABLED=0", "attn_gate", "none"),
        ("GATED_ATTN_ENABLED=1", "attn_gate", "dense"),
        ("GATED_ATTN_ENABLED=0 SPARSE_ATTN_GATE_ENABLED=1", "attn_gate", "sparse"),
        ("SPARSE_ATTN_GATE_ENABLED=1 GATED_ATTN_ENABLED=0", "attn_gate", "sparse"),
        ("SPARSE_ATTN_GATE_ENABLED=0", "attn_gate", "dense"),
        ("GATED_ATTN_ENABLED=0 SPARSE_ATTN_GATE_ENABLED=0 ATTN_OUT_GATE_ENABLED=0", "attn_gate", "none"),
        ("ATTN_OUT_GATE_ENABLED=1", "attn_gate", "two_sigma"),
        ("GATE_ATTN_OUT=1 ATTN_OUT_GATE_ENABLED=1", "attn_gate", "two_sigma"),
        ("ATTN_GATE=sparse GATED_ATTN_ENABLED=0", "attn_gate", "sparse"),
        ("ATTN_GATE=dense GATED_ATTN_ENABLED=1", "attn_gate", "dense"),
        ("PRESET=pr1855 GATED_ATTN_ENABLED=0", "attn_gate", "sparse"),
        ("PRESET=pr1855 SPARSE_ATTN_GATE_ENABLED=0 GATED_ATTN_ENABLED=1", "attn_gate", "dense"),
        ("PRESET=pr1880 GATE_ATTN_OUT=0", "attn_gate", "none"),
        ("INT5_ALL=1", "matrix_bits", 5),
        ("PRESET=baseline INT5_ALL=0", "matrix_bits", 8),
        ("EMA_ENABLED=0", "ema_decay", 0.0),
        ("EMA_ENABLED=1", "ema_decay", 0.9965),
        ("PRESET=fork5 EMA_ENABLED=1", "ema_decay", 0.997),
        ("PRESET=baseline EMA_ENABLED=1", "ema_decay", 0.9965),
        ("EMA_ENABLED=1 EMA_DECAY=0.99", "ema_decay", 0.99),
        ("EMA_ENABLED=0 EMA_DECAY=0", "ema_decay", 0.0),
        ("EMA_ENABLED=0 SWA_ENABLED=1", "ema_decay", 0.0),
        ("LQER_ENABLED=1", "lqer_rank", 4),
        ("LQER_ENABLED=1 LQER_RANK=2", "lqer_rank", 2),
        ("PRESET=pr1855 LQER_ENABLED=0", "lqer_rank", 0),
        ("PRESET=pr1855 LQER_ENABLED=1", "lqer_rank", 4),
        ("BIGRAM_HASH_BUCKETS=4096", "bigram_vocab_size", 4096),
        ("BIGRAM_HASH_BUCKETS=4096 BIGRAM_VOCAB_SIZE=4096", "bigram_vocab_size", 4096),
        ("PRUNE_FRAC=0.03", "mag_prune_frac", 0.03),
        ("SMEAR_GATE=0", "smear_gate_enabled", False),
        ("VAL_BATCH_SIZE=65536", "val_batch_tokens", 65536),
        ("ATTN_OUT_GATE_WIDTH=8", "gate_window", 8),
        ("SMEAR_GATE_WIDTH=8 GATE_WINDOW=8", "gate_window", 8),
        ("GATE_WIDTH=8", "gate_window", 8),
    ],
)  # fmt: skip
def test_published_names_mean_their_settings(env: str, field: str, wanted: Any) -> None:
    """Switches and aliases, alone and beside what they stand for, in any order, set their field and nothing else."""
    variables = dict(pair.split("=") for pair in env.split())
    config, origins = tg.load_config(variables)
    assert tg.load_config(dict(reversed(variables.items())))[0] == config
    plain = tg.load_config({"PRESET": variables.get("PRESET", "default")})[0]
    assert getattr(config, field) == wanted and type(getattr(config, field)) is tg.FIELDS[field].type
    others = {name for name in tg.FIELDS if getattr(config, name) != getattr(plain, name)} - {field}
    assert others <= {key.lower() for key in variables}
    if getattr(config, field) != getattr(plain, field):
        assert "environment" in origins[field]


@pytest.mark.parametrize(
    "env, named",
    [
        ("GATED_ATTN_ENABLED=1 SPARSE_ATTN_GATE_ENABLED=1", ""),
        ("ATTN_OUT_GATE_ENABLED=1 GATED_ATTN_ENABLED=1", ""),
        ("GATE_ATTN_OUT=0 ATTN_OUT_GATE_ENABLED=1", ""),
        ("ATTN_GATE=dense SPARSE_ATTN_GATE_ENABLED=1", ""),
        ("ATTN_GATE=sparse SPARSE_ATTN_GATE_ENABLED=0", ""),
        ("INT5_ALL=1 MATRIX_BITS=6", ""),
        ("EMA_ENABLED=0 EMA_DECAY=0.99", ""),
        ("EMA_ENABLED=1 EMA_DECAY=0", ""),
        ("LQER_ENABLED=0 LQER_RANK=4", ""),
        ("BIGRAM_HASH_BUCKETS=4096 BIGRAM_VOCAB_SIZE=2048", ""),
        ("MAG_PRUNE_FRAC=0.1 PRUNE_FRAC=0.2", ""),
        ("GATE_WIDTH=8 SMEAR_GATE_WIDTH=12", ""),
        ("WARMDOWN_ITERS=100 WARMDOWN_FRAC=0.5", ""),
        ("WARMDOWN_ITERS=100", "WARMDOWN_FRAC"),
        ("SWA_ENABLED=1 EMA_DECAY=0.99", ""),
        ("SWA_ENABLED=1", "EMA_DECAY"),
        ("PARALLEL_RESIDUAL_START=7 PARALLEL_START_LAYER=8", ""),
        ("PARALLEL_RESIDUAL_START=0", "PARALLEL_START_LAYER"),
        ("LOADER=coprime TRAIN_SEQ_LEN=2000", "ROW_TOKENS"),
        ("BIGRAM_VOCAB_SIZE=1", "BIGRAM_VOCAB_SIZE"),
        ("BIGRAM_VOCAB_SIZE=16777216 BIGRAM_DIM=16384", ""),
    ],
)
def test_contradictions_are_refused_naming_both(env: str, named: str) -> None:
    """One line with both names and values, whatever the order of the variables."""
    variables = dict(pair.split("=") for pair in env.split())
    for order in (variables, dict(reversed(variables.items()))):
        with pytest.raises(tg.UserError) as caught:
            tg.load_config(order)
        message = str(caught.value)
        assert "\n" not in message
        for part in [named, *variables]:
            assert part in message, (part, message)


@pytest.mark.parametrize("key", sorted(SWITCHES))
@pytest.mark.parametrize("value", ["2", "yes", "", "-1", "1.0"])
def test_switches_are_zero_or_one(key: str, value: str) -> None:
    """Anything else is refused with an example."""
    with pytest.raises(tg.UserError, match=f"{key}={value}: not 0 or 1; for example {key}=1"):
        tg.load_config({key: value})


@pytest.mark.parametrize(
    "key, value, instead",
    [
        ("WEIGHT_DECAY", "0.04", "MUON_WD, ADAM_WD, EMBED_WD"),
        ("TTT_NUM_CHUNKS", "64", "TTT_CHUNK_TOKENS"),
        ("SWA_CHECKPOINTS", "10", "SWA_START_FRAC and SWA_EVERY"),
        ("GATE_MLP_OUT", "1", "MLP_GATE_OUT"),
    ],
)
def test_names_with_several_meanings_say_what_to_set(key: str, value: str, instead: str) -> None:
    """Names that meant different things in different systems are refused in every preset, with what to set instead."""
    for preset in tg.PRESETS:
        with pytest.raises(tg.UserError, match=f"{key}={value}: ") as caught:
            tg.load_config({"PRESET": preset, key: value})
        assert instead in str(caught.value)


def test_every_name_has_one_role() -> None:
    """A field or an alias, a switch, something built in, or something refused; switches have values of their field."""
    assert all(tg.NAMES[name.upper()] == tg.Name(name) for name in tg.FIELDS)  # no published name hides a field
    for key, name in tg.NAMES.items():
        assert (name.field in tg.FIELDS) + bool(name.advice) + (name.built_in is not None) <= 1, key
        assert (name.on is None) == (name.off is None) and (name.on is None or name.field), key
    for key, name in SWITCHES.items():
        for value in (name.on, name.off):
            assert tg.parse_value(name.field.upper(), str(value)) == value, key


@pytest.mark.parametrize(
    "key, value, built_in",
    [
        ("EMBEDDING_DIM", "254", "512"), ("LATE_QAT", "1", "0"), ("ROPE_YARN", "1", "0"), ("TIE_EMBEDDINGS", "0", "1"),
        ("LOGIT_RESCALE_MODE", "sigmoid", "tanh"), ("TTT_FREEZE_BLOCKS", "2", "0"), ("VAL_DOC_FRACTION", "0.1", "1"),
        ("PARALLEL_FINAL_LANE", "attn", "mean"), ("NGRAM_HINT_PRECOMPUTE_OUTSIDE", "1", "0"),
        ("WORD_BOOST", "0.5", "0"), ("WITHIN_BOOST", "0.5", "0"), ("SMEAR_BOS_TOKEN_ID", "-1", "1"),
    ],
)  # fmt: skip
def test_published_switches_that_no_system_turns_on_have_one_value(key: str, value: str, built_in: str) -> None:
    """The neutral value is accepted in every preset; any other one is refused in a line that names the built-in one."""
    for preset in tg.PRESETS:
        plain = tg.load_config({"PRESET": preset})[0]
        assert tg.load_config({"PRESET": preset, key: built_in})[0] == plain
        with pytest.raises(tg.UserError, match=f"{key}={value}: .*{key}={built_in} built in"):
            tg.load_config({"PRESET": preset, key: value})


def test_toy_presets_keep_their_mechanisms() -> None:
    """What the other tests shrink are sizes: choices, switches and layouts of a preset stay what they are."""
    free = {key.lower() for key in preset_env("default")} | {"preset"}
    for preset in tg.PRESETS:
        own, small = tg.load_config({"PRESET": preset})[0], tg.load_config(preset_env(preset))[0]
        changed = {name for name in tg.FIELDS if getattr(own, name) != getattr(small, name)}
        assert changed <= free, preset
        for name in ("bigram_vocab_size", "rope_train_seq_len", "warmdown_iters"):
            assert bool(getattr(own, name)) == bool(getattr(small, name)), (preset, name)
        assert (own.rope_dims == own.head_dim) == (small.rope_dims == small.head_dim)
        plans = [tg.layer_plan(c, True) for c in (own, tg.load_config(shallow_env(preset))[0])]
        for visits in (plans, [[visit for visit in plan if visit.skip is not None] for plan in plans]):
            published, shallow = ({visit.wiring for visit in plan} for plan in visits)
            assert published == shallow, preset
    assert "PRESET" not in toy_env()
