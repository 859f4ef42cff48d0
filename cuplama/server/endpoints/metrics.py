"""``/metrics``: what Prometheus reads."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from ..endpoint import Endpoint
from ..metrics import CONTENT_TYPE
from ..service import Service

__all__ = ["ENDPOINTS"]


async def _metrics(service: Service, _: Request) -> Response:
    text = await asyncio.to_thread(service.metrics.exposition)
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


ENDPOINTS = (
    Endpoint(
        "GET",
        "/metrics",
        _metrics,
        "Counters and histograms for Prometheus.",
        response_types=("text/plain",),
        quiet=True,
    ),
)
