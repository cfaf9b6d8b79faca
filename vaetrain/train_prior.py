"""Train a flow-matching prior on the latents of a trained VAE, on any number of processes: the second stage.

accelerate launch --config_file launch/gpu1.yaml vaetrain/train_prior.py --first-stage RUN [--data.latents DIR]
(launch/ has layouts for more processes, too)
"""

from __future__ import annotations

if __name__ == "__main__":
    from vaetrain.distributed.launcher import end_with_launcher

    end_with_launcher()  # before anything that takes time

from vaetrain.command_line import parse
from vaetrain.priors.flow_matching.config import PriorTraining

if __name__ == "__main__":
    CONFIG = parse(PriorTraining, __doc__)  # before the imports below, which take seconds

    from vaetrain.preflight import check_prior_training, refusing

    with refusing():
        check_prior_training(CONFIG)

from contextlib import ExitStack

from vaetrain.encode import EncodeConfig, encode
from vaetrain.priors.flow_matching.stage import FlowMatchingStage
from vaetrain.runs.directory import RunDirectory
from vaetrain.train import run_training


class SecondStage(FlowMatchingStage):
    """Flow matching on latents that are encoded at the start, where none are given."""

    def open_data(self, opened: ExitStack) -> None:
        """See `FlowMatchingStage`."""
        if self.config.data.latents is None:
            trained_on = RunDirectory.open(self.config.first_stage).config().data
            request = EncodeConfig(
                self.config.first_stage, self.latents, flip=trained_on.horizontal_flip, data=self.config.data.images
            )
            encode(request, self.accelerator)
        super().open_data(opened)


def main(config: PriorTraining) -> None:
    """Join the other processes and train."""
    run_training(config, SecondStage)


if __name__ == "__main__":
    main(CONFIG)
