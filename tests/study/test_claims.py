"""The verdicts on the paper's claims: studies made so that each verdict is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from semantic_routing.evaluation.records import CORRECT, Record
from semantic_routing.study import results
from semantic_routing.study.claims import ABOVE, BELOW, CLAIMS, Judged, judge, judge_claims, judge_skills
from semantic_routing.study.keep import write_kept
from semantic_routing.study.plan import StudyArguments, jobs
from semantic_routing.study.results import Interval, Number
from semantic_routing.study.tables import claim_sections
from semantic_routing.toy.captions import TAGS
from semantic_routing.toy.words.captions import UNSEEN_TAGS

PROMPTS = 40 * len(TAGS)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESAMPLES", 200)


def records(shares: Sequence[float], tags: Sequence[str] = TAGS) -> list[Record]:
    """Return records of which each tag has the share of right images: the same ones first, so that all are paired."""
    found = []
    for i in range(40 * len(tags)):
        tag, place = i % len(tags), i // len(tags)
        found.append(
            Record(prompt=i, id=f"{i:05d}", image=0, caption="", tags=(tags[tag],), file="",
                   scores={CORRECT: float(place < 40 * shares[tag])}, reason="")
        )  # fmt: skip
    return found


def even(share: float) -> list[Record]:
    return records([share] * len(TAGS))


def study(
    out: Path, shares: Mapping[str, Sequence[float]], clocks: Mapping[str, Sequence[float]] | None = None
) -> StudyArguments:
    """Write a finished study from every arm's share of right images by seed, and S1's by clock."""
    clocks = clocks or {}
    arms = tuple(f"{arm}:{len(of_seeds)}" for arm, of_seeds in shares.items())
    args = StudyArguments(scale="toy", out=out, arms=arms, n=PROMPTS, clocks=tuple(clocks))
    for job in jobs(args):
        scored = {"": even(shares[job.arm][job.seed])}
        scored |= {clock: even(clocks[clock][job.seed]) for clock in job.clocks}
        write_kept(args, job, scored, None)
    return args


def verdicts(found: Sequence[Judged]) -> dict[str, tuple[str, str]]:
    return {judged.claim.inequality: (judged.verdict, judged.to_decide) for judged in found}


def test_every_verdict_on_arms(tmp_path: Path) -> None:
    args = study(
        tmp_path,
        {
            "uniform": [0.500, 0.525, 0.550],
            "penultimate": [0.400, 0.425, 0.450],
            "depth": [0.600, 0.425, 0.550],  # up, down, level
            "static": [0.600, 0.625, 0.650],
            "time": [0.400, 0.425, 0.450],
        },
        {"shifted": [0.425, 0.450, 0.475]},
    )
    found = judge_claims(args)
    assert verdicts(found) == {
        "B2 - B1 > 0": ("holds", ""),
        "S2 - B2 > 0": ("undecided", "more --seeds"),
        "S2 - B1 > 0": ("undecided", "more --seeds; for these runs it holds"),
        "S2 - B3 > 0": ("undecided", "more --seeds; for these runs it does not hold"),
        "S2 - S1 > 0": ("undecided", "more --seeds; for these runs it holds"),
        "S2 - S3 > 0": ("not tested", "S3 in --arms"),
        "S2 - FuseDiT > 0": ("not tested", "FuseDiT in --arms"),
        "B3 - B2 < 0": ("does not hold", ""),
        "S1 - B2 < 0": ("holds", ""),
        "FuseDiT - B2 < 0": ("not tested", "FuseDiT in --arms"),
        "FuseDiT - B1 < 0": ("not tested", "FuseDiT in --arms"),
        "S1 effective - nominal time > 0": ("not tested", "calibrated in --clocks"),
        "S3 effective - nominal time > 0": ("not tested", "S3 in --arms, calibrated in --clocks"),
        "S1 shifted - nominal > 0": ("holds", ""),
        "S1 calibrated - nominal > 0": ("not tested", "calibrated in --clocks"),
        "S3 shifted - nominal > 0": ("not tested", "S3 in --arms, shifted in --clocks"),
        "S3 calibrated - nominal > 0": ("not tested", "S3 in --arms, calibrated in --clocks"),
        "first layer's weight / uniform - 1 < 0": ("not tested", "weights of more layers and blocks"),
        "last layer's weight / uniform - 1 < 0": ("not tested", "weights of more layers and blocks"),
        "correlation of neighbours' logits - chance < 0": ("not tested", "weights of more layers and blocks"),
        "share of peaks and dips - chance > 0": ("not tested", "weights of more layers and blocks"),
        "similarity of adjacent blocks - of others > 0": ("not tested", "weights of more layers and blocks"),
    }
    numbers = {judged.claim.inequality: judged.number for judged in found}
    gain = numbers["B2 - B1 > 0"]
    assert gain is not None
    assert gain.seeds == pytest.approx([0.1] * 3)
    shift = numbers["S1 shifted - nominal > 0"]
    assert shift is not None
    assert shift.seeds == pytest.approx([0.025] * 3)


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    args = study(tmp_path, {"uniform": [0.5, 0.5], "penultimate": [0.2], "depth": [0.3]})
    found = verdicts(judge_claims(args))
    assert found["B2 - B1 > 0"] == ("undecided", "more --seeds; for these runs it holds")
    assert found["S2 - B2 > 0"] == ("undecided", "more --seeds; for these runs it does not hold")
    assert {verdict for verdict, _ in found.values()} == {"undecided", "not tested"}


def test_the_recipes_rate_stands_for_an_arm(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("uniform", "depth"), n=PROMPTS, router_rates=(1.0, 10.0))
    for job in jobs(args):
        write_kept(args, job, {"": even({"uniform": 0.5, "depth": 0.6, "depth-rate10": 0.1}[job.variant])}, None)
    (number,) = [judged.number for judged in judge_claims(args) if judged.claim.inequality == "S2 - B2 > 0"]
    assert number is not None
    assert number.mean == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("prompts", "seeds", "side", "verdict"),
    [
        ((0.01, 0.03), (0.001, 0.04), ABOVE, "holds"),
        ((0.01, 0.03), (0.001, 0.04), BELOW, "does not hold"),
        ((-0.03, -0.01), (-0.04, -0.001), BELOW, "holds"),
        ((-0.03, -0.01), (-0.04, -0.001), ABOVE, "does not hold"),
        ((0.0, 0.03), (0.001, 0.04), ABOVE, "undecided"),  # an interval includes its ends
        ((0.01, 0.03), (0.0, 0.04), ABOVE, "undecided"),
        ((-0.03, 0.0), (-0.04, -0.001), ABOVE, "undecided"),
        ((0.0, 0.0), (0.0, 0.0), ABOVE, "undecided"),
        ((float("nan"), float("nan")), (0.01, 0.02), ABOVE, "undecided"),
        ((0.01, 0.03), None, ABOVE, "undecided"),
        (None, (0.01, 0.03), ABOVE, "holds"),
        (None, (-0.01, 0.03), ABOVE, "undecided"),
        (None, None, ABOVE, "undecided"),
    ],
)
def test_all_intervals_must_agree(prompts: Interval | None, seeds: Interval | None, side: int, verdict: str) -> None:
    number = Number(mean=0.02, seeds=(0.02, 0.02), over_prompts=prompts, over_seeds=seeds)
    found, to_decide = judge(number, side)
    assert found == verdict
    assert bool(to_decide) == (verdict == "undecided")


def test_more_prompts_decide_what_the_seeds_agree_on() -> None:
    number = Number(mean=0.02, seeds=(0.02, 0.02), over_prompts=(-0.01, 0.05), over_seeds=(0.01, 0.03))
    assert judge(number, ABOVE) == ("undecided", "a larger --n")


def write_weights(args: StudyArguments, rows: Sequence[np.ndarray]) -> None:
    for job in jobs(args):
        write_kept(args, job, {"": even(0.5)}, np.repeat(rows[job.seed][None], 21, axis=0).astype(np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.mark.parametrize(("sign", "verdict"), [(1, "holds"), (-1, "does not hold")])
def test_weights_as_the_paper_describes_them_and_the_reverse(tmp_path: Path, sign: int, verdict: str) -> None:
    alternating, smooth = np.array([-3, 1, -1, 1, -1, 1, -1, -3.0]), np.array([3, 0, 1, 2, 3, 2, 1, 3.0])
    blocks = [np.tile(alternating, (4, 1)), np.tile(smooth, (4, 1))][sign < 0]
    blocks[:, 3] += np.array([0, 0, 1, 1.5])[[0, 1, 2, 3] if sign > 0 else [0, 2, 1, 3]]  # neighbours are alike, or not
    args = StudyArguments(scale="toy", out=tmp_path, arms=("depth",), seeds=3, n=PROMPTS)
    write_weights(args, [softmax(blocks * scale) for scale in (0.9, 1.0, 1.1)])
    found = [judged for judged in judge_claims(args) if judged.claim.source in ("Figure 2", "Figure 3")]
    assert [judged.verdict for judged in found] == [verdict] * 5
    for judged in found:
        assert judged.number is not None
        assert judged.number.over_prompts is None
        assert len(judged.number.seeds) == 3


def test_weights_that_did_not_move_test_nothing_of_neighbours(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("depth",), seeds=2, n=PROMPTS)
    write_weights(args, [np.full((4, 8), 1 / 8)] * 2)
    found = verdicts(judge_claims(args))
    assert found["correlation of neighbours' logits - chance < 0"][0] == "not tested"
    assert found["first layer's weight / uniform - 1 < 0"][0] == "undecided"


def test_the_lead_is_that_of_the_calibrated_runs(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("time",), seeds=3, n=PROMPTS, clocks=("calibrated",))
    for job in jobs(args):
        scored = dict.fromkeys(("", "calibrated"), even(0.5))
        write_kept(args, job, scored, None, {"mean": 0.01 + 0.001 * job.seed, "interval": [0.005, 0.015]})
    (lead,) = [judged for judged in judge_claims(args) if judged.claim.inequality.startswith("S1 effective")]
    assert lead.number is not None
    assert lead.number.seeds == (0.01, 0.011, 0.012)
    assert lead.number.over_prompts == pytest.approx((0.005, 0.015))
    assert lead.verdict == "holds"
    write_kept(args, jobs(args)[1], scored, None)
    (lead,) = [judged for judged in judge_claims(args) if judged.claim.inequality.startswith("S1 effective")]
    assert (lead.verdict, lead.to_decide) == ("not tested", "leads in kept/, which earlier versions did not write")


def test_skills_are_judged_by_group_and_by_tag(tmp_path: Path) -> None:
    args = StudyArguments(scale="toy", out=tmp_path, arms=("uniform", "depth"), seeds=2, n=PROMPTS)
    gains = {"counting": 0.2, "negation": -0.1, "colors": 0.1}
    for job in jobs(args):
        more = [gains.get(tag, 0.0) if job.arm == "depth" else 0.0 for tag in TAGS]
        write_kept(args, job, {"": records([0.5 + gain for gain in more])}, None)
    found = {judged.claim.text: judged for judged in judge_skills(args)}
    assert list(found) == ["basic", "advanced", *TAGS]
    means = {name: judged.number.mean for name, judged in found.items() if judged.number}
    assert means["advanced"] == pytest.approx(0.1 / 5)
    assert means["basic"] == pytest.approx(0.1 / 6)
    assert {name: means[name] for name in gains} == pytest.approx(gains)
    assert [found[name].verdict for name in gains] == ["holds", "does not hold", "holds"]
    assert found["scene"].verdict == "undecided"
    assert found["counting"].claim.source == "+5.45"


def test_skills_of_the_paper_that_were_not_asked_have_no_group(tmp_path: Path) -> None:
    args = StudyArguments(scale="words", out=tmp_path, arms=("uniform", "depth"), seeds=1, n=160)
    tags = ("counting", *UNSEEN_TAGS)
    for job in jobs(args):
        write_kept(args, job, {"": records([0.5] * len(tags), tags)}, None)
    assert {judged.claim.text for judged in judge_skills(args)} == set(tags)
    assert judge_skills(replace(args, arms=("uniform",))) == []


def test_the_papers_differences_are_those_of_its_tables() -> None:
    paper = {claim.inequality: claim.source for claim in CLAIMS}
    assert len(paper) == len(CLAIMS)
    assert paper["B2 - B1 > 0"] == "+1.97, +1.86"
    assert paper["S1 shifted - nominal > 0"] == "+0.24, +0.26"
    assert paper["S3 shifted - nominal > 0"] == ""


def test_the_tables_of_claims(tmp_path: Path) -> None:
    args = study(tmp_path, {"uniform": [0.5, 0.525], "depth": [0.5, 0.525], "penultimate": [0.4, 0.425]})
    (title, claims), (skill_title, skills) = claim_sections(judge_claims(args), judge_skills(args))
    assert (title, skill_title) == ("The paper's claims", "S2 minus B2, by skill")
    first, second, *_ = claims.rows
    assert first[:3] == ("All layers are better than one", "B2 - B1 > 0", "+1.97, +1.86")
    assert first[3].startswith("+10.0 [+")
    assert first[4:] == ("holds", "")
    assert second[3:] == ("+0.0 [+0.0 to +0.0; +0.0 to +0.0]", "undecided", "more --seeds")
    assert claims.rows[5][3:] == ("", "not tested", "S3 in --arms")
    assert skills.rows[0][:2] == ("basic", "+1.40")
    assert len(claim_sections(judge_claims(replace(args, arms=("uniform:2",))), [])) == 1
