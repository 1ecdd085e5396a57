"""Ablations of routing: what a model loses without a layer in a block, with one layer alone, with blocks swapped."""
