"""The paper's claims about STR and CMP (PAPER 2), each held against baselines that may take as many bytes.

Every claim is a set of differences, each turned so that it is above 0 where the claim is right, with its 95 % interval:
a bootstrap over sequences, paired, for both sides have read the same ones (`retention_readings`, a row a reading of a
sequence). A claim holds where every difference is above 0, differs where any is below, and is undecided in between: it
must be right at every budget, against every baseline. Above are those whose interval is, and whose chance of being so
high, by a t test, is less than 2.5 %: four sequences that happen to agree make any bootstrap sure, once in sixteen
times. Of so many comparisons some are below 0 by chance: one refutes a claim only if its chance, by the same test, is
less than 2.5 % over their number (Bonferroni). That all are above needs no such correction.

Equal bytes: a baseline is compared at the same budget, length and protocol, where the bytes that it may take
(`retention.kv_bytes_allowed`, all tensors of a policy counted) are within `EQUAL_BYTES` of the policy's; others are
left out. What a policy leaves unused, as whole groups of quantized keys do, is its own loss. Baselines are all that the
field has and that protect what STR protects: `window`, which by definition has no sinks, is none, and `function` and
`content` are our own probes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.report.bootstrap import estimates
from tasks.report.queries import resamples_of, rows, tables_of
from tasks.report.text import integer, listed, percent, signed
from tasks.report.vocabulary import SAID, Estimate, Finding, Row, Sign, Verdict, beyond, every, untested

JUDGED = ("str", "cmp")
TIERED = "cmp"
"""Its local error, which is of evictions alone, leaves out what it quantizes and merges: of it nothing says what is
carried, and its errors are judged by the last layer alone."""

BASELINES = ("streaming", "random", "h2o", "snapkv", "tova")
EQUAL_BYTES = 0.05
"""Relative difference of two budgets' bytes that still counts as none."""

TOLERATED = math.log(1.01)
"""Nats a token that a policy may lose and still have "no loss of coherence": perplexity 1 % above the full run's. That
what replaces a model must keep 99 % of its quality is MLPerf Inference's rule (Reddi et al. 2019, arXiv 1911.02549)."""

ENOUGH = 8
"""Sequences that a length must have been read at to be preferred for its length."""

ONE_SIDED = 0.025

_SAID = {**SAID, "undecided": "is undecided here: some of these differences may be chance"}
"""An interval on one side of zero does not decide, for few sequences."""

Floats = npt.NDArray[np.float64]
Setting = tuple[str, int]
"""Protocol and length."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number of a reading, and how sequences are put together.

    Attributes:
        title: What tables call it.
        columns: Of `retention_readings`: what is averaged over sequences, or (sum, count) whose sums are divided.
        less: Whether less of it is better.
        digits: After the point.
        shown: From the mean to what people read.
    """

    title: str
    columns: tuple[str, ...]
    less: bool
    digits: int = 4
    shown: Callable[[float], float] = float


MASS = Measure(title="attention of the full run on survivors", columns=("retained_mass",), less=False)
CARRIED = Measure(
    title="carried error (actual ÷ local, geometric mean over layers; differences are of its logarithm)",
    columns=("log_carried",),
    less=True,
    shown=math.exp,
)
LAST = Measure(title="error at the last layer (median over tokens)", columns=("last_error",), less=True)
LOSS = Measure(title="loss above the full run’s (nats a token)", columns=("delta_nll_sum", "n"), less=True)
SIMILARITY = Measure(
    title="similarity of the keys that are kept (cosine)", columns=("key_similarity",), less=True
)
FULL_SIMILARITY = Measure(title=SIMILARITY.title, columns=("full_key_similarity",), less=True)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One of the paper's claims.

    Attributes:
        title: In a few words.
        says: Fills “That <policy> …”.
        measures: What is compared with every baseline.
    """

    title: str
    says: str
    measures: tuple[Measure, ...]


SURVIVAL = Claim(
    title="Survival",
    says="keeps more of what the model attends to than any baseline",
    measures=(MASS,),
)
"""Columns: `retained_mass` of `retention_readings`, the attention of the full run that falls on tokens which the policy
still has, the mean over its layers. Difference: policy − baseline. Slots alone are fixed by the budget, so how many
tokens survive says nothing; how much of the attention they carry does."""

PROPAGATION = Claim(
    title="Error propagation",
    says="lets errors grow less across layers than any baseline",
    measures=(CARRIED, LAST),
)
"""Columns: `log_carried`, the mean over layers of ln(error / local_error), and `last_error`, the error at the deepest
layer that a policy governs. Difference: baseline − policy of each. Both must be less: a policy that does much harm in
each layer has little to add by carrying it. Only under `stream`: with `prefill`, kept keys are exact."""

COHERENCE = Claim(
    title="Coherence",
    says=f"loses no coherence (at most {TOLERATED:.3f} nats a token: 1 % of perplexity), and less than any baseline",
    measures=(LOSS,),
)
"""Columns: `delta_nll_sum` / `n`, the teacher-forced loss above the full run's, a token. Differences: `TOLERATED` −
policy, which says that nothing is lost, and baseline − policy."""

REDUNDANCY = Claim(
    title="Redundancy",
    says="keeps keys that are less alike than the full cache’s and any baseline’s",
    measures=(SIMILARITY,),
)
"""Columns: `key_similarity`, the mean cosine between the keys that are kept, the mean over layers, and
`full_key_similarity`, the same of the full run's. Differences: full − policy, and baseline − policy."""

SPEED = "Overhead and speed"
"""Columns: `speed_ratio` of `retention_speed`, tokens a second decoded with the policy over those with the full cache,
measured in alternation. Difference: speed_ratio − 1 at every length and budget. The full cache is what the paper says
STR is faster than; the baselines' ratios stand beside it."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A policy beside one other at one budget.

    Attributes:
        other: Whom or what it is compared with.
        own: Its number.
        others: The other's.
        difference: Above 0 where the claim is right.
        chance: That it is so low if in truth it is 0; None: the interval alone decides.
    """

    other: str
    own: float
    others: float
    difference: Estimate
    chance: float | None = None

    def sign(self, among: int) -> Sign:
        """On which side of 0 the difference lies, being one of so many."""
        if self.chance is None:
            return self.difference.sign
        if self.difference.sign == "above" and 1 - self.chance < ONE_SIDED:
            return "above"
        return "below" if self.chance < ONE_SIDED / among else "unclear"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim about a policy at one budget (and length), held against all others.

    Attributes:
        claim: Title of the claim.
        measure: What was compared.
        policy: Name of the policy.
        budget: Share.
        length: Tokens of the sequences.
        compared: With whom.
        digits: Of the numbers.
        left_out: Baselines that may take another number of bytes.
        note: What to know beside it.
    """

    claim: str
    measure: str
    policy: str
    budget: float
    length: int
    compared: Sequence[Compared]
    digits: int = 4
    left_out: tuple[str, ...] = ()
    note: str = ""

    @property
    def hardest(self) -> Compared:
        """The one that the verdict rests on: of those that refute, or else leave it open, the smallest difference."""
        decides = ("below", "unclear", "above")
        among = len(self.compared)
        return min(self.compared, key=lambda one: (decides.index(one.sign(among)), one.difference.value))

    @property
    def verdict(self) -> Verdict:
        """Over all that it is compared with."""
        return verdict([self])

    @property
    def row(self) -> Row:
        """As a row of the table of claims."""
        hardest = self.hardest
        return {
            "claim": self.claim,
            "policy": self.policy,
            "budget": self.budget,
            "length": self.length,
            "measure": self.measure,
            "own": round(hardest.own, self.digits),
            "others": round(hardest.others, self.digits),
            "hardest": hardest.other,
            "compared": len(self.compared),
            **hardest.difference.row("difference"),
            "verdict": self.verdict,
        }


class Readings:
    """What the claims are asked of: readings by setting, policy and budget, paired by sequence.

    Args:
        connection: Of `infra.duck.connect`; the table `retention_readings` is there.
    """

    def __init__(self, connection: Any) -> None:
        self.resamples = resamples_of(connection, "retention")
        self.found: dict[tuple[Setting, str, float], dict[int, Row]] = {}
        for row in rows(connection, "SELECT * FROM retention_readings ORDER BY sequence"):
            place = ((row["protocol"], row["length"]), row["policy"], row["budget"])
            self.found.setdefault(place, {})[row["sequence"]] = row
        self.bytes = {
            ((row["protocol"], row["length"]), row["policy"], row["budget"]): row["kv_bytes_allowed"]
            for row in rows(
                connection, "SELECT protocol, length, policy, budget, kv_bytes_allowed FROM retention"
            )
        }

    @property
    def setting(self) -> Setting | None:
        """Where claims are judged: under `stream` if anything was read so, at the longest length that `ENOUGH`
        sequences were read at, or else at the one with most. None where nothing but the full cache was read."""
        settings: dict[Setting, int] = {}
        for (setting, policy, _), of in self.found.items():
            if policy != "full":
                settings[setting] = max(len(of), settings.get(setting, 0))
        streamed = {setting: n for setting, n in settings.items() if setting[0] == "stream"} or settings
        enough = [setting for setting, n in streamed.items() if n >= ENOUGH]
        if enough:
            return max(enough, key=lambda setting: setting[1])
        return max(streamed, key=lambda setting: (streamed[setting], setting[1]), default=None)

    def policies(self, setting: Setting) -> list[str]:
        """Names of the policies that were read there."""
        return list(dict.fromkeys(policy for at, policy, _ in self.found if at == setting))

    def budgets(self, setting: Setting, policy: str) -> list[float]:
        """Budgets of a policy, ascending."""
        return sorted({budget for at, name, budget in self.found if (at, name) == (setting, policy)})

    def has_equal_bytes(self, setting: Setting, one: str, other: str, budget: float) -> bool:
        """Whether two policies may take as many bytes at a budget, as far as `EQUAL_BYTES` says."""
        a, b = (self.bytes.get((setting, policy, budget)) for policy in (one, other))
        return a is not None and b is not None and abs(a - b) <= EQUAL_BYTES * max(a, b)

    def lost(self, setting: Setting, budget: float, policy: str) -> Compared | None:
        """A policy's loss above the full run's beside what is tolerated; None where it was not measured."""
        sums = self._addends([(policy, LOSS)], setting, budget)
        if sums is None:
            return None

        def of_sums(drawn: Floats) -> Floats:
            mine = drawn[:, 0] / drawn[:, 1]
            return np.stack([TOLERATED - mine, mine], axis=1)

        difference, own = estimates(sums, of_sums, self.resamples)
        return Compared(
            other="tolerated",
            own=own.value,
            others=TOLERATED,
            difference=difference,
            chance=_chance(sums, of_sums),
        )

    def compare(
        self,
        setting: Setting,
        budget: float,
        own: tuple[str, Measure],
        other: tuple[str, Measure],
        name: str = "",
    ) -> Compared | None:
        """Two policies' numbers over the sequences that both have read; None where there is none.

        Args:
            setting: Where.
            budget: Of both.
            own: Policy and measure; the measure says which side is better.
            other: The same of the other side.
            name: What the other side is called; empty: its policy.
        """
        sums = self._addends([own, other], setting, budget)
        if sums is None:
            return None
        sign = 1.0 if own[1].less else -1.0

        def of_sums(drawn: Floats) -> Floats:
            mine, others = drawn[:, 0] / drawn[:, 1], drawn[:, 2] / drawn[:, 3]
            return np.stack([sign * (others - mine), mine, others], axis=1)

        difference, mine, others = estimates(sums, of_sums, self.resamples)
        shown = own[1].shown
        return Compared(
            other=name or other[0],
            own=shown(mine.value),
            others=shown(others.value),
            difference=difference,
            chance=_chance(sums, of_sums),
        )

    def _addends(
        self, sides: Sequence[tuple[str, Measure]], setting: Setting, budget: float
    ) -> Floats | None:
        """(sequences, 2 a side) numerator and denominator of each side's mean, of sequences that all sides have."""
        of = [self.found.get((setting, policy, budget), {}) for policy, _ in sides]
        found = []
        for sequence in sorted(set.intersection(*(set(rows_of) for rows_of in of))):
            line: list[float] = []
            for rows_of, (_, measure) in zip(of, sides, strict=True):
                values = [rows_of[sequence][column] for column in measure.columns]
                if any(value is None or not math.isfinite(value) for value in values):
                    break
                line += [values[0], values[1] if len(values) > 1 else 1.0]
            else:
                found.append(line)
        return np.array(found, dtype=np.float64) if found else None


def _chance(sums: Floats, of_sums: Callable[[Floats], Floats]) -> float:
    """How likely the first number of a statistic is so low if it is 0: one-sided jackknife t test (Tukey 1958).

    Far out in its tails the bootstrap of a dozen sequences is too sure of itself; t knows how few they are.

    Args:
        sums: (sequences, columns) addends, as the bootstrap draws them.
        of_sums: The statistic.
    """
    from scipy.stats import t

    n = len(sums)
    if n < 2:
        return 1.0
    whole = of_sums(sums.sum(axis=0)[None])[0, 0]
    without = of_sums(sums.sum(axis=0) - sums)[:, 0]
    pseudo = n * whole - (n - 1) * without
    error = pseudo.std(ddof=1) / math.sqrt(n)
    if error == 0:
        return 0.0 if whole < 0 else 1.0
    return float(t.cdf(pseudo.mean() / error, n - 1))


def verdict(judged: Sequence[Judged]) -> Verdict:
    """Whether a claim holds in all of these; a difference is below 0 by what is left of chance among them all."""
    compared = [one for each in judged for one in each.compared]
    return every(one.sign(len(compared)) for one in compared)


def is_judgeable(connection: Any) -> bool:
    """Whether there is what claims are asked of."""
    return tables_of(connection) >= {"retention", "retention_readings"}


def judge(connection: Any) -> list[Judged]:
    """All claims about all policies that the paper makes them of, budget by budget."""
    readings = Readings(connection)
    setting = readings.setting
    found: list[Judged] = []
    if setting is None:
        return found
    for policy in readings.policies(setting):
        if family(policy) not in JUDGED:
            continue
        for claim in (SURVIVAL, PROPAGATION, COHERENCE, REDUNDANCY):
            if claim is PROPAGATION and setting[0] != "stream":
                continue
            for budget in readings.budgets(setting, policy):
                found += _judge(readings, setting, claim, policy, budget)
    if "retention_speed" in tables_of(connection):
        found += _speeds(connection)
    return found


def family(policy: str) -> str:
    """Which policy a name of `retention.options` begins with: `str-gate` is judged as `str` is."""
    return re.split(r"[^a-z0-9]", policy, maxsplit=1)[0]


def _judge(readings: Readings, setting: Setting, claim: Claim, policy: str, budget: float) -> list[Judged]:
    there = [name for name in readings.policies(setting) if name in BASELINES]
    equal = [name for name in there if readings.has_equal_bytes(setting, policy, name, budget)]
    found: list[Judged] = []
    if not equal:
        return found  # a claim to beat every baseline does not hold because there is none
    for measure in claim.measures:
        if measure is CARRIED and family(policy) == TIERED:
            continue
        own = (policy, measure)
        compared = [readings.compare(setting, budget, own, (name, measure)) for name in equal]
        against: dict[str, list[Compared | None]] = {measure.title: compared}
        if claim is REDUNDANCY:
            compared.append(readings.compare(setting, budget, own, (policy, FULL_SIMILARITY), "full"))
        if claim is COHERENCE:
            against[f"{measure.title}, as such"] = [readings.lost(setting, budget, policy)]
        for title, those in against.items():
            known = [one for one in those if one is not None and not math.isnan(one.difference.value)]
            if known:
                found.append(
                    Judged(
                        claim=claim.title,
                        measure=title,
                        policy=policy,
                        budget=budget,
                        length=setting[1],
                        compared=known,
                        digits=measure.digits,
                        left_out=tuple(name for name in there if name not in equal),
                    )
                )
    return found


def _speeds(connection: Any) -> list[Judged]:
    found = rows(connection, "SELECT * FROM retention_speed ORDER BY policy, budget, length")
    judged = []
    for row in found:
        if family(row["policy"]) not in JUDGED:
            continue
        ratio = Estimate.of(row, "speed_ratio")
        beside = [
            f"{other['policy']} {signed(other['speed_ratio'])}"
            for other in found
            if other["policy"] in BASELINES
            and (other["budget"], other["length"]) == (row["budget"], row["length"])
        ]
        judged.append(
            Judged(
                claim=SPEED,
                measure="tokens a second over the full cache’s",
                policy=row["policy"],
                budget=row["budget"],
                length=row["length"],
                compared=[
                    Compared(
                        other="full",
                        own=ratio.value,
                        others=1.0,
                        difference=Estimate(value=ratio.value - 1, low=ratio.low - 1, high=ratio.high - 1),
                    )
                ],
                digits=3,
                note=f"the baselines: {listed(beside)}" if beside else "",
            )
        )
    return judged


def findings(connection: Any) -> list[Finding]:
    """The five claims about each policy, then function against content; empty where there is nothing to ask."""
    if not is_judgeable(connection):
        return []
    readings, judged = Readings(connection), judge(connection)
    setting = readings.setting
    if setting is None:
        return []
    found = []
    asked = [policy for policy in readings.policies(setting) if family(policy) in JUDGED]
    for claim in (SURVIVAL, PROPAGATION):
        found += [_finding(claim, policy, judged, setting) for policy in asked]
    found += [_speed_finding(policy, judged) for policy in asked]
    for claim in (COHERENCE, REDUNDANCY):
        found += [_finding(claim, policy, judged, setting) for policy in asked]
    return [*found, function_against_content(readings)]


def _finding(claim: Claim, policy: str, judged: Sequence[Judged], setting: Setting) -> Finding:
    title = f"{claim.title}: {policy}"
    mine = [one for one in judged if (one.claim, one.policy) == (claim.title, policy)]
    if not mine:
        exact = claim is PROPAGATION and setting[0] != "stream"
        why = "nothing was streamed, and keys kept after an exact prefill are exact"
        return untested(
            title,
            why if exact else "no baseline may take as many bytes at any budget, or nothing was measured",
        )
    found = verdict(mine)
    told = []
    for measure in dict.fromkeys(each.measure for each in mine):
        at = "; ".join(_told(each) for each in mine if each.measure == measure)
        told.append(f"{measure[:1].upper()}{measure[1:]}: {at}.")
    left_out = sorted({name for each in mine for name in each.left_out})
    missing = f" Not compared, for they may take other bytes: {listed(left_out)}." if left_out else ""
    if claim is PROPAGATION and family(policy) == TIERED:
        missing += " What is carried cannot be told: the local error leaves out what is quantized and merged."
    return Finding(
        title=title,
        verdict=found,
        text=f"At {integer(setting[1])} tokens ({setting[0]}), beside what is hardest to beat. {' '.join(told)}"
        f"{missing} That {policy} {claim.says} {_SAID[found]}.",
    )


def _told(each: Judged) -> str:
    hardest = each.hardest
    return (
        f"{signed(hardest.own, each.digits)} against {signed(hardest.others, each.digits)} ({hardest.other}) at a "
        f"budget of {percent(each.budget, 1)}, {beyond(hardest.difference, ('better', 'worse'), each.digits)}"
    )


def _speed_finding(policy: str, judged: Sequence[Judged]) -> Finding:
    title = f"{SPEED}: {policy}"
    mine = [one for one in judged if (one.claim, one.policy) == (SPEED, policy)]
    if not mine:
        return untested(title, "its speed was not measured (retention.speed)")
    found = verdict(mine)
    told = "; ".join(
        f"after {integer(each.length)} tokens at a budget of {percent(each.budget, 1)}, "
        f"{signed(each.hardest.own)} times the full cache’s tokens a second ("
        f"{signed(each.hardest.difference.low + 1)} to {signed(each.hardest.difference.high + 1)}"
        f"{'; ' + each.note if each.note else ''})"
        for each in mine
    )
    return Finding(
        title=title,
        verdict=found,
        text=f"It decodes {told}. That {policy} is faster than the full cache at every length {_SAID[found]}.",
    )


def function_against_content(readings: Readings) -> Finding:
    """Beyond the paper: whether function tokens are the ones to keep.

    Columns: `delta_nll_sum` / `n` of the policies `function` and `content`, which keep that kind first and within a
    kind a uniform sample of equal age and position. Difference: content − function, at every budget.
    """
    title, setting = "Function against content tokens", readings.setting
    assert setting is not None
    compared = {
        budget: one
        for budget in readings.budgets(setting, "function")
        if (one := readings.compare(setting, budget, ("function", LOSS), ("content", LOSS))) is not None
    }
    if not compared:
        return untested(title, "the policies function and content were not both read")
    signs = {one.difference.sign for one in compared.values()}
    told = "; ".join(
        f"at a budget of {percent(budget, 1)} {signed(one.own, 4)} nats a token above the full run, content first "
        f"{signed(one.others, 4)}: {beyond(one.difference, ('less lost', 'more lost'), 4)}"
        for budget, one in compared.items()
    )
    if signs == {"above"}:
        answer = "Function tokens are the ones to keep"
    elif signs == {"below"}:
        answer = "Content tokens are the ones to keep"
    else:
        answer = "Which kind is the one to keep is not the same, or not clear, at every budget"
    return Finding(title=title, text=f"Keeping function tokens first costs {told}. {answer}.")
