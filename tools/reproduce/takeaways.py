"""The lecture's takeaways: its claim, the sweeps that test it, and what decides whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from reproduce.datasets import Scale
from reproduce.scores import Mean, Scores, clearly_differs, order_correlation
from reproduce.tables import Chart, Exhibit, Table
from vaetrain.report.chart import Series

CONFIGS = Path("configs/takeaways")

ELBO, PSNR, DISTANCE, RATE, SPEED = "val/elbo_nats", "val/psnr_db", "eval/fid", "val/rate_nats", "perf/images_per_s"
GMM_DISTANCE = "gmm/eval/fid"
BITS = "val/bits_per_dim"
NAMES = {
    ELBO: "ELBO, nats", PSNR: "PSNR, dB", DISTANCE: "distance of samples", RATE: "rate, nats", SPEED: "images/s",
    GMM_DISTANCE: "distance, gmm prior", BITS: "bits/dim", "val/distortion_nats": "distortion, nats",
}  # fmt: skip

SAME = 0.02
"""Values within this share of the best count as equally good."""


@dataclass(frozen=True)
class Condition:
    """The trials of a sweep that differ in their seed alone."""

    value: Any
    """Of the parameter that the sweep varies."""
    scores: tuple[Scores, ...]

    def mean(self, name: str) -> Mean | None:
        """Of a score over seeds; None unless every seed has it."""
        values = [scores[name] for scores in self.scores if name in scores]
        return Mean.of(values) if values and len(values) == len(self.scores) else None


Findings = Mapping[str, Sequence[Condition]]
"""The settings of each sweep, by its name."""


@dataclass(frozen=True)
class Verdict:
    """What came out."""

    kind: Literal["holds", "partly", "fails"]
    verdict: str
    exhibits: tuple[Exhibit, ...]


@dataclass(frozen=True)
class Takeaway:
    """A claim of the lecture and the experiment made of it."""

    name: str
    title: str
    claim: str
    design: str
    sweeps: tuple[str, ...]
    """Files below configs/takeaways (small: below its folder small)."""
    data: tuple[str, ...]
    """Shard sets at the small scale; the full scale's are in its configs."""
    judge: Callable[[Findings], Verdict]
    priors: tuple[str, ...] = ()
    """Whose samples are scored; none: only what validation measures."""

    def sweep_file(self, sweep: str, scale: Scale) -> Path:
        """Its file, relative to the root of the project."""
        return CONFIGS / "small" / f"{sweep}.yaml" if scale == "small" else CONFIGS / f"{sweep}.yaml"


def table_of(settings: Sequence[Condition], label: str, scores: Sequence[str], caption: str = "") -> Table:
    """A row a setting, mean ± standard error over seeds."""
    rows = []
    for setting in settings:
        means = [setting.mean(name) for name in scores]
        rows.append(
            (shown(setting.value), *("–" if mean is None else str(mean) for mean in means), str(len(setting.scores)))
        )
    return Table((label, *(NAMES[name] for name in scores), "seeds"), tuple(rows), caption)


def curve(label: str, settings: Sequence[Condition], score: str) -> Series:
    """A score over the settings' values, with its errors."""
    found = [(float(setting.value), mean) for setting in settings if (mean := setting.mean(score)) is not None]
    return Series(label, tuple((x, mean.value) for x, mean in found), tuple(mean.error or 0.0 for _, mean in found))


def shown(value: Any) -> str:
    """A parameter's value for a reader; a config by its name."""
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).stem if str(value).endswith(".yaml") else str(value)


def values_of(settings: Sequence[Condition], score: str) -> list[tuple[Condition, Mean]]:
    """The settings that have a score; raises ValueError when there are fewer than two to compare."""
    found = [(setting, mean) for setting in settings if (mean := setting.mean(score)) is not None]
    if len(found) < 2:
        raise ValueError(f"fewer than two settings have {score}")
    return found


def plateau(
    settings: Sequence[Condition], score: str
) -> tuple[tuple[Condition, Mean], list[Condition], tuple[Condition, Mean]]:
    """The best setting, those within SAME of it, and the worst, by a score of which more is better."""
    found = values_of(settings, score)
    best, worst = max(found, key=lambda each: each[1].value), min(found, key=lambda each: each[1].value)
    near = [setting for setting, mean in found if best[1].value - mean.value <= SAME * abs(best[1].value)]
    return best, near, worst


def learning_rate(findings: Findings) -> Verdict:
    """Decisive if the range costs clearly more than SAME."""
    settings = findings["learning_rate"]
    (best, top), near, (worst, bottom) = plateau(settings, ELBO)
    loss = (top.value - bottom.value) / abs(top.value)
    decisive = loss > SAME and clearly_differs(top, bottom)
    lowest, highest = near[0].value, near[-1].value
    return Verdict(
        "holds" if decisive else "fails",
        f"From the best rate ({best.value:g}, {top} nats) to the worst ({worst.value:g}, {bottom} nats) the ELBO falls by "
        f"{loss:.1%}. "
        + (
            f"Rates from {lowest:g} to {highest:g}, a factor of {highest / lowest:.3g}, are within {SAME:.0%} of the best."
            if len(near) > 1
            else f"No other rate is within {SAME:.0%} of it."
        ),
        (
            Chart("Validation ELBO over the learning rate", (curve("ELBO", settings, ELBO),), "learning rate", "ELBO, nats", True),
            table_of(settings, "learning rate", (ELBO, PSNR)),
        ),
    )  # fmt: skip


def batch_size(findings: Findings) -> Verdict:
    """Decisive with everything else kept; and how far the square-root rule carries."""
    kept = findings["batch_size"]
    ruled = [Condition(float(Path(str(each.value)).stem), each.scores) for each in findings["batch_size_rule"]]
    (_, top), _, (_, bottom) = plateau(kept, ELBO)
    loss_kept = (top.value - bottom.value) / abs(top.value)
    (_, top_ruled), near, (_, bottom_ruled) = plateau(ruled, ELBO)
    loss_ruled = (top_ruled.value - bottom_ruled.value) / abs(top_ruled.value)
    speeds = values_of(kept, SPEED)
    slowest, fastest = speeds[0][1].value, max(mean.value for _, mean in speeds)
    reach = max(float(each.value) for each in near)
    kind: Literal["holds", "partly", "fails"] = "fails"
    if loss_kept > SAME and clearly_differs(top, bottom):
        kind = "partly" if loss_ruled < loss_kept / 2 else "holds"
    words = {
        "holds": "It holds, whether or not the optimizer follows the batch",
        "partly": "It holds where the optimizer does not follow the batch",
        "fails": "Over this range it does not",
    }[kind]
    return Verdict(
        kind,
        f"{words}. For the same images, settings kept, the ELBO differs by {loss_kept:.1%} between the best and the worst batch; "
        f"with the "
        f"square-root rule by {loss_ruled:.1%}, and batches up to {reach:,.0f} are within {SAME:.0%} of the best. Throughput here "
        f"rises from "
        f"{slowest:,.0f} to {fastest:,.0f} images/s.",
        (
            Chart(
                "Validation ELBO over the batch, same number of images",
                (curve("settings kept", kept, ELBO), curve("square-root rule", ruled, ELBO)), "batch size", "ELBO, nats", True,
            ),
            Chart("Throughput over the batch", (curve("images/s", kept, SPEED),), "batch size", "images/s", True),
            table_of(kept, "batch, settings kept", (ELBO, PSNR, SPEED)),
            table_of(ruled, "batch, square-root rule", (ELBO, PSNR, SPEED)),
        ),
    )  # fmt: skip


def kl_weight(findings: Findings) -> Verdict:
    """More weight, better generation, worse reconstruction? By rank correlation, and by where the distance is lowest."""
    exhibits: list[Exhibit] = []
    sentences, verdicts = [], []
    for sweep, what in (("kl_weight", "MNIST"), ("kl_weight_cats", "cats")):
        settings = findings[sweep]
        quality, distance = values_of(settings, PSNR), values_of(settings, DISTANCE)
        weights = [float(setting.value) for setting, _ in quality]
        worse = order_correlation(weights, [mean.value for _, mean in quality])
        better = order_correlation(weights, [mean.value for _, mean in distance])
        lowest = min(distance, key=lambda each: each[1].value)[0].value
        verdicts += [worse < -0.8, better < -0.8]
        sentences.append(
            f"{what}: reconstruction worsens with the weight (rank correlation with PSNR {worse:+.2f}, {quality[0][1]} to "
            f"{quality[-1][1]} dB); the distance of samples from N(0, I) {'falls all the way' if better < -0.8 else 'is lowest'} "
            f"{'to' if better < -0.8 else 'at'} weight {lowest:g} (rank correlation {better:+.2f})"
        )
        rate = [
            (x.value, y.value)
            for setting in settings
            if (x := setting.mean(RATE)) is not None and (y := setting.mean(PSNR)) is not None
        ]
        exhibits += [
            Chart(
                f"{what}: reconstruction over the rate",
                (Series("PSNR", tuple(sorted(rate))),),
                "rate, nats",
                "PSNR, dB",
            ),
            Chart(
                f"{what}: distance of samples over the weight",
                (curve("N(0, I)", settings, DISTANCE), curve("gmm prior", settings, GMM_DISTANCE)),
                "KL weight",
                "distance",
                True,
            ),
            Chart(
                f"{what}: reconstruction over the weight",
                (curve("PSNR", settings, PSNR),),
                "KL weight",
                "PSNR, dB",
                True,
            ),
            table_of(settings, f"{what}: KL weight", (RATE, PSNR, ELBO, DISTANCE, GMM_DISTANCE)),
        ]
    kind: Literal["holds", "partly", "fails"] = "holds" if all(verdicts) else "partly" if any(verdicts) else "fails"
    return Verdict(kind, f"{'. '.join(sentences)}.", tuple(exhibits))  # fmt: skip


def epochs(findings: Findings) -> Verdict:
    """Does each doubling of the length still help clearly?"""
    found = values_of(findings["epochs"], ELBO)
    gains = []
    for (_, a), (setting, b) in pairwise(found):
        gains.append((setting.value, b.value - a.value, clearly_differs(a, b) and b.value > a.value))
    helped = [value for value, _, clear in gains if clear]
    kind: Literal["holds", "partly", "fails"] = (
        "holds" if len(helped) == len(gains) else "partly" if helped else "fails"
    )
    steps = ", ".join(
        f"to {value} epochs {gain:+.2f} nats{'' if clear else ' (not clear)'}" for value, gain, clear in gains
    )
    return Verdict(
        kind,
        f"Each doubling: {steps}. The first is worth {gains[0][1] / max(gains[-1][1], 1e-9):.3g} times the last.",
        (
            Chart(
                "Validation ELBO over the number of epochs, each with its own schedule",
                (curve("ELBO", findings["epochs"], ELBO),), "epochs", "ELBO, nats", True,
            ),
            table_of(findings["epochs"], "epochs", (ELBO, PSNR)),
        ),
    )  # fmt: skip


def architecture(findings: Findings) -> Verdict:
    """Convolutions against none, and the size of the latent."""
    (_, dense), (_, conv) = values_of(findings["architecture"], ELBO)[:2]
    decisive = clearly_differs(dense, conv)
    (best, top), _, (worst, bottom) = plateau(findings["latent_size"], ELBO)
    return Verdict(
        "holds" if decisive and conv.value > dense.value else "fails",
        f"With convolutions the ELBO is {conv} nats, without {dense}: {conv.value - dense.value:+.2f}. Among latent sizes of the "
        "dense model "
        f"{best.value} is best ({top}) and {worst.value} worst ({bottom}).",
        (
            table_of(findings["architecture"], "config", (ELBO, PSNR, SPEED), "Dense against convolutional"),
            Chart(
                "Validation ELBO over the latent's size, dense VAE", (curve("ELBO", findings["latent_size"], ELBO),),
                "latent dimensions", "ELBO, nats", True,
            ),
            table_of(findings["latent_size"], "latent dimensions", (ELBO, RATE, PSNR)),
        ),
    )  # fmt: skip


def ae_against_vae(findings: Findings) -> Verdict:
    """Reconstruction for the autoencoder, generation from N(0, I) for the VAE."""
    by_kind = {str(setting.value): setting for setting in findings["ae_against_vae"]}
    ae, vae = by_kind["False"], by_kind["True"]
    (_, ae_quality), (_, vae_quality) = values_of((ae, vae), PSNR)
    (_, ae_distance), (_, vae_distance) = values_of((ae, vae), DISTANCE)
    (_, ae_fitted), (_, vae_fitted) = values_of((ae, vae), GMM_DISTANCE)
    reconstructs = clearly_differs(ae_quality, vae_quality) and ae_quality.value > vae_quality.value
    generates = clearly_differs(ae_distance, vae_distance) and ae_distance.value > vae_distance.value
    still = clearly_differs(ae_fitted, vae_fitted) and ae_fitted.value > vae_fitted.value
    kind: Literal["holds", "partly", "fails"] = "fails"
    if reconstructs or generates:
        kind = "holds" if reconstructs and generates and still else "partly"
    return Verdict(
        kind,
        f"Reconstruction: autoencoder {ae_quality} dB, VAE {vae_quality} dB. Samples from N(0, I): distance {ae_distance} against "
        f"{vae_distance}. From a mixture fitted to the codes: {ae_fitted} against {vae_fitted}"
        f"{'' if still else '; there the VAE is not clearly better: the second half of the claim is one about N(0, I)'}.",
        (
            table_of(
                [Condition("autoencoder", ae.scores), Condition("VAE", vae.scores)], "MNIST, dense",
                (PSNR, DISTANCE, GMM_DISTANCE),
            ),
        ),
    )  # fmt: skip


def recipe(findings: Findings) -> Verdict:
    """Ours against the lecture-like baselines, sampling as each recipe does: ours from the fitted mixture, theirs from N(0, I)."""
    exhibits: list[Exhibit] = []
    sentences, verdicts = [], []
    for sweep, what in (("recipe_mnist", "MNIST"), ("recipe_cats", "cats")):
        *baselines, ours = findings[sweep]
        for baseline in baselines:
            better = []
            comparable = what == "cats" or "bernoulli" in shown(baseline.value)  # densities do not compare with masses
            for score, ours_score, sign in ((ELBO, ELBO, 1), (PSNR, PSNR, 1), (DISTANCE, GMM_DISTANCE, -1)):
                (_, theirs), (_, own) = (
                    (baseline, _needed(baseline, score)), (ours, _needed(ours, ours_score)),
                )  # fmt: skip
                if score == ELBO and not comparable:
                    continue
                clear = clearly_differs(theirs, own) and sign * (own.value - theirs.value) > 0
                better.append(clear)
                sentences.append(
                    f"{what}, against {shown(baseline.value)}, {NAMES[score]}: {own} against {theirs}"
                    f"{'' if clear else ' (not clearly better)'}"
                )
            verdicts.append(all(better))
        exhibits.append(
            table_of(
                findings[sweep], f"{what}: config", (ELBO, BITS, PSNR, DISTANCE, GMM_DISTANCE),
                f"{what}; ELBOs of MSE and cross-entropy do not compare with each other" if what == "MNIST" else what,
            )
        )  # fmt: skip
    kind: Literal["holds", "partly", "fails"] = "holds" if all(verdicts) else "partly" if any(verdicts) else "fails"
    return Verdict(kind, f"{'. '.join(sentences)}.", tuple(exhibits))


def _needed(setting: Condition, score: str) -> Mean:
    mean = setting.mean(score)
    if mean is None:
        raise ValueError(f"{shown(setting.value)} has no {score}")
    return mean


TAKEAWAYS = (
    Takeaway(
        "learning_rate", "Learning rate", "“Importance of learning rate”: it decides the result.",
        "MNIST, dense VAE, two epochs (full: twenty), seven rates a factor of two apart.", ("learning_rate",),
        ("mnist",), learning_rate,
    ),
    Takeaway(
        "batch_size", "Batch size", "“Importance of batch size when training with GPUs”.",
        "MNIST, dense VAE, batches 32 to 2,048 for the same number of images, once with all settings kept, once with AdamW "
        "following by the square-root rule (docs/scaling.md).",
        ("batch_size", "batch_size_rule"), ("mnist",), batch_size,
    ),
    Takeaway(
        "kl_weight", "KL weight", "“More KL weight: better generation, worse reconstruction.”",
        "The lecture's loss, Σ(x − m)² + weight · KL: MNIST, dense; cats, convolutional (small: half width); six or seven weights.",
        ("kl_weight", "kl_weight_cats"), ("mnist", "cats64"), kl_weight, priors=("standard", "gmm"),
    ),
    Takeaway(
        "epochs", "Number of epochs", "“More epochs give better results.”",
        "MNIST, dense VAE, lengths that double, each with its own cosine.", ("epochs",), ("mnist",), epochs,
    ),
    Takeaway(
        "architecture", "Architecture", "“The architecture decides”: convolutions, and the size of the latent.",
        "MNIST, same latent, likelihood, images and optimizer, with and without convolutions; dense VAEs with 2 to 128 latents.",
        ("architecture", "latent_size"), ("mnist",), architecture,
    ),
    Takeaway(
        "ae_against_vae", "Autoencoder against VAE", "“The autoencoder reconstructs better, the VAE generates better.”",
        "MNIST, dense, MSE with and without KL, three epochs (full: twenty).", ("ae_against_vae",), ("mnist",),
        ae_against_vae, priors=("standard", "gmm"),
    ),
    Takeaway(
        "recipe", "Our recipe against the lecture-like VAE",
        "Ours, not the lecture's: the recommended configs beat a plain VAE (MSE + KL, constant rate, no tricks) of the same "
        "network on the same images in ELBO, PSNR and distance of samples.",
        "configs/mnist_vae.yaml and afhq_cat64.yaml (full: afhq_cat.yaml) with a mixture fitted to the codes, against the same "
        "network trained plainly and sampled from N(0, I).",
        ("recipe_mnist", "recipe_cats"), ("mnist", "cats64"), recipe, priors=("standard", "gmm"),
    ),
)  # fmt: skip
