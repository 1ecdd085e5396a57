"""Comparing strategies: every arm trained at equal budget, evaluated, and set beside the others."""
