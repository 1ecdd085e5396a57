"""What an adopted routing gives: a B1 model of the toy world, trained on in six ways for the same further steps.

    python benchmarks/adopt_gain.py --work studies/adopt --out docs/results/adopt [--seeds 2] [--base 1500] [--more N]

For each seed a B1 model is trained, exported and then

- left as it is (base), or trained on with all of its weights (b1);
- adopted, its weights frozen, and its routing trained as gate, simplex or affine weights (gate, simplex, affine);
- adopted as simplex for two thirds of the steps, then given a LoRA on its text projections for the rest (lora);
- changed to S2, whose routing starts at the average, and trained on with all of its weights (s2).

For one seed all ways see the same pictures with the same noise and times. All are scored by the exact checker on the
same prompts from the same noise, and by the velocity loss of the prompts' own pictures, which tells smaller
differences apart. A stopped run goes on; ``--work`` keeps the models and ``--out`` the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from semantic_routing.adopt.api import load_routing
from semantic_routing.adopt.table import open_routing
from semantic_routing.adopt.training.config import AdoptConfig, LoraSettings
from semantic_routing.adopt.training.lora import LORA_FILE
from semantic_routing.adopt.training.own_subject import as_bundle
from semantic_routing.adopt.training.run import resume, start
from semantic_routing.analysis.adopted import adopted_figures
from semantic_routing.analysis.figures import Drawn
from semantic_routing.analysis.report import MEANS
from semantic_routing.analysis.table import Table
from semantic_routing.checkpoint.load import checkpoints
from semantic_routing.cli.main import main as semroute
from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.data.dataset import open_data
from semantic_routing.data.loader import Loader
from semantic_routing.evaluation.records import CORRECT, RECORDS, Record, read_records
from semantic_routing.evaluation.shapes import evaluate_shapes
from semantic_routing.flow import path, training_times, velocity
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.model.runtime import autocast
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.study.results import Number, numbers
from semantic_routing.study.tables import accuracy_bars
from semantic_routing.toy.worlds import SHAPES, WORLDS
from semantic_routing.training.recipes import TOY_SAMPLING, toy
from semantic_routing.training.trainer import Trainer

CPU = torch.device("cpu")
FORMS = ("gate", "simplex", "affine")
WAYS = ("base", "b1", *FORMS, "lora", "s2")
LABELS = {
    "base": "B1", "b1": "B1 trained on", "gate": "gate", "simplex": "simplex", "affine": "affine",
    "lora": "simplex, then LoRA", "s2": "S2, all trained",
}  # fmt: skip
RANK = 8
TIMES = 8
LOSS = "loss"
LATER = 1000
"""Seeds of the further steps are that much larger: they see other pictures than the first steps."""


def base(args: argparse.Namespace, seed: int) -> Path:
    """Return the run of a seed's B1 model, trained if needed."""
    run = args.work / f"first-seed{seed}"
    if (run / "checkpoints" / f"step-{args.base:07d}").is_dir():
        return run
    if checkpoints(run):
        semroute(["train", "--resume", str(run)])
    else:
        options = ["--seed", str(seed), "--steps", str(args.base), "--preview-every", "0"]
        semroute(["train", "toy", "--arm", "B1", *options, "--out", str(run)])
    return run


def exported(args: argparse.Namespace, seed: int) -> Path:
    """Return the pipeline of a seed's B1 model, exported if needed."""
    folder = args.work / f"pipeline-seed{seed}"
    if not folder.is_dir():
        semroute(["export", str(base(args, seed)), "--out", str(folder)])
    return folder


def trained_on(args: argparse.Namespace, seed: int, arm: str, work: Path) -> TextToImage:
    """Train all weights of the B1 model on as ``arm``; another router starts as it always does."""
    run = base(args, seed)
    there = load_bundle(run, CPU)
    cfg = replace(toy(arm), steps=args.more, seed=seed + LATER)
    trainer = Trainer(cfg, work, text=there.encoder.config)
    own = trainer.bundle.model
    with torch.no_grad():
        for name, p in there.model.named_parameters():  # the moving average
            if not name.startswith("router."):
                own.get_parameter(name).copy_(p)
        for name, p in own.named_parameters():
            trainer.ema[name].copy_(p)
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    loader = Loader(data, batch=cfg.batch, noise_shape=trainer.bundle.codec.latent_shape(cfg.image_size))
    for step in range(args.more):
        trainer.advance(trainer.prepare(loader.load(step)))
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(trainer.ema[name])
    return trainer.bundle


def adopted(args: argparse.Namespace, seed: int, way: str, work: Path) -> TextToImage:
    """Train a routing on the pipeline, and a LoRA after it if ``way`` says so."""
    recipe = toy("depth")
    steps = args.more * 2 // 3 if way == "lora" else args.more
    cfg = AdoptConfig(
        pipeline=str(exported(args, seed)), weights="simplex" if way == "lora" else way, steps=steps,
        lora=LoraSettings(rank=RANK, steps=args.more - steps) if way == "lora" else LoraSettings(), batch=recipe.batch,
        seed=seed + LATER, time=recipe.time, scheduler_shift=False, ema_decay=recipe.ema_decay,
        optim=replace(AdoptConfig().optim, lr=recipe.optim.lr, warmup=recipe.optim.warmup, decay=recipe.optim.decay),
        checkpoint_every=100, compile=True,
    )  # fmt: skip
    if not (work / "checkpoints" / f"step-{args.more:07d}").is_dir():
        if checkpoints(work):
            resume(work)
        else:
            start(cfg, work)
    pipe = SemanticRoutingPipeline.from_pretrained(cfg.pipeline)
    if way == "lora":
        pipe.load_lora_weights(work, weight_name=LORA_FILE)
    load_routing(pipe, work)
    return as_bundle(pipe, CPU)


def score(args: argparse.Namespace, way: str, seed: int) -> None:
    """Train one way for a seed and keep its verdicts, unless they are there."""
    kept = args.out / "kept" / f"{way}-seed{seed}.json"
    if kept.is_file():
        return
    work = args.work / f"{way}-seed{seed}"
    make: dict[str, Callable[[], TextToImage]] = {
        "base": lambda: load_bundle(base(args, seed), CPU),
        "b1": lambda: trained_on(args, seed, "penultimate", work),
        "s2": lambda: trained_on(args, seed, "depth", work),
    }
    bundle = make.get(way, lambda: adopted(args, seed, way, work))()
    how: SampleConfig = replace(TOY_SAMPLING, steps=args.sampling_steps)
    evaluate_shapes(bundle, work / "evaluation", n=args.n, seed=0, cfg=how)
    found = read_records(work / "evaluation" / RECORDS)
    facts = {
        "manifest": manifest(way=way, seed=seed, base=args.base, more=args.more),
        "prompts": {record.id: record.tag for record in found},
        "correct": "".join("1" if record.scores[CORRECT] else "0" for record in found),
        "loss": [round(loss, 6) for loss in held_out_losses(bundle, args.n)],
    }
    write_text(kept, json.dumps(facts) + "\n")


@torch.no_grad()
def held_out_losses(bundle: TextToImage, n: int) -> list[float]:
    """Return the velocity loss of each prompt's picture, a mean over ``TIMES`` times of training and as many noises."""
    samples, losses = WORLDS[SHAPES].prompts(0, n), []
    generator = torch.Generator().manual_seed(0)
    for first in range(0, n, 110):
        part = samples[first : first + 110]
        images = torch.stack([torch.from_numpy(sample.image) for sample in part])
        latents, features = bundle.codec.encode(images), bundle.encode([sample.caption for sample in part])
        errors = torch.zeros(len(part))
        for _ in range(TIMES):
            noise = torch.randn(latents.shape, generator=generator)
            uniform = torch.rand(len(part), generator=generator)
            t = training_times(uniform, toy("depth").time, images[0, ..., 0].numel())
            noisy = path(latents, noise, t)
            with autocast(CPU, bundle.bf16):
                context = bundle.model.prepare_text(features, bundle.model.gate_time(noisy, t))
                predicted = bundle.model(noisy, t, context)
            errors += (predicted.float() - velocity(latents, noise)).square().flatten(1).mean(1)
        losses += (errors / TIMES).tolist()
    return losses


def kept_records(kept: Path) -> list[Record]:
    """Return the verdict and the loss of each prompt."""
    facts = json.loads(kept.read_text(encoding="utf-8"))
    rows = zip(facts["prompts"].items(), facts["correct"], facts["loss"], strict=True)
    return [
        Record(
            prompt=i, id=name, image=0, caption="", tags=(tag,), file="", reason="",
            scores={CORRECT: float(mark), LOSS: loss},
        )
        for i, ((name, tag), mark, loss) in enumerate(rows)
    ]  # fmt: skip


Compared = dict[str, dict[str, Number]]
"""Numbers by way and column."""


def compared(records: dict[str, list[list[Record]]], metric: str) -> tuple[Compared, Compared, Compared]:
    """Return each way's numbers, its differences to B1, and those to B1 trained on."""
    own = {way: numbers(found, metric=metric) for way, found in records.items()}
    gains, further = (
        {way: numbers(records[way], records[other], metric=metric) for way in WAYS[first:]}
        for first, other in ((1, "base"), (2, "b1"))
    )
    return own, gains, further


def overview(parts: tuple[Compared, Compared, Compared], *, scale: float, title: str) -> Table:
    """Return the table of one metric over all prompts, in units of 1 / ``scale``."""
    cells = [
        (
            LABELS[way],
            *(_cell(part.get(way, {}).get("overall"), sign=i > 0, scale=scale) for i, part in enumerate(parts)),
        )
        for way in WAYS
    ]
    return Table(("", title, "minus B1", "minus B1 trained on"), cells)


def report(args: argparse.Namespace) -> str:
    """Write tables and figures of all ways that are done for every seed; return the first two tables."""
    records = {
        way: [kept_records(args.out / "kept" / f"{way}-seed{seed}.json") for seed in range(args.seeds)] for way in WAYS
    }
    parts = {metric: compared(records, metric) for metric in (CORRECT, LOSS)}
    own = parts[CORRECT][0]
    first = overview(parts[CORRECT], scale=100, title="accuracy (%)")
    losses = overview(parts[LOSS], scale=1000, title="loss (thousandths)")
    tags = [name for name in own["base"] if name not in MEANS]
    second = Table(
        ("", *(LABELS[way] for way in WAYS)),
        [(tag.replace("_", " "), *(f"{100 * own[way][tag].mean:.1f}" for way in WAYS)) for tag in tags],
    )
    method = str(__doc__).split("\n\n", 2)[2]
    sections = (("Accuracy", first), ("Loss", losses), ("Accuracy by skill (%)", second))
    text = "\n\n".join(f"## {title}\n\n{table.markdown()}" for title, table in sections) + f"\n\n{method}"
    write_text(args.out / "tables.md", text)
    everything = {
        metric: {
            name: {way: {tag: number.to_json() for tag, number in found.items()} for way, found in part.items()}
            for name, part in zip(("own", "minus_b1", "minus_b1_trained_on"), three, strict=True)
        }
        for metric, three in parts.items()
    }
    write_text(args.out / "results.json", json.dumps(everything, indent=2) + "\n")
    facts = manifest(
        base=args.base, more=args.more, prompts=args.n, sampling_steps=args.sampling_steps, lora_rank=RANK,
        seeds={"runs": list(range(args.seeds)), "further": [seed + LATER for seed in range(args.seeds)]},
    )  # fmt: skip
    write_text(args.out / "manifest.json", json.dumps(facts, indent=2) + "\n")
    for drawn in figures(args, own):
        drawn.save(args.out / "figures")
    return f"{first.markdown()}\n\n{losses.markdown()}"


def _cell(number: Number | None, *, sign: bool, scale: float) -> str:
    """Return a number with its intervals over prompts and over seeds."""
    if number is None:
        return ""
    form = "+.1f" if sign else ".1f"
    spans = [
        f"{scale * low:{form}} to {scale * high:{form}}"
        for low, high in filter(None, (number.over_prompts, number.over_seeds))
    ]
    return f"{scale * number.mean:{form}} [{'; '.join(spans)}]"


def figures(args: argparse.Namespace, own: dict[str, dict[str, Number]]) -> Iterator[Drawn]:
    """Draw the accuracy of every way, and the routing of each form for the first seed."""
    bars = {way: (LABELS[way], own[way]["overall"]) for way in WAYS}
    yield accuracy_bars(bars, title="Accuracy of the toy world's prompts")
    for form in FORMS:
        (drawn,) = adopted_figures(open_routing(args.work / f"{form}-seed0"), (0.0,))
        yield replace(drawn, name=f"weights-{form}", title=f"{drawn.title}: {form}, seed 0")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What an adopted routing gives on the toy world.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the models")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seed", type=int, help="do this seed alone, and write no tables")
    parser.add_argument("--base", type=int, default=1500, help="steps of the B1 model")
    parser.add_argument("--more", type=int, default=1000, help="further steps")
    parser.add_argument("--n", type=int, default=1100, help="prompts")
    parser.add_argument("--sampling-steps", type=int, default=50)
    args = parser.parse_args(argv)
    for seed in range(args.seeds) if args.seed is None else [args.seed]:
        for way in WAYS:
            score(args, way, seed)
    if args.seed is None:
        sys.stdout.write(f"{report(args)}\n")


if __name__ == "__main__":
    main()
