"""Quantising a model folder into another one: calibration, matrix by matrix, and the files that come out."""

__all__ = ["METHODS"]

METHODS = ("rtn", "gptq")
"""How numbers become codes: each to the nearest, or by GPTQ."""
