"""GenEval: detector, colours, verdicts."""
