"""Where the tests find the checkout and its data."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"  # files that tests read: tokenizers and chats with their golden ids
GOLDEN = ROOT / "tests" / "golden" / "cases"  # tiny models with transformers' float32 results
