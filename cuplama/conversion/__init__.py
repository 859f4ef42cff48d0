"""Quantising a model folder into another one: calibration, matrix by matrix, and the files that come out."""
