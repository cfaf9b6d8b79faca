"""The scores of evaluation.json with what each means and what it was computed from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vaetrain.command_line import flatten
from vaetrain.report.chart import Series, chart
from vaetrain.report.page import absent, caution, fold, paragraph, side_by_side, subheading, table
from vaetrain.report.values import inner, number_text, shown_value
from vaetrain.runs.record import RunRecord, number

MEANINGS = {
    "val/elbo_nats": "lower bound on log p(x), nats per image; larger is better",
    "val/distortion_nats": "−log p(x|z), nats per image",
    "val/rate_nats": "KL(q(z|x) ‖ p(z)), nats per image",
    "val/bits_per_dim": "−ELBO in bits per pixel value; smaller is better",
    "val/mse": "mean squared error on [0, 1]; smaller is better",
    "val/psnr_db": "dB; larger is better",
    "val/ssim": "structural similarity, at most 1; larger is better",
    "eval/fid": "samples against real images; smaller is better",
    "eval/fid_floor": "real images against other real ones: what a perfect generator would score",
    "eval/fid_at_num_floor": "FID of as many images on either side as the floor has: what to hold against it",
    "eval/fid_infinity": "FID extrapolated to endlessly many images",
    "eval/fid_val": "samples against the val split",
    "eval/fid_train": "samples against as many training images",
    "eval/fid_gap": "eval/fid_val − eval/fid_train: several standard errors mean learned by heart",
    "eval/kid": "kernel distance, unbiased; smaller is better",
    "eval/precision": "share of samples among real images; larger is better",
    "eval/recall": "share of real images among samples; larger is better",
    "eval/inception_score": "larger is better, for natural images",
    "eval/rfid": "FID of reconstructions against their images; smaller is better",
    "eval/rfid_infinity": "the same, extrapolated to endlessly many images",
    "eval/lpips": "perceptual distance of reconstructions; smaller is better",
    "eval/nll_nats": "−log p(x) by importance sampling, an upper bound, nats per image; smaller is better",
    "eval/nll_bits_per_dim": "the same in bits per pixel value",
    "eval/rate_nats": "mutual information + marginal KL",
    "eval/mutual_information_nats": "what a code says about its image",
    "eval/marginal_kl_nats": "how far all codes together lie from the prior",
    "eval/dimension_kl_nats": "of the marginal KL, each dimension by itself",
    "eval/total_correlation_nats": "of the marginal KL, dependence between dimensions",
    "eval/elbo_gap_nats": "ELBO of training less ELBO of validation images",
    "eval/active_units": "latent units whose mean varies by more than the threshold",
    "eval/active_units_threshold": "variance of a posterior mean over images",
    "eval/nearest_pixel_distance_ratio": "distance of samples to training images over that of validation images: near 0 for copies",
    "eval/nearest_pixel_distance_ratio_to_recon": "the same over reconstructions, which are as blurred as samples",
    "eval/nearest_pixel_closer_than_val": "½ where nothing is copied, 1 for copies",
    "eval/nearest_feature_distance_ratio": "as above, in the features that nearest_protocol names",
    "eval/nearest_feature_distance_ratio_to_recon": "as above, in the features that nearest_protocol names",
    "eval/nearest_feature_closer_than_val": "as above, in the features that nearest_protocol names",
}
"""By contract name."""

GROUPS = (
    ("ELBO and reconstruction", ("val/",)),
    ("Samples", ("eval/fid", "eval/kid", "eval/precision", "eval/recall", "eval/inception")),
    ("Reconstructions through a network", ("eval/rfid", "eval/lpips")),
    ("Memorisation", ("eval/nearest",)),
    ("Likelihood and latent", ("eval/",)),
)
"""A score belongs to the first group that has the beginning of its name."""

ERRORS = ("_se", "_std_error", "_std")
"""Endings of the names of standard errors, and of the inception score's deviation between splits."""

PRIOR_COLUMNS = {
    "heldout_nats_per_dim": "held-out nats/dim", "eval/fid": "FID", "eval/fid_infinity": "FID∞", "eval/kid": "KID",
    "eval/precision": "precision", "eval/recall": "recall",
}  # fmt: skip
"""Of the table of priors; those that no prior has are left out."""


def scores_of_run(recorded: RunRecord) -> str:
    """All of evaluation.json."""
    scores = recorded.evaluation
    if scores is None:
        return absent(
            recorded.why_not(recorded.run.evaluation_file, f"vaetrain/evaluate.py --run {recorded.run.path} writes it.")
        )
    parts = [paragraph(_of_what(scores)), *map(paragraph, _reasons(scores))]
    left = {name for name in scores if "/" in name and not name.endswith("_reason")}
    for title, beginnings in GROUPS:
        names = [name for name in scores if name in left and name.startswith(beginnings)]
        left -= set(names)
        if names:
            parts.append(subheading(title))
            if title == "Samples":
                parts.append(_fid_protocol(scores))
            parts.append(table(("score", "value", "what it is"), _rows(scores, names)))
            if title == "Samples":
                parts.append(_priors(scores))
    parts += [_charts(scores), *_protocols(scores)]
    return "".join(parts)


def summary_rows(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few scores one asks for first, those that there are, FID under the name of its protocol."""
    protocol = inner(scores, "fid_protocol").get("name")
    wanted = {
        "val/elbo_nats": "ELBO, nats per image", "val/bits_per_dim": "bits/dim", "eval/nll_nats": "−log p(x) ≤, nats per image",
        "val/psnr_db": "PSNR, dB", "val/ssim": "SSIM", "eval/fid": f"FID ({protocol})" if protocol else "FID",
        "eval/fid_floor": "FID floor", "eval/fid_infinity": "FID∞", "eval/rfid": "rFID", "eval/lpips": "LPIPS",
        "eval/active_units": "active units",
    }  # fmt: skip
    return [
        (label, number_text(value))
        for name, label in wanted.items()
        if math.isfinite(value := number(scores.get(name)))
    ]


def _of_what(scores: Mapping[str, Any]) -> str:
    origin = inner(scores, "provenance")
    device = origin.get("device", "an unknown device")
    revision = str(origin.get("git_revision") or "unknown revision")[:12]
    return (
        f"Of {scores.get('checkpoint', 'an unnamed checkpoint')}, scored {origin.get('started', 'at an unknown time')} by "
        f"{revision}{' with uncommitted changes' if origin.get('git_dirty') else ''} on {device}."
    )


def _reasons(scores: Mapping[str, Any]) -> list[str]:
    return [
        f"{name.removesuffix('_reason')} is not measured: {reason}"
        for name, reason in scores.items()
        if name.endswith("_reason")
    ]


def _rows(scores: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str, str]]:
    errors = {f"{name}{ending}" for name in names for ending in ERRORS}
    rows = []
    for name in names:
        if name in errors:
            continue
        error = next((number(scores[name + ending]) for ending in ERRORS if name + ending in scores), math.nan)
        value = scores[name]
        shown = number_text(number(value)) if value is None or isinstance(value, int | float) else shown_value(value)
        if math.isfinite(error):
            shown += f" ± {number_text(error, 2)}"
        rows.append((name, shown, MEANINGS.get(name, "")))
    return rows


def _fid_protocol(scores: Mapping[str, Any]) -> str:
    protocol = inner(scores, "fid_protocol")
    if not protocol:
        return ""
    parts = [
        paragraph(
            f"FID by protocol {protocol.get('name')}: {shown_value(protocol.get('num_generated'))} samples of the prior "
            f"{protocol.get('prior', 'standard')} against {shown_value(protocol.get('num_real'))} real images "
            f"({protocol.get('real_images')}), through {protocol.get('extractor')}, layer {protocol.get('layer')}. "
            f"Floor: {protocol.get('floor', 'not recorded')}."
        )
    ]
    if protocol.get("weights_are_published") is False:
        parts.append(
            caution("The extractor's weights are not the published ones: this FID compares with nobody else's.")
        )
    return "".join(parts)


def _priors(scores: Mapping[str, Any]) -> str:
    priors = {name: row for name, row in inner(scores, "priors").items() if isinstance(row, Mapping)}
    columns = [
        column for column in PRIOR_COLUMNS if any(math.isfinite(number(row.get(column))) for row in priors.values())
    ]
    if not columns:
        return ""
    rows = [(name, *(number_text(number(row.get(column))) for column in columns)) for name, row in priors.items()]
    return table(("prior", *(PRIOR_COLUMNS[column] for column in columns)), rows, caption="Priors fitted to the codes")


def _charts(scores: Mapping[str, Any]) -> str:
    drawn = []
    line = inner(inner(scores, "fid_protocol"), "fid_against_count")
    counts, fids = (
        list(map(number, found)) if isinstance(found := line.get(name), list) else [] for name in ("counts", "fids")
    )
    infinity = number(scores.get("eval/fid_infinity"))
    if counts and len(counts) == len(fids) and math.isfinite(sum(fids)) and math.isfinite(infinity) and min(counts) > 0:
        places = [1 / count for count in counts]
        # The line of least squares goes through the mean of its points; fid_infinity is where it meets 0.
        slope = (sum(fids) / len(fids) - infinity) / (sum(places) / len(places))
        ends = ((0.0, infinity), (max(places), infinity + slope * max(places)))
        series = [Series("FID", tuple(zip(places, fids, strict=True))), Series("straight line to FID∞", ends)]
        drawn.append(chart("FID over the number of images", series, x="1 / number of images", y="FID", markers=True))
    bounds = inner(inner(inner(scores, "likelihood_protocol"), "nll"), "bounds_nats")
    found = [(number_of(k), bound) for k, bound in bounds.items() if isinstance(bound, Mapping)]
    if found:
        points = tuple((k, number(bound.get("mean"))) for k, bound in found)
        errors = tuple(number(bound.get("standard_error")) for _, bound in found)
        drawn.append(
            chart("Bound on log p(x) over importance samples", [Series("bound, ± standard error", points, errors)],
                  x="importance samples", y="nats per image", log_x=True, markers=True)
        )  # fmt: skip
    return side_by_side(drawn) if drawn else ""


def _protocols(scores: Mapping[str, Any]) -> list[str]:
    tables = []
    for name in ("fid_protocol", "rfid_protocol", "lpips_protocol", "likelihood_protocol", "protocol"):
        if content := inner(scores, name):
            rows = [(key, shown_value(value)) for key, value in flatten(content)]
            tables.append(table(("key", "value"), rows, caption=name))
    return [fold("Protocols in full", "".join(tables))] if tables else []


def number_of(text: str) -> float:
    """A key as a number, NaN when it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
