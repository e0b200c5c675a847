"""Fine-tune Stable Diffusion on a few pictures of one subject (DreamBooth), and serve the result.

Importing this package imports nothing heavy: torch, diffusers and Pillow are loaded by the modules
that use them.
"""

__version__ = "0.1.0"
