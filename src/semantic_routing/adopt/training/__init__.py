"""Training of an adopted pipeline's routing, and of a LoRA on its text projections, from images with captions."""
