"""A checkpoint on data: ``helo-fast evaluate`` and ``helo-fast predict``."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from helo_fast.train.data import DATASETS, resolve
from helo_fast.train.data.base import EmotionDataModule
from helo_fast.train.files import replacing, write_json
from helo_fast.train.fold import prediction_table, quiet_lightning, score
from helo_fast.train.module import DATA_KEY, HeLoModule, row_checksum
from helo_fast.train.options import DATA_SKIP, check_backend, naming_trainer_options, translate
from helo_fast.train.report import TITLES

# What the data must share with the training run; the checkpoint's value stands where the option is left out.
SHARED = ("places", "n_channels", "normalise", "protocol", "validation")
TRAINER_OPTIONS = {"accelerator", "precision"}


def load_checkpoint(path: str | Path) -> tuple[HeLoModule, dict[str, Any]]:
    """The model of a checkpoint that ``helo-fast train`` wrote, and what it keeps of its data.

    Only tensors and plain types are read: a checkpoint from elsewhere cannot run code.

    Raises:
        ValueError: the file is no such checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(f"--checkpoint: {path} is no file: give the best.ckpt of a fold, OUT/folds/SEED/FOLD/checkpoints/best.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types for files that are none of its own
        raise ValueError(f"--checkpoint: {path} cannot be read as a checkpoint: {one_sentence(error)}") from error
    if not isinstance(checkpoint, dict) or not {DATA_KEY, "hyper_parameters", "state_dict"} <= checkpoint.keys():
        raise ValueError(f"--checkpoint: {path} was not written by helo-fast train: it lacks hyper_parameters or {DATA_KEY}")
    module = HeLoModule(**checkpoint["hyper_parameters"])
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval(), checkpoint[DATA_KEY]


def one_sentence(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0]


def _parse(command: str, description: str, argv: list[str], output_help: str) -> tuple[LightningArgumentParser, Namespace]:
    check_backend()
    parser = LightningArgumentParser(
        prog=f"helo-fast {command}",
        description=description,
        usage="%(prog)s [options]",
        exit_on_error=False,
        formatter_class=DefaultHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=str, required=True, help="A best.ckpt or last.ckpt that helo-fast train wrote.")
    parser.add_argument("--output", type=str, default=None, help=output_help)
    if command == "evaluate":
        parser.add_argument(
            "--rows", type=Literal["test", "all"], default="test", help="The test rows of the checkpoint's fold, or all rows."
        )
    parser.add_subclass_arguments(EmotionDataModule, "data", fail_untyped=False, required=True, skip=DATA_SKIP)
    argv = translate(argv)
    wanted = ("--data=", "--config=", "--help", "-h", "--data.help", "--print_config")
    if not any(token.startswith(wanted) for token in argv):
        raise ValueError(f"--data: name a data set, for example --data wesad --data.root DIR: {', '.join(DATASETS)} or an import path")
    skip = set(inspect.signature(Trainer.__init__).parameters) - {"self"} - TRAINER_OPTIONS
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, skip=skip)
    return parser, parser.parse_args(argv)


def _open(parser: LightningArgumentParser, config: Namespace) -> tuple[HeLoModule, EmotionDataModule, dict[str, Any]]:
    """The model, and the data as its training run saw them: same places, split and normalisation."""
    module, trained = load_checkpoint(config.checkpoint)
    arguments = config.data.init_args
    signatures = (inspect.signature(cls).parameters for cls in (EmotionDataModule, resolve(config.data.class_path)))
    defaults = {name: parameter.default for parameters in signatures for name, parameter in parameters.items()}
    for name in SHARED:
        if name not in arguments:
            continue
        # An option that equals its default cannot be told from one left out; one that differs was meant.
        given, needed = arguments[name], {**trained, **trained["dims"]}[name]
        if given not in (None, defaults[name], needed):
            raise ValueError(f"--data.{name}: {given} does not fit the checkpoint, which was trained with {needed}")
        arguments[name] = needed
    if arguments.get("batch_size") == defaults["batch_size"]:  # released predictions depend on the other rows of a batch
        arguments.batch_size = trained.get("batch_size", arguments.batch_size)
    data = parser.instantiate(Namespace(data=config.data)).data
    data.seed = trained["seed"]
    for what, has, needs in (
        ("label names", list(data.label_names), trained["label_names"]),
        ("sizes", data.dims, trained["dims"]),
    ):
        if has != needs:
            raise ValueError(f"--checkpoint: {config.checkpoint} was trained on {what} {needs}, these data have {has}")
    return module, data, trained


def _trainer(parser: LightningArgumentParser, config: Namespace) -> Trainer:
    quiet_lightning()
    with naming_trainer_options(parser, config):
        return Trainer(**config.trainer.as_dict(), devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)


def _run(module: HeLoModule, loader: DataLoader, trainer: Trainer, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    seed_everything(seed, workers=True, verbose=False)  # released draws random numbers in evaluation too
    batches = trainer.predict(module, dataloaders=loader)
    return tuple(torch.cat([batch[name] for batch in batches]).cpu() for name in ("index", "predict"))


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output: {output} cannot be written ({error.strerror or error}): give another file") from error


def evaluate(argv: list[str]) -> int:
    """``helo-fast evaluate``: prints the six metrics and writes them as JSON."""
    description = "Score a checkpoint: the six metrics, means over windows."
    parser, config = _parse("evaluate", description, argv, "JSON file; default: beside the checkpoint.")
    trainer = _trainer(parser, config)
    module, data, trained = _open(parser, config)
    # Of a subject that was left out every row is a test row, and nobody else's recordings are needed to find them.
    every = config.rows == "all" or (trained["protocol"] == "loso" and data.fold_names() == [trained["fold"]])
    if not every:
        if trained["fold"] not in data.fold_names():
            raise ValueError(f"--rows: these data lack {trained['fold']}, whose rows the checkpoint was not trained on: use --rows all")
        if trained["protocol"] != "loso" and row_checksum(data.data) != trained["rows"]:
            raise ValueError(
                f"--rows: these are not the rows that the checkpoint's {trained['protocol']} split was made of, so which of them it "
                "was trained on is not known: give the same data, or --rows all for data that it has never seen"
            )
        data.fold = trained["fold"]
    _normalise(data, trained)
    index, predict = _run(module, data.predict_dataloader() if every else data.test_dataloader(), trainer, data.seed)
    scores = score(data.data.labels[index.numpy()], predict.numpy())
    output = Path(config.output or Path(config.checkpoint).with_suffix(f".{config.rows}.json"))
    facts = {"checkpoint": config.checkpoint, "fold": trained["fold"], "rows": config.rows, "windows": len(index)}
    with _writing(output):
        write_json(output, {**facts, "metrics": scores})
    for name, value in scores.items():
        print(f"{TITLES[name]:14}{value:.4f}")
    print(f"means over {len(index)} windows; written to {output}")
    return 0


def predict(argv: list[str]) -> int:
    """``helo-fast predict``: writes one row per window, all windows of the data."""
    description = "Write a checkpoint's predictions: subject, trial, index, true and predicted distribution of every window."
    parser, config = _parse("predict", description, argv, "FILE.csv or FILE.parquet.")
    output = Path(config.output or "")
    if output.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--output: {config.output} must end in .csv or .parquet")
    trainer = _trainer(parser, config)
    module, data, trained = _open(parser, config)
    _normalise(data, trained)
    table = prediction_table(data, *_run(module, data.predict_dataloader(), trainer, trained["seed"]))
    with _writing(output), replacing(output) as temporary:
        table.to_csv(temporary, index=False) if output.suffix == ".csv" else table.to_parquet(temporary, index=False)
    print(f"{len(table)} windows written to {output}")
    return 0


def _normalise(data: EmotionDataModule, trained: dict[str, Any]) -> None:
    data.use_normalisation({name: value.numpy() for name, value in trained["normalisation"].items()})
