"""The paper's claims: for each the number of a study that judges it, and the verdict.

Differences and their intervals are those of ``study/results.py``. A statistic of weights has one value for each run,
and thus only an interval over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from semantic_routing.analysis.statistics import excess, neighbour_correlation, smoothness, turning_points
from semantic_routing.evaluation.records import Record
from semantic_routing.evaluation.summary import Columns
from semantic_routing.model.arms import ARMS
from semantic_routing.sampling.clock import SHIFTED
from semantic_routing.study.keep import kept_lead, kept_weights
from semantic_routing.study.plan import CALIBRATED, Job, StudyArguments
from semantic_routing.study.results import Interval, Number, columns_of, difference, over_seeds, records_of, variants_of
from semantic_routing.toy.captions import TAGS

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "not tested"
ABOVE, BELOW = 1, -1
"""Sides of zero."""

TABLE_1 = {
    ("penultimate", ""): (64.54, 74.96),
    ("uniform", ""): (66.51, 76.82),
    ("static", ""): (64.77, 76.31),
    ("fusedit", ""): (60.95, 75.02),
    ("time", ""): (63.41, 76.20),
    ("time", SHIFTED): (63.65, 76.46),
    ("depth", ""): (67.07, 79.07),
    ("joint", ""): (66.05, 77.44),
}
"""The paper's scores on GenEval and GenAI-Bench by arm and clock (Tables 1 and 3)."""

ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal")
SKILL_GROUPS = {"basic": tuple(tag for tag in TAGS if tag not in ADVANCED), "advanced": ADVANCED}
"""Tags of the worlds in the groups of Table 2."""
TABLE_2 = {
    "basic": "+1.40",
    "advanced": "+3.08",
    "colors": "+0.57",
    "color_attr": "+0.57",
    "position": "+1.10",
    "scene": "+2.26",
    "counting": "+5.45",
    "comparison": "+4.10",
    "differentiation": "+3.82",
    "negation": "+2.54",
    "universal": "+4.99",
}
"""S2 minus B2 on GenAI-Bench, by group and for the skill that is nearest to a tag (Table 2)."""


@dataclass(frozen=True)
class Finished:
    """The finished runs of a study by arm; an arm is represented by the first of its router's learning rates."""

    args: StudyArguments
    runs: Mapping[str, Sequence[Job]]

    def lacks(self, *arms: str, clock: str = "") -> str:
        """Return which options add what is missing; empty if nothing is."""
        missing = [ARMS[arm].label for arm in dict.fromkeys(arms) if arm not in self.runs]
        wanted = [f"{' and '.join(missing)} in --arms"] if missing else []
        if clock and not (set(arms) <= self.runs.keys() and clock in self.runs[arms[0]][0].clocks):
            wanted.append(f"{clock} in --clocks")
        return ", ".join(wanted)

    def records(self, arm: str, clock: str = "") -> list[list[Record]]:
        return records_of(self.args, self.runs[arm], clock)


def finished(args: StudyArguments) -> Finished:
    """Return the finished runs of a study."""
    runs: dict[str, Sequence[Job]] = {}
    for of_variant in variants_of(args).values():
        runs.setdefault(of_variant[0].arm, of_variant)
    return Finished(args, runs)


@dataclass(frozen=True)
class Difference:
    """The overall accuracy of one arm minus that of another, or of an arm with another clock minus its nominal one."""

    one: str
    other: str
    clock: str = ""
    """Clock of ``one``; empty for the nominal one."""
    percent: ClassVar[bool] = True
    """Whether the number is shown in percentage points."""

    @property
    def name(self) -> str:
        one, other = (ARMS[arm].label for arm in (self.one, self.other))
        return f"{one} {self.clock} - nominal" if self.clock else f"{one} - {other}"

    def measure(self, study: Finished) -> Number | str:
        """Return the number, or what the study lacks for it."""
        if lacks := study.lacks(self.one, self.other, clock=self.clock):
            return lacks
        one, other = study.records(self.one, self.clock), study.records(self.other)
        return difference(one, other, {"overall": columns_of(one)["overall"]})["overall"]


@dataclass(frozen=True)
class Lead:
    """Effective minus nominal time of an arm's sampling, the mean over steps and images."""

    arm: str
    percent: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{ARMS[self.arm].label} effective - nominal time"

    def measure(self, study: Finished) -> Number | str:
        if lacks := study.lacks(self.arm, clock=CALIBRATED):
            return lacks
        leads = [kept_lead(study.args, job) for job in study.runs[self.arm]]
        measured = [lead for lead in leads if lead is not None]
        if len(measured) < len(leads):
            return "leads in kept/, which earlier versions did not write"
        means, intervals = zip(*measured, strict=True)
        low, high = np.mean(intervals, axis=0).tolist()  # at least as wide as the interval of the runs' mean
        return Number(mean=float(np.mean(means)), seeds=means, over_prompts=(low, high), over_seeds=over_seeds(means))


@dataclass(frozen=True)
class OfWeights:
    """A statistic of the weights of S2, which are the same at all times."""

    name: str
    statistic: Callable[[Float[np.ndarray, "K L"]], float]
    percent: ClassVar[bool] = False

    def measure(self, study: Finished) -> Number | str:
        if lacks := study.lacks("depth"):
            return lacks
        weights = [kept_weights(study.args, job) for job in study.runs["depth"]]
        values = tuple(self.statistic(found[0].astype(float)) for found in weights if found is not None)
        if len(values) < len(weights) or not np.isfinite(values).all():
            return "weights of more layers and blocks"
        return Number(mean=float(np.mean(values)), seeds=values, over_prompts=None, over_seeds=over_seeds(values))


Measure = Difference | Lead | OfWeights


@dataclass(frozen=True)
class PaperClaim:
    """A claim of the paper: a number is above or below zero."""

    text: str
    measure: Measure
    side: int = ABOVE
    source: str = ""
    """The paper's own differences, or the place of its evidence; empty if it has neither."""

    @property
    def inequality(self) -> str:
        """What the claim says of the number, such as "S2 - B2 > 0"."""
        return f"{self.measure.name} {'>' if self.side == ABOVE else '<'} 0"


def _difference(text: str, one: str, other: str, clock: str = "", side: int = ABOVE) -> PaperClaim:
    source = ""
    if (one, clock) in TABLE_1:
        source = ", ".join(f"{a - b:+.2f}" for a, b in zip(TABLE_1[one, clock], TABLE_1[other, ""], strict=True))
    return PaperClaim(text, Difference(one, other, clock), side, source)


CLAIMS = (
    _difference("All layers are better than one", "uniform", "penultimate"),
    *(
        _difference("S2 is the best strategy", "depth", other)
        for other in ("uniform", "penultimate", "static", "time", "joint", "fusedit")
    ),
    _difference("One learned mix for all blocks is not better than the average", "static", "uniform", side=BELOW),
    _difference("Routing by time alone is worse than the average", "time", "uniform", side=BELOW),
    _difference("FuseDiT is behind", "fusedit", "uniform", side=BELOW),
    _difference("FuseDiT is behind", "fusedit", "penultimate", side=BELOW),
    *(PaperClaim("Sampling runs ahead of the nominal time", Lead(arm), source="Figure 4") for arm in ("time", "joint")),
    *(
        _difference("A later time for the gates helps", arm, arm, clock)
        for arm in ("time", "joint")
        for clock in (SHIFTED, CALIBRATED)
    ),
    *(
        PaperClaim(
            "The first and the last layer are neglected",
            OfWeights(f"{name} layer's weight / uniform - 1", partial(excess, layer=layer)),
            BELOW,
            "Figure 2",
        )
        for name, layer in (("first", 0), ("last", -1))
    ),
    PaperClaim(
        "Neighbouring layers inhibit each other",
        OfWeights("correlation of neighbours' logits - chance", neighbour_correlation),
        BELOW,
        "Figure 2",
    ),
    PaperClaim(
        "Neighbouring layers inhibit each other",
        OfWeights("share of peaks and dips - chance", turning_points),
        source="Figure 2",
    ),
    PaperClaim(
        "Weights change smoothly from block to block",
        OfWeights("similarity of adjacent blocks - of others", smoothness),
        source="Figure 3",
    ),
)
"""The paper has Eq. 11's clock for S1 alone and no numbers for the weights: what is measured of them is our choice."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim with a study's number and verdict."""

    claim: PaperClaim
    number: Number | None
    verdict: str
    to_decide: str
    """What would decide the claim; empty if it is decided."""

    def to_json(self) -> dict[str, Any]:
        return {
            "claim": self.claim.text,
            "inequality": self.claim.inequality,
            "paper": self.claim.source,
            "number": None if self.number is None else self.number.to_json(),
            "verdict": self.verdict,
            "to_decide": self.to_decide,
        }


def judge_claims(args: StudyArguments) -> list[Judged]:
    """Return the verdict of a finished study on each of the paper's claims."""
    study = finished(args)
    return [_judged(claim, claim.measure.measure(study)) for claim in CLAIMS]


def judge_skills(args: StudyArguments) -> list[Judged]:
    """Return the verdict on whether S2 is above B2, for groups of tags and for every tag; none without these arms."""
    study, measure = finished(args), Difference("depth", "uniform")
    if study.lacks(measure.one, measure.other):
        return []
    one, other = study.records(measure.one), study.records(measure.other)
    found = difference(one, other, _skill_columns(columns_of(one)))
    return [_judged(PaperClaim(name, measure, source=TABLE_2.get(name, "")), found[name]) for name in found]


def _judged(claim: PaperClaim, found: Number | str) -> Judged:
    if isinstance(found, str):
        return Judged(claim=claim, number=None, verdict=UNTESTED, to_decide=found)
    verdict, to_decide = judge(found, claim.side)
    return Judged(claim=claim, number=found, verdict=verdict, to_decide=to_decide)


def _skill_columns(columns: Columns) -> Columns:
    """Return the groups of tags whose tags are all there, and the tags."""
    tags = {name: column for name, column in columns.items() if column == ((name,),)}
    groups = {name: tuple((tag,) for tag in group) for name, group in SKILL_GROUPS.items() if tags.keys() >= set(group)}
    return groups | tags


def judge(number: Number, side: int) -> tuple[str, str]:
    """Return the verdict on the claim that a number is on one side of zero, and what would decide it.

    All intervals must agree. One run decides nothing.
    """
    seeds = _side(number.over_seeds)
    prompts = seeds if number.over_prompts is None else _side(number.over_prompts)
    of_these_runs = HOLDS if prompts == side else FAILS
    if prompts == seeds != 0:
        return of_these_runs, ""
    if seeds:
        return UNDECIDED, "a larger --n"
    return UNDECIDED, f"more --seeds; for these runs it {of_these_runs}" if prompts else "more --seeds"


def _side(interval: Interval | None) -> int:
    """Return on which side of zero an interval is; 0 if it includes zero, and for one run, which has no interval."""
    if interval is None:
        return 0
    low, high = interval
    return int(low > 0) - int(high < 0)
