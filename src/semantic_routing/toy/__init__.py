"""The toy world: scenes of shapes with captions and an exact checker."""
