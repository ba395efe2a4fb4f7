"""The options of ``helo-fast train`` on Lightning's CLI: the parser, and what a parsed configuration builds."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import DefaultHelpFormatter, Namespace, get_loader, set_dumper
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from helo_fast import __version__, _registry
from helo_fast.model import HeLoConfig
from helo_fast.train.data import DATASETS, resolve
from helo_fast.train.data.base import EmotionDataModule
from helo_fast.train.module import HeLoModule

SHORTHANDS = {
    "--protocol": "--data.protocol",
    "--split": "--data.protocol",
    "--normalise": "--data.normalise",
    "--batch-size": "--data.batch_size",
    "--epochs": "--trainer.max_epochs",
}
SHORT_FLAGS = {"--skip-bad-subjects": "--data.skip_bad_subjects=true", "--allow-pickle": "--data.allow_pickle=true"}

# Set by the run itself: folder, fold and seed; or without sense here, as every fold needs its checkpoints and all its test rows.
TRAINER_SKIP = {"default_root_dir", "enable_checkpointing", "fast_dev_run", "barebones", "enable_progress_bar"}
TRAINER_SKIP |= {"limit_test_batches", "limit_predict_batches"}
DATA_SKIP = {"fold", "seed"}
FROM_DATA = {"n_channels", "dim_eeg", "dim_gsr", "dim_ppg", "dim_video", "emotion_classes"}
MOST_SEED = 2**32 - 1  # numpy's

# Not part of what a run computes: a run may go on with other values of these.
PRESENTATION = {"out", "jobs", "quiet", "overwrite"}

DESCRIPTION = f"""Train HeLo on every fold of a data set, score it beside baselines, and write a report.

Data sets: {", ".join(DATASETS)}, or an import path my_module.MyData of an EmotionDataModule. Their options: --data.help NAME.

Shorthands: {", ".join(f"{a} = {b}" for a, b in {**SHORTHANDS, **SHORT_FLAGS}.items())}.

The released recipe: --preset released --split random --epochs 300 --patience 0 --select last --seeds 3407."""


def translate(argv: list[str]) -> list[str]:
    """``argv`` with the shorthands spelled out and data sets named by class path, these before any ``--data.*`` option.

    Raises:
        ValueError, ImportError: a data set is not known.
    """
    out: list[str] = []
    first_data_option = None
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if token in SHORT_FLAGS:
            name, equals, value = SHORT_FLAGS[token].partition("=")
        name = SHORTHANDS.get(name, name)
        if name in ("--data", "--data.help", "--config", "-c") and not equals:
            value = next(tokens, "")
            equals = "=" if value else ""
        if name in ("--data", "--data.help") and value:
            value = class_path(value)
        if name in ("--config", "-c"):
            name, value = "--config", _named_in_file(value)
        token = f"{name}{equals}{value}"
        if name == "--data" and first_data_option is not None:
            out.insert(first_data_option, token)
            continue
        if name.startswith("--data.") and first_data_option is None:
            first_data_option = len(out)
        out.append(token)
    return out


def class_path(name: str) -> str:
    """Import path of a data set's class. A path in the current folder works too, as with ``python -m``."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    cls = resolve(name)
    return f"{cls.__module__}.{cls.__qualname__}"


class _Dumper(yaml.SafeDumper):
    """Quotes every text that begins like a number: jsonargparse takes more of them for one than PyYAML does, 1e3 and 1.5e3."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if re.match(r"[-+.]*\d", text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def _dump_yaml(content: Any) -> str:
    return yaml.dump(content, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


set_dumper("yaml", _dump_yaml)  # of config.yaml and --print_config


def _named_in_file(path: str) -> str:
    """A configuration file, or its content where its ``data`` is a short name that Lightning's CLI cannot resolve."""
    if not Path(path).is_file():
        return path
    try:
        content = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} cannot be read as YAML, mend it: {error}") from error
    data = content.get("data") if isinstance(content, dict) else None
    given = data.get("class_path") if isinstance(data, dict) else data
    if not isinstance(given, str):
        return path
    content["data"] = {**(data if isinstance(data, dict) else {}), "class_path": class_path(given)}
    return _dump_yaml(content)


def check_backend() -> None:
    """Raises ValueError where HELO_FAST_BACKEND asks for a back end that is unknown or cannot run here."""
    name = _registry.requested(None)
    reason = None if name == _registry.AUTO else _registry.BACKENDS[name].unavailable()
    if reason is not None:
        raise ValueError(f"{_registry.ENVIRONMENT_VARIABLE}: {name} cannot run here ({reason}): choose another, or unset it")


@contextlib.contextmanager
def naming_trainer_options(parser: LightningArgumentParser, config: Namespace) -> Iterator[None]:
    """What Lightning has against a trainer, as an error that names the options that were given."""
    try:
        yield
    except Exception as error:  # Lightning and torch raise many types
        defaults = parser.get_defaults().trainer
        changed = {name: value for name, value in config.trainer.items() if value != defaults[name]}
        changed.pop("max_epochs", None)  # checked before
        given = " ".join(f"--trainer.{name} {value}" for name, value in changed.items()) or "--trainer"
        raise ValueError(f"{given}: Lightning refuses this, change it or leave it out: {error}") from error


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's paragraphs."""


class HeLoCLI(LightningCLI):
    """Lightning's CLI over HeLo's model, a data set and a trainer; builds them per fold, since folds differ in data.

    Args:
        argv: The options, without the command's name.
    """

    def __init__(self, argv: list[str]) -> None:
        super().__init__(
            HeLoModule,
            EmotionDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "exit_on_error": False,
                "description": DESCRIPTION,
                "prog": "helo-fast train",
                "usage": "%(prog)s [options]",
                "dump_header": [f"helo-fast {__version__}; the same run again: helo-fast train --config THIS_FILE"],
            },
            args=translate(argv),
            run=False,
        )

    # ---- Lightning's hooks

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(**kwargs, formatter_class=_Formatter)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # LightningCLI reads it; here every fold is seeded by --seeds.
        parser.add_argument("--seed_everything", type=bool, default=False, help=argparse.SUPPRESS)
        add = parser.add_argument
        add("--preset", type=Literal["paper", "released"], default="paper", help="HeLo as in the paper or as released.")
        add("--seeds", type=int, nargs="+", default=[0], help="Every fold is trained once with each.")
        add("--folds", type=str, nargs="+", default=None, help="Only these subjects' folds.")
        add("--out", type=str, default=None, help="Folder of the run; default runs/<data>-<preset>-<protocol>.")
        add("--overwrite", action="store_true", help="Delete the run that --out holds and start again.")
        add(
            "--jobs",
            type=int,
            default=None,
            help="Folds trained at a time, each in a process with its share of the cores; default: as many as there are "
            "cores or folds, 1 on a GPU.",
        )
        add(
            "--patience",
            type=int,
            default=15,
            help="Stop a fold when the validation KL has not improved for this many epochs; 0: never.",
        )
        add(
            "--select",
            type=Literal["best", "last"],
            default="best",
            help="Weights that are tested: of the epoch with the lowest validation KL, or of the last. Always the last "
            "where validation and test rows are the same.",
        )
        add("--baselines", type=bool, default=True, help="Score the baselines on the same folds.")
        add("--quiet", action="store_true", help="No progress; only warnings and the final table.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(EmotionDataModule, "data", fail_untyped=False, required=True, skip=DATA_SKIP)
        parser.add_class_arguments(HeLoConfig, "model", skip={"preset", *FROM_DATA}, instantiate=False)
        parser.add_class_arguments(HeLoModule, "optimizer", skip={"config"}, instantiate=False)
        parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True, skip=TRAINER_SKIP)
        parser.set_defaults({"data": {"class_path": DATASETS["synthetic"]}})
        parser.set_defaults({"trainer.max_epochs": 60, "trainer.logger": False, "trainer.num_sanity_val_steps": 0})
        parser.set_defaults({"trainer.enable_model_summary": False, "trainer.log_every_n_steps": 1})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        config = self.config
        if config.out is None:
            config.out = str(Path("runs", f"{self.data_name}-{config.preset}-{config.data.init_args.protocol}"))
        for name, least in (("patience", 0), ("jobs", 1)):
            if config[name] is not None and config[name] < least:
                raise ValueError(f"--{name}: expected at least {least}, got {config[name]}")
        epochs = config.trainer.max_epochs
        if epochs is not None and epochs < 1 and epochs != -1:
            raise ValueError(f"--epochs: expected at least 1, or -1 with --trainer.max_steps or --trainer.max_time, got {epochs}")
        for name in ("max_steps", "limit_train_batches"):
            if config.trainer[name] == 0:
                raise ValueError(f"--trainer.{name}: 0 trains nothing: give more, or leave it out")
        if config.trainer.limit_val_batches == 0 and config.patience:
            raise ValueError("--trainer.limit_val_batches: 0 leaves early stopping nothing to go by: add --patience 0")
        if config.patience and not isinstance(config.trainer.val_check_interval, (int, float, type(None))):
            raise ValueError("--trainer.val_check_interval: early stopping goes by batches, not by a time: give these, or add --patience 0")
        seeds = config.seeds
        if len(set(seeds)) < len(seeds) or min(seeds, default=-1) < 0 or max(seeds) > MOST_SEED:
            raise ValueError(f"--seeds: expected different integers >= 0 and <= {MOST_SEED}, got {seeds}")

    def instantiate_classes(self) -> None:
        """Nothing yet: a model's sizes are known when the data are loaded."""

    # ---- what the configuration describes

    @property
    def data_name(self) -> str:
        path = self.config.data.class_path
        return next((name for name, known in DATASETS.items() if known == path), path.rsplit(".", 1)[-1])

    def dump(self) -> str:
        """The configuration as YAML: ``helo-fast train --config`` on it is the same run."""
        config = self.config.clone()
        config.overwrite = False  # an order for once
        return self.parser.dump(config)

    def make_data(self, seed: int = 0) -> EmotionDataModule:
        """The data set with the split and training order of ``seed``."""
        data = self.parser.instantiate(Namespace(data=self.config.data)).data
        data.seed = seed
        return data

    def make_module(self, data: EmotionDataModule) -> HeLoModule:
        """A model of the configured preset and of the data's sizes."""
        config = HeLoConfig(preset=self.config.preset, **self.config.model.as_dict(), **data.dims)
        return HeLoModule(config, **self.config.optimizer.as_dict())

    def make_trainer(self, callbacks: list[Callback], plugins: list[Any], **overrides: Any) -> Trainer:
        """The configured trainer, with ``callbacks`` and ``plugins`` added to those of the user."""
        with naming_trainer_options(self.parser, self.config):
            options = dict(self.parser.instantiate(Namespace(trainer=self.config.trainer)).trainer)
            for name, added in (("callbacks", callbacks), ("plugins", plugins)):
                given = options.get(name) or []
                options[name] = [*(given if isinstance(given, list) else [given]), *added]
            if self.config.preset == "released" and options.get("strategy") == "ddp":
                options["strategy"] = "ddp_find_unused_parameters_true"  # released has a layer that it never uses
            return Trainer(**{**options, **overrides})
