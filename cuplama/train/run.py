"""A training from beginning to end: files and options in, a model folder out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..errors import CheckpointError, ParameterError
from ..models.checkpoint import load_weights
from ..models.config import load_config
from ..text.tokenizer import Tokenizer
from .checkpoint import Run, Saved, TrainingFolder
from .data import Progress, TokenData, check_files
from .log import TrainingLog
from .loop import Loop, Outcome, Report
from .opening import open_training_backend
from .origin import Origin, new_model, trained_model
from .picture import draw_losses
from .settings import TrainingSettings
from .trainer import GuidingModel, Trainer
from .windows import Windows, evaluation_batches

__all__ = ["Hooks", "Job", "run_training"]

_log = logging.getLogger("cuplama")
_MOST_TOKENS = 2**31 - 1  # of a batch: kernels count them in 32 bits


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and where to.

    data: text files and JSON lines; out: the folder; config, tokenizer: files of a new model; model: instead of them
    the folder or GGUF file of a trained one, and model_name what it was called; teachers: folders of the settings'
    teachers; evaluation: files like data; resume: whether to go on from the folder's checkpoint.
    """

    settings: TrainingSettings
    data: Sequence[Path]
    out: Path
    config: Path | None = None
    tokenizer: Path | None = None
    model: Path | None = None
    model_name: str = ""
    teachers: Sequence[Path] = ()
    evaluation: Sequence[Path] = ()
    resume: bool = False


@dataclass(frozen=True)
class Hooks:
    """What a training tells while it runs, and whether it is to stop.

    reading: (bytes of the data read, bytes in all), where tokens are made; began: (what it runs on, the model in a few
    words, the step that it goes on from) once, before the first step; report: after each step; note: a line about
    something that nobody has to heed; stop: asked after each step.
    """

    reading: Progress = lambda done, total: None
    began: Callable[[str, str, int], None] = lambda device, model, done: None
    report: Callable[[Report], None] = lambda report: None
    note: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False


def run_training(job: Job, hooks: Hooks) -> Outcome:
    """Train, and save to ``job.out``: every so often, at the end, and where it is asked to stop.

    Raises ParameterError, ConfigError, TokenizerError, PromptError for data, CheckpointError for the folder, and
    DeviceError, each in one line that names the culprit.
    """
    settings = job.settings
    check_files([*job.data, *job.evaluation])
    origin = _origin(job)
    context = settings.row_length(origin.config.context, not origin.config.ropes)
    if settings.batch_size * context > _MOST_TOKENS:
        raise ParameterError(
            f"batch_size = {settings.batch_size} rows of {context} tokens are more than the {_MOST_TOKENS} of a batch"
        )
    if context > origin.config.context:
        limit = origin.config.context
        _log.warning("rows of %d tokens are longer than the %d that the model is made for", context, limit)
    with TrainingFolder(job.out, job.resume) as folder:
        return _train(job, hooks, origin, context, folder)


def _train(job: Job, hooks: Hooks, origin: Origin, context: int, folder: TrainingFolder) -> Outcome:
    settings = job.settings
    data, evaluation = _data(job, origin, folder, hooks)
    windows = Windows(data, context, settings.batch_size, settings.accumulate, settings.seed)
    evaluated = partial(evaluation_batches, length=context, batch_size=settings.batch_size)
    if evaluation is not None:
        next(evaluated(evaluation))  # refuses what has nothing to evaluate
    run = Run(settings, data.fingerprint, origin.fingerprint, context)
    saved = folder.load(run)
    done = 0 if saved is None else saved.step
    if job.resume and saved is None:
        hooks.note(f"{job.out} has no checkpoint yet; the training begins with step 1")
    if done >= settings.steps:
        hooks.note(f"{job.out} has all {done} steps; there is nothing to do")
        return Outcome(done, False)
    _note_of_schedule(saved, settings, hooks)
    guides = _guides(job, origin)
    with (
        closing(open_training_backend(settings, origin.config, origin.weights, context, guides)) as backend,
        closing(TrainingLog(job.out, done)) as log,
        Trainer(origin.config, origin.weights, settings, backend, context, guides) as trainer,
    ):
        if saved is not None:
            _go_on(trainer, saved, folder)
        hooks.began(backend.describe(), _described(trainer, data), done)
        return Loop(
            trainer=trainer,
            settings=settings,
            batches=windows.step,
            evaluation=None if evaluation is None else lambda: evaluated(evaluation),
            log=log,
            save=_Saver(trainer, origin, folder, run, hooks).save,
            report=hooks.report,
            stop=hooks.stop,
        ).run(done)


@dataclass
class _Saver:
    """Saves the model and what a run needs to go on."""

    trainer: Trainer
    origin: Origin
    folder: TrainingFolder
    run: Run
    hooks: Hooks

    def save(self, step: int) -> None:
        """After a step. The picture comes last: what is wrong with it is told once, and nothing more."""
        files, trainer = self.origin.files, self.trainer
        self.folder.save(step, trainer.state(), self.run, lambda staging: files.write(staging, trainer))
        problem = draw_losses(self.folder.path)
        if problem is not None:
            self.hooks.note(problem)
            self.hooks = replace(self.hooks, note=lambda text: None)


def _origin(job: Job) -> Origin:
    if job.model is not None:
        return trained_model(job.model, job.model_name or str(job.model), job.settings)
    if job.config is None or job.tokenizer is None:
        raise ParameterError("config and tokenizer are needed for a new model, or the name of a trained one")
    if job.settings.lora:
        raise ParameterError("lora trains adapters of a model that was trained before; a new model has no use for them")
    return new_model(job.config, job.tokenizer, job.settings.seed)


def _data(job: Job, origin: Origin, folder: TrainingFolder, hooks: Hooks) -> tuple[TokenData, TokenData | None]:
    """(tokens to train on, tokens to evaluate on)."""

    def tokens(paths: Sequence[Path], name: str) -> TokenData:
        found = TokenData.build(
            paths, origin.tokenizer, folder.path / "data", origin.marks, origin.config.vocab_size, name=name,
            fixed=name == "train" and folder.has_checkpoint, progress=hooks.reading,
        )  # fmt: skip
        return replace(found, apart=job.settings.documents == "apart")

    return tokens(job.data, "train"), tokens(job.evaluation, "eval") if job.evaluation else None


def _note_of_schedule(saved: Saved | None, settings: TrainingSettings, hooks: Hooks) -> None:
    """Tell that the learning rates of the steps to come are not those that the run had planned."""
    before = None if saved is None else saved.run.get("settings", {}).get("steps")
    if before not in (None, settings.steps):
        hooks.note(f"the run had {before} steps and now has {settings.steps}: its learning rates are now those of that")


def _go_on(trainer: Trainer, saved: Saved, folder: TrainingFolder) -> None:
    try:
        trainer.load_state(saved.arrays)
    except (KeyError, ValueError) as e:  # as of another version
        raise CheckpointError(f"{folder.path}: the checkpoint is not of this model: {e}") from None


def _guides(job: Job, origin: Origin) -> list[GuidingModel]:
    """The teachers. Raises ParameterError for one of another vocabulary, by its size or by its tokens."""
    found = []
    for folder in job.teachers:
        config = load_config(folder)
        if config.vocab_size != origin.config.vocab_size:
            raise ParameterError(
                f"teachers: {folder} has a vocabulary of {config.vocab_size} tokens, the model one of"
                f" {origin.config.vocab_size}"
            )
        _check_tokens(folder, Tokenizer.find(folder), origin.tokenizer)
        found.append(GuidingModel(config, load_weights(folder, config)))
    return found


def _check_tokens(folder: Path, theirs: Tokenizer | None, ours: Tokenizer) -> None:
    """Refuse a teacher that means something else by an id. One without a tokenizer is believed."""
    for id in range(0 if theirs is None else ours.vocab_size):
        if theirs is not None and theirs.piece(id) != ours.piece(id):
            names = [tokenizer.token_shown(id) for tokenizer in (theirs, ours)]
            raise ParameterError(
                f"teachers: {folder} has {names[0]} for token {id}, the model {names[1]}; both need the same tokenizer"
            )


def _described(trainer: Trainer, data: TokenData) -> str:
    elements = sum(array.size for array in trainer.parameters.weights.values())
    return f"{elements:,} weights on {len(data.tokens):,} tokens of data"
