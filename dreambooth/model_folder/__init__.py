"""A model on the disk: found, checked, read, written, packed and described."""
