"""What the best checkpoint goes by, and the distance of reconstructions while training."""

import json
import re

import pytest

from launching import TINY
from torchscript_extractor import write_torchscript_extractor
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.evaluate import evaluate
from vaetrain.evaluation.config import EvaluateConfig
from vaetrain.metrics.config import FidConfig
from vaetrain.metrics.validation import ValidationScores
from vaetrain.preflight import check_rfid
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.training.progress import Progress


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    return write_torchscript_extractor(tmp_path_factory.mktemp("network") / "tiny.pt")


def validations(run_dir):
    every = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in every if record["split"] == "val"]


def state(run_dir):
    [*_, newest] = list_checkpoints(run_dir / "checkpoints")
    return json.loads((newest / "state.json").read_text())["progress"]


def test_each_score_is_better_when_it_is_higher_and_distances_when_they_are_lower():
    scores = ValidationScores(-20.0, 12.0, 8.0, 1.0, 0.1, 10.0, 0.5, {"lpips": 0.3, "rfid": 40.0})
    assert {by: scores.score(by) for by in ("elbo", "psnr", "ssim", "lpips", "rfid")} == {
        "elbo": -20.0, "psnr": 10.0, "ssim": 0.5, "lpips": -0.3, "rfid": -40.0,
    }  # fmt: skip
    assert ValidationScores(-20.0, 12.0, 8.0, 1.0, 0.1, 10.0, 0.5).score("rfid") is None


def test_a_validation_without_the_score_is_neither_better_nor_worse_and_another_score_begins_anew():
    progress = Progress(step=3, sound_step=3)
    progress.note_validation(None, "rfid")
    progress.note_validation(-5.0, "rfid")
    progress.note_validation(None, "rfid")
    assert (progress.best_score, progress.best_step, progress.validations_without_best) == (-5.0, 3, 0)
    progress.step = progress.sound_step = 4
    progress.note_validation(-7.0, "elbo")
    assert (progress.best_score, progress.best_step, progress.best_by) == (-7.0, 4, "elbo")


def test_rfid_while_training_is_that_of_evaluate_and_chooses_the_best(
    extractor, train_tiny, accelerator, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run_dir = train_tiny(
        "--train.best-by", "rfid", "--train.rfid.every-epochs", 2, "--train.rfid.extractor", extractor, epochs=5
    )
    found = [record.get("val/rfid") for record in validations(run_dir)]
    assert [value is not None for value in found] == [False, True, False, True, True]
    assert not any("val_raw/rfid" in record for record in validations(run_dir))
    best = min(value for value in found if value is not None)
    assert state(run_dir)["best_score"] == -best
    at = next(record for record in validations(run_dir) if record.get("val/rfid") == best)
    assert state(run_dir)["best_step"] == at["step"]
    fid = FidConfig(extractor=str(extractor))
    scores = evaluate(EvaluateConfig(run=run_dir, scores=("rfid",), checkpoint="best", fid=fid), accelerator)
    assert scores["eval/rfid"] == pytest.approx(best, rel=1e-5)


def test_the_best_is_by_psnr_if_asked_for(train_tiny):
    run_dir = train_tiny("--train.best-by", "psnr", epochs=3)
    best = max(validations(run_dir), key=lambda record: record["val/psnr_db"])
    assert (state(run_dir)["best_step"], state(run_dir)["best_score"]) == (best["step"], best["val/psnr_db"])
    again = train_tiny("--train.best-by", "ssim", epochs=4)
    assert (state(again)["best_by"], state(again)["best_step"]) == ("ssim", 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train.best-by", "rfid"), "needs --train.rfid.every-epochs"),
        (("--train.best-by", "lpips"), "needs --objective.perceptual.weight above 0"),
        (("--train.rfid.every-epochs", "0"), "give at least 1, or None"),
        (("--train.rfid.every-epochs", "1"), r"inception-v3-compat needs --train.rfid.weights FILE"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        parse(Config, None, [*TINY, "--data.train", "shards", *options])
    assert re.search(message, " ".join(capsys.readouterr().err.replace("│", " ").split()))


def test_a_missing_network_is_said_before_anything_is_opened():
    settings = parse(
        Config,
        None,
        [*TINY, "--data.train", "x", "--train.rfid.every-epochs", "1", "--train.rfid.extractor", "none.pt"],
    )
    with pytest.raises(FileNotFoundError, match=r"--train.rfid.extractor none.pt does not exist"):
        check_rfid(settings.train.rfid)
