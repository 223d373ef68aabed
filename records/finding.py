"""What a rule finds: a status, what was found, and the limit."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """What a rule found: status ok, fail, warn or unknown."""

    status: str
    found: str
    limit: str = ""


def ok(found: Any, limit: Any = "") -> Finding:
    return Finding("ok", str(found), str(limit))


def fail(found: Any, limit: Any = "") -> Finding:
    return Finding("fail", str(found), str(limit))


def warn(found: Any, limit: Any = "") -> Finding:
    return Finding("warn", str(found), str(limit))


def unknown(found: Any, limit: Any = "") -> Finding:
    return Finding("unknown", str(found), str(limit))


def worst(findings: Iterable[Finding], nothing: str) -> Finding:
    """All findings as one: the worst status, and what was found with that status."""
    found = list(findings)
    for status in ("fail", "warn", "unknown", "ok"):
        chosen = [finding for finding in found if finding.status == status]
        if chosen:
            texts = list(dict.fromkeys(finding.found for finding in chosen))
            return Finding(
                status,
                "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else ""),
                chosen[0].limit,
            )
    return unknown(nothing)
