"""Conventions of other programs: the reference's weights, diffusers."""
