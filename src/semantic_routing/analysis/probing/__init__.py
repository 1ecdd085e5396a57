"""``semroute probe``: what each layer of a language model encodes, and what an average of its layers loses."""
