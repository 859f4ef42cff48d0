"""``cuplama train``: a new model, or one that goes on learning, from files of text."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..errors import ParameterError
from ..train.backward import RECOMPUTE
from ..train.schedule import SCHEDULES
from ..train.settings import DOCUMENTS, DTYPES, OPTIMIZERS, TrainingSettings
from .options import DEBUG, DEVICE, OFFLINE, QUIET, Decorator, complete_model
from .running import find_folder
from .sections import FilesOption, SectionedCommand, section
from .streams import notice, progress_bar
from .training_progress import TrainingProgress, stopping_signals

__all__ = ["train"]

_PATH = click.Path(path_type=Path)
_DEFAULTS = {f.name: f.default for f in fields(TrainingSettings)}
_OPTIONS = {"teachers": "teacher", "lora_targets": "lora-target"}  # settings whose options have another name


def _setting(name: str, type: Any, metavar: str | None, text: str, show: bool = True) -> Decorator:
    """The option of a setting of that name, with the setting's default."""
    return click.option(
        f"--{name.replace('_', '-')}", type=type, default=_DEFAULTS[name], show_default=show, metavar=metavar, help=text
    )


def _files(name: str, text: str, required: bool = False) -> Decorator:
    return click.option(
        name, cls=FilesOption, multiple=True, required=required, type=_PATH, metavar="FILE...", help=text
    )


_MODEL = section(
    "The model",
    click.option(
        "--from",
        "model",
        metavar="MODEL",
        shell_complete=complete_model,
        help="Go on training this one: a folder or hub id (org/name); with --lora also a GGUF file.",
    ),
    click.option("--config", type=_PATH, metavar="FILE", help="Or make a new one of this shape, a config.json."),
    click.option("--tokenizer", type=_PATH, metavar="FILE", help="With --config: its tokenizer.json."),
    click.option("--out", type=_PATH, required=True, metavar="DIR", help="The folder that the model is written to."),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint in DIR, with the same options."),
    _setting("save_every", int, "N", "Steps between two checkpoints; 0: only at the end."),
)
_DATA = section(
    "The data",
    _files("--data", "Text, or *.jsonl with a text or with messages in each line.", required=True),
    _files("--eval-data", "Texts that are not trained on, to see how well the model does on new ones."),
    _setting("eval_every", int, "N", "Steps between two evaluations of all of them; 0: only at the end."),
    _setting("context", int, "T", "Tokens of a row.  [default: the model's limit, at most 1024]", show=False),
    _setting(
        "documents",
        click.Choice(DOCUMENTS),
        None,
        "together: each sees those before it in the row, as in one long text.",
    ),
    _setting("batch_size", int, "B", "Rows that go through the model at once. More take more memory."),
    _setting("accumulate", int, "N", "Batches for each update of the weights: as --batch-size N * B, but slower."),
    _setting("seed", int, "N", "Of the first weights, the order of the data, and dropout."),
)
_STEPS = section(
    "The steps",
    click.option("--steps", type=int, required=True, metavar="N", help="Updates of the weights in all."),
    _setting(
        "optimizer",
        click.Choice(OPTIMIZERS),
        None,
        "muon: the matrices of the layers by Muon, all else by AdamW. It often needs fewer steps.",
    ),
    _setting("lr", float, "X", "The highest learning rate."),
    _setting("warmup", int, "N", "Steps in which it rises to that."),
    _setting("schedule", click.Choice(SCHEDULES), None, "How it goes on: down to a tenth at the last step, or not."),
    _setting("weight_decay", float, "X", "Of tensors of two or more dimensions."),
    _setting("beta1", float, "X", "AdamW: how long the mean of gradients remembers."),
    _setting("beta2", float, "X", "AdamW: how long the mean of their squares remembers."),
    _setting("eps", float, "X", "AdamW: added to the root of that mean."),
    _setting("grad_clip", float, "X", "The largest norm of all gradients together; 0: no limit."),
    _setting("dropout", float, "P", "The share of embeddings and results of blocks that is left out."),
)
_ADAPTERS = section(
    "Adapters, and learning from other models",
    _setting("lora", int, "R", "Train adapters of this rank, and leave the model as it is.", show=False),
    _setting("lora_alpha", float, "X", "They count X / R times.  [default: twice the rank]", show=False),
    click.option(
        "--lora-target",
        "lora_targets",
        multiple=True,
        metavar="NAME",
        help="Matrices that get one, such as q_proj (repeatable).  [default: all but the head]",
    ),
    click.option(
        "--teacher",
        "teachers",
        multiple=True,
        metavar="MODEL",
        help="Learn what this model predicts, too (repeatable). It must have the same tokenizer.",
    ),
    _setting("teacher_share", float, "X", "How much that counts, against the text itself."),
)
_DEVICE = section(
    "Where it runs",
    DEVICE,
    _setting("dtype", click.Choice(DTYPES), None, "auto: bfloat16 on CUDA, with float32 copies; float32 on NumPy."),
    _setting("recompute", click.Choice(RECOMPUTE), None, "What is computed twice, to need less memory."),
)


@click.command(cls=SectionedCommand, short_help="Train a model on text: a new one, or one that is there.")
@_MODEL
@_DATA
@_STEPS
@_ADAPTERS
@_DEVICE
@OFFLINE
@QUIET
@DEBUG
def train(
    model: str | None,
    config: Path | None,
    tokenizer: Path | None,
    out: Path,
    resume: bool,
    data: tuple[Path, ...],
    eval_data: tuple[Path, ...],
    teachers: tuple[str, ...],
    offline: bool,
    **given: Any,
) -> None:
    """Train a model on text.

    DIR becomes a model folder like any other: give it to -m. Beside the model it holds the checkpoint that --resume
    goes on from, log.jsonl with a row for each step, and loss.png. Ctrl-C saves and ends; the same command with
    --resume goes on, after any end.

    In text files a special token such as <|endoftext|> stands between documents, which do not see each other, unless
    they are trained --documents together. Of *.jsonl with messages only what the assistant says is learned.
    """
    if (model is None) == (config is None):
        raise click.UsageError("give either --from MODEL, or --config and --tokenizer for a new one")
    if (config is None) != (tokenizer is None):
        raise click.UsageError("--config and --tokenizer go together, and without --from")
    from ..train.run import Hooks, Job, run_training  # here, so that no other command waits for it

    try:
        settings = TrainingSettings(teachers=teachers, **given)
        job = Job(
            settings=settings,
            data=data,
            out=out,
            config=config,
            tokenizer=tokenizer,
            model=None if model is None else find_folder(model, offline),
            model_name=model or "",
            teachers=[find_folder(teacher, offline) for teacher in teachers],
            evaluation=eval_data,
            resume=resume,
        )
        with progress_bar("reading", "B") as reading, TrainingProgress().shown() as shown, stopping_signals() as stop:

            def began(device: str, model: str, done: int) -> None:
                stop.listen()  # before this a signal ends the command at once
                notice(f"training {model}, {device}{f', from step {done} on' if done else ''}")

            outcome = run_training(job, Hooks(reading, began, shown, notice, stop))
    except ParameterError as e:
        raise click.UsageError(_with_option(str(e))) from None
    if outcome.stopped:
        notice(f"stopped after step {outcome.step} of {settings.steps}, which is saved; --resume goes on from there")
        sys.exit(128 + stop.signal)
    click.echo(out)


def _with_option(message: str) -> str:
    """A message that begins with the name of a setting, as one that begins with its option."""
    name, _, rest = message.partition(" ")
    name = name.removesuffix(":")
    return f"--{_OPTIONS.get(name, name.replace('_', '-'))} {rest}" if name in _DEFAULTS else message
