"""CONFIG: settings come from default, preset and environment, are typed, and mistakes are named in one line."""

import dataclasses
import re
import string

import pytest
from conftest import ROOT, TOY, toy_config, toy_env
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt as tg

# The command under which PR #1941 was published, as it stands there. NCCL_NET is read by a library.
PUBLISHED_PR1941 = """
NCCL_NET=Socket GATED_ATTN_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2000 PHASED_TTT_NUM_PHASES=3 MATRIX_CLIP_SIGMAS=12.85
ATTN_CLIP_SIGMAS=13.0 MLP_CLIP_SIGMAS=12.0 EMBED_BITS=7 EMBED_CLIP_SIGMAS=15.0 MATRIX_LR=0.026 MIN_LR=0.10
FUSED_CE_ENABLED=1 TTT_WARM_START_A=1 TTT_WEIGHT_DECAY=2.0 TTT_LORA_ALPHA=144 TTT_LORA_RANK=128
GPTQ_RESERVE_SECONDS=0.5 GPTQ_CALIBRATION_BATCHES=16 SEED=42 DATA_DIR=./data
"""

# Fields that no preset changes. Run-time knobs: where, how, how often, what; they are no property of a system.
RUN_TIME = {
    "run_id", "runs_dir", "stages", "seed", "compile", "attn_backend", "kernels", "checkpoint_seconds", "data_dir",
    "val_loss_every", "report",
}  # fmt: skip
# Ours: budget and size keeping.
OWN_KNOBS = {"eval_chunk_factors", "eval_max_seconds", "eval_stride"}
# Published names of tuned values, which published commands and sweeps set; no two published systems differ in them.
PUBLISHED_KNOBS = {
    "adam_eps", "beta1", "bigram_dim", "enable_looping_at", "gate_window", "gated_attn_init_std",
    "global_ttt_grad_clip", "global_ttt_momentum", "lqer_top_k", "mlp_gate_bias",
    "muon_backend_steps", "rope_base", "swa_every", "swa_start_frac", "tied_embed_init_std", "token_boost",
    "token_order", "ttt_beta1", "ttt_momentum",
}  # fmt: skip


def test_precedence_is_default_then_preset_then_environment() -> None:
    """A value comes from the environment, else from the preset, else from the default; origins say which."""
    default, origins = tg.load_config({})
    assert default == tg.Config() and not origins
    tiny, origins = tg.load_config({"PRESET": "tiny"})
    assert (
        tiny.model_dim == tg.PRESETS["tiny"]["model_dim"] != default.model_dim and tiny.matrix_lr == default.matrix_lr
    )
    assert origins["model_dim"] == "preset tiny" and "matrix_lr" not in origins
    both, origins = tg.load_config({"PRESET": "tiny", "MODEL_DIM": "64", "MATRIX_LR": "0.5"})
    assert (both.model_dim, both.matrix_lr, both.vocab_size) == (64, 0.5, tiny.vocab_size)
    assert origins["model_dim"] == origins["matrix_lr"] == "environment" and origins["vocab_size"] == "preset tiny"


def test_values_have_the_type_of_their_field() -> None:
    """Whole numbers, numbers, switches and text are parsed as such, in every preset too."""
    config = toy_config(SEED="7", MATRIX_LR="1e-3", SMEAR_GATE_ENABLED="0", RUN_ID="x", MLP_MULT="3")
    assert (config.seed, config.matrix_lr, config.smear_gate_enabled, config.run_id, config.mlp_mult) == (
        7,
        0.001,
        False,
        "x",
        3.0,
    )
    for preset in tg.PRESETS:
        config = tg.load_config({"PRESET": preset})[0]
        for name, field in tg.FIELDS.items():
            assert type(getattr(config, name)) is field.type, (preset, name)


def test_config_is_immutable() -> None:
    """Nothing can change a setting after it has been checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy_config().seed = 3


@pytest.mark.parametrize(
    "key, value, needed",
    [
        ("SEED", "1.5", "whole number"),
        ("SEED", "", "whole number"),
        ("MATRIX_LR", "fast", "number"),
        ("MATRIX_LR", "nan", "at least 0 and at most 1000000000"),
        ("MATRIX_LR", "inf", "at most 1000000000"),
        ("SMEAR_GATE_ENABLED", "yes", "0 or 1"),
        ("SMEAR_GATE_ENABLED", "2", "0 or 1"),
        ("ITERATIONS", "0", "at least 1"),
        ("EMA_DECAY", "1", "at most"),
        ("MATRIX_BITS", "9", "at most 8"),
        ("WARMDOWN_FRAC", "-0.1", "at least 0"),
        ("VOCAB_SIZE", "65537", "at most 65536"),
        ("ATTN_BACKEND", "flash", "fa3, varlen, sdpa"),
        ("COMPILE", "yes", "auto, 0, 1"),
        ("PRESET", "huge", "tiny"),
        ("NUM_HEADS", "5", "MODEL_DIM=32"),
        ("NUM_KV_HEADS", "3", "NUM_HEADS=4"),
        ("ROPE_DIMS", "3", "even"),
        ("ROPE_DIMS", "10", "at most MODEL_DIM / NUM_HEADS = 8"),
        ("GATE_WINDOW", "33", "MODEL_DIM=32"),
        ("ROW_TOKENS", "60", "TRAIN_BATCH_TOKENS=256"),
        ("ROW_TOKENS", "512", "not a multiple of a row of 512"),
        ("TRAIN_SEQ_LEN", "65", "ROW_TOKENS=64"),
        ("EVAL_STRIDE", "33", "EVAL_SEQ_LEN=32"),
        ("TTT_CHUNK_SIZE", "33", "TTT_EVAL_SEQ_LEN=32"),
        ("TTT_CHUNK_STEPS", "8:4,16:33", "TTT_EVAL_SEQ_LEN=32"),
        ("TTT_CHUNK_STEPS", "8:4,16:0", "positive"),
        ("TTT_CHUNK_STEPS", "8:-4", "positive"),
        ("TTT_CHUNK_STEPS", "16:4,8:2", "must rise"),
        ("TTT_CHUNK_STEPS", "8:2,8:4", "must rise"),
        ("TTT_CHUNK_STEPS", "8", "for example 256:12,1024:24"),
        ("TTT_CHUNK_STEPS", "8:2:1", "for example 256:12,1024:24"),
        ("TTT_CHUNK_STEPS", "short:2", "for example 256:12,1024:24"),
        ("TTT_CHUNK_STEPS", "8:2.5", "for example 256:12,1024:24"),
        ("TTT_CHUNK_STEPS", "8:", "for example 256:12,1024:24"),
        ("FIT_ARTIFACT", "2", "0, 1, fill"),
        ("LOOP_END", "4", "NUM_LAYERS=4"),
        ("LOOP_START", "3", "LOOP_END=2"),
        ("PARALLEL_START_LAYER", "2", "must come last"),
        ("STAGES", "train,score", "train, quantize, evaluate"),
        ("STAGES", "evaluate,train", "in this order"),
        ("STAGES", "train,train", "in this order"),
        ("STAGES", "describe,train", "or describe"),
        ("STAGES", "", "give a comma list"),
        ("STAGES", "evaluate", "RUN_ID"),
        ("RUN_ID", "a/b", "plain folder name"),
        ("RUN_ID", "..", "plain folder name"),
    ],
)  # fmt: skip
def test_bad_values_are_named_with_their_fix(key: str, value: str, needed: str) -> None:
    """One line: the setting, the value that was given, and what is allowed."""
    with pytest.raises(tg.UserError) as caught:
        tg.load_config(toy_env() | {key: value})
    message = str(caught.value)
    assert f"{key}={value}" in message and needed in message and "\n" not in message


@pytest.mark.parametrize("key", sorted(set(tg.NAMES) | {"PRESET", "MATRIX_LRR"}))
def test_odd_values_are_shown_shortened_on_one_line(key: str) -> None:
    """Line breaks, control characters and long texts of any variable: one line, escaped, of a bounded length."""
    for value in ("1\n2", "\x1b[31m\r\t\u2028\udc80", "9" * 300, "x" * 300, "a b\n" * 100):
        try:
            origins = tg.load_config({key: value})[1]
        except tg.UserError as error:
            assert str(error).isprintable() and len(str(error)) < 400 and f"{key}=" in str(error)
        else:  # texts, and names without an effect
            assert key not in tg.NAMES or tg.FIELDS.get(tg.NAMES[key].field, tg.FIELDS["run_id"]).type is str
            assert all(origin.isprintable() and len(origin) < 200 for origin in origins.values())


def test_shown_values_are_what_one_types() -> None:
    """Switches as 0 and 1, numbers without an empty fraction, text as it is up to 80 characters."""
    for value, text in ((True, "1"), (8.0, "8"), (0.1, "0.1"), (1e-12, "1e-12"), ("v1.0", "v1.0"), (None, "None")):
        assert tg.shown(value) == text
    assert tg.shown("ü" * 80) == "ü" * 80 and tg.shown("1\n2") == "1\\n2"
    assert tg.shown("x" * 81) == "x" * 60 + "... (81 characters)"


def test_chunk_steps_are_read_as_pairs() -> None:
    """TTT_CHUNK_STEPS: pairs of limit and chunk, blanks allowed; the example in the message is one; empty is none."""
    for text, steps in (("", []), ("8:2", [(8, 2)]), (" 8:2, 16 : 32 ", [(8, 2), (16, 32)])):
        assert toy_config(TTT_CHUNK_STEPS=text).chunk_steps == steps
    published = tg.load_config({"TTT_CHUNK_STEPS": "256:12,1024:24"})[0]
    assert published.chunk_steps == [(256, 12), (1024, 24)]


def test_settings_that_only_fit_together_are_checked_together() -> None:
    """Reserve against budget, and a batch that eight rows cannot share."""
    with pytest.raises(tg.UserError, match="GPTQ_RESERVE_SECONDS=8"):
        toy_config(MAX_WALLCLOCK_SECONDS=8, GPTQ_RESERVE_SECONDS=8)
    with pytest.raises(tg.UserError, match="TRAIN_BATCH_TOKENS=4100"):
        tg.load_config({"TRAIN_BATCH_TOKENS": "4100", "TRAIN_SEQ_LEN": "64"})
    assert toy_config(MAX_WALLCLOCK_SECONDS=0, GPTQ_RESERVE_SECONDS=8).train_seconds == float("inf")


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_one_typo_in_a_name_is_refused_with_the_right_name(data: st.DataObject) -> None:
    """A character dropped, doubled, replaced or swapped in any setting's name is refused, naming the real one."""
    known = tg.NAMES.keys() | {"PRESET"}
    name = data.draw(st.sampled_from(sorted(n for n in known if len(n) > 4)))
    i = data.draw(st.integers(0, len(name) - 2))
    letter = data.draw(st.sampled_from(string.ascii_uppercase + "_"))
    typo = data.draw(
        st.sampled_from(
            [name[:i] + name[i + 1 :], name[:i] + letter + name[i:], name[:i] + letter + name[i + 1 :]]
            + [name[:i] + name[i + 1] + name[i] + name[i + 2 :], name + letter]
        )
    )
    assume(typo not in known)
    with pytest.raises(tg.UserError, match="did you mean") as caught:
        tg.load_config({typo: "1"})
    suggestion = re.search(r"did you mean (\w+)\?", str(caught.value))[1]
    assert suggestion in known and (suggestion == name or tg.one_typo_apart(typo, suggestion))


def test_foreign_variables_are_ignored() -> None:
    """What launchers, shells and libraries set is none of our business, even where it looks a little alike."""
    foreign = "PATH HOME USER SHELL LANG TERM PWD RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
    foreign += " NCCL_NET NCCL_DEBUG CUDA_VISIBLE_DEVICES PYTHONPATH PYTHONHASHSEED VENV PYTHON NPROC LOCAL_WORLD_SIZE"
    foreign += (
        " GROUP_RANK ROLE_RANK TORCHELASTIC_RUN_ID HF_TOKEN TMPDIR EDITOR LOGNAME HOSTNAME DISPLAY DATADIRS STAGE_NAME"
    )
    assert tg.load_config(dict.fromkeys(foreign.split(), "x")) == tg.load_config({})


def test_retired_names_are_accepted_with_the_built_in_value_only() -> None:
    """A published name that is no choice any more passes with its built-in value and is refused with another."""
    built_in_names = {key: name.built_in for key, name in tg.NAMES.items() if not name.field and not name.advice}
    assert len(built_in_names) > 60
    for key, built_in in built_in_names.items():
        config, origins = tg.load_config({key: "0.123" if built_in is None else built_in})
        assert config == tg.Config() and "without effect" in origins[key]
        if built_in is not None:
            with pytest.raises(tg.UserError, match=f"{key}=something: .*{built_in or 'empty'}.* built in"):
                tg.load_config({key: "something"})
    tg.load_config({"VAL_DOC_FRACTION": "1.0"})  # the same number, spelled otherwise


@pytest.mark.parametrize("preset", ["pr1941", "default"])
def test_published_command_runs_as_it_stands(preset: str) -> None:
    """The published command is accepted whole, and changes nothing but the reserve, the seed and the folder."""
    env = dict(pair.split("=") for pair in PUBLISHED_PR1941.split())
    config, origins = tg.load_config(env | {"PRESET": preset})
    plain = tg.load_config({"PRESET": preset})[0]
    changed = {name for name in tg.FIELDS if getattr(config, name) != getattr(plain, name)}
    assert changed == {"gptq_reserve_seconds", "seed", "data_dir"}
    assert not any(tg.NAMES[key].field for key in env if key in origins)
    assert set(env) - origins.keys() - {key.upper() for key in origins} == {"NCCL_NET", "GATED_ATTN_ENABLED"}
    assert plain.attn_gate == "dense"  # what GATED_ATTN_ENABLED=1 asks for


@pytest.mark.parametrize("preset", sorted(tg.PRESETS))
def test_every_preset_is_a_valid_configuration(preset: str) -> None:
    """Each preset loads, names real fields, stays in their ranges, and describes itself."""
    config = tg.load_config({"PRESET": preset})[0]
    assert config.preset == preset and tg.PRESETS[preset].keys() <= tg.FIELDS.keys()
    for name, value in tg.PRESETS[preset].items():
        assert tg.parse_value(name.upper(), str(int(value) if isinstance(value, bool) else value)) == value
    assert tg.describe(config)["parameters"] > 0


def test_every_field_changes_in_a_preset_or_is_a_documented_knob() -> None:
    """No option without a use: what no preset changes is a run-time knob or a published name, and in these lists."""
    default = tg.Config()
    changed = {
        name for preset in tg.PRESETS.values() for name, value in preset.items() if value != getattr(default, name)
    }
    assert set(tg.FIELDS) - changed == RUN_TIME | OWN_KNOBS | PUBLISHED_KNOBS


# Choices that no preset makes: the valid way round of an order that presets refuse to take, and no refitting at all.
CHOICES_WITHOUT_PRESET = {("ttt_kind", "pre_eval_illegal"), ("fit_artifact", "0")}


def test_every_choice_is_made_in_a_preset_or_is_a_documented_one() -> None:
    """The same for the values of a setting with choices: the default's, those of presets, or in the list above."""
    unmade = set()
    for name, field in tg.FIELDS.items():
        made = {field.default} | {preset[name] for preset in tg.PRESETS.values() if name in preset}
        if name not in RUN_TIME:
            unmade |= {(name, choice) for choice in field.metadata["choices"] if choice not in made}
    assert unmade == CHOICES_WITHOUT_PRESET


@pytest.mark.parametrize("name", ["README.md", "run.sh"])
def test_every_setting_in_the_documents_exists(name: str) -> None:
    """Each KEY=value that a reader could copy is a setting, another published name of one, or the launcher's own."""
    launcher = {"NPROC", "VENV", "PYTHON", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    libraries = ("OMP_", "GOMP_", "NCCL_", "CUDA_", "TORCH", "MASTER_", "PIP_", "PYTHON")
    text = re.sub(r"^error: .*\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M)  # the next test's
    pairs = re.findall(r"\b([A-Z][A-Z0-9_]{2,})=([\w.,/+-]*)", text)
    assert pairs
    for key, value in pairs:
        if key in launcher or key.startswith(libraries):
            continue
        assert key == "PRESET" or key in tg.NAMES and not tg.NAMES[key].advice, f"{name}: {key}"
        if key.lower() in tg.FIELDS and value:
            tg.parse_value(key, value)
        if key == "PRESET" and value:
            assert value in tg.PRESETS


def test_the_error_in_the_readme_is_what_such_a_setting_gives() -> None:
    lines = re.findall(r"^error: ((\w+)=(\S+): .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert lines
    for message, key, value in lines:
        with pytest.raises(tg.UserError, match=f"^{re.escape(message)}$"):
            tg.load_config({key: value})


def test_messages_of_a_bad_number_give_an_allowed_example() -> None:
    """The example in the message is itself accepted."""
    for name, field in tg.FIELDS.items():
        if field.type in (int, float, bool):
            with pytest.raises(tg.UserError) as caught:
                tg.parse_value(name.upper(), "abc")
            example = str(caught.value).rsplit("=", 1)[1]
            assert type(tg.parse_value(name.upper(), example)) is field.type


def test_toy_settings_are_real_settings() -> None:
    """The configuration of these tests uses no name that the script ignores."""
    assert set(TOY) <= {name.upper() for name in tg.FIELDS}
