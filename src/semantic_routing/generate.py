"""From a trained checkpoint and prompts to images."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from semantic_routing.checkpoint import EMA, MODEL, find_checkpoint, load_weights, read_state, write_text
from semantic_routing.claims import LOCK, claimed
from semantic_routing.clock import NOMINAL, parse_clock
from semantic_routing.codec import Codec, CodecConfig, NotFiniteError, make_codec
from semantic_routing.config import from_dict
from semantic_routing.device import keep_freed_memory, pick_device, use_bfloat16
from semantic_routing.dit import Backbone, DiTConfig
from semantic_routing.features import TextFeatures
from semantic_routing.fusedit import make_model
from semantic_routing.manifest import manifest
from semantic_routing.origins import FOLDER, KEY, located_model
from semantic_routing.pictures import is_whole, save_png
from semantic_routing.processes import Processes, processes
from semantic_routing.prompts import read_prompts
from semantic_routing.sampler import (
    RENOISE_ONCE,
    SAMPLERS,
    Callback,
    SamplerSpelling,
    guided,
    noise_for,
    sampler_name,
    schedule,
)
from semantic_routing.text_encoder import TextEncoder, TextEncoderConfig, TextShape

ALONE = Processes()
_ROUNDING = threading.Lock()
_ROUNDED: dict[nn.Module, tuple[int, list[tuple[nn.Parameter, Tensor]]]] = {}
"""Networks whose weights are rounded now: by how many calls, and what the weights are."""
TINY = "tiny"
"""Name of the text encoder that a run makes for itself (``tiny_lm.py``); "tiny:4x64" has 4 layers of width 64."""
TEXT_ENCODER = "text_encoder"
"""Folder of a run that holds the text encoder made for it."""
PROMPTS = "prompts.jsonl"
"""What sampling says of each image."""


MOST_GUIDANCE = 1000
"""Scales of guidance beyond it only overflow."""
GRAPHS = 32
"""Compiled graphs of one function that are kept."""
SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The names of types in safetensors files."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are sampled; the defaults are the paper's."""

    steps: int = 50
    """Steps of the sampler."""
    guidance: float = 6.0
    """Scale of classifier-free guidance; 1 is none."""
    sampler: SamplerSpelling = "euler"
    """euler and heun integrate the flow, euler-ancestral renews part of the noise, renoise all of it (seeks modes)."""
    shift: float = 1.0
    """Above 1, more steps near the noise."""
    clock: str = NOMINAL
    """The time that time-dependent routing is told: nominal, shifted (Eq. 11), shifted:SIZE, or a calibration file."""
    seed: int = 0
    """Run seed: with prompt index and image index it decides an image's noise."""
    batch: int = 64
    """Images sampled together."""
    compile: bool = False
    """Compile the network: slower to start, faster steps; pixels differ by rounding, also between batch sizes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", sampler_name(self.sampler))
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; sampling needs at least 1")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be above 0 and finite")
        check_guidance(self.guidance)


def check_guidance(scale: float) -> None:
    """Raise ValueError for a scale that leaves no picture finite."""
    if not abs(scale) <= MOST_GUIDANCE:
        raise ValueError(f"guidance is {scale}; it must be finite, at most {MOST_GUIDANCE}")


def tiny_sizes(name: str) -> dict[str, Any] | None:
    """Read the sizes of a tiny language model off its name: "tiny", "tiny:LAYERSxWIDTH" or "tiny:LAYERSxWIDTHxSTEPS".

    Returns arguments of ``tiny_lm``; None for the name of another text encoder.
    """
    found = re.fullmatch(rf"{TINY}(?::(\d+)x(\d+)(?:x(\d+))?)?", name)
    if found is None:
        return None
    return {key: int(size) for key, size in zip(("layers", "width", "steps"), found.groups(), strict=True) if size}


def locate_encoder(cfg: TextEncoderConfig, run: Path) -> TextEncoderConfig:
    """Where a run's text encoder really is: in the run's own folder if it made one, else as named."""
    if tiny_sizes(cfg.name_or_path) is None:
        return cfg
    folder = run / TEXT_ENCODER
    if not folder.is_dir():
        raise ValueError(f"the run {run} lacks its folder {TEXT_ENCODER}, the language model that was made for it")
    return replace(cfg, name_or_path=str(folder))


def open_encoder(cfg: TextEncoderConfig, run: Path, device: torch.device) -> TextEncoder:
    """Load a run's text encoder."""
    return TextEncoder.from_pretrained(locate_encoder(cfg, run), device)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A trained model with all that sampling from it needs."""

    model: Backbone
    encoder: TextEncoder
    codec: Codec
    image_size: int
    """Side of an image in pixels."""
    size: tuple[int, int] | None = None
    """Height and width of the images to draw, if not ``image_size`` both."""
    null_prompt: str = ""
    """What stands for "no prompt" in guidance: what dropped prompts were replaced by in training."""
    bf16: bool = False
    """Whether products run in bfloat16."""
    checkpoint: Path | None = None
    """Where it was loaded from."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's resolved configuration."""
    _encoded: dict[str, TextFeatures] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of its images."""
        return self.size or (self.image_size, self.image_size)

    @property
    def device(self) -> torch.device:
        return self.model.proj_out.weight.device

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """What this model's text encoder says about the prompts, on the model's device.

        In the weights' own type where autocast will not bring the two together.
        """
        features = self.encoder.encode(list(prompts), with_kv=self.model.cfg.strategy.reads_keys)
        return features.to(self.device, None if self.bf16 else self.model.proj_out.weight.dtype)

    def null_features(self) -> TextFeatures:
        """What the text encoder says about the null prompt, asked once."""
        if self.null_prompt not in self._encoded:
            self._encoded[self.null_prompt] = self.encode([self.null_prompt])
        return self._encoded[self.null_prompt]

    def sample(
        self,
        prompts: Sequence[str],
        images: Sequence[tuple[int, int]],
        cfg: SampleConfig,
        callback: Callback | None = None,
    ) -> UInt8[Tensor, "B H W 3"]:
        """One image for each prompt; ``images`` names it by (prompt index, image index) for its noise."""
        finite: list[Tensor] = []

        def watch(step: int, t: Tensor, x: Tensor, v: Tensor) -> None:
            finite.append(v.isfinite().flatten(1).all(1))
            if callback is not None:
                callback(step, t, x, v)

        try:
            return self.codec.decode(self.sample_latents(prompts, images, cfg, watch))
        except NotFiniteError as error:
            place = error.pictures[0]
            bad = (~torch.stack(finite)[:, place]).nonzero().flatten().tolist()
            when = f"from step {bad[0] + 1} of {cfg.steps} on" if bad else "where its latents are decoded"
            raise NotFiniteError(error.pictures, f"the picture of {prompts[place]!r} is not finite {when}") from error

    def sample_latents(
        self,
        prompts: Sequence[str],
        images: Sequence[tuple[int, int]],
        cfg: SampleConfig,
        callback: Callback | None = None,
    ) -> Float[Tensor, " B *latent"]:
        """The latents of ``sample``'s images; ``callback`` sees every step."""
        shape = latent_shape(self.codec, self.model.cfg, *self.pixels)
        x = noise_for(cfg.seed, images, shape).to(self.device)
        clock = parse_clock(cfg.clock)
        if clock is not None and not self.model.cfg.strategy.takes_clock:
            raise ValueError(f"--clock {cfg.clock}: the routing of arm {self.model.cfg.arm} goes by no given time")

        def fresh(step: int) -> Tensor:
            return noise_for(cfg.seed, images, shape, step).to(self.device)

        with torch.no_grad(), autocast(self.device, self.bf16), rounded_once(self.model, self.bf16):
            times = schedule(cfg.steps, cfg.shift)
            velocity = guided(self.model, self.encode(prompts), self.null_features(), cfg.guidance, clock, times)
            return SAMPLERS[cfg.sampler](velocity, x, times, noise=fresh, callback=callback)


def autocast(device: torch.device, bf16: bool) -> torch.autocast | nullcontext[None]:
    """Products in bfloat16, or everything as it is."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def rounded_once(model: nn.Module, bf16: bool) -> Iterator[None]:
    """Weights of products are bfloat16 while the context lasts: what autocast makes of them anew at every step.

    Sharded weights stay as they are: they are gathered in bfloat16.
    """
    if not bf16:
        yield
        return
    with _ROUNDING:  # calls in several threads share the weights: the first rounds, the last puts back
        users, exact = _ROUNDED.get(model, (0, []))
        if not users:
            linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
            exact = [(p, p.data) for m in linears for p in m.parameters() if not isinstance(p.data, DTensor)]
            for p, x in exact:
                p.data = x.bfloat16()
        _ROUNDED[model] = users + 1, exact
    try:
        yield
    finally:
        with _ROUNDING:
            users, exact = _ROUNDED.pop(model)
            if users > 1:
                _ROUNDED[model] = users - 1, exact
            else:
                for p, x in exact:
                    p.data = x


def compile_network(model: Backbone) -> None:
    """Compile a network to sample from, anew for every size of picture and, on a CPU, of text.

    On a CPU one graph of the whole network and one of its text: what lies between the blocks costs as much as they do.
    On a GPU all blocks share one small graph, and a sampler records them together as a CUDA graph.
    """
    allow_graphs()
    if model.proj_out.weight.device.type == "cuda":
        for block in model.blocks:
            block.compile(dynamic=False)
        model.recorded = True
        return
    model.compile(dynamic=False)
    model.__dict__["prepare_text"] = torch.compile(model.prepare_text, dynamic=False)


def allow_graphs() -> None:
    """Let torch keep a graph for each length that texts are padded to, which are more than its eight."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)


def read_run_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint; ValueError where it has none."""
    config = read_state(folder).get("config")
    if not isinstance(config, dict) or not {"model", "text", "codec", "image_size"} <= config.keys():
        raise ValueError(f"{folder} was not written by semroute train: its state.json has no configuration")
    return config


def check_encoder(shape: TextShape, cfg: DiTConfig) -> None:
    """ValueError where a text encoder is not like the one that the transformer was made for."""
    gives, reads = {"layers": len(shape.layers)}, {"layers": cfg.text_layers}
    if cfg.strategy.reads_keys:
        gives |= {"key heads": shape.kv_heads, "head width": shape.head_dim}
        reads |= {"key heads": cfg.kv_heads, "head width": cfg.head_dim}
    else:
        gives |= {"width": shape.width}
        reads |= {"width": cfg.text_width}
    if gives != reads:
        ours, theirs = (", ".join(f"{name} {size}" for name, size in sizes.items()) for sizes in (gives, reads))
        raise ValueError(
            f"the text encoder gives {ours}, but this transformer reads {theirs}: use the encoder it was trained with"
        )


def check_channels(codec: Codec, cfg: DiTConfig) -> None:
    """ValueError where a codec's latents are not what the transformer draws."""
    if codec.channels != cfg.channels:
        source = "the VAE's latents have" if codec.has_posterior else "pixels have"
        raise ValueError(f"{source} {codec.channels} channels, but this transformer draws {cfg.channels}")


def latent_shape(codec: Codec, cfg: DiTConfig, height: int, width: int) -> tuple[int, int, int]:
    """Shape (channels, h, w) of the latents of an image in pixels; ValueError where patches do not divide it."""
    side = codec.factor * cfg.patch
    if any(not isinstance(pixels, int) or pixels < 1 or pixels % side for pixels in (height, width)):
        raise ValueError(
            f"an image of {height!r} x {width!r} pixels does not divide into this transformer's patches of "
            f"{side} x {side} pixels; use multiples of {side}"
        )
    return codec.latent_shape(height, width)


def load_model(folder: Path, *, averaged: bool = True) -> Backbone:
    """The network of a checkpoint alone, on the CPU."""
    with torch.device("meta"):
        model = make_model(from_dict(DiTConfig, read_run_config(folder)["model"], "model."))
    load_weights(folder / (EMA if averaged else MODEL), model)
    return model


def load_bundle(path: Path, device: torch.device, *, averaged: bool = True, compiled: bool = False) -> Bundle:
    """The model of a run's folder (its latest checkpoint) or of one checkpoint, with encoder and codec.

    ``averaged`` takes the moving average of the weights, which is what samples best; ``compiled`` compiles the
    network. ValueError if there is no checkpoint, it is damaged, or it does not fit its own configuration, text encoder
    or codec.
    """
    folder = find_checkpoint(path)
    config = read_run_config(folder)
    size = config["image_size"]
    model = load_model(folder, averaged=averaged)
    begun = read_state(folder).get(KEY, {}).get(FOLDER)  # relative paths are meant from there
    text = located_model(from_dict(TextEncoderConfig, config["text"], "text."), begun)
    encoder = open_encoder(text, folder.parent.parent, device)
    codec = make_codec(located_model(from_dict(CodecConfig, config["codec"], "codec."), begun), device)
    check_encoder(encoder.shape, model.cfg)
    check_channels(codec, model.cfg)
    latent_shape(codec, model.cfg, size, size)
    model.eval().requires_grad_(False).to(device)
    if compiled:
        compile_network(model)
    return Bundle(
        model=model,
        encoder=encoder,
        codec=codec,
        image_size=size,
        null_prompt=config.get("null_prompt", ""),
        bf16=use_bfloat16(config.get("precision", "auto"), device),
        checkpoint=folder,
        config=config,
    )


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SampleConfig):
    """Sample images from a trained run."""

    model: Annotated[Path, tyro.conf.Positional]
    """A run's folder, one of its checkpoints, or a pipeline of semroute export."""
    out: Path
    """Folder to write PNG files to; whole images already there are kept."""
    prompt: tuple[str, ...] = ()
    """Prompts."""
    prompts: Path | None = None
    """File of prompts: one a line, or .jsonl or .csv with a column prompt, text or caption."""
    images_per_prompt: int = 1
    """Images for each prompt, each from its own noise."""
    negative_prompt: str | None = None
    """What guidance moves away from, instead of the model's null prompt."""
    height: int | None = None
    """Height of the images in pixels, if not the model's own."""
    width: int | None = None
    """Width of the images in pixels, if not the model's own."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or another that torch knows."""

    def arranged(self, bundle: Bundle) -> Bundle:
        """Set the model to the size and the negative prompt asked for; ValueError for a size that patches cannot."""
        size = (self.height or bundle.image_size, self.width or bundle.image_size)
        for name in ("height", "width"):
            if (pixels := getattr(self, name)) is not None and pixels < 1:
                raise ValueError(f"{name} is {pixels}; it must be at least 1")
        latent_shape(bundle.codec, bundle.model.cfg, *size)
        null = bundle.null_prompt if self.negative_prompt is None else self.negative_prompt
        return replace(bundle, size=size, null_prompt=null)


def sample_to_folder(args: SampleArguments, open_model: Callable[..., Bundle] = load_bundle) -> Path:
    """Write ``PPPPP_II.png`` for prompt P and image I, ``prompts.jsonl`` and ``manifest.json``; returns the folder.

    Images that are there already are kept, provided that the folder's manifest asks for the same ones. Under
    torchrun each process samples its share.
    """
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts is not None else [])]
    if not prompts:
        raise ValueError('nothing to sample: give --prompt "a red circle" or --prompts FILE')
    if args.images_per_prompt < 1:
        raise ValueError(f"images_per_prompt is {args.images_per_prompt}; it must be at least 1")
    keep_freed_memory()
    bundle = args.arranged(open_model(args.model, pick_device(args.device), compiled=args.compile))
    names = [(p, i) for p in range(len(prompts)) for i in range(args.images_per_prompt)]
    paths = {name: args.out / f"{name[0]:05d}_{name[1]:02d}.png" for name in names}
    with processes() as job, claimed_by_first(args.out, job):
        identity = request(bundle, prompts, args) if job.first else {}  # large weights take a while to hash
        claim_folder(args.out, identity, job, checkpoint=str(bundle.checkpoint))
        sample_missing(bundle, prompts, paths, args, job)
        if job.first:
            rows = [{"file": paths[name].name, "prompt": prompts[name[0]], "image": name[1]} for name in names]
            write_text(args.out / PROMPTS, "".join(json.dumps(row) + "\n" for row in rows))
    return args.out


def claimed_by_first(out: Path, job: Processes) -> AbstractContextManager[None]:
    """Keep other commands out of a folder; the first process of the job does so for all."""
    return claimed(out / LOCK, out) if job.first else nullcontext()


def request(bundle: Bundle, prompts: Sequence[str], cfg: SampleConfig) -> dict[str, Any]:
    """All that decides a folder's images. The batch size decides nothing."""
    return {
        "weights_sha256": weights_sha256(bundle.model),
        "null_prompt": bundle.null_prompt,
        "resolution": bundle.pixels[0] if len(set(bundle.pixels)) == 1 else [*bundle.pixels],
        "sampler": {f.name: getattr(cfg, f.name) for f in fields(SampleConfig) if f.name != "batch"},
        "prompts": {"n": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()},
    }


def weights_sha256(model: Backbone) -> str:
    """SHA-256 of a model's weights, equal to that of the safetensors file which holds just them.

    The file is not made: its header is written here, and tensors follow one at a time, widest types first.
    """
    state = sorted(model.state_dict().items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, x in state:
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": SAFETENSORS[x.dtype], "shape": [*x.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for _, x in state:
        digest.update(x.detach().contiguous().flatten().view(torch.uint8).numpy(force=True))
    return digest.hexdigest()


def claim_folder(out: Path, identity: dict[str, Any], job: Processes = ALONE, **facts: Any) -> None:
    """Write the manifest of the images to come; ValueError if the folder holds those of another request."""
    if job.first:
        _claim(out, identity, facts)
    job.wait()


def _claim(out: Path, identity: dict[str, Any], facts: dict[str, Any]) -> None:
    path = out / "manifest.json"
    found: dict[str, Any] = {}
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged; delete {out} or choose another --out") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} is no manifest of images; choose another --out")
    if isinstance(found.get("sampler"), dict) and found["sampler"].get("sampler") == RENOISE_ONCE:
        found["sampler"]["sampler"] = "renoise"
    other = [name for name, value in identity.items() if found.get(name) != value]
    if other and (found or any(out.rglob("*.png")) or (out / PROMPTS).exists()):
        what = ", ".join(f"{name} {found.get(name)} instead of {identity[name]}" for name in other)
        raise ValueError(f"{out} holds other images ({what}); choose another --out or delete it")
    write_text(path, json.dumps(manifest(**identity, **facts), indent=2) + "\n")


def sample_missing(
    bundle: Bundle,
    prompts: Sequence[str],
    paths: dict[tuple[int, int], Path],
    cfg: SampleConfig,
    job: Processes = ALONE,
) -> None:
    """Sample the images (prompt index, image index) whose files are not there, or not whole, a batch at a time.

    Each process of the job samples its share, and returns when all are done.
    """
    share = job.share(list(paths))
    missing = [name for name in share if not is_whole(paths[name], bundle.pixels)]
    desc = "Sampling" if job.count == 1 else f"Sampling, 1 of {job.count} processes"
    done = len(share) - len(missing)
    with tqdm(total=len(share), initial=done, desc=desc, unit="image", disable=not job.first) as bar:
        for first in range(0, len(missing), cfg.batch):
            names = missing[first : first + cfg.batch]
            images = bundle.sample([prompts[p] for p, _ in names], names, cfg).numpy(force=True)
            for name, image in zip(names, images, strict=True):
                save_png(paths[name], image)
                bar.update()
    job.wait()
