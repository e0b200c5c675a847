"""Half-precision weights and CUDA graphs; off by default, until a GPU has measured them."""
