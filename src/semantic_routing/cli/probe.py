"""``semroute probe``: measures what each layer of a language model encodes, and what an average of layers loses."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from semantic_routing.analysis.probing.report import figures, verdict, write_page
from semantic_routing.analysis.probing.run import probe_encoder
from semantic_routing.analysis.probing.states import check_memory
from semantic_routing.analysis.probing.tasks import world_tasks
from semantic_routing.common.device import has_bfloat16, keep_freed_memory, pick_device
from semantic_routing.common.files import check_writable, write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.sampling.load import TEXT_ENCODER
from semantic_routing.sampling.prompts import read_prompts
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.toy.worlds import SHAPES, WORLDS


@dataclass(frozen=True, kw_only=True)
class ProbeArguments:
    """Measure what each layer of a language model encodes, and what an average of its layers loses."""

    encoder: Annotated[str, tyro.conf.Positional]
    """A language model as for text.name_or_path (a folder or a name on the hub), or a run that contains one."""
    out: Path
    """Folder for the figures (.png, .pdf), their numbers (.csv, .npz), probe.json and index.html."""
    prompts: str = SHAPES
    """A file of prompts as for semroute sample, or the captions of a world: "shapes" for the toy world, or "words" for
    the world of words, which has its own tasks."""
    tokens: int = 20_000
    """Largest number of tokens to measure."""
    tasks: bool = True
    """Also fit linear probes of colours, shapes, counts and relations."""
    captions: int = 400
    """Number of captions for each task."""
    layers: str = "all"
    """Layers to measure: "all", a range "6..29" or a list "9,18,27"."""
    prefix: str = ""
    """Instruction put before every prompt."""
    chat_template: bool = False
    """Wrap each prompt as a user's message in the model's own chat template."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Floating-point type of the language model; "auto" is bfloat16 if the device supports it in hardware."""
    seed: int = 0
    """Random seed of the captions and of the cross-validation folds."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or another torch device."""

    def __post_init__(self) -> None:
        if self.tokens < 100 or self.captions < 50:
            raise ValueError("a probe needs at least 100 tokens and 50 captions per task")


def run_probe(args: ProbeArguments) -> list[Path]:
    """Run the command; return the paths of the page and the figures."""
    check_writable(args.out)
    keep_freed_memory()
    device = pick_device(args.device)
    encoder = TextEncoder.from_pretrained(_config(args, device), device)
    check_memory(args.tokens, encoder.num_layers, encoder.width)
    world = args.prompts if args.prompts in WORLDS else SHAPES
    tasks = world_tasks(world, args.captions, args.seed) if args.tasks else []
    found = probe_encoder(
        encoder, _prompts(args), source=_name(args.prompts), tokens=args.tokens, tasks=tasks, seed=args.seed
    )
    drawn = list(figures(found))
    written = [figure.save(args.out) for figure in drawn]
    write_text(args.out / "probe.json", json.dumps(found.summary(), indent=2) + "\n")
    settings = json.loads(json.dumps(asdict(args), default=str))
    write_text(args.out / "manifest.json", json.dumps(manifest(**settings), indent=2) + "\n")
    sys.stderr.write(f"{verdict(found)}\n")
    return [*written, write_page(args.out / "index.html", found, drawn)]


def _config(args: ProbeArguments, device: torch.device) -> TextEncoderConfig:
    inside = Path(args.encoder) / TEXT_ENCODER
    return TextEncoderConfig(
        name_or_path=str(inside) if inside.is_dir() else args.encoder,
        layers=args.layers,
        prefix=args.prefix,
        chat_template=args.chat_template,
        dtype="bfloat16" if args.dtype == "auto" and has_bfloat16(device) else args.dtype,
    )


def _prompts(args: ProbeArguments) -> list[str]:
    if args.prompts not in WORLDS:
        return read_prompts(Path(args.prompts))
    data = open_data(DataConfig(paths=(args.prompts,)), image_size=32, seed=args.seed)
    return data.captions(args.tokens // 5)


def _name(prompts: str) -> str:
    return f"captions of {WORLDS[prompts].title}" if prompts in WORLDS else Path(prompts).name
