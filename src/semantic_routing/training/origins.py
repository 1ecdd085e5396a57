"""Digests of a run's data, language model and codec, to recognise them when the run is resumed.

These are not in the run's folder. So every checkpoint records the number of data records, digests of some of them, and
digests of some of the frozen models' weights. Paths and dates of files are not compared, so data may be moved.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semantic_routing.common.errors import BadData
from semantic_routing.data.dataset import Dataset
from semantic_routing.data.sidecar import Sidecar
from semantic_routing.data.sources.records import RecordSource
from semantic_routing.data.streams import RecordStream
from semantic_routing.model.codec import Codec
from semantic_routing.text.encoder import TextEncoder

SAMPLED = 64
"""Number of records per source, and of values per weight, that are hashed."""
TEXT = "text encoder"
"""Key of the text encoder's digest, and its name in messages."""
PROBE = "A red circle, 3 green stars & one naïve café-window: 日本語 🎨."
"""Text that differs between tokenizers."""


def data_origins(data: Dataset) -> list[dict[str, Any]]:
    """Return each source's path, number of records, and digests of some of them."""
    return [
        {"path": source.name, "records": len(source), **_digests(source, stream.how.sidecar)}
        for stream in data.streams
        if isinstance(stream, RecordStream)
        for source in stream.sources
    ]


def _digests(source: RecordSource, sidecar: Sidecar | None) -> dict[str, str]:
    """Hash the images and the captions of evenly spaced records."""
    pictures, captions = blake2b(repr(list(source.shards)).encode(), digest_size=16), blake2b(digest_size=16)
    for index in spread(len(source), SAMPLED):
        try:
            record = source.read(index)
        except BadData as error:
            pictures.update(error.reason.encode())
            continue
        pictures.update(record.image)
        more = () if sidecar is None else sidecar.captions(record.key)
        captions.update(repr((sorted(record.captions.items()), more)).encode())
    return {"pictures": pictures.hexdigest(), "captions": captions.hexdigest()}


def model_origins(encoder: TextEncoder, codec: Codec) -> dict[str, str]:
    """Return digests of the frozen models, taken before their weights are sharded."""
    return frozen_origins(encoder.model, encoder.tokenizer, getattr(codec, "vae", None))


def frozen_origins(
    text_encoder: nn.Module, tokenizer: Any, vae: nn.Module | None, **others: nn.Module
) -> dict[str, str]:
    """Return digests of frozen models by their names in messages."""
    found = {TEXT: f"{weights_digest(text_encoder)}-{_tokens(tokenizer)}"}
    models = others if vae is None else {"VAE": vae} | others
    return found | {name: weights_digest(model) for name, model in models.items()}


def weights_digest(model: nn.Module) -> str:
    """Hash some values of every weight, independently of the dtype and device that the weights are loaded in."""
    digest = blake2b(digest_size=16)
    for name, x in sorted(model.state_dict().items()):
        digest.update(repr((name, tuple(x.shape))).encode())
        if isinstance(x, torch.Tensor) and not x.is_meta and x.numel():
            chosen = x.detach().flatten()[torch.tensor(spread(x.numel(), SAMPLED), device=x.device)]
            digest.update(chosen.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _tokens(tokenizer: Any) -> str:
    """Hash a tokenizer's vocabulary size and tokens of a text."""
    ids = tokenizer(PROBE)["input_ids"]
    return blake2b(repr((len(tokenizer), list(ids))).encode(), digest_size=16).hexdigest()


def spread(count: int, most: int) -> Sequence[int]:
    """Return at most ``most`` evenly spaced numbers of 0..count - 1, including the first and the last."""
    return range(count) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]


def accept(run: Path, found: list[str], accepted: bool, again: str) -> list[str]:
    """Return messages about changed data or models; raise ValueError if there are any that the user did not accept.

    ``again`` is the command that resumes the run.
    """
    if found and not accepted:
        raise ValueError(
            f"{run} was started on other data or models: {'; '.join(found)}. Restore them, or resume with the changes: "
            f"{again} {shlex.quote(str(run))} --accept-changes"
        )
    return [f"resuming although {one}" for one in found]


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what changed between two records of origins; facts missing from an older version count as unchanged."""
    found = []
    if "data" in then:
        before, after = then["data"], now["data"]
        if len(before) != len(after):
            found.append(f"there are {len(after)} sources of data instead of {len(before)}")
        for old, new in zip(before, after, strict=False):
            if old["records"] != new["records"]:
                found.append(f"{new['path']} holds {new['records']} records instead of {old['records']}")
            else:
                others = [what for what in ("pictures", "captions") if old[what] != new[what]]
                found += [f"{new['path']} holds other {' and '.join(others)}"] if others else []
    models = (TEXT, "VAE", "transformer", "teacher")
    other = [what for what in models if what in then and then[what] != now.get(what)]
    return found + [f"the {what} is a different one" for what in other]
