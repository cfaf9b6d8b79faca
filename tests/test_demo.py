"""`make demo` in small: its own commands, on fewer faces and for fewer steps, each started by the ordinary Python."""

import json
import shlex
import subprocess
import sys

import numpy as np
from PIL import Image

import vaetrain
from launching import ROOT, succeed

FEWER = {
    "--num-images 2000 --val-count 10%": "--num-images 72 --val-count 8",
    "--num-images 200": "--num-images 10",
    "--likelihood.num-images 16 --likelihood.num-samples 100": "--likelihood.num-images 4 --likelihood.num-samples 20",
    "--fit.gmm-components 10": "--fit.gmm-components 2",
}
SHORTER = "--train.num-images 64 --train.val-every-epochs 1 --log.every-steps 1 --log.num-pictures 4"


def demo_commands(folder):
    """What `make demo` would run, with its folders under `folder` and its numbers made small."""
    recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    recipe = recipe.replace("\\\n", " ")
    for before, after in FEWER.items():
        assert before in recipe
        recipe = recipe.replace(before, after)
    recipe = recipe.replace("datasets/faces64", f"{folder}/faces64").replace("runs/demo", f"{folder}/run")
    scripts = [line for line in recipe.splitlines() if "vaetrain/" in line or "tools/" in line]
    for line in scripts:
        words = shlex.split(line)
        first = next(number for number, word in enumerate(words) if word.startswith(("vaetrain/", "tools/")))
        yield words[first:]


def test_the_demo_end_to_end(tmp_path):
    commands = list(demo_commands(tmp_path))
    assert [command[0] for command in commands] == [
        "tools/make_shards.py", "vaetrain/train.py", "vaetrain/evaluate.py", "vaetrain/sample.py", "tools/export.py",
        "tools/report.py",
    ]  # fmt: skip
    for command in commands:
        if command[0] == "vaetrain/train.py":
            own = ["--run-dir", tmp_path / "run", "--data.train", tmp_path / "faces64"]
            command = [*command, *own, *SHORTER.split()]
        assert str(tmp_path) in succeed(*command, python=sys.executable).splitlines()[-1], (
            "the last line says where the output is"
        )
    for name in ("losses", "kl", "reconstructions", "samples", "interpolations"):
        with Image.open(tmp_path / "run" / "figures" / f"{name}.png") as picture:
            colours = np.unique(np.asarray(picture.convert("RGB").resize((32, 32))).reshape(-1, 3), axis=0)
            assert len(colours) > 10, f"{name}.png is blank"
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["val/ssim"] <= 1
    assert "reconstructions" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "samples" / "manifest.json").read_text())["count"] == 10
    assert vaetrain.load(tmp_path / "run" / "export").sample(2).shape == (2, 3, 64, 64)
