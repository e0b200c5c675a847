"""Half-precision weights and CUDA graphs; off by default until they are measured on a GPU."""
