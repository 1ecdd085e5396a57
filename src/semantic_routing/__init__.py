"""Semantic Routing: condition text-to-image diffusion transformers on all layers of a language model."""

__version__ = "0.1.0"
