"""What is published about the challenge's data: repositories, names, sizes and check sums, in one table.

Sources: the logs and texts of the pull requests named in the rows. A None is a figure that nobody published.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from script import definitions
from shards import DataError

# The validation split is this many documents at the head of the frozen list.
VAL_DOCUMENTS: int = definitions("CHALLENGE_DOCUMENTS")["CHALLENGE_DOCUMENTS"]


@dataclass(frozen=True)
class Variant:
    repository: str | None  # on the hub, type dataset; None: not published, made with data/export.py
    dataset: str  # folder under datasets/
    tokenizer: str  # file under tokenizers/
    vocab_size: int
    # The published scores use a multiple of `block` targets; the stream itself has a tail of less than that.
    block: int = 2048
    val_targets: int | None = None  # targets of the validation stream, cut to a multiple of `block`
    val_bytes: int | None = None  # bytes of those targets
    val_bytes_tolerance: int = 1
    val_bytes_full: int | None = None  # bytes of the whole stream, +- 2
    tokenizer_sha256: str | None = None
    caseops: bool = False  # has a byte side-car
    mp3: bool = False


_CASEOPS_MODEL = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
_CASEOPS_SHA256 = "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d"

VARIANTS = {
    # The challenge's own export. Its byte total is known to three decimals only (151.080 M).
    "sp1024": Variant("willdepueoai/parameter-golf", "fineweb10B_sp1024", "fineweb_1024_bpe.model", 1024,
                      block=1024, val_targets=62_021_632, val_bytes=151_080_000, val_bytes_tolerance=500),
    # Exports by a participant, used by most records.
    "sp4096": Variant("kevclark/parameter-golf", "fineweb10B_sp4096", "fineweb_4096_bpe.model", 4096,
                      val_targets=45_508_608, val_bytes=151_074_000, val_bytes_tolerance=500),
    "sp8192": Variant("kevclark/parameter-golf", "fineweb10B_sp8192", "fineweb_8192_bpe.model", 8192,
                      val_targets=40_540_160, val_bytes=151_078_222),
    # PR #1729; totals from the manifest quoted in #1953 and #2127.
    "caseops": Variant("romeerp/parameter-golf-caseops-v1", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
                       _CASEOPS_MODEL, 8192, val_targets=47_851_520, val_bytes=151_074_499, val_bytes_full=151_080_645,
                       tokenizer_sha256=_CASEOPS_SHA256, caseops=True),
    # PR #2109.
    "mp3": Variant(None, "fineweb10B_sp8192_caseops_marker_pair_v3", _CASEOPS_MODEL,
                   8192, val_targets=43_767_808, val_bytes=151_079_389, val_bytes_full=151_080_645,
                   tokenizer_sha256=_CASEOPS_SHA256, caseops=True, mp3=True),
}  # fmt: skip

# Other names of the same variants.
ALIASES = {"sp8192_lossless_caps_caseops_v1_reserved": "caseops"} | {
    variant.dataset: name for name, variant in VARIANTS.items()
}


def variant_of(config: Any) -> str:
    """The row of VARIANTS that a Config of train_gpt.py reads; sp and the vocabulary where there is no such row."""
    if config.marker_pair_mode:
        return "mp3"
    return "caseops" if config.caseops_enabled else f"sp{config.vocab_size}"


def find_variant(name: str) -> tuple[str, Variant]:
    """(short name, variant); raises DataError that lists the names."""
    short = ALIASES.get(name, name)
    if short not in VARIANTS:
        near = difflib.get_close_matches(name, [*VARIANTS, *ALIASES], 1)
        fix = f"did you mean {near[0]}?" if near else "choose one of these"
        raise DataError("variant", repr(name), f"one of {', '.join(VARIANTS)}", fix)
    return short, VARIANTS[short]
