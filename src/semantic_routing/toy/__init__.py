"""The toy world, in which everything is known: scenes of shapes, their captions and an exact checker."""
