"""Conversion to and from other programs: the reference implementation's weights, and diffusers."""
