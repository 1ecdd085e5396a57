"""A tiny Qwen3 and its tokenizer, trained here on captions by next-token prediction.

It replaces a pretrained language model where no weights can be downloaded. ``save_pretrained`` writes it into a cache
folder, and ``TextEncoder.from_pretrained(folder)`` loads it like any other.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from semantic_routing.common.device import cache_folder, has_bfloat16
from semantic_routing.common.files import as_umask_says
from semantic_routing.data.dataset import Dataset
from semantic_routing.text.quiet import quiet_transformers
from semantic_routing.toy.stories import story
from semantic_routing.toy.worlds import SHAPES, WORDS, WORLDS
from semantic_routing.training.optim import OptimConfig, make_optimizers, set_rates

RECIPE = 1  # part of the cache key: raise it when anything below changes the trained weights
BATCH = 128  # captions per step
# Muon keeps the states of different words apart; with AdamW one direction dominates them.
OPTIM = OptimConfig(name="muon", lr=3e-3, muon_lr=0.02, betas=(0.9, 0.95), weight_decay=0.01, warmup=10, decay="cosine")
EMBEDDING_STD = 1.0
VOCABULARY = 4096  # upper limit; a small corpus of templated captions needs a few hundred
CONTEXT = 512  # longest caption in tokens
HELD_OUT = 20  # every 20th distinct caption is kept for the report, never trained on
CORPUS_SEED = 1  # seed of the stories; one model then serves every run
SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = range(3)


def tiny_lm(
    captions: Iterable[str],
    *,
    seed: int = 0,
    layers: int = 8,
    width: int = 128,
    steps: int = 200,
    cache_dir: Path | str | None = None,
) -> Path:
    """Train a language model on ``captions`` and return its folder; a second call with the same arguments reuses it.

    The folder is in ``cache_dir`` (default: ``device.cache_folder``), named by a hash of arguments and captions. It
    holds the model, the tokenizer and ``training.json`` with the held-out loss. The same arguments give the same
    weights. Raises ValueError for sizes out of range, fewer than two distinct captions, or an unwritable cache.
    """
    corpus = list(dict.fromkeys(captions))
    if len(corpus) < 2:
        raise ValueError(f"a language model needs at least two distinct captions to train on, got {len(corpus)}")
    if steps < 1 or layers < 1 or width < 64 or width % 32:
        raise ValueError(
            f"got {layers} layers, width {width}, {steps} steps; expected at least 1 layer, 1 step, "
            "and a width that is a multiple of 32 from 64 on"
        )
    options = {"recipe": RECIPE, "seed": seed, "layers": layers, "width": width, "steps": steps}
    digest = hashlib.sha256(json.dumps([options, corpus]).encode()).hexdigest()[:16]
    folder = Path(cache_dir or cache_folder()).expanduser() / f"tiny-lm-{digest}"
    if not folder.is_dir():
        with _scratch(folder) as written:
            tokenizer = _train_tokenizer(corpus)
            model, report = _train(corpus, tokenizer, seed, layers, width, steps)
            with quiet_transformers():
                model.save_pretrained(written)
            tokenizer.save_pretrained(written)
            (written / "training.json").write_text(json.dumps(options | report, indent=2) + "\n", encoding="utf-8")
    return folder


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, then rename it to ``folder``; raise ValueError if there is no place to write it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ValueError(f"cannot write the cache {folder.parent} ({error.strerror}); set SEMROUTE_CACHE") from error
    with scratch as temporary:
        written = Path(temporary) / "model"
        yield written
        as_umask_says(written, written.iterdir())
        if not folder.is_dir():  # another process may have been faster, with the same result
            written.rename(folder)


def training_corpus(data: Dataset, size: int = 20_000) -> list[str]:
    """Return the texts on which a run's language model is trained: stories of the toy world, and the run's captions.

    The captions of generated worlds are those of training, without held-out words.
    """
    toy = [story(CORPUS_SEED, index) for index in range(size)]
    if data.cfg.paths == (SHAPES,):
        return toy
    if data.cfg.paths == (WORDS,):
        return toy + [WORLDS[WORDS].sample(CORPUS_SEED, index).caption for index in range(size)]
    return toy + data.captions(size, trained=True)


def _train_tokenizer(corpus: list[str]) -> Any:
    """Train a byte-level BPE in lower case: frequent words become one token each, and no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=CONTEXT
    )


def _train(
    corpus: list[str], tokenizer: Any, seed: int, layers: int, width: int, steps: int
) -> tuple[Any, dict[str, Any]]:
    """Train from scratch; return the model and its report."""
    rows = [[*ids, EOS] for ids in tokenizer(corpus, truncation=True, max_length=CONTEXT - 1)["input_ids"]]
    held_out = rows[::HELD_OUT]
    trained = [row for i, row in enumerate(rows) if i % HELD_OUT]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(len(tokenizer), layers, width)
    optimizers = make_optimizers(model, OPTIM, blocks="model.layers.")
    batches = _batches(trained, seed)
    with tqdm(total=steps, desc="Training the tiny language model", unit="step") as bar:
        for step in range(steps):
            set_rates(optimizers, OPTIM, step, step / steps)
            loss = _loss(model, next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    model.eval()
    with torch.no_grad():
        losses = [_loss(model, _pad(held_out[i : i + BATCH])) for i in range(0, len(held_out), BATCH)]
    report = {"captions": len(corpus), "vocabulary": len(tokenizer), "train_loss": loss.item()}
    return model, report | {"held_out_loss": torch.stack(losses).mean().item()}


def _model(vocabulary: int, layers: int, width: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config._attn_implementation = "eager"  # SDPA's backward is slower on a CPU at these sizes
    model = Qwen3ForCausalLM(config)
    # Far apart from the start: otherwise words with the same use ("circle", "square") would stay similar.
    nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    return model


def _batches(rows: list[list[int]], seed: int) -> Iterator[Int[Tensor, "B N"]]:
    """Yield batches endlessly in random order, each of captions of similar length, to have little padding."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        order.sort(key=lambda i: len(rows[i]))  # stable: random among captions of one length
        starts = range(0, len(order), BATCH)
        for k in torch.randperm(len(starts), generator=generator).tolist():
            yield _pad([rows[i] for i in order[starts[k] : starts[k] + BATCH]])


def _pad(rows: list[list[int]]) -> Int[Tensor, "B N"]:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def _loss(model: nn.Module, ids: Int[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the next token in nats. Causal attention never sees the right padding."""
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(torch.device("cpu"))):
        logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=PAD)
