"""Fused kernels of the method's core operation: normalise every layer's hidden states and mix them."""
