"""The command line: options and their shorthands, one-line errors, exit codes, evaluate and predict on a checkpoint."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from helo_fast.train import summary
from helo_fast.train.cli import main, one_line
from helo_fast.train.data.synthetic import SyntheticData
from helo_fast.train.fold import fold_folder
from helo_fast.train.options import HeLoCLI, translate

DATA = ["--data=synthetic", "--data.n_subjects=3", "--data.n_trials=2", "--data.n_windows=3", "--data.n_channels=2", "--data.dim_video=8"]
TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
SYNTHETIC = "helo_fast.train.data.synthetic.SyntheticData"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on several
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of one fold of a finished run."""
    out = tmp_path_factory.mktemp("cli") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "write_report", lambda out: None)
        command = ["train", *DATA, "--model.feature_dim=16", "--epochs=2", "--jobs=1", "--quiet", "--folds", "S02", "--out", str(out)]
        assert main(command) == 0
    return fold_folder(out, 0, "S02")


def fails(capsys, *argv):
    """The one line on stderr of a command that exits with 2."""
    assert main(list(argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("helo-fast: error: "), lines
    return lines[0]


# ---- options


@pytest.mark.parametrize(
    "given, expected",
    (
        (["--protocol", "random", "--epochs", "3"], ["--data.protocol", "random", "--trainer.max_epochs", "3"]),
        (["--split=random", "--normalise=none"], ["--data.protocol=random", "--data.normalise=none"]),
        (["--skip-bad-subjects"], ["--data.skip_bad_subjects=true"]),
        (["--data.seed_of_mine", "3", "--data", "synthetic"], [f"--data={SYNTHETIC}", "--data.seed_of_mine", "3"]),
        (["--data.help", "synthetic"], [f"--data.help={SYNTHETIC}"]),
        (["--data.help"], ["--data.help"]),
    ),
)
def test_shorthands_are_spelled_out(given, expected):
    assert translate(given) == expected


def test_configuration_file_may_name_a_data_set_for_short(tmp_path):
    for data in ("synthetic", {"class_path": "synthetic", "init_args": {"n_subjects": 4}}):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": data, "seeds": [5], "model": {"dropout": 0.25}}))
        config = HeLoCLI(["--config", str(tmp_path / "c.yaml"), "--model.depth", "2"]).config
        assert config.data.class_path == SYNTHETIC and config.seeds == [5] and (config.model.dropout, config.model.depth) == (0.25, 2)
    assert config.data.init_args.n_subjects == 4


def test_presets_and_overrides_make_the_model():
    cli = HeLoCLI([*DATA, "--preset", "released", "--model.depth", "2", "--optimizer.lr", "0.5"])
    module = cli.make_module(cli.make_data())
    config = module.model.config
    assert (config.preset, config.transport, config.depth, config.n_channels, config.dim_video) == ("released", "gromov", 2, 2, 8)
    assert module.hparams["lr"] == 0.5
    assert cli.config.out == "runs/synthetic-released-loso"


def test_written_configuration_reads_back_the_same(tmp_path):
    cli = HeLoCLI([*DATA, "--folds", "1", "2", "--seeds", "3", "4", "--overwrite", "--trainer.gradient_clip_val", "1"])
    (tmp_path / "config.yaml").write_text(cli.dump())
    again = HeLoCLI(["--config", str(tmp_path / "config.yaml")])
    assert again.dump() == cli.dump() and again.config.folds == ["1", "2"] and not again.config.overwrite


def test_names_like_numbers_stay_text_in_a_written_configuration(tmp_path):
    names = ["1e3", "1.5e3", "+1E-3", "007", "0x10", "1_000", "1:30", ".5", "2020-01-01", "true", "null"]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump({"data": "synthetic"}) + f"folds: {json.dumps(names)}\noptimizer:\n  lr: 1e-3\n")
    for argv in (["--config", str(tmp_path / "given.yaml")], [*DATA, "--folds", *names, "--optimizer.lr", "1e-3"]):
        cli = HeLoCLI([*argv, "--out=1e3"])
        (tmp_path / "config.yaml").write_text(cli.dump())
        config = HeLoCLI(["--config", str(tmp_path / "config.yaml")]).config
        assert cli.config.folds == config.folds == names and config.out == "1e3" and config.optimizer.lr == 1e-3


@pytest.mark.parametrize("command", ("train", "evaluate", "predict"))
def test_help_explains_the_options(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and f"usage: helo-fast {command} [options]" in text
    explained = {
        "train": ("--preset {paper,released} HeLo as in the paper", "released recipe", "--model.dropout", "--trainer.precision", "--jobs"),
        "evaluate": ("--rows {test,all}", "--checkpoint"),
        "predict": ("FILE.csv or FILE.parquet", "--checkpoint"),
    }
    assert all(words in text for words in explained[command])


def test_help_of_a_data_set_explains_its_options(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--data.help", "synthetic"])
    assert "--data.window_noise" in capsys.readouterr().out


def test_info_and_usage(capsys):
    assert main(["info"]) == 0 and main(["info", "--help"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["--help"]) == 0 and "evaluate" in capsys.readouterr().out
    assert main([]) == 2


# ---- errors


@pytest.mark.parametrize(
    "argv, words",
    (
        (["trian"], "'trian' is no command; choose from train, evaluate, predict, info"),
        (["info", "--verbose"], "info takes no options"),
        (["train", "--data", "wesod"], "'wesod' is none of synthetic, dmer, wesad"),
        (["train", "--data", "no_such_module.Data"], "cannot import 'no_such_module'"),
        (["train", "--data.n_subject", "3"], "Option 'n_subject' is not accepted"),
        (["train", "--model.transport", "taxi"], "--model.transport: expected one of ['gromov', 'sinkhorn', 'fused']"),
        (["train", "--model.n_channels", "3"], "--model.n_channels"),
        (["train", *DATA, "--model.heads", "3"], "heads must divide feature_dim"),
        (["train", *DATA, "--optimizer.lr", "-1"], "lr: -1.0 is out of range"),
        (["train", *DATA, "--folds", "S02", "S99"], "--folds: no S99 in these data; choose from S01, S02, S03"),
        (["train", *DATA, "--seeds", "1", "1"], "--seeds: expected different integers >= 0"),
        (["train", *DATA, "--jobs", "0"], "--jobs: expected at least 1"),
        (["train", *DATA, "--epochs", "0"], "--epochs: expected at least 1"),
        (["train", *DATA, "--epochs", "-5"], "--epochs: expected at least 1"),
        (["train", *DATA, "--seeds", "99999999999"], "--seeds: expected different integers >= 0 and <= 4294967295"),
        (["train", *DATA, "--trainer.accelerator", "foo"], "--trainer.accelerator foo: Lightning refuses this"),
        (["train", *DATA, "--trainer.devices", "0"], "--trainer.devices 0: Lightning refuses this"),
        (["train", *DATA, "--trainer.limit_val_batches", "0"], "--trainer.limit_val_batches: 0 leaves early stopping nothing to go by"),
        (["train", *DATA, "--trainer.limit_train_batches", "0"], "--trainer.limit_train_batches: 0 trains nothing"),
        (["train", *DATA, "--trainer.limit_test_batches", "1"], "limit_test_batches"),
        (
            ["train", *DATA, "--trainer.limit_train_batches", "0.5"],
            "--trainer.limit_train_batches: 0.5 of the 1 batches of fold S01 is none",
        ),
        (["train", *DATA, "--trainer.limit_val_batches", "0.5"], "--trainer.limit_val_batches: 0.5 of the 1 batches of fold S01 is none"),
        (["train", *DATA, "--trainer.overfit_batches", "0.5"], "--trainer.overfit_batches: 0.5 of the 1 batches of fold S01 is none"),
        (["train", *DATA, "--trainer.val_check_interval", "9"], "--trainer.val_check_interval: 9 is more than the 1 training batches of"),
        (["train", *DATA, "--trainer.val_check_interval", "00:00:01:00"], "--trainer.val_check_interval: early stopping goes by batches"),
        (["train", *DATA, "--split=random", *TWO], "2 processes share the test rows, of which fold S01 has 1: use fewer devices"),
        (["train", "--config", __file__], f"--config: {__file__} cannot be read as YAML"),
        (["train", *DATA, "--out", __file__], f"--out: {__file__} cannot be a run's folder"),
        (["train", *DATA, "--out", f"{__file__}/below"], f"--out: {__file__}/below cannot be a run's folder"),
        (["train", *DATA, "--jobs", "2", *TWO], "--jobs: 2 with several devices"),
        (["train", "--config", "no/such/file.yaml"], "File does not exist"),
        (["train", "--data", "wesad", "--data.root", "no/such/folder"], "no/such/folder"),
        (["predict", "--checkpoint", "no.ckpt", *DATA, "--output", "a.csv"], "--checkpoint: no.ckpt is no file"),
        (["predict", "--checkpoint", "no.ckpt", *DATA, "--output", "a.txt"], "--output: a.txt must end in .csv or .parquet"),
        (["predict", "--checkpoint", "no.ckpt", *DATA, "--output", "a.csv", "--trainer.accelerator", "foo"], "--trainer.accelerator foo"),
        (["predict", "--checkpoint", "no.ckpt", *DATA], "--output: None must end in .csv or .parquet"),
        (["evaluate", "--checkpoint", "no.ckpt"], "--data: name a data set"),
    ),
)
def test_mistakes_are_told_in_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, words", (("foo", "unknown back end 'foo'"), ("cuda", "cuda cannot run here (")))
@pytest.mark.parametrize("command", (["train", *DATA], ["predict", "--checkpoint", "no.ckpt", *DATA, "--output", "a.csv"]))
def test_back_end_that_cannot_run_is_told_before_anything_is_written(command, name, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELO_FAST_BACKEND", name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"HELO_FAST_BACKEND: {words}" in fails(capsys, *command)
    assert not list(tmp_path.iterdir())


def test_debug_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("HELO_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="wesod"):
        main(["train", "--data", "wesod"])


def test_one_line_keeps_what_was_wrong():
    tree = (
        'Parser key "data":\n  Does not validate against any of the Union subtypes\n  Subtypes: [A, B]\n  Errors:\n'
        "    - Problem with given class_path 'a.B':\n        Option 'x' is not accepted\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>"
    )
    assert one_line(tree) == "--data: Problem with given class_path 'a.B': Option 'x' is not accepted"
    assert one_line("a\n  b") == "a b"
    assert one_line("n_channels: not given\nGiven value: Namespace(places=None)") == "n_channels: not given"


def test_two_runs_cannot_share_a_folder(tmp_path, capsys):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"):
        assert "another helo-fast train is at work" in fails(capsys, "train", *DATA, "--out", str(tmp_path))


def test_the_command_exits_with_its_code():
    done = subprocess.run([sys.executable, "-m", "helo_fast", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("helo-fast: error: 'trian'")


# ---- a checkpoint


def test_evaluate_repeats_the_scores_of_the_fold(trained, tmp_path, capsys):
    command = ["evaluate", "--checkpoint", str(trained / "checkpoints" / "best.ckpt"), *DATA, "--output", str(tmp_path / "scores.json")]
    assert main(command) == 0
    written, fold = json.loads((tmp_path / "scores.json").read_text()), json.loads((trained / "metrics.json").read_text())
    assert written["windows"] == 6 and written["fold"] == "S02"
    for name, value in fold["model"].items():
        assert written["metrics"][name] == pytest.approx(value, rel=1e-6)
    assert f"{fold['model']['kl']:.4f}" in capsys.readouterr().out


def test_evaluate_needs_only_the_subject_that_was_left_out(trained, tmp_path, monkeypatch):
    load = SyntheticData.load

    def load_one(self):
        data = load(self)
        rows = data.subject == "S02"
        modalities = {name: value[rows] for name, value in data.modalities.items()}
        return replace(data, modalities=modalities, labels=data.labels[rows], subject=data.subject[rows], trial=data.trial[rows])

    monkeypatch.setattr(SyntheticData, "load", load_one)
    command = ["evaluate", "--checkpoint", str(trained / "checkpoints" / "best.ckpt"), *DATA]
    assert main([*command, "--output", str(tmp_path / "scores.json")]) == 0
    written, fold = json.loads((tmp_path / "scores.json").read_text()), json.loads((trained / "metrics.json").read_text())
    assert written["windows"] == 6 and written["metrics"]["kl"] == pytest.approx(fold["model"]["kl"], rel=1e-6)


def test_evaluate_takes_the_batch_size_of_the_training_run(tmp_path, monkeypatch):
    """Released predictions depend on the other rows of their batch."""
    monkeypatch.setattr(summary, "write_report", lambda out: None)
    options = ["--preset=released", "--batch-size=4", "--model.feature_dim=16", "--epochs=1", "--jobs=1", "--quiet", "--baselines=false"]
    assert main(["train", *DATA, *options, "--folds", "S02", "--out", str(tmp_path)]) == 0
    fold = fold_folder(tmp_path, 0, "S02")
    command = ["evaluate", "--checkpoint", str(fold / "checkpoints" / "best.ckpt"), *DATA, "--output", str(tmp_path / "s.json")]

    def kl(*given):
        assert main([*command, *given]) == 0
        return json.loads((tmp_path / "s.json").read_text())["metrics"]["kl"]

    trained = json.loads((fold / "metrics.json").read_text())["model"]["kl"]
    assert kl() == pytest.approx(trained, rel=1e-6) != kl("--batch-size=3")


@pytest.mark.parametrize("suffix", ("csv", "parquet"))
def test_predict_writes_a_row_per_window(trained, tmp_path, suffix):
    output = tmp_path / f"predictions.{suffix}"
    assert main(["predict", "--checkpoint", str(trained / "checkpoints" / "best.ckpt"), *DATA, "--output", str(output)]) == 0
    table = pd.read_csv(output) if suffix == "csv" else pd.read_parquet(output)
    assert table["index"].tolist() == list(range(18)) and table.subject.unique().tolist() == ["S01", "S02", "S03"]
    names = [f"{kind}_emotion {k}" for kind in ("true", "predicted") for k in range(1, 11)]
    assert list(table.columns) == ["subject", "trial", "index", *names]
    of_fold = pd.read_csv(trained / "predictions.csv")  # with the training run's normalisation these rows come out the same
    np.testing.assert_allclose(table[table.subject == "S02"][names], of_fold[names], atol=1e-6)


@pytest.mark.parametrize("command", ("evaluate", "predict"))
def test_output_that_cannot_be_written_is_named(trained, tmp_path, capsys, command):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.csv", "/proc/x.csv"):
        argv = [command, "--checkpoint", str(trained / "checkpoints" / "best.ckpt"), *DATA, "--output", str(path)]
        assert f"--output: {path} cannot be written" in fails(capsys, *argv)


@pytest.mark.parametrize(
    "options, words",
    (
        (["--data.emotion_classes=4"], "was trained on label names"),
        (["--data.dim_video=9"], "was trained on sizes"),
        (["--data.n_channels=4"], "--data.n_channels: 4 does not fit the checkpoint, which was trained with 2"),
        (["--normalise=none"], "--data.normalise: none does not fit the checkpoint, which was trained with train"),
        (["--data.places", '{"eeg": "eeg", "gsr": "ppg", "ppg": "gsr", "video": "video"}'], "--data.places"),
    ),
)
def test_data_that_do_not_fit_the_checkpoint_are_refused(trained, tmp_path, capsys, options, words):
    command = ["predict", "--checkpoint", str(trained / "checkpoints" / "best.ckpt"), *DATA, *options]
    assert words in fails(capsys, *command, "--output", str(tmp_path / "p.csv"))


def test_evaluate_refuses_rows_that_may_have_been_trained_on(trained, tmp_path, capsys):
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    others = {**checkpoint, "data": {**checkpoint["data"], "protocol": "subject-dependent", "rows": "of other data"}}
    unknown = {**checkpoint, "data": {**checkpoint["data"], "fold": "S77"}}
    for changed, words in ((others, "which of them it was trained on is not known"), (unknown, "these data lack S77")):
        torch.save(changed, tmp_path / "c.ckpt")
        command = ["evaluate", "--checkpoint", str(tmp_path / "c.ckpt"), *DATA]
        assert words in fails(capsys, *command) and "--rows all" in fails(capsys, *command)
        assert main([*command, "--rows", "all"]) == 0
        assert json.loads((tmp_path / "c.all.json").read_text())["windows"] == 18


def test_a_file_that_is_no_checkpoint_is_refused(trained, tmp_path, capsys):
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    for name, words in (("junk.ckpt", "cannot be read as a checkpoint"), ("other.ckpt", "was not written by helo-fast train")):
        assert words in fails(capsys, "predict", "--checkpoint", str(tmp_path / name), *DATA, "--output", str(tmp_path / "p.csv"))
