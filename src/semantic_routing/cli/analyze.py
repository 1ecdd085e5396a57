"""``semroute analyze``: plots trained models, their ablations and their sampling trajectories."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from semantic_routing.adopt.table import open_routing
from semantic_routing.analysis.ablation.figures import ablation_figures, disagreement
from semantic_routing.analysis.ablation.run import AblationConfig, run_ablation
from semantic_routing.analysis.adopted import adopted_figures, is_routing
from semantic_routing.analysis.distances import compare_routers
from semantic_routing.analysis.figures import Drawn
from semantic_routing.analysis.page import Strip, write_page
from semantic_routing.analysis.profiles import routing_figures
from semantic_routing.analysis.routers import CHOSEN_TIMES, TIMES, open_router, routes, routing_weights
from semantic_routing.analysis.trajectory import LEAD, Trajectory, sample_trajectory
from semantic_routing.analysis.trajectory_figures import lead_table, trajectory_figures, write_calibration
from semantic_routing.analysis.weights import weight_figures
from semantic_routing.cli.arguments import FLAT
from semantic_routing.common.device import keep_freed_memory, pick_device
from semantic_routing.common.files import check_writable, write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.interop.open import open_model
from semantic_routing.model.dit import Backbone
from semantic_routing.sampling.prompts import read_prompts
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage, check_guidance
from semantic_routing.toy.worlds import SHAPES, WORLDS


@dataclass(frozen=True, kw_only=True)
class TrajectorySampling(SampleConfig):
    """Sampling settings that all trajectories share; their steps and guidance are in ``AnalyzeArguments``."""

    steps: Annotated[int, tyro.conf.Fixed] = 50
    guidance: Annotated[float, tyro.conf.Fixed] = 6.0
    compile: Annotated[bool, tyro.conf.Fixed] = False


@dataclass(frozen=True, kw_only=True)
class AnalyzeArguments:
    """Plot how much each block reads of each language-model layer, and measure sampling trajectories."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, checkpoints or exported pipelines, or folders or files of adopted routings. Several are plotted
    separately, and models are compared."""
    out: Path
    """Folder for the figures (.png, .pdf) and their numbers (.csv, .npz)."""
    times: tuple[float, ...] = CHOSEN_TIMES
    """Times (0 noise, 1 data) at which the weights of time-dependent routing are plotted."""
    blocks: tuple[int, ...] = ()
    """Blocks, counted from 0, whose weights are plotted one by one; by default the first, the middle and the last."""
    trajectory: bool = False
    """Sample images and measure how far the trajectory runs ahead of the training forward process (Figure 4)."""
    prompts: Path | None = None
    """File of prompts for the trajectories, as for semroute sample. By default they are unseen captions of the toy
    world; "words" means captions of the world of words."""
    n: int = 64
    """Number of prompts to sample."""
    guidance: tuple[float, ...] = (1.0, 3.0, 6.0)
    """Classifier-free guidance scales; each is measured."""
    steps: tuple[int, ...] = (50,)
    """Numbers of sampling steps; each is measured."""
    sampling: Annotated[TrajectorySampling, FLAT, tyro.conf.SuppressFixed] = field(default_factory=TrajectorySampling)
    """How the trajectories are sampled."""
    ablate: bool = False
    """Measure what is lost when a block does without each layer, reads only one layer, or swaps its weights with
    another."""
    ablation: AblationConfig = field(default_factory=AblationConfig)
    """What is ablated, and how its effect is measured."""
    html: bool = False
    """Also write index.html, a page with all figures and a time slider for the weights."""
    device: str = "auto"
    """Device for the trajectories: auto, cpu, cuda, cuda:1 or another torch device."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError(
                "nothing to analyse: give a run or a checkpoint, such as semroute analyze runs/x --out figures"
            )
        if self.n < 1 or not self.guidance or not self.steps or min(self.steps) < 2:
            raise ValueError("a trajectory needs --n of at least 1, at least one --guidance, and --steps of at least 2")
        for scale in self.guidance:
            check_guidance(scale)
        if not self.times or not all(0 <= time <= 1 for time in self.times):
            raise ValueError("times must be from 0 (noise) to 1 (data); give at least one")
        for name in ("times", "blocks", "guidance", "steps"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} has the same value twice; give each value once")


def run_analysis(args: AnalyzeArguments) -> list[Path]:
    """Draw all figures and return the PNG files and pages that were written."""
    check_writable(args.out)
    adopted = {path: open_routing(path) for path in args.models if is_routing(path)}
    if adopted and (args.trajectory or args.ablate or args.html or args.blocks):
        raise ValueError(
            f"{next(iter(adopted))} is a routing without a model: leave out --trajectory, --ablate, --html, --blocks"
        )
    routers = {path: open_router(path) for path in args.models if path not in adopted}
    folders = _folders(args)
    written: list[Path] = []
    for path, routing in adopted.items():
        _write_manifest(path, folders[path], args)
        written += [drawn.save(folders[path]) for drawn in adopted_figures(routing, args.times)]
    for path, model in routers.items():
        written += _analyze(path, model, folders[path], args)
    if len(routers) > 1:
        names = [str(folders[path].relative_to(args.out)) for path in routers]
        written += [drawn.save(args.out) for drawn in compare_routers(names, list(routers.values()))]
    return written


def _folders(args: AnalyzeArguments) -> dict[Path, Path]:
    """Return the folder for each model's figures: ``out`` for one model, else folders named after the models."""
    if len(args.models) == 1:
        return {args.models[0]: args.out}
    names = [path.resolve().name for path in args.models]
    if len(set(names)) < len(names):  # such as checkpoints of the same step
        names = ["-".join(part for part in path.parts if part not in ("/", "checkpoints")) for path in args.models]
    if len(set(names)) < len(names):
        raise ValueError("the same model is given twice; give each model once")
    return {path: args.out / name for path, name in zip(args.models, names, strict=True)}


def _analyze(path: Path, model: Backbone, out: Path, args: AnalyzeArguments) -> list[Path]:
    if args.trajectory and not routes(model):
        drawn = []  # only the trajectory can be drawn
    else:
        drawn = [*weight_figures(model, args.times, args.blocks), *routing_figures(model)]
    strips: list[Strip] = []
    leads: list[dict[str, Any]] = []
    found: dict[str, Any] | None = None
    if args.trajectory or args.ablate:
        keep_freed_memory()
        bundle = open_model(path, pick_device(args.device))
    if args.ablate:
        ablated, found = _ablate(bundle, args, out)
        drawn += ablated
    if args.trajectory:
        runs = _trajectories(bundle, args, out)
        drawn += trajectory_figures(runs)
        leads = lead_table(runs)
        write_text(out / LEAD, json.dumps(leads, indent=2) + "\n")
        strips = _strips(bundle, args) if args.html else []
    _write_manifest(path, out, args)
    written = [figure.save(out) for figure in drawn]
    if args.html:
        written.append(write_page(out / "index.html", str(path), model, drawn, leads, strips, found))
    return written


def _write_manifest(path: Path, out: Path, args: AnalyzeArguments) -> None:
    settings = asdict(args)
    settings = settings.pop("sampling") | settings  # the tuples of steps and guidance stay
    for name in ("models", "out", "compile"):
        del settings[name]
    write_text(out / "manifest.json", json.dumps(manifest(model=str(path), **settings), indent=2, default=str) + "\n")


def _ablate(bundle: TextToImage, args: AnalyzeArguments, out: Path) -> tuple[list[Drawn], dict[str, Any] | None]:
    """Measure the ablations; return their figures and where weight and need disagree."""
    score, measured = run_ablation(bundle, args.ablation, out)
    cfg, weights = bundle.model.cfg, routing_weights(bundle.model, TIMES).mean(0)
    found = disagreement(cfg, weights, measured)
    if found is not None:
        write_text(out / "disagreement.json", json.dumps(found, indent=2) + "\n")
    return list(ablation_figures(cfg, weights, measured, score.name)), found


def _captions(args: AnalyzeArguments) -> list[str]:
    source = args.prompts or Path(SHAPES)
    if str(source) in WORLDS:
        return [sample.caption for sample in WORLDS[str(source)].prompts(args.sampling.seed, args.n)]
    return read_prompts(source)[: args.n]


def _trajectories(bundle: TextToImage, args: AnalyzeArguments, out: Path) -> list[tuple[SampleConfig, Trajectory]]:
    """Measure a trajectory for each number of steps and guidance; write the calibration of each at once."""
    captions = _captions(args)
    runs: list[tuple[SampleConfig, Trajectory]] = []
    for steps in args.steps:
        for guidance in args.guidance:
            cfg = replace(args.sampling, steps=steps, guidance=guidance)
            measured = sample_trajectory(bundle, captions, cfg)
            write_calibration(out / f"calibration-g{guidance:g}-s{steps}.json", cfg, measured)
            runs.append((cfg, measured))
    return runs


STRIP_PROMPTS, STRIP_IMAGES = 4, 8
"""Prompts in the strips, and images in each strip."""


def _strips(bundle: TextToImage, args: AnalyzeArguments) -> list[Strip]:
    """Draw the model's estimates of the image during sampling, x + (1 - t) v, decoded, for a few prompts."""
    captions = _captions(args)[:STRIP_PROMPTS]
    names = [(index, 0) for index in range(len(captions))]
    steps = args.steps[0]
    shown = {round(i * (steps - 1) / (STRIP_IMAGES - 1)) for i in range(STRIP_IMAGES)}
    strips = []
    for guidance in args.guidance:
        seen: list[tuple[float, torch.Tensor]] = []

        def keep(step: int, t: torch.Tensor, x: torch.Tensor, v: torch.Tensor, seen: list = seen) -> None:
            if step in shown:
                seen.append((float(t), bundle.codec.decode(x + (1 - t).to(x.device) * v)))

        bundle.sample(captions, names, replace(args.sampling, steps=steps, guidance=guidance), keep)
        for index, caption in enumerate(captions):
            images = [image[index].numpy(force=True) for _, image in seen]
            strips.append(Strip(caption, f"guidance {guidance:g}", [t for t, _ in seen], images))
    return strips
