"""``semroute data encode``: the hidden states of a run's captions, computed before training and cached on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from semantic_routing.checkpoint.load import find_checkpoint, read_state
from semantic_routing.common.config import from_dict, read_config
from semantic_routing.common.device import pick_device
from semantic_routing.common.distributed import World
from semantic_routing.common.errors import BadData
from semantic_routing.data.captions import CaptionChoice
from semantic_routing.data.dataset import Dataset, open_data
from semantic_routing.data.sidecar import RECAPTION
from semantic_routing.data.streams import RecordStream, WorldStream
from semantic_routing.model.arms import parse_arm
from semantic_routing.sampling.load import locate_encoder, read_run_config
from semantic_routing.sampling.located import FOLDER, KEY
from semantic_routing.text.config import tiny_sizes
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.encode_arguments import EncodeArguments, check_room
from semantic_routing.training.parallelize import place_encoder
from semantic_routing.training.recipes import RECIPES
from semantic_routing.training.run_folder import located_run, run_of
from semantic_routing.training.tiny_lm import tiny_lm, training_corpus
from semantic_routing.training.validation import held_out

MEASURED = 1000
"""Captions whose mean length predicts the size."""


def encode_text(args: EncodeArguments) -> str:
    """Encode the captions that are not in the folder yet; returns a summary."""
    cfg = configuration(args)
    if not cfg.text.keep_on_disk:
        raise ValueError("the run caches no states on disk: give --keep-on-disk, and train with --text.keep-on-disk")
    if cfg.parallel.text_encoder == "sharded":
        raise ValueError("a sharded text encoder caches no states: train with another parallel.text_encoder")
    data = open_data(cfg.data, image_size=cfg.image_size, seed=cfg.seed)
    found = distinct_captions(data, cfg)
    encoder, with_kv = _encoder(cfg, data), cfg.model.strategy.reads_keys
    sample = found[:: max(1, len(found) // MEASURED)]
    size = encoder.state_bytes(sample, with_kv=with_kv) * len(found)
    summary = f"{len(found):,} captions, about {size / 2**30:.2f} GiB of states in {cfg.text.keep_on_disk}"
    if args.size_only:
        return summary
    check_room(size, cfg.text.keep_on_disk_bytes, summary)
    tqdm.write(summary)
    with tqdm(total=len(found), desc="Encoding captions", unit="caption") as bar:
        for start in range(0, len(found), args.batch):
            part = found[start : start + args.batch]
            encoder.encode(part, with_kv=with_kv, strict=False)
            if encoder.disk_is_full:
                raise ValueError(
                    f"{cfg.text.keep_on_disk} takes no more than the states of about {start:,} captions: make room or "
                    "raise --keep-on-disk-bytes, and repeat the command"
                )
            bar.update(len(part))
    return f"{len(found):,} captions encoded into {cfg.text.keep_on_disk}"


def _encoder(cfg: TrainConfig, data: Dataset) -> TextEncoder:
    """Load the text encoder as a run does."""
    text = cfg.text
    if (sizes := tiny_sizes(text.name_or_path)) is not None:
        text = replace(text, name_or_path=str(tiny_lm(training_corpus(data), **sizes)))
    encoder = TextEncoder.from_pretrained(text)
    return place_encoder(encoder, cfg.parallel, World(device=pick_device(cfg.device)), compiled=cfg.compile)


def configuration(args: EncodeArguments) -> TrainConfig:
    """Return the run's configuration, with its models where they are now and the folder of the arguments."""
    if args.run in RECIPES:
        cfg = RECIPES[args.run](parse_arm(args.arm))
    elif (path := Path(args.run)).is_file():
        cfg = read_config(TrainConfig, path)
    else:
        run = run_of(path)
        folder = find_checkpoint(run)
        begun = read_state(folder).get(KEY, {}).get(FOLDER)
        cfg = located_run(from_dict(TrainConfig, read_run_config(folder)), begun)
        cfg = replace(cfg, text=locate_encoder(cfg.text, run))
    cfg = replace(cfg, steps=args.steps or cfg.steps, device=args.device or cfg.device)
    given = {"keep_on_disk": args.keep_on_disk, "keep_on_disk_bytes": args.keep_on_disk_bytes}
    named: dict[str, Any] = {name: value for name, value in given.items() if value}
    if args.latents:
        return cfg if cfg.codec.kind == "pixels" else replace(cfg, codec=replace(cfg.codec, **named))
    return replace(cfg, text=replace(cfg.text, name_or_path=args.text or cfg.text.name_or_path, **named))


def distinct_captions(data: Dataset, cfg: TrainConfig) -> list[str]:
    """Return every caption that a run may read, each once: of training, validation and previews, and the null prompt.

    For the generated worlds, which are unlimited, these are the captions of the run's steps.
    """
    found = dict.fromkeys([cfg.null_prompt])
    if cfg.preview_every:
        found |= dict.fromkeys(data.captions(cfg.preview.batch))
    if cfg.validation.every:
        pictures = held_out(cfg.validation, cfg.data, cfg.image_size)
        found |= dict.fromkeys(pictures(i).caption for i in range(cfg.validation.samples))
    with tqdm(desc="Listing captions", unit="sample") as bar:
        for stream in data.streams:
            texts: Iterator[str]
            if isinstance(stream, WorldStream):
                texts = stream.texts(cfg.steps * cfg.batch)
            else:
                assert isinstance(stream, RecordStream)
                texts = _record_captions(stream)
            for caption in texts:
                found[caption] = None
                bar.update()
    return list(found)


def _record_captions(stream: RecordStream) -> Iterator[str]:
    """Yield all captions of a stream's records that training may choose."""
    sidecar = stream.how.sidecar
    for source in stream.sources:
        for index in range(len(source)):
            try:
                record = source.read(index)
            except BadData:
                continue
            captions = dict(record.captions)
            if sidecar is not None and (more := sidecar.captions(record.key, source.name)):
                captions[RECAPTION] = more
            yield from (text.strip() for key in _keys(stream.how.choice, captions) for text in captions[key])


def _keys(choice: CaptionChoice, captions: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the keys of a record that captions are chosen from."""
    if choice.weights:
        return [key for key in choice.weights if captions.get(key)]
    return [key for key in choice.usual if captions.get(key)][:1]
