"""The benchmarks that ``semroute evaluate`` knows: for each its arguments and what runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from semantic_routing.chat.client import Usage
from semantic_routing.chat.server import ChatConfig
from semantic_routing.common.device import has_bfloat16, keep_freed_memory, pick_device
from semantic_routing.common.distributed import processes
from semantic_routing.evaluation.benchmark import Benchmark, Scorer
from semantic_routing.evaluation.compare import CompareArguments, compare
from semantic_routing.evaluation.drawbench import read_drawbench
from semantic_routing.evaluation.fid import FeaturesArguments, evaluate_features
from semantic_routing.evaluation.genai_bench import read_genai_bench
from semantic_routing.evaluation.geneval.benchmark import IMAGES_PER_PROMPT, GenEvalScorer, read_geneval
from semantic_routing.evaluation.geneval.models import CLIP, DETECTOR, load_geneval_models
from semantic_routing.evaluation.judges.local_vqascore import LocalVQAJudge
from semantic_routing.evaluation.judges.unified_reward import UNIFIED_REWARD_TEMPLATE, UnifiedRewardJudge
from semantic_routing.evaluation.judges.vqascore import VQA_TEMPLATES, VQAJudge
from semantic_routing.evaluation.records import TABLE
from semantic_routing.evaluation.run import evaluate_images, evaluate_model
from semantic_routing.evaluation.shapes import shapes_benchmark
from semantic_routing.interop.open import open_model
from semantic_routing.sampling.samplers import SamplerSpelling
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.training.recipes import TOY_SAMPLING

USAGE = "usage.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(SampleConfig):
    """What every benchmark is asked for."""

    model: Path | None = None
    """A run's folder, one of its checkpoints, or a pipeline of semroute export: its images are sampled and scored."""
    images: Path | None = None
    """A folder of images made by any tool, laid out as the benchmark's official tools expect, to be scored."""
    out: Path
    """Folder of the images and all results; a stopped evaluation goes on."""
    score: bool = True
    """Score the images, or only sample them."""
    rescore: bool = False
    """Score anew what another scorer has scored."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or another that torch knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.images is None):
            raise ValueError("what should be evaluated? give either --model, a run or pipeline, or --images, a folder")
        if self.images is not None and not self.score:
            raise ValueError("--no-score samples images only, and --images are there already; give --model")


@dataclass(frozen=True, kw_only=True)
class ShapesArguments(EvaluateArguments):
    """Score a model on unseen captions of the toy world with the exact checker."""

    n: int = 440
    """Prompts, spread evenly over the eleven tags."""
    prompt_seed: int = 0
    """Which prompts."""
    sampler: SamplerSpelling = TOY_SAMPLING.sampler
    """euler and heun integrate the flow, euler-ancestral renews part of the noise, renoise all of it (seeks modes)."""
    steps: int = TOY_SAMPLING.steps
    """Steps of the sampler."""
    guidance: float = TOY_SAMPLING.guidance
    """Scale of classifier-free guidance; 1 is none."""
    shift: float = TOY_SAMPLING.shift
    """Above 1, more steps near the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an evaluation needs at least 1 prompt")


def shapes(args: ShapesArguments) -> str:
    """Evaluate on the toy world; the table."""
    benchmark, checker = shapes_benchmark(args.prompt_seed, args.n)
    return evaluate(benchmark, lambda: checker, args, prompt_seed=args.prompt_seed)


@dataclass(frozen=True, kw_only=True)
class GenEvalArguments(EvaluateArguments):
    """GenEval: does an image show the objects, numbers, colours and positions that its prompt asks for?"""

    prompts: Path
    """evaluation_metadata.jsonl of djghosh13/geneval."""
    images_per_prompt: int = IMAGES_PER_PROMPT
    """Images for each prompt."""
    detector: str = DETECTOR
    """Mask2Former: a folder, a name on the hub, or mmdetection's file of weights, which the official scorer uses."""
    clip: str = CLIP
    """CLIP ViT-L/14 for colours: a folder or a name on the hub."""
    variant: str = ""
    """A label of the score, beside what the models are labelled."""


def geneval(args: GenEvalArguments) -> str:
    """Evaluate on GenEval; the table."""
    benchmark = read_geneval(args.prompts, args.images_per_prompt)

    def scorer() -> Scorer:
        detector, colors = load_geneval_models(args.detector, args.clip, pick_device(args.device))
        return GenEvalScorer(detector=detector, colors=colors, variant=args.variant)

    return evaluate(benchmark, scorer, args)


@dataclass(frozen=True, kw_only=True)
class JudgedArguments(EvaluateArguments):
    """What a benchmark with a model as its judge is asked for."""

    prompts: Path
    """The benchmark's prompts."""
    images_per_prompt: int = 1
    """Images for each prompt."""
    judge: ChatConfig = field(default_factory=ChatConfig)
    """The judge's server, which speaks OpenAI's protocol; answers are kept in OUT/answers if no cache is named."""

    def asked(self) -> ChatConfig:
        """The judge's server with a place for its answers."""
        return self.judge if self.judge.cache is not None else replace(self.judge, cache=self.out / "answers")


@dataclass(frozen=True, kw_only=True)
class GenAIBenchArguments(JudgedArguments):
    """GenAI-Bench: VQAScore, the probability that a model answers Yes when asked whether an image shows its prompt."""

    prompts: Path
    """genai_image.json, of 527 or 1600 prompts."""
    skills: Path
    """genai_skills.json of the same set."""
    local_judge: str | None = None
    """A vision-language model of transformers (a folder or a name on the hub) as the judge, instead of a server."""
    template: str = "3.1"
    """The question: of t2v_metrics 3.1 or 3.0, or a text with {} in the prompt's place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score and (self.local_judge is None) == (not self.judge.model):
            raise ValueError("who should judge? give --judge.model, served at --judge.base-url, or else --local-judge")


def genai_bench(args: GenAIBenchArguments) -> str:
    """Evaluate on GenAI-Bench; the table."""
    template = VQA_TEMPLATES.get(args.template, args.template)

    def scorer() -> Scorer:
        if args.local_judge is None:
            return VQAJudge(args.asked(), template)
        device = pick_device(args.device)
        dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
        return LocalVQAJudge.from_pretrained(args.local_judge, device=device, dtype=dtype, template=template)

    return evaluate(read_genai_bench(args.prompts, args.skills, args.images_per_prompt), scorer, args)


@dataclass(frozen=True, kw_only=True)
class DrawBenchArguments(JudgedArguments):
    """DrawBench: alignment, coherence and style from 1 to 5, as UnifiedReward sees them."""

    prompts: Path
    """CSV with the columns Prompts and Category, or JSON or JSON lines with such keys."""
    template: Path = UNIFIED_REWARD_TEMPLATE
    """Text of the request with {prompt} in the prompt's place; the official one can be given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score and not self.judge.model:
            raise ValueError("who should judge? give --judge.model, served at --judge.base-url")


def drawbench(args: DrawBenchArguments) -> str:
    """Evaluate on DrawBench; the table."""
    benchmark = read_drawbench(args.prompts, args.images_per_prompt)
    return evaluate(benchmark, lambda: UnifiedRewardJudge(args.asked(), args.template), args)


def evaluate(benchmark: Benchmark, make_scorer: Callable[[], Scorer], args: EvaluateArguments, **facts: Any) -> str:
    """Sample, unless there are images, and score; the table, or the folder where only sampling was asked for.

    Under torchrun each process does its share, and all but the first answer with nothing.
    """
    keep_freed_memory()
    with processes() as job:
        # Before hours of sampling: a scorer that cannot be had.
        scorer = make_scorer() if args.score else None
        try:
            if args.model is not None:
                bundle = open_model(args.model, pick_device(args.device), compiled=args.compile)
                evaluate_model(benchmark, bundle, args.out, args, scorer, job, rescore=args.rescore, **facts)
            elif args.images is not None and scorer is not None:
                evaluate_images(benchmark, args.images, args.out, scorer, job, rescore=args.rescore, **facts)
        finally:
            if scorer is not None and scorer.usage is not None and scorer.usage.requests:
                note_usage(args.out / USAGE, scorer.usage)
        if not job.first:
            return ""
        return str(args.out) if scorer is None else (args.out / TABLE).read_text(encoding="utf-8").rstrip()


def note_usage(path: Path, usage: Usage) -> None:
    """Add what a judge was asked, and what it cost, to a file with a line for each process of each run."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"date": datetime.now(UTC).isoformat(timespec="seconds")} | asdict(usage)) + "\n")


BENCHMARKS: dict[str, tuple[type, Callable[[Any], str]]] = {
    "shapes": (ShapesArguments, shapes),
    "geneval": (GenEvalArguments, geneval),
    "genai-bench": (GenAIBenchArguments, genai_bench),
    "drawbench": (DrawBenchArguments, drawbench),
    "compare": (CompareArguments, compare),
    "features": (FeaturesArguments, evaluate_features),
}
