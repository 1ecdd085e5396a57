"""``semroute adopt``: trains the routing of a pipeline, samples with it, and shows the content of routing files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from semantic_routing.adopt.drawing import Drawing
from semantic_routing.adopt.edits import read_edits
from semantic_routing.adopt.file import find_file
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.table import routing_table
from semantic_routing.adopt.training.config import AdoptConfig
from semantic_routing.adopt.training.make_subject import make_subject
from semantic_routing.adopt.training.open_pipeline import load_results, lora_beside, open_pipe
from semantic_routing.adopt.training.run import resume, start
from semantic_routing.adopt.training.subject import Subject
from semantic_routing.cli.arguments import FLAT, options, parse, parse_known
from semantic_routing.cli.runs import resume_arguments
from semantic_routing.common.config import read_config
from semantic_routing.common.device import keep_freed_memory, pick_device
from semantic_routing.common.files import hash_files, write_text
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.sampling.folder import PROMPTS, claim_folder, sample_missing
from semantic_routing.sampling.prompts import read_prompts


@dataclass(frozen=True, kw_only=True)
class AdoptArguments:
    """The options of ``semroute adopt train`` besides the settings."""

    data: tuple[str, ...] = ()
    """Training data, the same as --data.paths."""
    config: Path | None = None
    """The config.json of a run to start from."""
    out: Path | None = None
    """Folder of the new run."""
    resume: Path | None = None
    """Folder of a run to resume, instead of starting a new one."""


@dataclass(frozen=True, kw_only=True)
class AdoptSampleArguments:
    """Sample images from a pipeline, with or without a routing."""

    pipeline: Annotated[str, tyro.conf.Positional]
    """Folder of a diffusers pipeline, or its name on the Hugging Face hub."""
    out: Path
    """Folder for the PNG files; complete images that are already there are kept."""
    routing: str | None = None
    """Folder, file or hub name of a routing; without it the original model is sampled."""
    scale: float = 1.0
    """Strength of the routing: 0 is the original model."""
    edits: Path | None = None
    """JSON file of edits of the routing that semroute explore saved; a scale in it is multiplied by --scale."""
    lora: bool = True
    """Also load the LoRA in the folder of the routing, if there is one."""
    prompt: tuple[str, ...] = ()
    """Prompts, each in quotation marks."""
    prompts: Path | None = None
    """File of prompts: one per line, or .jsonl or .csv with a column prompt, text or caption."""
    images_per_prompt: int = 1
    """Number of images per prompt, each from different noise."""
    negative_prompt: str | None = None
    """Prompt that classifier-free guidance moves away from; by default the pipeline's own."""
    height: int | None = None
    """Height of the images in pixels; by default the pipeline's."""
    width: int | None = None
    """Width of the images in pixels; by default the pipeline's."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of the weights: bf16, fp32, or auto, which is bf16 if the hardware supports it."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or another torch device."""
    sampling: Annotated[Drawing, FLAT] = field(default_factory=Drawing)
    """How the images are sampled."""

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt is {self.images_per_prompt}; it must be at least 1")
        if self.edits is not None and self.routing is None:
            raise ValueError(f"{self.edits} holds edits of a routing: give the routing, too, with --routing")
        if self.routing is not None and self.routing.endswith(".json"):
            raise ValueError(f"--routing is a routing's folder or file: give its edits as --edits {self.routing}")


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """Show the header of a routing file, and its weights by block."""

    routing: Annotated[str, tyro.conf.Positional]
    """Folder, file or hub name of a routing."""
    times: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Times (0 noise, 1 data) of the weights to show, if the routing depends on time."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        if not self.times or not all(0 <= time <= 1 for time in self.times):
            raise ValueError("times must be from 0 (noise) to 1 (data); give at least one")


def run_train(args: list[str], usage: str) -> Path:
    """Train as ``args`` say and return the run's folder; ``usage`` is printed above the settings by --help."""
    pipeline, given = (args[:1], args[1:]) if args and not args[0].startswith("-") else ([], args)
    own, settings = parse_known(AdoptArguments, given, prog="semroute adopt train")
    if own.resume is not None:
        alone = not pipeline and own == AdoptArguments(resume=own.resume)
        how = resume_arguments("semroute adopt train", settings, alone=alone)
        return resume(own.resume, steps=how.steps, accept_changes=how.accept_changes)
    default = AdoptConfig() if own.config is None else read_config(AdoptConfig, own.config)
    if own.data:
        if any(arg.startswith("--data.paths") for arg in settings):
            raise ValueError("--data and --data.paths are the same option; give one of them")
        default = replace(default, data=replace(default.data, paths=own.data))
    if not {"-h", "--help"}.isdisjoint(settings):
        sys.stdout.write(f"{usage}\n\n")
    beside = tuple(options(AdoptArguments))
    cfg = parse(AdoptConfig, pipeline + settings, prog="semroute adopt train PIPELINE", default=default, beside=beside)
    if not cfg.pipeline:
        raise ValueError("give the pipeline's folder or hub name: semroute adopt train PIPELINE --out DIR")
    if own.out is None:
        raise ValueError("give the folder of the new run, such as --out routings/x")
    return start(cfg, own.out)


def run_sample(args: AdoptSampleArguments) -> Path:
    """Write ``PPPPP_II.png`` for prompt P and image I, ``prompts.jsonl`` and ``manifest.json``; return the folder.

    Existing images are kept; ValueError if the folder's manifest describes other images.
    """
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts is not None else [])]
    if not prompts:
        raise ValueError('nothing to sample: give --prompt "a red circle" or --prompts FILE')
    file = None if args.routing is None else find_file(args.routing)
    edits = None if args.edits is None or file is None else read_edits(args.edits, file)
    keep_freed_memory()
    subject, routing = _opened(args, file)
    names = [(p, i) for p in range(len(prompts)) for i in range(args.images_per_prompt)]
    paths = {name: args.out / f"{name[0]:05d}_{name[1]:02d}.png" for name in names}
    with claimed(args.out / LOCK, args.out):
        identity = _request(args, subject, file, prompts) | {"edits": None if edits is None else edits.to_json()}
        claim_folder(args.out, identity)
        with nullcontext() if edits is None or routing is None else edits.on(routing):
            sample_missing(subject, prompts, paths, args.sampling)
        rows = [{"file": paths[name].name, "prompt": prompts[name[0]], "image": name[1]} for name in names]
        write_text(args.out / PROMPTS, "".join(json.dumps(row) + "\n" for row in rows))
    return args.out


def _opened(args: AdoptSampleArguments, file: Path | None) -> tuple[Subject, Routing | None]:
    """Load a pipeline, at the size of the arguments, with the routing and the LoRA that they name."""
    device = pick_device(args.device)
    pipe = open_pipe(args.pipeline, device, args.precision)
    subject = make_subject(pipe, device, args.precision)
    subject.negative_prompt = args.negative_prompt
    subject.size = (args.height or subject.image_size, args.width or subject.image_size)
    subject.latent_shape(*subject.size)
    return subject, None if file is None else load_results(pipe, file, args.scale, lora=args.lora)


def _request(args: AdoptSampleArguments, subject: Subject, file: Path | None, prompts: list[str]) -> dict[str, Any]:
    """Return all settings that decide a folder's images."""
    lora = lora_beside(file) if file is not None and args.lora else None
    sampler = asdict(args.sampling)
    del sampler["batch"]
    return {
        "pipeline": args.pipeline,
        "routing_sha256": None if file is None else hash_files([file]),
        "lora_sha256": None if lora is None else hash_files([lora]),
        "scale": args.scale,
        "negative_prompt": args.negative_prompt,
        "resolution": [*subject.pixels],
        "sampler": sampler,
        "prompts": {"n": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()},
    }


def run_info(args: InfoArguments) -> str:
    """Return the header and the weights of a routing as tables, or as JSON."""
    return routing_table(args.routing, args.times, as_json=args.json)


SUBCOMMANDS: dict[str, tuple[type, Callable[[Any], str | Path]]] = {
    "sample": (AdoptSampleArguments, run_sample),
    "info": (InfoArguments, run_info),
}
