"""Reads and writes weights, including those of other programs."""
