"""The training runs of the story model: their settings, and which are trained together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ALL_RUNS", "SEARCH", "STUDENTS", "TEACHERS", "Run"]


@dataclass(frozen=True)
class Run:
    """One training run: architecture, data and optimisation. Sizes in tokens, channels and stories."""

    name: str
    vocab: int = 4096
    hidden: int = 256
    layers: int = 9
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 704
    context: int = 1024
    batch: int = 32768  # tokens per step
    epochs: float = 12.0
    optimizer: str = "muon"
    lr: float = 0.02  # of the matrices under Muon
    adam_lr: float = 0.004  # of embedding and norms; of everything under AdamW
    weight_decay: float = 0.1
    dropout: float = 0.1
    bpe_dropout: float = 0.0  # half of the stories of an epoch are re-encoded with this merge dropout
    extra: bool = True  # the lower-cased corpus with its case restored
    tales: bool = False  # the other corpora
    teachers: tuple[str, ...] = ()
    written: float = 0.0  # share of batches from stories that the teachers wrote
    text_loss: float = 0.15  # weight of the plain loss beside the teachers', on batches of the corpus
    seed: int = 0


_BIG: Mapping[str, Any] = {"hidden": 512, "layers": 6, "kv_heads": 4, "mlp": 1408, "epochs": 16.0}

# What `search` trains, all at once.
SEARCH: tuple[Run, ...] = (
    Run("teacher-512x6", **_BIG, dropout=0.15, weight_decay=0.1),
    Run("teacher-512x6-reg", **_BIG, dropout=0.2, weight_decay=0.3, seed=1),
    Run("teacher-512x6-tales", **_BIG, dropout=0.15, weight_decay=0.2, tales=True, seed=2),
    Run("teacher-512x6-bpedrop", **_BIG, dropout=0.15, weight_decay=0.2, bpe_dropout=0.1, seed=3),
    Run("small-256x9", epochs=6),
    Run("small-256x9-noextra", epochs=6, extra=False),
    Run("small-256x9-adamw", epochs=6, optimizer="adamw", adam_lr=0.003),
    Run("small-256x9-nodrop", epochs=6, dropout=0.0),
    Run("small-256x9-vocab2048", epochs=6, vocab=2048),
    Run("small-384x4", epochs=6, hidden=384, layers=4, heads=6, kv_heads=2, mlp=960),
)
TEACHERS = 3  # the best this many form the ensemble

# What `distill` trains, all at once.
STUDENTS: tuple[Run, ...] = (
    Run("student-256x9", written=0.5, dropout=0.0, weight_decay=0.05, epochs=60),
    Run("student-384x4", written=0.5, dropout=0.0, weight_decay=0.05, epochs=60, hidden=384, layers=4, heads=6,
        kv_heads=2, mlp=960),
)  # fmt: skip

ALL_RUNS = {run.name: run for run in SEARCH + STUDENTS}
