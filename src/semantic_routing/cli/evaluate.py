"""``semroute evaluate``: the arguments of each benchmark and the function that runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch

from semantic_routing.chat.client import Usage
from semantic_routing.chat.server import ChatConfig
from semantic_routing.cli.arguments import FLAT
from semantic_routing.common.device import has_bfloat16, keep_freed_memory, pick_device
from semantic_routing.common.distributed import processes
from semantic_routing.common.files import check_writable
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
from semantic_routing.evaluation.records import LOSS, TABLE
from semantic_routing.evaluation.run import evaluate_images, evaluate_model
from semantic_routing.evaluation.shapes import shapes_benchmark
from semantic_routing.evaluation.velocity_loss import evaluate_loss
from semantic_routing.flow import FIXED_TIMES
from semantic_routing.interop.open import open_model
from semantic_routing.sampling.routing_file import read_override
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.toy.worlds import SHAPES, WORDS
from semantic_routing.training.recipes import TOY_SAMPLING

USAGE = "usage.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Arguments of every benchmark that scores images."""

    model: Path | None = None
    """Folder of a run, a checkpoint, or a pipeline of semroute export; its images are sampled and scored."""
    images: Path | None = None
    """Folder of existing images to score instead, in the layout of the benchmark's official tools."""
    out: Path
    """Folder for the images and results; a stopped evaluation resumes there."""
    routing: Path | None = None
    """JSON file of routing weights that replace the model's own; semroute sample reads the same files."""
    score: bool = True
    """Score the images; --no-score only samples them."""
    rescore: bool = False
    """Score images again that another scorer has already scored."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or another torch device."""
    sampling: Annotated[SampleConfig, FLAT] = field(default_factory=SampleConfig)
    """How the images are sampled."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.images is None):
            raise ValueError("nothing to evaluate: give either --model, a run or pipeline, or --images, a folder")
        if self.images is not None and not self.score:
            raise ValueError("--no-score only samples images, which needs --model instead of --images")
        if self.images is not None and self.routing is not None:
            raise ValueError("--routing replaces weights of a model, which needs --model instead of --images")


@dataclass(frozen=True, kw_only=True)
class ShapesArguments(EvaluateArguments):
    """Score a model on unseen captions of the toy world with the exact checker."""

    n: int = 440
    """Number of prompts, spread evenly over the eleven tags."""
    prompt_seed: int = 0
    """Random seed of the prompts."""
    sampling: Annotated[SampleConfig, FLAT] = field(
        default_factory=lambda: replace(TOY_SAMPLING, batch=SampleConfig.batch)
    )
    """How the images are sampled; the defaults are those of the toy recipes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n is {self.n}; an evaluation needs at least 1 prompt")


def shapes(args: ShapesArguments) -> str:
    """Evaluate on the toy world and return the table."""
    benchmark, checker = shapes_benchmark(args.prompt_seed, args.n)
    return evaluate(benchmark, lambda: checker, args, prompt_seed=args.prompt_seed)


@dataclass(frozen=True, kw_only=True)
class WordsArguments(ShapesArguments):
    """Score a model on unseen captions of the world of words, and on held-out words, with the exact checker."""

    n: int = 760
    """Number of prompts, spread evenly over the nineteen tags."""


def words(args: WordsArguments) -> str:
    """Evaluate on the world of words and return the table."""
    benchmark, checker = shapes_benchmark(args.prompt_seed, args.n, WORDS)
    return evaluate(benchmark, lambda: checker, args, prompt_seed=args.prompt_seed)


@dataclass(frozen=True, kw_only=True)
class LossArguments:
    """Measure a model's velocity loss on held-out pictures, prompt by prompt, which takes seconds.

    It shows smaller differences than scores of sampled images; semroute evaluate compare gives their intervals.
    """

    model: Path
    """Folder of a run, a checkpoint, or a pipeline of semroute export."""
    out: Path
    """Folder for the results."""
    n: int = 1100
    """Number of pictures."""
    paths: tuple[str, ...] = ()
    """Held-out data, in the form of data.paths; by default the world or the validation data of the run."""
    times: tuple[float, ...] = FIXED_TIMES
    """Times over which the loss is averaged, from 0 (noise) to 1 (data)."""
    seed: int = 0
    """Random seed of the captions, pictures and noise."""
    batch: int = 64
    """Pictures per forward pass; does not change the result."""
    routing: Path | None = None
    """JSON file of routing weights that replace the model's own; semroute sample reads the same files."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or another torch device."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch < 1 or not self.times or not all(0 <= time <= 1 for time in self.times):
            raise ValueError("a loss needs n and batch of at least 1, and at least one time, from 0 to 1")


def velocity_loss(args: LossArguments) -> str:
    """Measure the loss and return the table; under torchrun only the first process returns text."""
    keep_freed_memory()
    check_writable(args.out)
    with processes() as job:
        bundle = open_model(args.model, pick_device(args.device))
        routing = None if args.routing is None else read_override(args.routing, bundle.model.cfg)
        evaluate_loss(
            bundle, args.out, n=args.n, times=args.times, paths=args.paths, seed=args.seed, batch=args.batch,
            routing=routing, job=job,
        )  # fmt: skip
    if not job.first:
        return ""
    return (args.out / TABLE).read_text(encoding="utf-8").rstrip()


@dataclass(frozen=True, kw_only=True)
class GenEvalArguments(EvaluateArguments):
    """Score a model on GenEval: the objects, numbers, colours and positions that the prompts ask for."""

    prompts: Path
    """File evaluation_metadata.jsonl of djghosh13/geneval."""
    images_per_prompt: int = IMAGES_PER_PROMPT
    """Images per prompt."""
    detector: str = DETECTOR
    """Mask2Former: a folder, a name on the hub, or the mmdetection weights file that the official scorer uses."""
    clip: str = CLIP
    """CLIP ViT-L/14 for colours: a folder or a name on the hub."""
    variant: str = ""
    """Label of the score, put before the labels of the detector and the colour classifier."""


def geneval(args: GenEvalArguments) -> str:
    """Evaluate on GenEval and return the table."""
    benchmark = read_geneval(args.prompts, args.images_per_prompt)

    def scorer() -> Scorer:
        detector, colors = load_geneval_models(args.detector, args.clip, pick_device(args.device))
        return GenEvalScorer(detector=detector, colors=colors, variant=args.variant)

    return evaluate(benchmark, scorer, args)


@dataclass(frozen=True, kw_only=True)
class JudgedArguments(EvaluateArguments):
    """Arguments of the benchmarks that are scored by a judge model."""

    prompts: Path
    """File of the benchmark's prompts."""
    images_per_prompt: int = 1
    """Images per prompt."""
    judge: ChatConfig = field(default_factory=ChatConfig)
    """The judge's OpenAI-compatible server; its answers are cached, by default in OUT/answers."""

    def asked(self) -> ChatConfig:
        """Return the judge's server with a folder for its answers."""
        return self.judge if self.judge.cache is not None else replace(self.judge, cache=self.out / "answers")


@dataclass(frozen=True, kw_only=True)
class GenAIBenchArguments(JudgedArguments):
    """Score a model on GenAI-Bench: VQAScore, the probability that a judge answers Yes, the image shows its prompt."""

    prompts: Path
    """File genai_image.json, with 527 or 1600 prompts."""
    skills: Path
    """File genai_skills.json of the same set."""
    local_judge: str | None = None
    """Judge on this machine instead of a server: a vision-language model of transformers (a folder or a hub name)."""
    template: str = "3.1"
    """The question: that of t2v_metrics 3.1 or 3.0, or a text with {} in place of the prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score and (self.local_judge is None) == (not self.judge.model):
            raise ValueError("no judge: give --judge.model, served at --judge.base-url, or else --local-judge")


def genai_bench(args: GenAIBenchArguments) -> str:
    """Evaluate on GenAI-Bench and return the table."""
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
    """Score a model on DrawBench: alignment, coherence and style from 1 to 5, judged by UnifiedReward."""

    prompts: Path
    """CSV file with the columns Prompts and Category, or JSON or JSON lines with these keys."""
    template: Path = UNIFIED_REWARD_TEMPLATE
    """Text file of the request to the judge, with {prompt} in place of the prompt, such as the official one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score and not self.judge.model:
            raise ValueError("no judge: give --judge.model, served at --judge.base-url")


def drawbench(args: DrawBenchArguments) -> str:
    """Evaluate on DrawBench and return the table."""
    benchmark = read_drawbench(args.prompts, args.images_per_prompt)
    return evaluate(benchmark, lambda: UnifiedRewardJudge(args.asked(), args.template), args)


def evaluate(benchmark: Benchmark, make_scorer: Callable[[], Scorer], args: EvaluateArguments, **facts: Any) -> str:
    """Sample the images unless they are given, score them and return the table.

    With --no-score return the folder of the images. Under torchrun each process does its share, and only the first
    process returns text.
    """
    keep_freed_memory()
    with processes() as job:
        # First, so that a scorer that cannot be loaded fails before hours of sampling.
        scorer = make_scorer() if args.score else None
        try:
            if args.model is not None:
                bundle = open_model(args.model, pick_device(args.device), compiled=args.sampling.compile)
                routing = None if args.routing is None else read_override(args.routing, bundle.model.cfg)
                evaluate_model(
                    benchmark, bundle, args.out, args.sampling, scorer, job,
                    rescore=args.rescore, routing=routing, **facts,
                )  # fmt: skip
            elif args.images is not None and scorer is not None:
                evaluate_images(benchmark, args.images, args.out, scorer, job, rescore=args.rescore, **facts)
        finally:
            if scorer is not None and scorer.usage is not None and scorer.usage.requests:
                note_usage(args.out / USAGE, scorer.usage)
        if not job.first:
            return ""
        return str(args.out) if scorer is None else (args.out / TABLE).read_text(encoding="utf-8").rstrip()


def note_usage(path: Path, usage: Usage) -> None:
    """Append the requests to a judge and their cost to a file with one line for each process of each run."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"date": datetime.now(UTC).isoformat(timespec="seconds")} | asdict(usage)) + "\n")


BENCHMARKS: dict[str, tuple[type, Callable[[Any], str]]] = {
    SHAPES: (ShapesArguments, shapes),
    WORDS: (WordsArguments, words),
    LOSS: (LossArguments, velocity_loss),
    "geneval": (GenEvalArguments, geneval),
    "genai-bench": (GenAIBenchArguments, genai_bench),
    "drawbench": (DrawBenchArguments, drawbench),
    "compare": (CompareArguments, compare),
    "features": (FeaturesArguments, evaluate_features),
}
