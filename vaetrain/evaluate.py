"""Score a trained VAE: ELBO, bits per dimension, reconstruction and FID, on any number of processes.

accelerate launch --config_file launch/gpu1.yaml vaetrain/evaluate.py --run RUN [--fid.num-images 2000] [--fid.weights FILE]
(launch/ has layouts for more processes, too)

A score carries its protocol: which images, how many, through which network with which weights. FID stands next to its
floor (real images against real ones) and its extrapolation to endlessly many images.
"""

from __future__ import annotations

from vaetrain.command_line import parse, plain, user_errors
from vaetrain.metrics.config import EvaluateConfig, ScoreName

if __name__ == "__main__":
    CONFIG = parse(EvaluateConfig, __doc__)  # before the imports below, which take seconds

    from vaetrain.preflight import check_evaluation, refusing

    with refusing():
        check_evaluation(CONFIG)

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from vaetrain import distributed
from vaetrain.run import write_json
from vaetrain.scoring import Scoring, out_file


def evaluate(config: EvaluateConfig, accelerator: Accelerator) -> dict[str, Any]:
    """All scores by name, with the protocol behind them and the provenance of model and scores. A collective.

    `val/*` are means over every image of the val split; what compares images through a network is None, with a reason, when
    no weights are given. Raises ValueError when nothing else was asked for.
    """
    scoring = Scoring(config, accelerator)
    # FID first: it is what may find fault with the options, and nothing has been computed in vain by then.
    parts: dict[ScoreName, Callable[[], dict[str, Any]]] = {
        "fid": scoring.generation,
        "rfid": scoring.reconstruction,
        "elbo": scoring.elbo,
        "lpips": scoring.perceptual,
        "likelihood": scoring.likelihood,
        "nearest": scoring.nearest,
        "latents": scoring.latents,
    }
    scores = scoring.compare_priors()
    for name, measure in parts.items():
        if name in config.scores:
            scores |= measure()
    trained = scoring.trained
    record: dict[str, Any] = {
        "run": str(config.run),
        "checkpoint": str(trained.checkpoint),
        **trained.position(),
        "split": "val",
        **scores,
        "protocol": {
            "evaluate": plain(config),
            "val_fingerprint": scoring.val_reader.manifest.fingerprint,
            "elbo": "one latent sample per image; bits_per_dim of a density is approximate, see docs/objective.md",
        },
        "training": {"config": trained.config, "provenance": trained.provenance, "dataset": trained.dataset},
        "provenance": scoring.provenance(scoring.val_reader.manifest.fingerprint),
    }
    if accelerator.is_main_process:
        write_json(out_file(config), record)
        print_scores(record)
        print(f"scores written to {out_file(config)}")
    return record


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
    if not record.get("fid_protocol", {}).get("weights_are_published", True):
        print("eval/fid is no FID that compares with anybody's: the extractor's weights are not the published ones")


def main(config: EvaluateConfig) -> None:
    """Join the other processes and score."""
    with user_errors():
        accelerator = distributed.start(config.precision)
        with distributed.finishing(accelerator):
            evaluate(config, accelerator)


if __name__ == "__main__":
    main(CONFIG)
