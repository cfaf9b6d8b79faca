"""Reports: all that a run holds is on the page, what it lacks is said, and nothing that files say can do harm."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from html_document import Document
from launching import run_here, succeed
from vaetrain.command_line import flatten
from vaetrain.report.curves import thinned
from vaetrain.report.document import report, short_names

FID = {
    "name": "lecture-2k", "num_generated": 2000, "num_real": 2000, "prior": "standard", "extractor": "inception-v3-compat",
    "real_images": "train split, 2000 of 60000", "floor": "two disjoint sets of 2000 real images", "layer": "2048",
    "weights_are_published": False, "fid_against_count": {"counts": [1000, 1500, 2000], "fids": [24.0, 22.0, 21.0]},
}  # fmt: skip

EVALUATION = {
    "checkpoint": "checkpoints/step-00000005", "val/elbo_nats": -98.4, "val/psnr_db": 23.0, "eval/fid": 21.03,
    "eval/fid_floor": 4.25, "eval/fid_infinity": 17.5, "eval/kid": 0.0125, "eval/kid_std_error": 0.0004,
    "eval/rfid": None, "eval/rfid_reason": "no weights were given", "eval/nll_nats": 91.5, "eval/nll_nats_se": 0.7,
    "fid_protocol": FID,
    "priors": {"standard": {"heldout_nats_per_dim": -1.41, "eval/fid": 21.03}, "gmm": {"heldout_nats_per_dim": -1.2}},
    "likelihood_protocol": {"nll": {"bounds_nats": {k: {"mean": -92.0, "standard_error": 1.0} for k in ("1", "100")}}},
    "protocol": {"val_fingerprint": "abc"}, "provenance": {"git_revision": "f" * 40, "device": "cpu", "started": "2026-01-02"},
}  # fmt: skip


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A run of its own, scored, with a picture of every kind."""
    folder = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    for name in ("latent_traversals", "priors", "nearest", "my_own"):
        Image.new("RGB", (40, 20), "red").save(folder / "figures" / f"{name}.png")
    return folder


def read(*runs: Path) -> Document:
    return Document(report(runs))


def charts(document: Document) -> dict[str, dict[str, Any]]:
    """Charts by title."""
    figures = [figure for figure in document.all("figure", class_="chart") if "data-chart" in figure.attributes]
    return {figure.text.split("\n")[0]: json.loads(figure.attributes["data-chart"]) for figure in figures}


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_all_of_a_run_is_on_its_page(run):
    document = read(run)
    assert [head.text for head in document.all("h2")] == [
        "Summary", "Curves", "Pictures", "Scores", "Data", "Configuration", "Provenance",
    ]  # fmt: skip
    cells = {cell.text for cell in (*document.all("td"), *document.all("th"))}
    config = yaml.safe_load((run / "config.yaml").read_text())
    for section, content in config.items():
        for key, _ in flatten(content if isinstance(content, dict) else {section: content}):
            assert key in cells, key
    provenance = json.loads((run / "provenance.json").read_text())
    assert {provenance["git_revision"], provenance["device"], provenance["packages"]["torch"]} <= cells
    assert any(
        command.text.startswith("accelerate launch --config_file launch/gpu1.yaml ") for command in document.all("code")
    )
    dataset = json.loads((run / "dataset.json").read_text())
    assert {dataset["train"]["fingerprint"], "100", "23", "cat", "dog", "16 × 16, 3 channels"} <= cells
    pictures = {file.stem for file in (run / "figures").glob("*.png")}
    assert len(document.all("img")) == len(pictures) == 9
    assert all(image.attributes["alt"] and image.attributes["src"].startswith("data:") for image in document.all("img"))
    for name in (name for name in EVALUATION if "/" in name and not name.endswith(("_std_error", "_se", "_reason"))):
        assert name in cells, name
    assert {"0.012500 ± 4.0·10⁻⁴", "91.500 ± 0.70", "21.030", "–", "standard", "gmm"} <= cells
    assert document.references() == []


def test_scores_stand_beside_their_protocol(run):
    text = read(run).text
    assert "FID by protocol lecture-2k: 2,000 samples of the prior standard against 2,000 real images" in text
    assert "Floor: two disjoint sets of 2000 real images." in text
    assert "The extractor's weights are not the published ones" in text
    assert "eval/rfid is not measured: no weights were given" in text
    assert "FID (lecture-2k)" in text
    edit(run / "evaluation.json", fid_protocol=FID | {"weights_are_published": True})
    assert "not the published ones" not in read(run).text


def test_the_line_to_endless_images_goes_through_its_points(run):
    line = {"counts": [1000, 2000], "fids": [24.0, 21.0]}
    edit(run / "evaluation.json", **{"eval/fid_infinity": 18.0}, fid_protocol=FID | {"fid_against_count": line})
    [found] = [chart for chart in charts(read(run)).values() if chart["x"] == "1 / number of images"]
    assert found["series"][0]["points"] == [[0.001, 24.0], [0.0005, 21.0]]
    assert found["series"][1]["points"] == [[0.0, 18.0], [0.001, 24.0]]


def test_every_metric_is_drawn_or_said_to_be_constant(run):
    document = read(run)
    constant = {cell.text for cell in document.all("th", scope="row")}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drawn = [chart["series"] for chart in charts(document).values()]
    for name in {name for record in records for name in record} - {"step", "images_seen", "epoch", "split"}:
        values = [record[name] for record in records if record.get(name) is not None]
        shown = any(
            [y for _, y in line["points"]] == pytest.approx(values, rel=1e-6) for series in drawn for line in series
        )
        assert shown or not values or (name in constant and len(set(values)) == 1), name


def test_null_and_nan_leave_gaps_and_break_nothing(run):
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    train = [record for record in records if record["split"] == "train"]
    train[1]["train/loss"] = None
    train[2]["train/loss"] = math.nan
    train[0]["train/grad_norm"] = "much"
    train[0]["train/skipped_steps"] = 3
    for record in records:
        if record["split"] == "val":
            record["val/psnr_db"] = None
            record["val/elbo_nats"] = math.inf
    event = {"step": 4, "images_seen": 80, "epoch": 1.0, "split": "event", "event": "rollback", "reason": "<b>loss</b>"}
    file.write_text("".join(json.dumps(record) + "\n" for record in (*records, event)))
    document = read(run)
    [loss] = [chart for title, chart in charts(document).items() if "Loss" in title]
    assert [point[1] is None for point in loss["series"][0]["points"]][:3] == [False, True, True]
    assert f"2 of {len(train)} training records have no finite loss" in document.text
    assert "3 step(s) were skipped" in document.text
    assert "<b>loss</b>" in document.text


def test_what_is_missing_is_said_in_a_sentence(run):
    (run / "evaluation.json").unlink()
    shutil.rmtree(run / "figures")
    (run / "dataset.json").unlink()
    (run / "provenance.json").unlink()
    (run / "metrics.jsonl").unlink()
    text = read(run).text
    assert "There is no evaluation.json: vaetrain/evaluate.py --run" in text
    assert "There are no pictures in figures/" in text
    assert "There is no dataset.json: training writes it when it starts." in text
    assert "There is no provenance.json: nobody knows what made this run." in text
    assert "There is no metrics.jsonl: training has recorded nothing yet." in text
    assert "Training has recorded nothing yet." in text


@pytest.mark.parametrize("file", ["evaluation.json", "dataset.json", "provenance.json", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("content", ["{", "[1, 2]\n", "", '{"a": {"b": [1, null]}}\n', "\x00\n", "- {"])
def test_damaged_files_are_named(run, file, content):
    (run / file).write_text(content)
    document = read(run)
    if content.strip() and not content.startswith('{"a"') and (file != "metrics.jsonl" or content.endswith("\n")):
        assert f"{file} is damaged" in document.text or f"line(s) of {file} cannot be read" in document.text
    compared = read(run, run).text
    assert "runs compared" in compared


def test_a_damaged_picture_is_named(run):
    (run / "figures" / "samples.png").write_bytes(b"no picture")
    assert "The picture samples.png (Samples:" in read(run).text


def test_a_run_that_has_not_ended_says_so(run):
    assert "Trained for 1 epochs: 100 images seen in 5 steps." in read(run).text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["epochs"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "of 300 images wanted: training goes on, was interrupted, or stopped early." in read(run).text


HOSTILE = "<script>window.hacked=1<script><img src=x onerror=hacked=1>"


def poison(value: object) -> object:
    """Every text of a record, names too, hostile."""
    if isinstance(value, dict):
        return {f"{name}{HOSTILE}": poison(item) for name, item in value.items()} | {
            name: poison(item) for name, item in value.items()
        }
    if isinstance(value, list):
        return [poison(item) for item in value]
    return value + "</script>" + HOSTILE if isinstance(value, str) else value


@pytest.fixture
def hostile_run(run) -> Path:
    """A run whose name and every text in its files try to be HTML."""
    for name in ("evaluation.json", "dataset.json", "provenance.json"):
        content = json.loads((run / name).read_text())
        poisoned = {key: poison(value) for key, value in content.items()}
        (run / name).write_text(json.dumps(poisoned | {HOSTILE: "x", f"eval/{HOSTILE}": 1.0}))
    config = {key: poison(value) for key, value in yaml.safe_load((run / "config.yaml").read_text()).items()}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, record in enumerate(records):
        record[f"train/{HOSTILE}"] = step
    event = {"split": "event", "event": HOSTILE, "reason": HOSTILE, "epoch": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, event]))
    (run / "uncommitted.patch").write_text(f"</code></pre>{HOSTILE}")
    Image.new("RGB", (4, 4)).save(run / "figures" / f"{HOSTILE.replace('/', '')}.png")
    return run.rename(run.with_name(HOSTILE))


def test_names_and_files_that_try_to_be_html_are_harmless(hostile_run, tiny_run):
    for document in (read(hostile_run), read(hostile_run, tiny_run)):
        assert len(document.all("script")) == 2  # the page's own
        assert not [e for e in document.elements if any(name.startswith("on") for name in e.attributes)]
        assert all(image.attributes["src"].startswith("data:") for image in document.all("img"))
        assert document.text.count(HOSTILE) > 50
        assert document.references() == []
    assert read(hostile_run).all("h1")[0].text == HOSTILE


@pytest.fixture
def run_of_two(run, tmp_path) -> Path:
    """Another run, with another learning rate and other losses."""
    folder = shutil.copytree(run, tmp_path / "elsewhere" / "second")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["optim"]["lr"] = 0.125
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record |= {"train/loss": 7.5} if record["split"] == "train" else {"val/psnr_db": 30.25}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "evaluation.json").unlink()
    return folder


def test_several_runs_are_compared(run, run_of_two):
    document = read(run, run_of_two)
    headings = [head.text for head in document.all("h2")]
    assert headings == ["Results side by side", "Curves compared", "What differs", "Pictures compared", "run", "second"]
    rows = [line.split("\n")[0] for line in (row.text for row in document.all("tr"))]
    assert any(row.startswith("optim.lr") and row.endswith("0.125") for row in rows)
    assert any(row.startswith("val/psnr_db") and row.endswith("30.25") for row in rows)
    assert any(row.startswith("eval/fid (lecture-2k)21.03–") for row in rows)
    [loss] = [chart for title, chart in charts(document).items() if "Training loss" in title]
    assert [line["label"] for line in loss["series"]] == ["run", "second"]
    assert {y for _, y in loss["series"][1]["points"]} == {7.5}
    assert "config differs: optim.lr" in document.text


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert short_names(paths) == ["a/run", "b/run"]
    assert short_names([paths[0], paths[0]]) == ["run (1)", "run (2)"]
    assert short_names([paths[0], tmp_path / "c"]) == ["run", "c"]


def test_a_run_that_cannot_be_compared_is_left_out_and_named(run, run_of_two):
    (run_of_two / "dataset.json").write_text("{")
    text = read(run, run_of_two).text
    assert f"{run_of_two} is left out:" in text
    assert "Fewer than two of these runs can be compared." in text


def test_long_lines_keep_their_spikes():
    line = [(float(step), 1000.0 if step == 77_777 else 1.0) for step in range(100_000)]
    found = thinned(line)
    assert len(found) <= 2001
    assert (77_777.0, 1000.0) in found
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert len(thinned([(float(step), math.nan) for step in range(10_000)])) <= 2001


def test_the_tool_writes_where_it_says(run, tmp_path, capsys):
    assert run_here("tools/report.py", run) == 0
    assert f"report written to {run / 'report.html'} (" in capsys.readouterr().out
    assert "elsewhere" not in (run / "report.html").read_text()
    out = tmp_path / "new" / "page.html"
    assert f"report written to {out} (" in succeed("tools/report.py", run, run, "--out", out, python=sys.executable)
    assert (run / "report.html").read_text() == report([run])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "run directory {path} does not exist"),
        (lambda path: path.mkdir(), "{path} is no run directory (it has no config.yaml); name one that vaetrain/train.py made"),
        (lambda path: path.write_text(""), "{path} is no run directory (it has no config.yaml); name one"),
        (lambda path: [(path / "a").mkdir(parents=True), (path / "a" / "config.yaml").touch()],
         "{path} is no run directory (it has no config.yaml); it holds some, name those: {path}/a"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused_with_a_remedy(tmp_path, make, said):
    path = tmp_path / "x"
    make(path)
    with pytest.raises(FileNotFoundError) as error:
        report([path])
    assert str(error.value).startswith(said.format(path=path))


def test_the_tool_refuses_without_a_traceback(run, tmp_path, capsys):
    for arguments, said in (
        ([tmp_path / "x"], f"error: run directory {tmp_path / 'x'} does not exist\n"),
        ([], "error: name at least one run directory\n"),
        ([run, "--out", run], f"error: --out {run} is a folder; name a file, for example {run / 'report.html'}\n"),
    ):
        assert (run_here("tools/report.py", *arguments), capsys.readouterr().err) == (1, said)
    edit(run / "provenance.json", format_version=99, packages={"vaetrain": "9.9"})
    with pytest.raises(ValueError, match="which wrote it, or a later one"):
        report([run])
