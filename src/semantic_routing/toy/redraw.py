"""Further images for a caption: other scenes in which its claims hold."""

from __future__ import annotations

from dataclasses import replace

from semantic_routing.toy.captions import Sample
from semantic_routing.toy.scenes import BACKGROUNDS, COLORS, Dice, Scene, scatter

TRIES = 64
"""Layouts that are tried before the sample's own is kept."""


def redrawn(sample: Sample, dice: Dice) -> Sample:
    """Draw another scene of a sample's caption.

    The objects stay, with their shapes and sizes. Places, colours and the background change at random where the
    claims leave them open.
    """
    scene = replace(sample.scene, background=dice.pick(tuple(BACKGROUNDS)))
    scene = scene if _true(sample, scene) else sample.scene
    for i, thing in enumerate(scene.objects):
        painted = replace(thing, color=dice.pick(tuple(COLORS)))
        other = replace(scene, objects=(*scene.objects[:i], painted, *scene.objects[i + 1 :]))
        scene = other if _true(sample, other) else scene
    for _ in range(TRIES):
        moved = replace(scene, objects=scatter(scene.objects, dice))
        if _true(sample, moved):
            return replace(sample, scene=moved)
    return replace(sample, scene=scene)


def _true(sample: Sample, scene: Scene) -> bool:
    """Return whether all claims of a sample hold in a scene."""
    return all(claim.fault(scene.objects, scene.background) is None for claim in sample.claims)
