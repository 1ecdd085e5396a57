"""Other conventions: the reference's weights, diffusers."""
