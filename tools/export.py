"""Export a run's trained model: weights, a config and a model card, for `vaetrain.load`, for diffusers, or as ONNX.

python tools/export.py RUN OUT [--format vaetrain|diffusers|onnx] [--push-to-hub OWNER/NAME]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vaetrain.command_line import parse, user_errors


@dataclass(frozen=True)
class ExportArguments:
    """What to export, and where to."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""

    out: tyro.conf.Positional[Path]
    """Folder for the weights, config.json and README.md."""

    format: Literal["vaetrain", "diffusers", "onnx"] = "vaetrain"
    """vaetrain: what `vaetrain.load` reads. diffusers: what `diffusers.AutoencoderKL.from_pretrained` reads, of a model of the kind
    autoencoder-kl; every training image is encoded once, for the latents' statistics, by as many processes as are launched. onnx: a
    graph each for encoder and decoder, compared with the model under onnxruntime (vaetrain[onnx])."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint with the best validation score, or the newest. EMA weights either way."""

    normalise: Literal["scalar", "channels"] = "scalar"
    """What a second stage is told to normalise latents by (diffusers). scalar: scaling_factor and shift_factor, one for all
    channels. channels: latents_mean and latents_std, with a scaling_factor of 1."""

    data: str | None = None
    """Shard set of the training images (diffusers); None: where the run found it."""

    batch_size: int = 64
    """Images encoded at a time by each process (diffusers)."""

    push_to_hub: str | None = None
    """Repository OWNER/NAME of the Hugging Face Hub to upload the export to, as the owner of HF_TOKEN."""

    public: bool = False
    """A repository that is new may be seen by everybody: mind the licence of the training images."""


def write(arguments: ExportArguments) -> None:
    """Export on as many processes as there are, and push; only diffusers' format has work for more than one."""
    from vaetrain import export  # imports torch, which --help and a wrong path need not wait for
    from vaetrain.distributed import processes
    from vaetrain.interchange.hub import push
    from vaetrain.priors.saved import prior_file, prior_of_run

    run, out, checkpoint = arguments.run, arguments.out, arguments.checkpoint
    is_main = True
    match arguments.format:
        case "vaetrain":
            trained = export.load_run(run, checkpoint=checkpoint)
            has_prior = prior_of_run(run, trained) is not None  # and it is whole
            prior = prior_file(run, trained, "flow-matching") if has_prior else None
            export.export(run, out, checkpoint=checkpoint, prior=prior)
        case "onnx":
            _, difference = export.export_onnx(run, out, checkpoint=checkpoint)
            print(f"onnxruntime and the model differ by at most {difference:.1e}")
        case "diffusers":
            accelerator = processes.start()
            with processes.finishing(accelerator):
                is_main = accelerator.is_main_process
                export.export_diffusers(
                    run, out, accelerator, checkpoint=checkpoint, normalise=arguments.normalise, data=arguments.data,
                    batch_size=arguments.batch_size,
                )  # fmt: skip
    if is_main:
        print(f"exported to {out}")
        if arguments.push_to_hub is not None:
            print(f"pushed to {push(out, arguments.push_to_hub, public=arguments.public)}")


if __name__ == "__main__":
    ARGUMENTS = parse(ExportArguments, __doc__, flags=True)

    from vaetrain.interchange.hub import require_login
    from vaetrain.preflight import check_run

    with user_errors():
        check_run(ARGUMENTS.run)
        if ARGUMENTS.push_to_hub is not None:
            require_login(ARGUMENTS.push_to_hub)
        write(ARGUMENTS)
