"""Recipes, the step, the loop, parallelism from outside."""
