"""Verdicts follow the numbers: each claim holds, holds in part or fails where made-up measurements say so."""

from __future__ import annotations

import pytest

from reproduce.scores import Mean, clearly_differs, order_correlation
from reproduce.takeaways import TAKEAWAYS, Condition

ELBO, PSNR, FID, GMM, RATE, SPEED = (
    "val/elbo_nats", "val/psnr_db", "eval/fid", "gmm/eval/fid", "val/rate_nats", "perf/images_per_s",
)  # fmt: skip
JUDGES = {takeaway.name: takeaway.judge for takeaway in TAKEAWAYS}


def setting(value, noise=0.01, **scores):
    """Three seeds around the scores."""
    names = {"elbo": ELBO, "psnr": PSNR, "fid": FID, "gmm": GMM, "rate": RATE, "speed": SPEED}
    return Condition(
        value, tuple({names[name]: score + sign * noise for name, score in scores.items()} for sign in (-1, 0, 1))
    )


def test_means_have_errors_and_differences_are_clear_or_not():
    mean = Mean.of([1.0, 2.0, 3.0])
    assert (mean.value, mean.error, str(mean)) == (2.0, pytest.approx(0.57735), "2.00 ± 0.58")
    assert Mean.of([2.0]).error is None
    assert clearly_differs(Mean(1.0, 0.1, 3), Mean(1.3, 0.1, 3))
    assert not clearly_differs(Mean(1.0, 0.1, 3), Mean(1.2, 0.1, 3))
    assert not clearly_differs(Mean(1.0, None, 1), Mean(9.0, 0.1, 3))
    assert order_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert order_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.8)
    assert order_correlation([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0


@pytest.mark.parametrize(("worst", "kind"), [(-150.0, "holds"), (-100.5, "fails")])
def test_a_learning_rate_decides_where_a_wrong_one_costs(worst, kind):
    sweep = [setting(1e-4, elbo=worst, psnr=20), setting(1e-3, elbo=-100, psnr=22), setting(4e-3, elbo=-101, psnr=22)]
    judgement = JUDGES["learning_rate"]({"learning_rate": sweep})
    assert judgement.kind == kind
    if kind == "holds":
        assert "falls by 50.0%" in judgement.verdict
        assert "Rates from 0.001 to 0.004, a factor of 4" in judgement.verdict
        alone = JUDGES["learning_rate"]({"learning_rate": sweep[:2]})
        assert alone.verdict.endswith("No other rate is within 2% of it.")


@pytest.mark.parametrize(
    ("kept", "ruled", "kind"), [(-130.0, -101.0, "partly"), (-130.0, -129.0, "holds"), (-101.0, -101.0, "fails")]
)
def test_a_batch_decides_where_the_optimizer_does_not_follow(kept, ruled, kind):
    judgement = JUDGES["batch_size"](
        {
            "batch_size": [setting(32, elbo=-100, speed=10, psnr=1), setting(512, elbo=kept, speed=90, psnr=1)],
            "batch_size_rule": [
                setting("configs/takeaways/batch/32.yaml", elbo=-100, psnr=1, speed=10),
                setting("configs/takeaways/batch/512.yaml", elbo=ruled, psnr=1, speed=90),
            ],
        }
    )
    assert judgement.kind == kind
    assert "rises from 10 to 90 images/s" in judgement.verdict


@pytest.mark.parametrize(
    ("distances", "kind"), [((90, 60, 40, 30, 20, 10), "holds"), ((90, 40, 10, 30, 60, 80), "partly")]
)
def test_more_weight_generates_better_all_the_way_or_up_to_a_point(distances, kind):
    sweep = [
        setting(10.0 ** (number - 3), psnr=25 - number, fid=distance, gmm=5, rate=30 - number, elbo=-number)
        for number, distance in enumerate(distances)
    ]
    judgement = JUDGES["kl_weight"]({"kl_weight": sweep, "kl_weight_cats": sweep})
    assert judgement.kind == kind
    assert ("falls all the way to weight 100" if kind == "holds" else "is lowest at weight 0.1") in judgement.verdict
    flat = [setting(float(number + 1), psnr=20, fid=5, gmm=5, rate=1, elbo=1) for number in range(6)]
    assert JUDGES["kl_weight"]({"kl_weight": flat, "kl_weight_cats": flat}).kind == "fails"


@pytest.mark.parametrize(
    ("elbos", "kind"), [((-120, -110, -105), "holds"), ((-120, -110, -110), "partly"), ((-110, -110, -111), "fails")]
)
def test_more_epochs_help_while_each_doubling_does(elbos, kind):
    sweep = [setting(2**number, elbo=elbo, psnr=20) for number, elbo in enumerate(elbos)]
    judgement = JUDGES["epochs"]({"epochs": sweep})
    assert judgement.kind == kind
    assert f"to 2 epochs {elbos[1] - elbos[0]:+.2f} nats" in judgement.verdict


def test_an_architecture_decides_where_it_is_clearly_better():
    latents = [setting(2, elbo=-150, psnr=1, rate=1), setting(32, elbo=-100, psnr=1, rate=1)]
    dense, conv = (
        setting("configs/d.yaml", elbo=-110, psnr=1, speed=1),
        setting("configs/c.yaml", elbo=-98, psnr=1, speed=1),
    )
    judge = JUDGES["architecture"]
    assert judge({"architecture": [dense, conv], "latent_size": latents}).kind == "holds"
    assert judge({"architecture": [conv, dense], "latent_size": latents}).kind == "fails"
    noisy = setting("configs/c.yaml", noise=50.0, elbo=-98, psnr=1, speed=1)
    assert judge({"architecture": [dense, noisy], "latent_size": latents}).kind == "fails"


@pytest.mark.parametrize(("fitted", "kind"), [(40, "holds"), (5, "partly")])
def test_the_autoencoders_weakness_may_be_the_prior_alone(fitted, kind):
    ae = setting("False", psnr=25, fid=900, gmm=fitted)
    vae = setting("True", psnr=20, fid=30, gmm=20)
    judgement = JUDGES["ae_against_vae"]({"ae_against_vae": [ae, vae]})
    assert judgement.kind == kind
    assert ("the VAE is not clearly better" in judgement.verdict) == (kind == "partly")
    worse = JUDGES["ae_against_vae"]({"ae_against_vae": [setting("False", psnr=10, fid=9, gmm=9), vae]})
    assert worse.kind == "fails"


def test_our_recipe_must_win_in_everything_that_compares():
    plain = setting("configs/lecture/vae_mnist.yaml", elbo=-1000, psnr=16, fid=25, gmm=18)
    bernoulli = setting("configs/takeaways/plain_bernoulli.yaml", elbo=-110, psnr=20, fid=25, gmm=18)
    ours = setting("configs/mnist_vae.yaml", elbo=-100, psnr=22, fid=40, gmm=9)
    cats = [setting("a.yaml", elbo=1, psnr=16, fid=25, gmm=18), setting("b.yaml", elbo=9, psnr=22, fid=40, gmm=9)]
    judge = JUDGES["recipe"]
    judgement = judge({"recipe_mnist": [plain, bernoulli, ours], "recipe_cats": cats})
    assert judgement.kind == "holds"
    assert "vae_mnist, ELBO" not in judgement.verdict  # a density does not compare with a mass
    assert "plain_bernoulli, ELBO, nats: -100.0000 ± 0.0058" in judgement.verdict
    worse = setting("configs/mnist_vae.yaml", elbo=-100, psnr=22, fid=40, gmm=30)
    assert judge({"recipe_mnist": [plain, bernoulli, worse], "recipe_cats": cats}).kind == "partly"
