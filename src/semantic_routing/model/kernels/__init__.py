"""What the program exists for, at the speed of memory: the fused normalise-and-mix."""
