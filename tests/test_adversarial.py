"""The adversarial term: what public trainers get wrong with it, each by name, and what it is made of."""

import contextlib
import itertools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vaetrain.training.logger
from launching import TINY
from vaetrain.command_line import parse
from vaetrain.config import Config
from vaetrain.data.readers.batch import Batch
from vaetrain.data.readers.order import BatchLayout
from vaetrain.data.readers.reader import open_reader
from vaetrain.distributed.randomness import noise_of_training, uniform_of_training
from vaetrain.model.likelihood import from_uint8
from vaetrain.objective.config import AdversarialConfig, adversarial_weight_at
from vaetrain.objective.elbo import negative_elbo
from vaetrain.runs.checkpoint_names import list_checkpoints
from vaetrain.scaling.short_training import short_training
from vaetrain.training.differentiable_augment import augment, num_draws
from vaetrain.training.discriminator import Opinion, PatchGAN
from vaetrain.training.memory import train_on_dummies
from vaetrain.training.schedule import unfinished_warmups
from vaetrain.training.step import TrainStep

CPU = torch.device("cpu")
BATCH_SIZE, MICRO = 4, 2
OPTIONS = ("--objective.adversarial.layers", "2", "--objective.adversarial.channels", "16")
ON = ("--objective.adversarial.weight", "0.5", *OPTIONS)
EVERYTHING = (
    *ON, "--objective.adversarial.norm", "spectral", "--objective.adversarial.lecam", "0.01", "--objective.adversarial.r1", "0.1",
    "--objective.adversarial.augment", "colour", "translation", "cutout", "--objective.adversarial.loss", "non-saturating",
)  # fmt: skip
KINDS = pytest.mark.parametrize(
    "options", [ON, EVERYTHING, (*ON, "--model.kind", "dense"), (*ON, "--model.likelihood", "bernoulli"),
     (*ON, "--model.kind", "autoencoder-kl", "--model.base-channels", "32")],
    ids=["hinge", "everything", "dense", "bernoulli", "autoencoder-kl"],
)  # fmt: skip


def config(*arguments: object) -> Config:
    return parse(Config, None, [*TINY, "--data.train", "shards", "--train.compile", "False", *map(str, arguments)])


@pytest.fixture
def build(accelerator):
    """A step whose models have gradients everywhere: new VAEs end their residual branches in zeros."""

    def build_step(*arguments: object) -> TrainStep:
        step = TrainStep.build(config(*arguments), BatchLayout.of(BATCH_SIZE, MICRO, 0, 1), accelerator)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in step.vae.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return step

    yield build_step
    accelerator.free_memory()


def pixels() -> Tensor:
    shape = (BATCH_SIZE, 3, 16, 16)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def images() -> itertools.cycle:
    numbers = torch.zeros(MICRO, dtype=torch.int64)
    return itertools.cycle([Batch(each, numbers, numbers) for each in pixels().split(MICRO)])


def accumulate(step: TrainStep, weight: float | None, images_seen: int = 0) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of both models."""
    step.accumulate(images(), images_seen, 1.0, weight)
    of_vae = [parameter.grad.clone() for parameter in step.vae.parameters()]
    return of_vae, [None if p.grad is None else p.grad.clone() for p in step.adversary.parameters]


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


# What others got wrong (../shared/first_stage.md)


@KINDS
def test_the_discriminators_loss_leaks_nothing_into_the_autoencoder(options, build):
    """Without detach the discriminator's step would teach the decoder to be found out."""
    step = build(*options)
    without, nothing = accumulate(step, None)
    assert nothing == [None] * len(nothing)
    learning, of_discriminator = accumulate(step, 0.0)
    assert all(map(torch.equal, without, learning))
    assert (
        sum(bool(gradient.any()) for gradient in of_discriminator) >= len(of_discriminator) - 1
    )  # both sides of hinge cancel in one


@KINDS
def test_the_decoders_loss_leaves_no_gradient_in_the_discriminator(options, build):
    step = build(*options)
    step_without = accumulate(step, 0.0)
    step.update(0.0, BATCH_SIZE)
    assert step.adversary.ratio > 0
    for weight in (0.0, 0.5):
        of_vae, of_discriminator = accumulate(step, weight)
        if not weight:
            alone = of_discriminator
    assert not any(map(torch.equal, step_without[0][1:], of_vae[1:]))
    assert all(map(torch.equal, alone, of_discriminator))


@KINDS
@pytest.mark.parametrize("adaptive", [True, False])
def test_gradients_and_the_ratio_are_those_of_one_loss_written_down_at_once(options, adaptive, build):
    """Against autograd through both models together, as the formulas have it, without micro-batches."""
    step = build(*options, "--objective.adversarial.adaptive", adaptive)
    adversary, settings = step.adversary, step.config
    accumulate(step, 0.0)
    step.update(0.0, BATCH_SIZE)
    ratio = adversary.ratio.clone() if adaptive else torch.tensor(1.0)
    of_vae, of_discriminator = accumulate(step, 0.5)

    noise, mirrored = noise_of_training(0, slice(0, BATCH_SIZE), settings.model.latent_shape, CPU)
    batch = torch.where(mirrored[:, None, None, None], pixels().flip(3), pixels())
    x = from_uint8(batch if settings.data.horizontal_flip else pixels(), step.vae.likelihood.pixel_range)
    terms = step.vae(x, noise)
    low, high = step.vae.likelihood.pixel_range
    pair = [2 * (each - low) / (high - low) - 1 for each in (x, step.vae.likelihood.raw_mean(terms.params))]
    policy = settings.objective.adversarial.augment
    draws = uniform_of_training(0, slice(0, BATCH_SIZE), num_draws(policy), CPU)
    opinion = adversary.discriminator(*(augment(each, policy, draws) for each in pair))
    value = adversary.reconstruction_loss(opinion).sum()
    elbo = negative_elbo(terms.distortion, terms.kl, 1.0).sum()
    loss = (elbo + 0.5 * ratio * value) / (BATCH_SIZE * settings.model.num_pixels)
    weights = list(step.vae.parameters())
    for ours, theirs in zip(of_vae, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5 * float(norm(of_vae)))
    own = adversary.discriminator_loss(opinion).mean()
    for ours, theirs in zip(
        of_discriminator, torch.autograd.grad(own, adversary.parameters, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5 * float(norm(of_discriminator)))
    if adaptive:
        last = step.vae.last_layer
        wanted, own_norm = (
            torch.autograd.grad(each / BATCH_SIZE, last, retain_graph=True)[0].norm()
            for each in (terms.distortion.sum(), value)
        )
        # Singular vectors have moved on since.
        torch.testing.assert_close(ratio, wanted / (own_norm + 1e-4), rtol=2e-2, atol=0.0)


def test_the_ratio_counts_the_perceptual_term_too(build):
    step = build(*ON)
    accumulate(step, 0.0)
    step.update(0.0, BATCH_SIZE)
    without = step.adversary.ratio.clone()

    class Heavy:
        name, weight, made_of = "heavy", 1e4, {}

        def __call__(self, x, terms):
            return (terms.params - x).square().mean((1, 2, 3))

    step.terms = (Heavy(),)
    step.adversary.ratio.zero_()
    accumulate(step, 0.0)
    step.update(0.0, BATCH_SIZE)
    assert step.adversary.ratio > 1.5 * without


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [ON, EVERYTHING], ids=["hinge", "everything"])
def test_it_is_finite_in_half_precision(dtype, options, build, monkeypatch):
    """The adaptive weight of others is NaN in fp16."""
    step = build(*options)
    forward = step.model.forward

    def in_half(*arguments):
        with torch.autocast("cpu", dtype):
            return forward(*arguments)

    monkeypatch.setattr(step.model, "forward", in_half)
    step.adversary.discriminator.in_bf16 = dtype == torch.bfloat16
    for number, weight in enumerate((0.0, 0.5, 0.5)):
        of_vae, of_discriminator = accumulate(step, weight, number * BATCH_SIZE)
        assert all(gradient.isfinite().all() for gradient in [*of_vae, *of_discriminator])
        result = step.update(1e-4, (number + 1) * BATCH_SIZE)
        assert not result.skipped
        assert all(value.isfinite() for value in result.totals.values())
    assert 0 < step.adversary.ratio < 1e6


@KINDS
def test_no_parameter_is_without_a_gradient(options, build):
    """Or DDP would wait for it."""
    of_vae, of_discriminator = accumulate(build(*options), 0.5)
    assert all(gradient is not None for gradient in [*of_vae, *of_discriminator])


@pytest.mark.parametrize("culprit", ["model", "discriminator"])
def test_a_step_that_is_skipped_is_skipped_by_both(culprit, build):
    step = build(*EVERYTHING)
    accumulate(step, 0.0)
    step.update(1e-3, BATCH_SIZE)
    before = {name: tensor.clone() for name, tensor in step.adversary.state_dict().items()}
    weights = [parameter.detach().clone() for parameter in step.vae.parameters()]
    accumulate(step, 0.5, BATCH_SIZE)
    damaged = step.adversary.parameters if culprit == "discriminator" else list(step.vae.parameters())
    damaged[0].grad.fill_(math.nan)
    assert step.update(1e-3, 2 * BATCH_SIZE).skipped
    assert all(map(torch.equal, weights, step.vae.parameters()))
    after = step.adversary.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The judge who found nothing wrong remembers what it saw; singular vectors come nearer to the same weights.
    assert all(name.startswith("judge.") or name.endswith(("._u", "._v")) for name in moved)


def test_without_weight_there_is_none(build, monkeypatch, tiny_shards, accelerator):
    step = build(*OPTIONS, "--objective.adversarial.weight", "0")
    assert step.adversary is None
    assert not step.vae.keeps_features
    assert step.names_of_totals == ("loss", "distortion_nats", "rate_nats")
    assert (
        step.vae(from_uint8(pixels(), (-1.0, 1.0)), torch.zeros(BATCH_SIZE, *step.config.model.latent_shape))[3] is None
    )


def test_the_memory_probe_has_one_and_short_trainings_do_not(tiny_shards, accelerator, monkeypatch):
    called = []
    original = PatchGAN.forward
    monkeypatch.setattr(PatchGAN, "forward", lambda *a: (called.append(1), original(*a))[1])
    settings = config(*ON, "--data.train", tiny_shards)
    train_on_dummies(settings, accelerator, 2)
    assert len(called) == 4  # two steps, images and reconstructions
    reader = open_reader(settings.data, "train", device=CPU)
    with short_training(settings, accelerator, reader) as training:
        training.step(1e-3)
    reader.close()
    assert len(called) == 4


# Runs


def records(run_dir, split="train"):
    every = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if not key.startswith("perf/")}
        for record in every
        if record["split"] == split
    ]


def contents(run_dir):
    [*_, newest] = list_checkpoints(run_dir / "checkpoints")
    return {file.name: file.read_bytes() for file in newest.glob("*.safetensors")}


@pytest.mark.parametrize("options", [ON, EVERYTHING], ids=["hinge", "everything"])
@pytest.mark.parametrize("died_at", [4, 10])
def test_a_run_killed_before_or_after_the_start_resumes_to_the_bit(options, died_at, train_tiny, monkeypatch, tmp_path):
    ways = (*options, "--objective.adversarial.lead-fraction", "0.25", "--checkpoint.every-steps", "3")
    whole = train_tiny(*ways, run_dir="whole")
    logged = records(whole)
    begun = [record["train/discriminator_loss"] is not None for record in logged]
    assert begun == sorted(begun)
    assert {*begun} == {False, True}
    last = logged[-1]
    assert last["train/adversarial_weight"] > 0
    assert 0 <= last["train/discriminator_accuracy_real"] <= 1
    assert 0 <= last["train/discriminator_accuracy_recon"] <= 1
    if died_at == 4 and options is not EVERYTHING:
        assert set(contents(whole)) >= {"adversary.safetensors", "model.safetensors"}

    class Killed(Exception):
        pass

    def die_later(self, progress, *arguments, **keywords):
        if progress.step == died_at:
            raise Killed
        return original(self, progress, *arguments, **keywords)

    original = vaetrain.training.logger.RunLogger.log_training
    monkeypatch.setattr(vaetrain.training.logger.RunLogger, "log_training", die_later)
    with contextlib.suppress(Killed):
        train_tiny(*ways, run_dir="broken")
    monkeypatch.undo()
    broken = train_tiny(*ways, run_dir="broken")
    assert contents(broken) == contents(whole)
    assert [records(broken, split) for split in ("train", "val")] == [
        records(whole, split) for split in ("train", "val")
    ]
    assert json.loads((broken / "provenance.json").read_text())["loss_terms"]["adversarial"]["layers"] == "2"


def test_it_may_come_and_go_on_a_resume_and_not_with_another_network(train_tiny, copy_of_tiny_run):
    run_dir = copy_of_tiny_run()
    now = (*ON, "--objective.adversarial.start-fraction", "0", "--objective.adversarial.ramp-fraction", "0")
    assert train_tiny(*now, epochs=2) == run_dir
    assert records(run_dir)[-1]["train/adversarial_weight"] > 0
    with pytest.raises(ValueError, match=r"--objective.adversarial.layers 2, now it is 1; .*Use the same value"):
        train_tiny(*now, "--objective.adversarial.layers", "1", epochs=3)
    train_tiny(epochs=3)
    assert "train/adversarial" not in records(run_dir)[-1]
    assert "adversary.safetensors" not in contents(run_dir)


# What it is made of


def test_when_it_begins_is_a_function_of_the_images_seen():
    times = AdversarialConfig(weight=2.0, start_fraction=0.5, lead_fraction=0.1, ramp_fraction=0.2)
    seen = {images: adversarial_weight_at(times, images, 1000) for images in (0, 399, 400, 500, 600, 700, 1000)}
    assert seen == {0: None, 399: None, 400: 0.0, 500: 0.0, 600: pytest.approx(1.0), 700: 2.0, 1000: 2.0}
    at_once = AdversarialConfig(weight=2.0, start_images=300, lead_fraction=0.0, ramp_fraction=0.0)
    assert [adversarial_weight_at(at_once, images, 1000) for images in (299, 300)] == [None, 2.0]
    assert adversarial_weight_at(AdversarialConfig(), 1000, 1000) is None


def test_a_start_after_the_end_of_training_is_told():
    late = config(*ON, "--objective.adversarial.start-images", "5000")
    assert any("does not see the discriminator before 5,000" in line for line in unfinished_warmups(late, 1000))
    assert not any("discriminator" in line for line in unfinished_warmups(late, 100_000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--objective.adversarial.layers", "3"), "needs images of at least 24 pixels, and these have 16"),
        (("--objective.adversarial.weight", "-1"), "must not be negative"),
        (("--objective.adversarial.start-fraction", "2"), r"start-fraction is 2.0; give a fraction"),
        (("--objective.adversarial.lr", "0"), "give a positive number, or None"),
        (("--objective.adversarial.channels", "0"), "at least 1"),
        (("--objective.adversarial.start-images", "-1"), "give a number of images"),
    ],
)
def test_what_cannot_be_is_refused(options, message, capsys):
    def check():
        settings = config(*ON, *options)
        settings.objective.adversarial.check_images(settings.model.image_size)

    with pytest.raises((ValueError, SystemExit)) as error:
        check()
    said = " ".join(f"{error.value} {capsys.readouterr().err}".replace("│", " ").split())
    assert re.search(message, said)


@pytest.mark.parametrize(("layers", "side", "field"), [(2, 48, 34), (3, 96, 70)])
def test_a_logit_sees_a_patch(layers, side, field):
    torch.manual_seed(0)
    net = PatchGAN(AdversarialConfig(layers=layers, channels=4, norm="spectral"), 3)
    image = torch.zeros(1, 3, side, side, requires_grad=True)
    logits = net(image)
    assert logits.shape[1] == logits.shape[2] == side // 2**layers - 2
    middle = logits.shape[1] // 2
    (gradient,) = torch.autograd.grad(logits[0, middle, middle], image)
    rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 <= field
    if side >= 2 * field - 22:
        assert rows[-1] - rows[0] + 1 > field - 8


def test_spectral_norms_follow_the_weights_once_a_step_however_it_is_cut(accelerator):
    states = []
    for micro in (BATCH_SIZE, MICRO, 1):
        step = TrainStep.build(config(*EVERYTHING), BatchLayout.of(BATCH_SIZE, micro, 0, 1), accelerator)
        step.model.train()
        step.adversary.model.train()
        numbers = torch.zeros(micro, dtype=torch.int64)
        for number in range(3):
            batches = iter([Batch(each, numbers, numbers) for each in pixels().split(micro)])
            step.accumulate(batches, number * BATCH_SIZE, 1.0, 0.5)
            step.update(1e-3, (number + 1) * BATCH_SIZE)
        net = step.adversary.discriminator.net
        states.append(net.state_dict())
        for convolution in (module for module in net if isinstance(module, nn.Conv2d)):
            assert float(torch.linalg.matrix_norm(convolution.weight.detach().flatten(1), 2)) == pytest.approx(
                1.0, abs=0.2
            )
        accelerator.free_memory()
    for other in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_losses_are_those_of_the_papers(build):
    step = build(*ON)
    real, recon = torch.tensor([[[0.3, 2.0]]]), torch.tensor([[[-0.4, 1.0]]])
    opinion = Opinion(real, recon, torch.tensor([4.0]))
    adversary = step.adversary

    def losses(**options):
        adversary.config = AdversarialConfig(weight=0.5, **options)
        return float(adversary.discriminator_loss(opinion)), float(adversary.reconstruction_loss(opinion))

    assert losses() == pytest.approx((0.5 * (0.7 / 2 + (0.6 + 2.0) / 2), -0.3))
    of_both = 0.5 * (F.softplus(-real).mean() + F.softplus(recon).mean())
    assert losses(loss="non-saturating") == pytest.approx((float(of_both), float(F.softplus(-recon).mean())))
    assert losses(r1=3.0)[0] == pytest.approx(losses()[0] + 0.5 * 3.0 * 4.0)
    adversary.running_logits = torch.tensor([0.5, -0.5])  # images, reconstructions
    lecam = (
        (0.8**2 + 2.5**2) + (0.9**2 + 0.0)
    ) / 2  # max(0, logit of image + 0.5)², max(0, 0.5 − logit of reconstruction)²
    assert losses(lecam=0.1)[0] == pytest.approx(losses()[0] + 0.1 * lecam)


def test_r1_is_the_squared_gradient_by_the_pixels(build):
    discriminator = build(*EVERYTHING).adversary.discriminator
    x = from_uint8(pixels(), (-1.0, 1.0))
    penalty = discriminator(x, x).penalty
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator.net(leaf).mean((1, 2)).sum(), leaf)
    torch.testing.assert_close(penalty, gradient.square().sum((1, 2, 3)))
    assert penalty.gt(0).all()


POLICY = ("colour", "translation", "cutout")


def test_augmentations_are_functions_of_the_position_however_training_is_cut():
    whole = uniform_of_training(0, slice(0, 40), 5, CPU)
    parts = [uniform_of_training(0, slice(start, start + 10), 5, CPU) for start in range(0, 40, 10)]
    assert whole.equal(torch.cat(parts))
    assert not whole.equal(uniform_of_training(1, slice(0, 40), 5, CPU))
    assert whole.flatten().unique().numel() == whole.numel()
    noise, _ = noise_of_training(0, slice(0, 40), (5,), CPU)
    assert not noise.equal(whole)


def test_augmentations_change_each_image_by_its_own_draws_and_gradients_pass():
    x = from_uint8(pixels(), (-1.0, 1.0)).requires_grad_()
    draws = uniform_of_training(0, slice(0, BATCH_SIZE), num_draws(POLICY), CPU)
    changed = augment(x, POLICY, draws)
    assert changed.shape == x.shape
    for number in range(BATCH_SIZE):
        alone = augment(x[number : number + 1], POLICY, draws[number : number + 1])
        torch.testing.assert_close(alone, changed[number : number + 1])
    (gradient,) = torch.autograd.grad(changed.square().sum(), x)
    assert gradient.flatten(1).any(1).all()
    half = torch.full((BATCH_SIZE, 3), 0.5)
    torch.testing.assert_close(augment(x, ("colour",), half), x)  # the middle of each range is no change


def test_translation_moves_whole_pixels_up_to_an_eighth_and_cutout_covers_a_half():
    x = torch.arange(1.0, 257.0).view(1, 1, 16, 16)
    moves = {}
    for draw in (0.0, 0.45, 0.99):
        moved = augment(x, ("translation",), torch.tensor([[draw, 0.5]]))
        moves[draw] = next(s for s in range(-3, 4) if moved[0, 0, 8, 8] == x[0, 0, 8 - s, 8])
    assert moves == {0.0: -2, 0.45: 0, 0.99: 2}
    up = augment(x, ("translation",), torch.tensor([[0.0, 0.5]]))
    assert up[0, 0, :-2].equal(x[0, 0, 2:])
    assert not up[0, 0, -2:].any()
    for draw, covered in ((0.5, 64), (0.0, 16)):  # in the middle whole, in the corner a quarter of it
        assert augment(x, ("cutout",), torch.tensor([[draw, draw]])).eq(0).sum() == covered
