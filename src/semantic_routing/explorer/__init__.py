"""A page in the browser on which a model is tried out: pictures, routing weights, and edits of them."""
