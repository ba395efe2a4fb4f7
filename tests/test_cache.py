"""The feature cache: what finds an entry, and what happens to damaged ones."""

import concurrent.futures
import io
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

from helo_fast.train.data import cache as cache_module
from helo_fast.train.data.cache import FeatureCache, default_folder

RECIPE = {"version": 1, "window": 60.0}


class Make:
    """Counts its calls; each gives other numbers, so that an old entry is told from a new one."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"x": np.arange(6, dtype=np.float32).reshape(2, 3) + self.calls, "condition": np.array(["Base", "Medi 1"])}


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache")


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "input.csv"
    file.write_text("1,2\n")
    return file


def entries(cache):
    return sorted(cache.folder.iterdir()) if cache.folder.exists() else []


def test_made_once_and_found_again_bit_for_bit(cache, source):
    make = Make()
    assert cache.find([source], RECIPE) is None
    made = cache.get_or_make([source], RECIPE, make)
    found = FeatureCache(cache.folder).get_or_make([source], RECIPE, make)
    assert make.calls == 1
    assert list(found) == ["x", "condition"]
    for name in made:
        assert found[name].dtype == made[name].dtype
        np.testing.assert_array_equal(found[name], made[name])
    assert entries(cache) == [cache.path([source], RECIPE)]


def test_contents_decide_not_names_or_dates(cache, source, tmp_path):
    make = Make()
    cache.get_or_make([source], RECIPE, make)
    moved = source.rename(tmp_path / "elsewhere.csv")
    os.utime(moved, (0, 0))
    cache.get_or_make([moved], RECIPE, make)
    assert make.calls == 1
    moved.write_text("1,3\n")
    cache.get_or_make([moved], RECIPE, make)
    assert make.calls == 2


def test_recipe_and_order_of_inputs_decide(cache, source, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("3\n")
    paths = {
        cache.path(inputs, recipe)
        for inputs in ([source, other], [other, source], [source])
        for recipe in (RECIPE, RECIPE | {"version": 2}, RECIPE | {"window": 30.0})
    }
    assert len(paths) == 9
    assert cache.path([source], {"window": 60.0, "version": 1}) == cache.path([source], RECIPE)


def test_inputs_are_told_apart_where_one_ends_and_the_next_begins(cache, tmp_path):
    for name, text in (("a", "12"), ("b", "3"), ("c", "1"), ("d", "23")):
        (tmp_path / name).write_text(text)
    assert cache.path([tmp_path / "a", tmp_path / "b"], RECIPE) != cache.path([tmp_path / "c", tmp_path / "d"], RECIPE)


def test_recipe_without_version_is_refused(cache, source):
    with pytest.raises(ValueError, match="'version'"):
        cache.get_or_make([source], {"window": 60.0}, Make())


def cut_off(content):
    return content[:-7]


def flip_a_bit(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, lambda _: b"", lambda content: b"x" + content, lambda content: content[:10]])
def test_damaged_entry_is_warned_of_and_made_anew(cache, source, damage):
    make = Make()
    cache.get_or_make([source], RECIPE, make)
    path = cache.path([source], RECIPE)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=path.name):
        remade = cache.get_or_make([source], RECIPE, make)
    assert make.calls == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cache.find([source], RECIPE)
    np.testing.assert_array_equal(found["x"], remade["x"])


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("as_npz", [True, False])
def test_a_pickle_in_the_cache_is_not_loaded(cache, source, tmp_path, as_npz):
    mark = tmp_path / "unpickled"
    if as_npz:
        buffer = io.BytesIO()
        np.savez(buffer, x=np.array([Touch(mark)], dtype=object))
        payload = buffer.getvalue()
    else:
        payload = pickle.dumps({"x": Touch(mark)})
    cache.folder.mkdir()
    cache.path([source], RECIPE).write_bytes(cache_module._header(payload) + payload)
    with pytest.warns(UserWarning, match="made anew"):
        assert cache.get_or_make([source], RECIPE, Make())["x"][0, 0] == 1
    assert not mark.exists()


def test_object_arrays_are_refused_and_leave_nothing(cache, source):
    with pytest.raises(TypeError, match="'bad'"):
        cache.get_or_make([source], RECIPE, lambda: {"bad": np.array([{}])})
    assert entries(cache) == []


def test_failing_make_leaves_nothing(cache, source):
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make([source], RECIPE, lambda: 1 // 0)
    assert entries(cache) == []


def test_interrupted_write_leaves_neither_entry_nor_rest(cache, source, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left") as caught:
            cache.get_or_make([source], RECIPE, Make())
    assert str(cache.folder) in str(caught.value) and caught.value.errno == 28
    assert entries(cache) == []
    assert cache.get_or_make([source], RECIPE, Make())["x"][0, 0] == 1


def test_folder_that_cannot_be_made_is_named(source):
    cache = FeatureCache(source / "below a file")
    with pytest.raises(OSError, match="below a file"):
        cache.get_or_make([source], RECIPE, Make())


def test_writers_at_the_same_time(cache, source):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: cache.get_or_make([source], RECIPE, lambda: {"x": np.ones(10_000)}), range(32)))
    assert all(result["x"].sum() == 10_000 for result in results)
    assert entries(cache) == [cache.path([source], RECIPE)]


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HELO_FAST_CACHE", str(tmp_path / "mine"))
    assert FeatureCache().folder == tmp_path / "mine"
    monkeypatch.delenv("HELO_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "helo-fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "helo-fast"
