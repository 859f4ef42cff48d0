"""Sequences of token ids in, drawn tokens out. docs/batching.md is a guide; ``engine.py`` is where to begin."""
