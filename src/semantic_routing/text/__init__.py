"""Prompts in, TextFeatures out."""
