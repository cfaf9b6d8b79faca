from launching import TINY
from together import script_succeeds
from vaetrain.data.sharding.config import ShardingConfig
from vaetrain.data.sharding.make_shards import make_shards


def test_a_single_validation_image_is_drawn_and_tracked(tmp_path):
    """It has nobody to be interpolated with, so there is one picture less for the tracker."""
    shards = tmp_path / "shards"
    make_shards(ShardingConfig("faces", shards, size=16, num_images=21, val_count=1, workers=1))
    script_succeeds(
        "vaetrain/train.py", "--data.train", shards, *TINY, "--train.epochs", 1, "--log.tensorboard", "True",
        "--run-dir", tmp_path / "run",
    )  # fmt: skip
    drawn = {file.stem for file in (tmp_path / "run" / "figures").iterdir()}
    assert drawn == {"reconstructions", "samples", "losses", "kl"}
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
