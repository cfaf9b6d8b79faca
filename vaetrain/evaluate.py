"""Score a trained VAE: ELBO, bits per dimension, reconstruction and FID, on any number of processes.

accelerate launch --config_file launch/gpu1.yaml vaetrain/evaluate.py --run RUN [--fid.num-images 2000] [--fid.weights FILE]
(launch/ has layouts for more processes, too)

A score carries its protocol: which images, how many, through which network with which weights. FID stands next to its
floor (real images against real ones) and its extrapolation to endlessly many images.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vaetrain.distributed.launcher import end_with_launcher

    end_with_launcher()  # before anything that takes time

from vaetrain.command_line import parse, plain, user_errors
from vaetrain.evaluation.config import EvaluateConfig
from vaetrain.exit_codes import EXIT_INCOMPLETE
from vaetrain.runs.provenance import provenance

if __name__ == "__main__":
    CONFIG = parse(EvaluateConfig, __doc__)  # before the imports below, which take seconds

    from vaetrain.preflight import check_evaluation, refusing

    with refusing():
        check_evaluation(CONFIG)

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator

from vaetrain.distributed import processes
from vaetrain.evaluation.evaluator import Evaluator, out_file
from vaetrain.evaluation.scores_file import ScoresFile
from vaetrain.progress_bar import ProgressBar
from vaetrain.training import precision


def evaluate(config: EvaluateConfig, accelerator: Accelerator) -> dict[str, Any]:
    """All scores by name, with the protocol behind them and the provenance of model and scores. A collective.

    `val/*` are means over every image of the val split. What cannot be measured, for want of weights or because its group fails,
    is None with a reason, and what fails or was asked for by name stands under `failed`. The file is written after each
    group. Raises ValueError when nothing at all can be measured.
    """
    scoring, file = Evaluator(config, accelerator), ScoresFile(out_file(config))
    # FID first: it is what is most often impossible, and nothing has been waited for by then.
    groups: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "priors": ("priors of the latents", scoring.compare_priors),
        "fid": ("FID of samples", scoring.generation),
        "rfid": ("FID of reconstructions", scoring.reconstruction),
        "elbo": ("ELBO and reconstruction of the validation images", scoring.elbo),
        "lpips": ("LPIPS of reconstructions", scoring.perceptual),
        "likelihood": ("bound on log p(x), mutual information, active units", scoring.likelihood),
        "nearest": ("nearest training images of samples", scoring.nearest),
        "latents": ("pictures of the latent space", scoring.latents),
    }
    asked = [name for name in groups if name in config.scores or (name == "priors" and scoring.wants_priors)]
    scores: dict[str, Any] = {}
    made_by = provenance(accelerator, scoring.val_reader.manifest.fingerprint)
    for number, name in enumerate(asked, start=1):
        what, measure = groups[name]
        if accelerator.is_main_process:
            print(f"{number}/{len(asked)} {what}", flush=True)
        with ProgressBar(what, quiet=not accelerator.is_main_process):
            if name != "priors":
                scoring.prepare_samples()
            scores |= scoring.attempt(name, measure)
        record = describe(scoring, scores, made_by, unfinished=asked[number:])
        if accelerator.is_main_process:
            file.write(record)
    if set(config.scores) <= scoring.failures.keys():
        if accelerator.is_main_process:
            file.give_up()
        scoring.raise_first_error()
    if accelerator.is_main_process:
        file.finish()
        print_scores(record)
        print(f"scores written to {file.path}")
    return record


def describe(
    scoring: Evaluator, scores: dict[str, Any], made_by: dict[str, Any], unfinished: Sequence[str]
) -> dict[str, Any]:
    """The record: what was scored, the scores so far, what failed, and how all of it was made."""
    config, trained = scoring.config, scoring.trained
    return {
        "run": str(config.run),
        "checkpoint": str(trained.checkpoint),
        **trained.position(),
        "split": "val",
        **({"unfinished": list(unfinished)} if unfinished else {}),
        **({"failed": dict(scoring.failures)} if scoring.failures else {}),
        **scores,
        "protocol": {
            "evaluate": plain(config),
            "val_fingerprint": scoring.val_reader.manifest.fingerprint,
            "elbo": "one latent sample per image; bits_per_dim of a density is approximate, see docs/objective.md",
        },
        "training": {"config": trained.config, "provenance": trained.provenance, "dataset": trained.dataset},
        "provenance": made_by,
    }


def print_scores(record: dict[str, Any]) -> None:
    """A line for each number, for each one that is missing the reason, and a table of priors if there are several."""
    for name, value in record.items():
        if "/" in name and not isinstance(value, str):
            print(f"{name:38s} {value if value is None else format(value, ',.6g')}")
    missing: dict[str, list[str]] = {}  # one line for all that lack the same
    for name, value in record.items():
        if name.endswith("_reason"):
            missing.setdefault(value, []).append(name.removesuffix("_reason"))
    for reason, names in missing.items():
        print(f"not measured: {', '.join(names)}: {reason}")
    for name, row in record.get("priors", {}).items():
        numbers = {
            "held-out nats/dim": row["heldout_nats_per_dim"],
            "FID": row.get("eval/fid"),
            "KID": row.get("eval/kid"),
        }
        known = ", ".join(f"{label} {value:,.4g}" for label, value in numbers.items() if value is not None)
        print(f"prior {name:12s} {known or 'no density'}")
    for name, reason in record.get("failed", {}).items():
        print(f"failed: {name}: {reason}")
    if not record.get("fid_protocol", {}).get("weights_are_published", True):
        print("eval/fid is no FID that compares with anybody's: the extractor's weights are not the published ones")


def main(config: EvaluateConfig) -> None:
    """Join the other processes and score; exits with EXIT_INCOMPLETE when something is missing that was asked for."""
    with user_errors():
        accelerator = precision.start(config.precision, timeout_s=config.timeout_s, timeout_option="--timeout-s")
        with processes.finishing(accelerator):
            record = evaluate(config, accelerator)
    if record.get("failed"):
        raise SystemExit(EXIT_INCOMPLETE)


if __name__ == "__main__":
    main(CONFIG)
