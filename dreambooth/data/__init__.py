"""The training folder: reading it, its pictures, class images, pairs and what is cached of them."""
