"""Latency under load through HTTP: ``python -m benchmarks.serve [--shape SHAPE] [--out FILE]``.

Starts a server with the model as a process of its own (or takes the one at ``--url``), and sends requests like those of
ShareGPT (``benchmarks/serving/lengths.py`` says what they are drawn from) with random tokens as prompts:

1. a run that warms up, and the capacity: as many requests at a time as ``--clients`` says, each client sends the next
   when its last has ended; output tokens and requests per second in the middle of that run;
2. at 25, 50, 75 and 90% of that rate, open loop: requests are due by a Poisson process and are sent then, whatever has
   become of those before. From when one was due: the time to its first token, between tokens, and to its end, at p50,
   p95 and p99.

``--overhead`` instead compares: prompts in one call of ``Model.generate``, in the server's process before it serves,
and as many requests at once through HTTP, streamed and not. ``--prefix`` instead holds conversations of two turns,
alone on the server. ``--plot PICTURE JSON`` draws what was written with ``--out``.

The client is asyncio in this process; a load never has more than 4,000 requests under way, and a failed request ends
the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.serving import load, picture
from benchmarks.serving.client import Client
from benchmarks.serving.lengths import ANSWERS, PROMPTS, Ask, Lengths, draw
from benchmarks.serving.server import Library, Settings
from cuplama.engine.kv_cache import KV_CACHE_DTYPES
from cuplama.errors import ParameterError

__all__ = ["main", "measure", "running"]

_PATIENCE = 600  # seconds that a server may take to be there
_LEAST = 20  # requests of a load, however slow the server is


@contextmanager
def running(settings: Settings) -> Iterator[dict[str, Any]]:
    """The server as a process; yields what it says of itself. It ends with the block."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "benchmarks.serving.server"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(settings.to_json() + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
            if not said:
                log.seek(0)
                raise load.FailedError(f"the server did not start:\n{log.read()[-2000:]}")
            yield json.loads(said)
        finally:
            if process.poll() is not None:
                log.seek(0)
                print(f"the server ended with status {process.returncode}:\n{log.read()[-2000:]}", file=sys.stderr)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _ready(client: Client) -> str:
    """Wait until the server answers; the name of its model."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            status, body = await client.get("/v1/models")
            if status == 200:
                return str(json.loads(body)["data"][0]["id"])
        except OSError:
            pass
        if time.monotonic() > end:
            raise load.FailedError("the server is not ready")
        await asyncio.sleep(0.1)


async def _load(args: argparse.Namespace, facts: dict[str, Any], client: Client, name: str) -> dict[str, Any]:
    """Capacity and levels."""
    rng = np.random.default_rng(args.seed)
    prompts, answers = (_bounded(x, min(args.longest, facts["context"] // 2 - 1)) for x in (PROMPTS, ANSWERS))

    def asks(count: int) -> list[Ask]:
        return draw(rng, count, prompts, answers, facts["vocab_size"])

    await load.at_once(client, name, asks(args.clients), args.clients)
    found = await load.capacity(client, name, asks(args.requests), args.clients)
    _say(found)
    levels = []
    for share in args.levels:
        rate = share * found["requests_per_second"]
        count = max(_LEAST, min(int(rate * args.seconds), args.most))
        levels.append({"share": share, **await load.open_loop(client, name, asks(count), rate, rng)})
        _say(levels[-1])
    workload = {"prompts": asdict(prompts), "answers": asdict(answers), "seed": args.seed, "arrivals": "Poisson"}
    return {"workload": workload, "capacity": found, "levels": levels}


async def _overhead(args: argparse.Namespace, facts: dict[str, Any], client: Client, name: str) -> dict[str, Any]:
    """The same work by the library, through HTTP in streams, and through HTTP as whole answers."""
    rng, seconds = np.random.default_rng(args.seed), {"library": facts["library_seconds"]}
    for kind in ("streamed", "whole"):
        taken = seconds[kind] = []
        for _ in range(args.repeats + 1):
            prompts = rng.integers(0, facts["vocab_size"], (args.sequences, args.tokens)).tolist()
            asks = [Ask(prompt, args.new) for prompt in prompts]
            done = await load.at_once(client, name, asks, args.sequences, kind == "streamed")
            taken.append(max(a.ended for a in done) - min(a.sent for a in done))
        del taken[0]
    tokens = args.sequences * args.new
    rates = {kind: tokens / median(found) for kind, found in seconds.items()}
    return {
        "overhead": {
            "sequences": args.sequences,
            "prompt_tokens": args.tokens,
            "new_tokens": args.new,
            "output_tokens_per_second": {kind: round(rate, 1) for kind, rate in rates.items()},
            "over_library": {kind: round(rates[kind] / rates["library"], 4) for kind in ("streamed", "whole")},
        }
    }


async def _prefix(args: argparse.Namespace, facts: dict[str, Any], client: Client, name: str) -> dict[str, Any]:
    rng = np.random.default_rng(args.seed)

    def ask(tokens: int) -> list[int]:
        found: list[int] = rng.integers(0, facts["vocab_size"], tokens).tolist()
        return found

    return {"prefix": await load.conversation(client, name, ask, args.turn, args.turn // 32, args.repeats)}


def _bounded(lengths: Lengths, longest: int) -> Lengths:
    return replace(lengths, longest=min(lengths.longest, longest))


def _say(row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)


async def measure(args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """What the arguments ask for, of the server at ``facts["url"]``."""
    client = Client(facts["url"], args.api_key)
    try:
        name = await _ready(client)
        wanted = _overhead if args.overhead else _prefix if args.prefix else _load
        found = await wanted(args, facts, client, name)
    finally:
        await client.close()
    settings = {"model": name, "environment": facts.get("environment", {}), "context": facts["context"]}
    return {**settings, **{k: facts[k] for k in ("cache_tokens", "max_running", "weights") if k in facts}, **found}


def _settings(args: argparse.Namespace) -> Settings:
    names = ("weight_format", "device", "dtype", "kv_cache_dtype", "activations", "max_running")
    how = {name: getattr(args, name) for name in names}
    source = {"model": args.shape or args.model, "dummy": args.shape is not None, **how}
    library = Library(args.sequences, args.tokens, args.new, args.repeats) if args.overhead else None
    context = args.context or (args.turn + args.turn // 32 + 64 if args.prefix else None)
    tokens = args.cache_tokens if args.cache_tokens == "auto" else int(args.cache_tokens)
    return Settings(source, context, tokens, library)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--shape", help="random weights of this shape, such as llama-3.1-8b; by default a bundled model"
    )
    server.add_argument("--model", help="a folder or hub id, as of cuplama serve -m")
    server.add_argument("--weight-format", default="", help='of the shape: such as "fp8"; by default its dtype')
    server.add_argument("--activations", choices=("auto", "fp8"), default="auto")
    server.add_argument("--kv-cache-dtype", choices=tuple(KV_CACHE_DTYPES), default="auto")
    server.add_argument("--device", choices=("auto", "cuda", "numpy"), default="auto")
    server.add_argument("--dtype", default="auto")
    server.add_argument("--context", type=int, help="tokens a text may have, as of cuplama serve")
    server.add_argument("--cache-tokens", default="auto")
    server.add_argument("--max-running", type=int, help="sequences that run at a time")
    server.add_argument("--url", help="a server that runs, http://HOST:PORT, in place of all that")
    server.add_argument("--api-key", help="for --url")
    server.add_argument("--vocab", type=int, default=32000, help="for --url: token ids below this are sent")
    loads = parser.add_argument_group("the load")
    loads.add_argument("--clients", type=int, default=256, help="requests at a time, for the capacity")
    loads.add_argument("--requests", type=int, default=2000, help="requests in all, for the capacity")
    loads.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="shares of it")
    loads.add_argument("--seconds", type=float, default=60, help="of each level")
    loads.add_argument("--most", type=int, default=20000, help="requests of a level at most")
    loads.add_argument("--longest", type=int, default=1024, help="tokens of a prompt or answer at most")
    loads.add_argument("--seed", type=int, default=0)
    other = parser.add_argument_group("in place of the load")
    other.add_argument("--overhead", action="store_true", help="the library's call, and the same through HTTP")
    other.add_argument("--prefix", action="store_true", help="first tokens of a conversation's first and second turn")
    other.add_argument("--sequences", type=int, default=64, help="of --overhead")
    other.add_argument("--tokens", type=int, default=128, help="of --overhead: of a prompt")
    other.add_argument("--new", type=int, default=256, help="of --overhead: generated for each")
    other.add_argument("--turn", type=int, default=8192, help="of --prefix: tokens of the first turn")
    other.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("PICTURE", "JSON"), help="draw a result, and do no more")
    return parser


def main(given: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(given)
    if args.overhead and args.url:
        parser.error("--overhead needs a server of its own: the library is timed in its process")
    try:
        if args.plot is not None:
            picture.draw(json.loads(args.plot[1].read_text(encoding="utf-8")), args.plot[0])
            return 0
        if args.url:
            context = args.context or 4096
            result = asyncio.run(measure(args, {"url": args.url, "vocab_size": args.vocab, "context": context}))
        else:
            with running(_settings(args)) as facts:
                form = {"weights": args.weight_format or facts["environment"]["dtype"]}
                result = asyncio.run(measure(args, {**facts, **form}))
    except (load.FailedError, ParameterError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=1) + "\n"
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    print(picture.table(result) if "levels" in result else text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
