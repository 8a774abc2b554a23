"""The optimizer steps that the names of a series' checkpoints say, or that they do not say one.

A step is the number behind `step`, `checkpoint`, `ckpt` or `iter`, or else the one that a name ends in. A series is
one run of training: its names may differ in the step, in a count of tokens that grows with it, and in nothing else.
Where they do (several stages, runs or seeds), one step may stand for two places of the training, and no order of the
numbers is that of the training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

_WORD = r"(?:global[-_]?)?(?:step|checkpoint|ckpt|iter(?:ation)?)s?"
# A unit may follow, and the tokens seen: TinyLlama's checkpoints are named step-50K-105b. What joins other digits
# separates no words: of 1e4, 1.5K, 1,000, 1_000 and 8-1000 none is read as its first number.
_STEP_BY_WORD = re.compile(
    rf"(?<![A-Za-z\d]){_WORD}[-_=]?(?P<number>\d+)(?P<unit>[KkMm]?)(?P<tokens>[-_]\d+(?:\.\d+)?[BbTt])?"
    r"(?![A-Za-z\d]|[.,_:-]\d)",
    re.IGNORECASE,
)
# Without such a word, pythia-70m is a size, v2 a version, and 2024-01-15 a day.
_LAST_NUMBER = re.compile(r"(?:^|(?<![\d][-_.,:])(?<=[-_]))(?P<number>\d+)(?P<unit>)(?P<tokens>)$")
_HAS_WORD = re.compile(rf"(?<![A-Za-z]){_WORD}(?![A-Za-z])", re.IGNORECASE)
_TOKENS = re.compile(r"tokens?[-_=]?(\d+(?:\.\d+)?[KMBT])|(\d+(?:\.\d+)?[KMBT])[-_]?tokens?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def step_of(name: str) -> int | None:
    """The step that a name says; None where it says none, or more than one."""
    match = _match(name)
    return None if match is None else int(match["number"]) * _UNITS[match["unit"].upper()]


def differing(names: Sequence[str]) -> bool:
    """Whether names that say their steps differ in more than that, and in a count of tokens that grows with it.

    Args:
        names: Of one series; `step_of` knows them all.
    """
    if len({_rest(name) for name in names}) > 1:
        return True
    in_order = sorted(names, key=lambda name: step_of(name) or 0)
    tokens = [_tokens(name) for name in in_order]
    return any(after < before for before, after in pairwise(tokens))


def _match(name: str) -> re.Match[str] | None:
    found = list(_STEP_BY_WORD.finditer(name))
    if found or _HAS_WORD.search(name):
        return found[0] if len(found) == 1 else None
    return _LAST_NUMBER.search(name)


def _rest(name: str) -> str:
    """What a name says beside its step and a count of tokens; how its words are joined is no matter."""
    match = _match(name)
    assert match is not None
    rest = f"{name[: match.start()]} {name[match.end() :]}"
    return " ".join(re.split(r"[-_=\s]+", _TOKENS.sub(" ", rest).lower())).strip()


def _tokens(name: str) -> float:
    """The tokens that a name says were seen; 0 where it says none."""
    match, step = _TOKENS.search(name), _match(name)
    assert step is not None
    said = (match[1] or match[2]) if match is not None else (step["tokens"] or "").lstrip("-_")
    return float(said[:-1]) * _UNITS[said[-1].upper()] if said else 0.0
