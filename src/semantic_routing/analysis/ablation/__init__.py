"""Ablations of routing: what a model loses without a layer, with only one layer, or with two blocks swapped."""
