"""Measures a language model layer by layer: linear prediction, geometry, and linear probes of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from semantic_routing.analysis.probing.classify import cross_validate
from semantic_routing.analysis.probing.linear import fold_prompts, predict_layers
from semantic_routing.analysis.probing.report import Norms, Probe, Reading
from semantic_routing.analysis.probing.states import TokenStates, states_at, token_states
from semantic_routing.analysis.probing.tasks import Task
from semantic_routing.text.encoder import TextEncoder


@torch.no_grad()
def probe_encoder(
    encoder: TextEncoder, prompts: Sequence[str], *, source: str, tokens: int, tasks: Sequence[Task] = (), seed: int = 0
) -> Probe:
    """Measure every layer of ``encoder`` on at most ``tokens`` tokens of the prompts, and on the tasks.

    ``source`` is a name for the prompts. Raises ValueError for an encoder of fewer than two layers or too few prompts.
    """
    if encoder.num_layers < 2:
        raise ValueError("a probe compares layers: choose at least 2, such as --layers all")
    states = token_states(encoder, prompts, most=tokens)
    inner = states.without_first()
    return Probe(
        encoder=encoder.config.name_or_path,
        prompts=source,
        layers=encoder.shape.layers,
        width=encoder.width,
        tokens=len(states.prompt),
        inner=predict_layers(inner.hidden, fold_prompts(inner.prompt, seed)),
        every=predict_layers(states.hidden, fold_prompts(states.prompt, seed), only=(-1, -3)),
        norms=_norms(states),
        readings=[reading for task in tqdm(tasks, desc="Linear probes") for reading in _read(encoder, task, seed)],
    )


def _norms(states: TokenStates) -> Norms:
    at = states.peak.argmax(1)
    channel = states.channel.gather(1, at[:, None])[:, 0]
    massive = states.peak.amax(1) / states.median
    first, others = (states.norm[:, where].mean(1) for where in (states.first, ~states.first))
    return Norms(
        first=first.numpy(force=True), others=others.numpy(force=True), massive=massive.numpy(force=True),
        channel=tuple(channel.tolist()),
    )  # fmt: skip


def _read(encoder: TextEncoder, task: Task, seed: int) -> list[Reading]:
    """Fit the probes of a task at each of its positions, for every layer and the average."""
    tokens = np.array(
        [[encoder.position(prompt, ends[i]) for ends in task.ends.values()] for i, prompt in enumerate(task.prompts)]
    )
    classes = sorted(set(task.answers))
    answers = np.array([classes.index(answer) for answer in task.answers])
    allowed = np.ones((len(answers), len(classes)), bool)
    if task.choices:
        allowed = np.array([[name in choice for name in classes] for choice in task.choices])
    states = states_at(encoder, task.prompts, tokens)
    found = []
    for place, hidden in zip(task.ends, states.unbind(2), strict=True):
        with one_thread_each() as pool:
            each = list(pool.map(lambda x: cross_validate(x, answers, allowed, seed), [*hidden, hidden.mean(0)]))
        accuracy, error = np.array([a.mean for a in each]), np.array([a.error for a in each])
        found.append(Reading(task.name, place, task.chance, len(answers), accuracy, error))
    return found


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of as many threads as torch uses; each computes alone, which is faster for small matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
