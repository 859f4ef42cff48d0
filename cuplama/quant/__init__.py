"""Weights as they are stored: their formats, one file each, and the value that names a checkpoint's tensors."""
