"""cuplama: a torch-free runtime for Llama-family language models.

import cuplama
model = cuplama.load()
print(model.generate("Once upon a time", seed=1).text)
"""

from .completion import Completion, Delta
from .errors import CuplamaError
from .load import load
from .model import Model
from .sampling_params import SamplingParams

__all__ = ["Completion", "CuplamaError", "Delta", "Model", "SamplingParams", "load"]
__version__ = "0.1.0"
