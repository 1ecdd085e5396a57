"""The plan of a training run before it is started: memory, time, bottleneck and failures, from counts."""
