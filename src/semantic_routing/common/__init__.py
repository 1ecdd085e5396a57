"""Helpers for every package; they know nothing of models."""
