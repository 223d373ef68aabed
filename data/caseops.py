"""The lossless case transform of CaseOps data, its byte side-car, and the fused markers of MP3 data.

A tokenizer spends many pieces on the capitals of words it knows in lower case. CaseOps (first accepted in the
challenge's PR #1729) therefore writes every ASCII letter in lower case and puts an operator, a private-use character,
in front of a capitalised word, an all-caps word or a capital inside a word:

    Red cat -> T red cat    USA -> A usa    eBook -> e N book    PhDs -> T ph N ds    I -> T i

(T, A and N stand for the operators; there are no blanks after them.) An operator character that is already in the text
gets an escape in front, so that decode(encode(text)) == text for every text. Only this transform is lossless: the
tokenizer that follows folds white space and applies NFKC.

Operators are not text, so the bytes that a score divides by come from a side-car: for every token the number of
original UTF-8 bytes it stands for. MP3 data (PR #2109) fuses the space piece with an operator that follows it.
"""

import re
from dataclasses import dataclass

import numpy as np
import sentencepiece
from shards import DataError

TITLE, ALL_CAPS, CAP_NEXT, ESCAPE = OPERATORS = ("\ue001", "\ue002", "\ue003", "\ue004")
# In UTF-8 every operator is 0xEE 0x80 and one of 0x81 to 0x84.
LEAD, MIDDLE = 0xEE, 0x80
TITLE_BYTE, ALL_CAPS_BYTE, CAP_NEXT_BYTE, ESCAPE_BYTE = 0x81, 0x82, 0x83, 0x84
OPERATOR_BYTES = 3
SEPARATOR = b"\xff"  # occurs in no UTF-8 text and is no letter

# ---------------------------------------------------------------------------------------------------------------------
# Text -> transformed text. Bytes of multi-byte characters are all above 0x7F, so ASCII letters are found bytewise.


def encode(text: str) -> str:
    return encode_bytes(text.encode()).decode()


def encode_documents(texts: list[bytes]) -> list[bytes]:
    """encode_bytes for many documents in one pass: the cost of a call is spread over all of them."""
    return encode_bytes(SEPARATOR.join(texts)).split(SEPARATOR) if texts else []


def encode_bytes(text: bytes) -> bytes:
    """Transform UTF-8 text.

    Each maximal run of capitals is treated by itself. A run of two letters or more without a lower-case neighbour is an
    all-caps word and gets one ALL_CAPS in front. Otherwise its first letter gets TITLE, or CAP_NEXT after a lower-case
    letter, and each further letter gets CAP_NEXT.
    """
    padded = np.frombuffer(b"\0" + text + b"\0", np.uint8)  # index 1 is the first byte: neighbours always exist
    is_capital = (padded - 65) < 26  # unsigned: smaller values wrap around
    capitals = np.flatnonzero(is_capital)
    literals = find_operators(padded)
    if len(capitals) + len(literals) == 0:
        return text
    positions, operators = _capital_operators(padded, capitals)
    if len(literals):
        positions = np.concatenate([positions, literals])
        operators = np.concatenate([operators, np.full(len(literals), ESCAPE_BYTE, np.uint8)])
        order = np.argsort(positions, kind="stable")
        positions, operators = positions[order], operators[order]
    lowered = padded | (is_capital.view(np.uint8) << 5)
    return _insert(lowered, positions, operators)[1:-1].tobytes()


def _capital_operators(padded: np.ndarray, capitals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions, operator bytes) to insert for the capitals at `capitals`, (n,) sorted."""
    if len(capitals) == 0:
        return capitals, np.zeros(0, np.uint8)
    begins_run = np.concatenate([[True], np.diff(capitals) != 1])
    first = np.flatnonzero(begins_run)  # index into capitals of each run's first letter
    lengths = np.diff(first, append=len(capitals))
    after_lower = _is_lower(padded[capitals[first] - 1])
    all_caps = ~after_lower & ~_is_lower(padded[capitals[first] + lengths]) & (lengths >= 2)
    operators = np.full(len(capitals), CAP_NEXT_BYTE, np.uint8)
    operators[first] = np.where(after_lower, CAP_NEXT_BYTE, np.where(all_caps, ALL_CAPS_BYTE, TITLE_BYTE))
    wanted = begins_run | ~np.repeat(all_caps, lengths)
    return capitals[wanted], operators[wanted]


def _is_lower(characters: np.ndarray) -> np.ndarray:
    return (characters - 97) < 26


def _insert(source: np.ndarray, positions: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """Copy of `source`, (n,) uint8, with the three bytes of an operator before each of the sorted `positions`."""
    out = np.empty(len(source) + OPERATOR_BYTES * len(positions), np.uint8)
    from_source = np.ones(len(out), bool)
    places = positions + OPERATOR_BYTES * np.arange(len(positions))
    for offset, value in enumerate((LEAD, MIDDLE, operators)):
        out[places + offset] = value
        from_source[places + offset] = False
    out[from_source] = source
    return out


def find_operators(text: np.ndarray) -> np.ndarray:
    """Positions of the operator characters in UTF-8 bytes, (n,) uint8."""
    leads = np.flatnonzero(text[:-2] == LEAD)
    return leads[(text[leads + 1] == MIDDLE) & (text[leads + 2] - TITLE_BYTE < 4)]


# ---------------------------------------------------------------------------------------------------------------------
# Transformed text -> text

# Every branch begins with an operator, so that the search can skip from one operator to the next. The condition on the
# character before it is therefore a lookbehind that includes the operator.
_OPERATION = re.compile(
    f"{ESCAPE}(?P<literal>.)"
    f"|{TITLE}(?<![A-Za-z].){CAP_NEXT}?(?P<title>[A-Za-z])"
    f"|{ALL_CAPS}(?<![A-Za-z].)(?P<all_caps>(?:{CAP_NEXT}?[A-Za-z])+)"
    f"|{CAP_NEXT}(?P<cap_next>[A-Za-z])"
    f"|[{TITLE}{ALL_CAPS}{CAP_NEXT}{ESCAPE}]",  # an operator in none of these places is an error
    re.DOTALL,
)


def decode(text: str) -> str:
    """The inverse of encode; raises ValueError when an operator stands where it cannot."""
    return _OPERATION.sub(_apply, text)


def _apply(match: re.Match) -> str:
    if match.lastgroup is None:
        before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
        raise ValueError(
            f"operator U+{ord(match[0]):04X} at character {match.start()} cannot stand between {before!r} and {after!r}"
        )
    if match.lastgroup == "literal":
        return match["literal"]
    return match[match.lastgroup].replace(CAP_NEXT, "").upper()


# ---------------------------------------------------------------------------------------------------------------------
# Bytes per token


def original_bytes(transformed: bytes) -> np.ndarray:
    """(n,) bool: which bytes of a transformed text are bytes of the original text: all but those of operators without
    an escape."""
    text = np.frombuffer(transformed, np.uint8)
    operators = find_operators(text)
    if (text[operators + 2] == ESCAPE_BYTE).any():
        operators = _without_escaped(operators, text)
    counts = np.ones(len(text), bool)
    for offset in range(OPERATOR_BYTES):
        counts[operators + offset] = False
    return counts


def _without_escaped(operators: np.ndarray, text: np.ndarray) -> np.ndarray:
    acting = []
    escaped = -1  # position of the character that the last escape makes literal
    for position in operators.tolist():
        if position != escaped:
            acting.append(position)
            escaped = position + OPERATOR_BYTES if text[position + 2] == ESCAPE_BYTE else -1
    return np.array(acting, np.int64)


def encode_with_sidecar(
    tokenizer: sentencepiece.SentencePieceProcessor, transformed: bytes
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, original bytes per id) of one transformed document, both (n,) uint16.

    A piece covers a range of bytes of the text before the tokenizer's normalisation, so a folded run of white space
    counts with all its bytes. Raises DataError for a piece of more than 65,535 bytes.
    """
    mapping = tokenizer.encode(transformed, return_type="offset_mapping")
    offsets = np.array(mapping["offsets"], np.int64).reshape(-1, 2)
    counted = np.concatenate([[0], np.cumsum(original_bytes(transformed))])
    sidecar = counted[offsets[:, 1]] - counted[offsets[:, 0]]
    if len(sidecar) and sidecar.max() > 0xFFFF:
        raise DataError(
            "document",
            f"a token that stands for {sidecar.max()} bytes",
            "at most 65,535 (the side-car is uint16)",
            "remove the run of white space or control characters from the text",
        )
    return np.array(mapping["ids"], np.uint16), sidecar.astype(np.uint16)


def require_operators(tokenizer: sentencepiece.SentencePieceProcessor, path: object) -> None:
    """Raise DataError unless the tokenizer has a piece for every operator."""
    if not has_operators(tokenizer):
        raise DataError(
            path,
            "no pieces for U+E001 to U+E004",
            "a CaseOps tokenizer",
            "use the CaseOps tokenizer (data/download.py caseops) or train one with --train-tokenizer and --caseops",
        )


def has_operators(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    return all(tokenizer.piece_to_id(operator) != tokenizer.unk_id() for operator in OPERATORS)


# ---------------------------------------------------------------------------------------------------------------------
# MP3: one token for the space piece and the operator after it


@dataclass(frozen=True)
class MarkerPairs:
    """Ids of the fused pairs: `space` followed by markers[i] becomes aliases[i].

    The aliases are the byte pieces 0x00, 0x01 and 0x02, which no ordinary text uses (ids 8, 9 and 10 of the published
    tokenizer).
    """

    space: int
    markers: tuple[int, int, int]
    aliases: tuple[int, int, int]

    @classmethod
    def of(cls, tokenizer: sentencepiece.SentencePieceProcessor) -> "MarkerPairs":
        """Raises DataError when the tokenizer lacks one of the pieces."""
        pieces = ["▁", TITLE, ALL_CAPS, CAP_NEXT, "<0x00>", "<0x01>", "<0x02>"]
        ids = [tokenizer.piece_to_id(piece) for piece in pieces]
        if tokenizer.unk_id() in ids:
            missing = [piece for piece, token in zip(pieces, ids, strict=True) if token == tokenizer.unk_id()]
            raise DataError(
                "tokenizer", f"no piece {missing}", "the pieces that --mp3 fuses", "use a CaseOps tokenizer"
            )
        return cls(ids[0], tuple(ids[1:4]), tuple(ids[4:7]))

    def alias_map(self) -> dict:
        """The content of alias_map.json beside MP3 shards."""
        names = ("space_title", "space_all_caps", "space_cap_next")
        rows = list(zip(names, self.markers, self.aliases, strict=True))
        pairs = [{"donor": alias, "marker_id": marker, "marker_name": name} for name, marker, alias in rows]
        return {"alias_map": {name: alias for name, _, alias in rows}, "marker_pairs": pairs}

    def fuse(self, tokens: np.ndarray, sidecar: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Fuse a stream of whole documents, (n,) uint16; the side-car of a fused token is the sum of its two.

        Raises DataError when an alias id is in use (the text holds control characters 0x00 to 0x02).
        """
        if np.isin(tokens, self.aliases).any():
            raise DataError(
                "document",
                "a control character 0x00, 0x01 or 0x02",
                "none: --mp3 uses these byte pieces",
                "remove the character from the text",
            )
        markers_at = np.isin(tokens, self.markers)
        spaces = np.flatnonzero((tokens[:-1] == self.space) & markers_at[1:])
        fused = tokens.copy()
        fused[spaces + 1] = self._table(self.markers, self.aliases)[tokens[spaces + 1]]
        if sidecar is not None:
            sidecar = sidecar.copy()
            sidecar[spaces + 1] += sidecar[spaces]
            sidecar = np.delete(sidecar, spaces)
        return np.delete(fused, spaces), sidecar

    def expand(self, tokens: np.ndarray) -> np.ndarray:
        """The inverse of fuse for tokens, (n,) uint16."""
        fused = np.flatnonzero(np.isin(tokens, self.aliases))
        expanded = tokens.copy()
        expanded[fused] = self._table(self.aliases, self.markers)[tokens[fused]]
        return np.insert(expanded, fused, self.space)

    @staticmethod
    def _table(keys: tuple[int, ...], values: tuple[int, ...]) -> np.ndarray:
        table = np.zeros(1 << 16, np.uint16)
        table[list(keys)] = values
        return table
