"""Fixtures of the tests that train; the packages that training needs may be absent, and are imported where they are used."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are slower on several; and the processes of a test must agree on the number to agree on the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Figures take longer than these trainings; test_report.py looks at them."""
    from helo_fast.train import summary

    monkeypatch.setattr(summary, "write_report", lambda out: None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of three folds and two seeds; not to be changed."""
    from small_run import train

    out = tmp_path_factory.mktemp("run") / "out"
    assert train(out, "--seeds", "0", "1") == 0
    return out
