"""What reaches training, and in which order: splits, normalisation, resumed runs, several processes."""

from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from helo_fast.train.data.base import EmotionData, EmotionDataModule
from helo_fast.train.data.splits import Split, _check_disjoint, loso, make_split, ordered_subjects, random_windows, subject_dependent


def grid(subjects: int, trials: int, windows: int) -> tuple[np.ndarray, np.ndarray]:
    subject = np.repeat([f"S{i}" for i in range(subjects)], trials * windows)
    return subject, np.tile(np.repeat([f"clip {i}" for i in range(trials)], windows), subjects)


# Few names on many rows: trial names shared by subjects, subjects of one row, trials in pieces, a subject named as a trial.
ROWS = st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from(["a", "1", "2", "3", "4", "5", "6"])), min_size=2, max_size=60)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.sampled_from(["loso", "subject-dependent", "random"]), st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_arrangement_leaks(rows, protocol, validation, seed):
    subject, trial = (np.array(column) for column in zip(*rows))
    for fold in ordered_subjects(subject):
        own = subject == fold
        try:
            split = make_split(protocol, subject, trial, fold, validation=validation, seed=seed)
        except ValueError as error:
            too_small = {
                "loso": own.all(),
                "subject-dependent": len(set(trial[own])) < 2,
                "random": own.sum() < 2,
            }
            assert too_small[protocol] and repr(fold) in str(error)
            continue
        train, held, test = split.train, split.validation, split.test
        for part in (train, held, test):
            assert len(part) and (np.diff(part) > 0).all() and part.dtype == np.int64
        assert not set(train) & set(test)
        pairs = [set(zip(subject[part], trial[part])) for part in (train, held, test)]
        if protocol == "loso":
            assert set(subject[test]) == {fold} and len(test) == own.sum()
            assert fold not in set(subject[train]) | set(subject[held])
            assert len({*train, *held, *test}) == len(subject)
            assert not set(subject[train]) & set(subject[held]) or (held is train and split.notes)
        else:
            assert {*subject[train], *subject[held], *subject[test]} == {fold}
            assert len({*train, *held, *test}) == own.sum()
        if protocol == "subject-dependent":
            assert not (pairs[0] | pairs[1]) & pairs[2]
            assert not pairs[0] & pairs[1] or (held is train and split.notes)
        if protocol == "random":
            assert (
                held is test and any("leaks" in note for note in split.notes) and any("validation = test" in note for note in split.notes)
            )


@settings(max_examples=50, deadline=None)
@given(ROWS, st.sampled_from(["loso", "subject-dependent"]), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(rows, protocol, shuffler):
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    fold = rows[0][0]
    parts = []
    for table in (rows, shuffled):
        subject, trial = (np.array(column) for column in zip(*table))
        try:
            split = make_split(protocol, subject, trial, fold, seed=3)
        except ValueError:
            parts.append(None)
            continue
        parts.append([sorted(zip(subject[part], trial[part])) for part in (split.train, split.validation, split.test)])
    assert parts[0] == parts[1]


def test_shares():
    subject, trial = grid(subjects=16, trials=10, windows=3)
    split = make_split("loso", subject, trial, "S4", validation=0.2)
    assert len(set(subject[split.validation])) == 3 and len(set(subject[split.train])) == 12 and not split.notes
    split = make_split("subject-dependent", subject, trial, "S4", validation=0.25)
    assert [len(set(trial[part])) for part in (split.train, split.validation, split.test)] == [6, 2, 2] and not split.notes
    split = make_split("random", subject, trial, "S4")
    assert len(split.train) == 24 and len(split.test) == 6
    assert set(trial[split.train]) & set(trial[split.test])  # this is how it leaks


def test_seed_and_fold_decide():
    subject, trial = grid(subjects=12, trials=8, windows=2)
    for protocol in ("loso", "subject-dependent", "random"):
        first, again, other = (make_split(protocol, subject, trial, "S3", seed=seed) for seed in (7, 7, 8))
        assert all(np.array_equal(getattr(first, part), getattr(again, part)) for part in ("train", "validation", "test"))
        assert not np.array_equal(first.train, other.train)
    held = [tuple(sorted(set(subject[loso(subject, fold).validation]))) for fold in ordered_subjects(subject)]
    assert len(set(held)) > 6  # not the same few subjects in every fold


def test_choices_do_not_change_between_versions():
    # Scores of different runs can be compared fold by fold only while these hold.
    subject, trial = grid(subjects=6, trials=5, windows=2)
    assert sorted(set(subject[loso(subject, "S1", validation=0.4).validation])) == ["S4", "S5"]
    assert sorted(set(trial[subject_dependent(subject, trial, "S1").test])) == ["clip 2"]
    assert random_windows(subject, "S1").test.tolist() == [16, 17]


@pytest.mark.parametrize(("trials", "expected"), [(2, (1, 1, 1)), (3, (2, 2, 1)), (4, (2, 1, 1)), (5, (3, 1, 1))])
def test_few_trials(trials, expected):
    subject, trial = grid(subjects=1, trials=trials, windows=2)
    split = subject_dependent(subject, trial, "S0")
    assert tuple(len(set(trial[part])) for part in (split.train, split.validation, split.test)) == expected
    assert (split.validation is split.train) == (trials < 4)
    assert [("validation = train" in note) for note in split.notes] == [True] * (trials < 4)


def test_two_subjects_validate_on_the_training_subject():
    subject, _ = grid(subjects=2, trials=2, windows=2)
    split = loso(subject, "S0")
    assert split.validation is split.train and "validation = train" in split.notes[0]


@pytest.mark.parametrize(
    ("protocol", "fold", "message"),
    [
        ("loso", "S9", "no rows of subject 'S9': choose from S0"),
        ("loso", "S0", "'S0' is the only subject.*subject-dependent"),
        ("subject-dependent", "S0", "'S0' has one trial only.*loso"),
        ("by-trial", "S0", "expected one of loso, subject-dependent, random"),
    ],
)
def test_impossible_splits_say_why(protocol, fold, message):
    subject, trial = grid(subjects=1, trials=1, windows=4)
    with pytest.raises(ValueError, match=message):
        make_split(protocol, subject, trial, fold)


def test_one_window_cannot_be_split_at_random():
    with pytest.raises(ValueError, match="'S0' has one row only"):
        random_windows(np.array(["S0", "S1"]), "S0")


@pytest.mark.parametrize(
    "parts",
    [([0, 1], [2], [1, 3]), ([0], [2, 3], [3]), ([0, 2], [2], [3]), ([], [1], [2])],
    ids=["train-test", "validation-test", "train-validation", "empty"],
)
def test_the_check_inside_finds_leaks(parts):
    split = Split("f", *(np.array(part, dtype=np.int64) for part in parts))
    with pytest.raises(RuntimeError, match="two parts, or an empty part"):
        _check_disjoint(split, np.array(["a", "b", "c", "d"]), "subjects")


# ---- normalisation


def fields(subjects: int = 5, seed: int = 0) -> dict:
    """A valid EmotionData of 12 rows per subject, whose subjects differ by far more than anything else."""
    subject, trial = grid(subjects, trials=4, windows=3)
    random = np.random.default_rng(seed)
    effect = np.repeat(10 * np.arange(subjects), 12)[:, None]
    widths = {"eeg": 6, "gsr": 3, "ppg": 2, "video": 5}
    modalities = {name: random.normal(size=(len(subject), width)) * 3 + effect for name, width in widths.items()}
    labels = random.dirichlet([1, 1, 1], size=len(subject))
    return {"modalities": modalities, "labels": labels, "subject": subject, "trial": trial, "names": ("calm", "glad", "sad")}


class Own(EmotionDataModule):
    default_n_channels = 2

    def __init__(self, data: dict | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.given, self.loads = data or fields(), 0

    def load(self) -> EmotionData:
        self.loads += 1
        return EmotionData(**self.given)


@pytest.mark.filterwarnings("ignore:warning. protocol random leaks")
@pytest.mark.parametrize("protocol", ["loso", "subject-dependent", "random"])
def test_test_rows_never_reach_training(protocol):
    modules = []
    for changed in (False, True):
        given = fields()
        if changed:
            for value in given["modalities"].values():
                value[modules[0].current.test] *= -1000
            given["labels"][modules[0].current.test] = [1, 0, 0]
        modules.append(Own(given, protocol=protocol, fold="S3"))
        modules[-1].setup()
    first, second = modules
    rows = first.current.train
    assert np.array_equal(rows, second.current.train)
    for name, value in first.tensors.items():
        assert value[rows].equal(second.tensors[name][rows]), name
    assert first.train_labels.equal(second.train_labels)
    assert not first.tensors["eeg"][first.current.test].equal(second.tensors["eeg"][first.current.test])


def test_normalisation_by_training_rows_and_by_subject():
    data = Own(fold="S0")
    data.setup()
    trained = data.tensors["video"][data.current.train]
    torch.testing.assert_close(trained.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.std(0, correction=0), torch.ones(5))
    assert data.tensors["video"][data.current.test].mean() < -1  # the held-out subject keeps its offset
    assert not any("transductive" in note for note in data.notes)
    data.normalise = "subject"
    data.setup()
    for subject in data.fold_names():
        own = data.tensors["video"][data.data.subject == subject]
        torch.testing.assert_close(own.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    assert data.normalisation == {} and any("transductive" in note for note in data.notes)
    data.normalise = "none"
    data.setup()
    assert np.array_equal(data.tensors["video"], data.data.modalities["video"])


def test_constant_features_do_not_explode():
    given = fields()
    gsr = given["modalities"]["gsr"]
    gsr[:, 0] = 1e6 + np.random.default_rng(0).integers(0, 2, 60) * 0.05  # float32 rounds this to one or two values
    gsr[:, 1] = np.where(given["subject"] == "S0", 1e8, 7.0)  # constant in training, elsewhere far away
    for normalise in ("train", "subject"):
        data = Own(given, fold="S0", normalise=normalise)
        data.setup()
        assert data.tensors["gsr"][:, :2].abs().max() == 0 and data.tensors["gsr"].abs().max() < 20


def test_statistics_in_float64():
    given = fields()
    given["modalities"]["gsr"] = given["modalities"]["gsr"] * 0 + 30000 + np.random.default_rng(0).normal(size=(60, 3))
    data = Own(given)
    data.setup()
    trained = data.tensors["gsr"][data.current.train].double()
    assert trained.mean(0).abs().max() < 1e-6 and (trained.std(0, correction=0) - 1).abs().max() < 1e-6


def test_next_fold_forgets_given_statistics():
    data, fresh = Own(fold="S1"), Own(fold="S2")
    data.setup()
    data.use_normalisation({name: value + 1 for name, value in data.normalisation.items()})
    data.fold = "S2"
    data.setup()
    fresh.setup()
    assert all(value.equal(fresh.tensors[name]) for name, value in data.tensors.items()) and data.loads == 1


# ---- order of training, resumption, several processes


class Recorder(pl.LightningModule):
    """Remembers which rows each training batch held."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(3, 3), {}

    def training_step(self, batch, batch_index):
        self.seen.setdefault(self.current_epoch, []).append(batch["index"].tolist())
        return self.layer(batch["gsr"]).square().mean()

    def validation_step(self, batch, batch_index):
        self.log("loss", self.layer(batch["gsr"]).square().mean())

    def test_step(self, batch, batch_index):
        self.log("test", batch["gsr"].mean())

    def predict_step(self, batch, batch_index):
        return batch["gsr"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(folder, epochs, validate=True, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, max_epochs=epochs, limit_val_batches=None if validate else 0, **quiet, **options)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore:.*srun.*")
@pytest.mark.parametrize("validate", [True, False])
def test_resumed_run_repeats_the_batches(tmp_path, validate):
    whole, half, rest = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, 4, validate).fit(whole, datamodule=Own(batch_size=16, seed=3))
    first = trainer(tmp_path, 2, validate)
    first.fit(half, datamodule=Own(batch_size=16, seed=3))
    path = first.checkpoint_callback.best_model_path
    trainer(tmp_path, 4, validate).fit(rest, datamodule=Own(batch_size=16, seed=3), ckpt_path=path)
    assert sorted(whole.seen) == [0, 1, 2, 3] and sorted(rest.seen) == [2, 3]
    assert whole.seen == half.seen | rest.seen
    assert whole.seen[0] != whole.seen[1]  # each epoch has an order of its own


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore:.*srun.*")
def test_checkpoint_brings_its_normalisation(tmp_path):
    data, model = Own(fold="S1"), Recorder()
    fit = trainer(tmp_path, 1)
    fit.fit(model, datamodule=data)
    path = fit.checkpoint_callback.best_model_path
    other = Own(fields(subjects=1, seed=8))
    predicted = torch.cat(trainer(tmp_path, 1).predict(model, datamodule=other, ckpt_path=path))
    mean, std = data.normalisation["gsr.mean"], data.normalisation["gsr.std"]
    np.testing.assert_allclose(predicted, (other.data.modalities["gsr"] - mean) / std, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="fold: the checkpoint was trained for protocol 'loso', fold 'S1'"):
        trainer(tmp_path, 1).test(model, datamodule=Own(fold="S2"), ckpt_path=path, verbose=False)
    with pytest.raises(ValueError, match="normalise: the checkpoint was trained with 'train', not 'subject'"):
        trainer(tmp_path, 1).test(model, datamodule=Own(fold="S1", normalise="subject"), ckpt_path=path, verbose=False)
    trainer(tmp_path, 1).test(model, datamodule=Own(fold="S1"), ckpt_path=path, verbose=False)


def test_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        data = Own(seed=seed, protocol="subject-dependent")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [data.current.train.tolist().index(row) for batch in loader for row in batch["index"].tolist()]

    orders = [tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9 and order(1, 1) == list(orders[4])


def test_processes_share_the_rows():
    ranks = []
    for rank in range(2):
        data = Own(fold="S1", batch_size=7)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        loaders = (data.train_dataloader(), data.test_dataloader())
        # A DistributedSampler is what keeps Lightning from putting one of its own in its place.
        assert all(isinstance(loader.sampler, DistributedSampler) for loader in loaders)
        ranks.append([torch.cat([batch["index"] for batch in loader]).tolist() for loader in loaders])
    for part, (first, second) in zip(("train", "test"), zip(*ranks)):
        assert sorted(first + second) == getattr(data.current, part).tolist()


def test_loader_workers_give_the_same_batches():
    here, there = Own(batch_size=16), Own(batch_size=16, num_workers=1)
    for first, second in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert all(first[name].equal(second[name]) for name in first)
