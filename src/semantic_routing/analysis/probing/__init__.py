"""``semroute probe``: what each layer of a language model knows, and what an average of its layers loses."""
