"""The training data: the folder, its pictures, class images, samples and cached latents."""
