"""Noise to pictures: samplers, guidance, TextToImage."""
