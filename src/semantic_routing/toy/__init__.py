"""A world in which everything is known: scenes of shapes, their captions and their exact checker."""
