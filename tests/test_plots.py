from vaetrain.data.sharding import make_shards
from vaetrain.data.sharding_config import ShardingConfig


def test_a_single_validation_image_is_drawn_and_tracked(train_tiny, tmp_path):
    """It has nobody to be interpolated with, so there is one picture less for the tracker."""
    shards = tmp_path / "shards"
    make_shards(ShardingConfig("faces", shards, size=16, num_images=21, val_count=1, workers=1))
    run_dir = train_tiny("--data.train", shards, "--log.tensorboard", "True", epochs=1)
    drawn = {file.stem for file in (run_dir / "figures").iterdir()}
    assert drawn == {"reconstructions", "samples", "losses", "kl"}
