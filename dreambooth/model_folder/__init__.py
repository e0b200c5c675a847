"""Finds, checks, reads, writes, packs and describes model folders on the disk."""
