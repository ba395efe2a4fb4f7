"""The examples and the README's own code run, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SELF_CONTAINED = ("Batched OT in three lines", "Operators")  # the README's sections whose code needs nothing else


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    return [float(found) for found in re.findall(pattern, text)]


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"batched_ot", "shape_matching"}


def test_batched_ot():
    printed = run(ROOT / "examples" / "batched_ot.py")
    assert "1770 pairs of clouds of 32 points" in printed
    assert numbers(r"same shape: (\d+)%", printed)[0] >= 90
    divergence = numbers(r"from circles ([\d.]+)", printed)
    assert len(divergence) == 4 and divergence == sorted(divergence, reverse=True) and divergence[-1] < 0.01 * divergence[0]


def test_shape_matching():
    printed = run(ROOT / "examples" / "shape_matching.py")
    right, distortion = numbers(r"(\d+)% of the points", printed), numbers(r"distortion ([\d.]+)", printed)
    assert len(right) == 3 and right[0] >= 99 and min(right) >= 90
    assert distortion == sorted(distortion)


@pytest.mark.parametrize("section", SELF_CONTAINED)
def test_readme_code_runs(section):
    text = (ROOT / "README.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        run("-c", block)
