"""data/variants.py and data/script.py: what is published about the data, and what train_gpt.py says of it."""

import pytest
from test_data_helpers import DATA  # isort: skip
import script  # isort: skip
import variants  # isort: skip

import train_gpt as tg


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_the_script_reads_every_variant_under_its_published_names(name: str) -> None:
    """Folder of the shards, tokenizer and vocabulary, and back to the row of the table."""
    variant = variants.VARIANTS[name]
    kinds = {"CASEOPS_ENABLED": str(int(variant.caseops)), "MARKER_PAIR_MODE": str(int(variant.mp3))}
    config = tg.load_config({"VOCAB_SIZE": str(variant.vocab_size), **kinds})[0]
    assert (config.dataset_dir.name, config.tokenizer_file.name) == (variant.dataset, variant.tokenizer)
    assert variants.variant_of(config) == name == variants.find_variant(variant.dataset)[0]


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_counts_of_a_published_variant_agree(name: str) -> None:
    """Whole blocks of targets, and the bytes of the challenge's text."""
    variant = variants.VARIANTS[name]
    assert variant.val_targets % variant.block == 0
    assert tg.CHALLENGE_BYTES[0] < variant.val_bytes < tg.CHALLENGE_BYTES[1]


def test_the_text_of_the_script_gives_what_the_script_has() -> None:
    """Constants, a function that uses one of them, and the settings that no result depends on."""
    names = ("ARTIFACT_LIMIT_BYTES", "TIME_LIMIT_S", "CHALLENGE_DOCUMENTS", "CHALLENGE_BYTES")
    assert script.definitions(*names) == {name: getattr(tg, name) for name in names}
    assert variants.VAL_DOCUMENTS == tg.CHALLENGE_DOCUMENTS
    found = script.definitions("PACKED_START", "packed_script", "without_docstrings")["packed_script"]("x = 1  # one\n")
    assert found == tg.packed_script("x = 1\n")
    for stages in (tg.RUN | tg.DATA, tg.EVALUATE):
        expected = {name for name, field in tg.FIELDS.items() if field.metadata["stage"] in stages}
        assert script.settings_of(*(stage.name for stage in stages)) == expected


def test_the_script_is_the_one_beside_the_folder() -> None:
    assert script.SCRIPT == DATA.parent / "train_gpt.py"
