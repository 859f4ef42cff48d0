"""What the emulator raises when a kernel does something wrong."""

from __future__ import annotations

__all__ = ["KernelFault"]


class KernelFault(Exception):  # noqa: N818 - it is the kernel's fault that is reported
    """A fault of a kernel. The first line names its kind, the kernel, block, thread and source line."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
