"""cuplama: a torch-free runtime for Llama-family language models.

import cuplama
model = cuplama.load()
print(model.generate("Once upon a time", seed=1).text)
"""

from .errors import CuplamaError
from .model import Completion, Model, Piece, load
from .sampling import SamplingParams

__all__ = ["Completion", "CuplamaError", "Model", "Piece", "SamplingParams", "load"]
__version__ = "0.1.0"
