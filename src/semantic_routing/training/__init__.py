"""Training: recipes, the training step, the loop, and parallelism applied from outside."""
