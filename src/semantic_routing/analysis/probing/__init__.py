"""``semroute probe``: the knowledge of each layer of a language model, and the loss of an average of its layers."""
