"""What a test may need of the machine, with the reason that is printed where it is missing."""

import importlib.util

import pytest

__all__ = ["needs_nvrtc"]

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cupy_backends") is None, reason="needs cupy, which brings the binding of NVRTC"
)
