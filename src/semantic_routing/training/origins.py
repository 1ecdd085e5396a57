"""What a run was begun on, so that it is known again when the run goes on: its data, language model and codec.

A run's order and its features follow from these, and none of them is in its folder. So every checkpoint remembers
how many records there were, what some of them were, and the same of the frozen models' weights; not where they lay,
nor when they were written: data that only moved are the same data. It remembers the folder, too, in which the run was
started: relative paths are taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
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
"""Records of a source, and numbers of a weight, that are looked at."""
PROBE = "A red circle, 3 green stars & one naïve café-window: 日本語 🎨."
"""What tells tokenizers apart."""


def data_origins(data: Dataset) -> list[dict[str, Any]]:
    """What identifies each source of records: its path, how many there are, and digests of what some of them hold."""
    return [
        {"path": source.name, "records": len(source), **_digests(source, stream.how.sidecar)}
        for stream in data.streams
        if isinstance(stream, RecordStream)
        for source in stream.sources
    ]


def _digests(source: RecordSource, sidecar: Sidecar | None) -> dict[str, str]:
    """Digests of the pictures and of the captions of records that are evenly spread."""
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
    """Digests of the frozen models; of weights before they are spread over processes."""
    found = {"text encoder": f"{_weights(encoder.model)}-{_tokens(encoder.tokenizer)}"}
    vae = getattr(codec, "vae", None)
    return found if vae is None else found | {"VAE": _weights(vae)}


def _weights(model: nn.Module) -> str:
    """A digest of some numbers of every weight, equal for whatever type and device the weights are loaded as."""
    digest = blake2b(digest_size=16)
    for name, x in sorted(model.state_dict().items()):
        digest.update(repr((name, tuple(x.shape))).encode())
        if isinstance(x, torch.Tensor) and not x.is_meta and x.numel():
            chosen = x.detach().flatten()[torch.tensor(spread(x.numel(), SAMPLED), device=x.device)]
            digest.update(chosen.to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _tokens(tokenizer: Any) -> str:
    """A digest of what a tokenizer makes of a text."""
    ids = tokenizer(PROBE)["input_ids"]
    return blake2b(repr((len(tokenizer), list(ids))).encode(), digest_size=16).hexdigest()


def spread(count: int, most: int) -> Sequence[int]:
    """At most ``most`` numbers of 0..count - 1, evenly spread, the first and the last among them."""
    return range(count) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is no longer what it was, in words; what an earlier version did not note is taken to be as it was."""
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
    return found + [f"the {what} is another" for what in ("text encoder", "VAE") if what in then
                    and then[what] != now.get(what)]  # fmt: skip
