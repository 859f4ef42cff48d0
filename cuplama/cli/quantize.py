"""``cuplama quantize``: a model folder with weights of 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path

import click

from ..conversion import METHODS
from ..errors import ParameterError
from ..quant.grid import GRIDS
from .options import DEBUG, DEVICE, OFFLINE, QUIET, complete_model, shard_size_option
from .prompt import read_file
from .running import find_folder
from .streams import notice, progress_bar

__all__ = ["quantize"]


@click.command(short_help="Write a copy of a model with weights of 4 or 8 bits.")
@click.argument("model", shell_complete=complete_model)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(list(GRIDS)), required=True, help="What the layers' matrices become."
)
@click.option(
    "--group-size",
    type=int,
    metavar="N",
    help="How many neighbours in a row share a scale: 128, 64, 32, or 0 for the whole row. Fewer are more exact, and "
    "take more bytes.  [default: 0; for int4 the largest that divides every row]",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="rtn",
    show_default=True,
    help="rtn: each number to the nearest. gptq: closer to the model, and slow; needs --calibrate.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For gptq: a text like those that the model is for.",
)
@click.option("--samples", type=int, default=128, show_default=True, metavar="N", help="For gptq: pieces of that text.")
@click.option(
    "--length",
    type=int,
    metavar="N",
    help="For gptq: tokens of each piece.  [default: 512, or the context if that is less]",
)
@shard_size_option
@DEVICE
@OFFLINE
@QUIET
@DEBUG
def quantize(
    model: str,
    out: Path,
    form: str,
    group_size: int | None,
    method: str,
    calibrate: Path | None,
    samples: int,
    length: int | None,
    shard_size: int,
    device: str,
    offline: bool,
) -> None:
    """Write a copy of MODEL, a folder or hub id, to the new folder OUT, with the layers' matrices in 4 or 8 bits.

    OUT is a model folder like any other: give it to -m. Its layout is that of compressed-tensors, which transformers
    and vLLM read, too. Embedding, head and norms stay as they are. A run that was stopped goes on when the same command
    is given again.

    To try a format without a copy, give --quantize to generate or chat.

    gptq runs a text through the model, layer by layer, and chooses numbers that change little of what the layers make
    of it.
    """
    from ..conversion.run import Options, quantise  # here, so that no other command waits for it

    if (method == "gptq") != (calibrate is not None):
        raise click.UsageError("--method gptq needs --calibrate FILE, and nothing else takes it")
    text = "" if calibrate is None else read_file(calibrate)
    if calibrate is not None and not text:
        raise click.UsageError(f"--calibrate: {calibrate} is empty")
    folder = find_folder(model, offline)
    options = Options(form, group_size, method, text, samples, length, device, shard_size)
    try:
        with progress_bar("quantising", "layers") as progress:
            made = quantise(folder, out, options, progress)
    except ParameterError as e:
        name, _, rest = str(e).partition(" ")  # its parameters have the options' names
        raise click.UsageError(f"--{name.replace('_', '-')} {rest}") from None
    if not made:
        notice(f"{out} is finished; there is nothing to do")
    click.echo(out)
