"""The public address of ``Tokenizer``, wherever it lives inside the package."""

from .text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
