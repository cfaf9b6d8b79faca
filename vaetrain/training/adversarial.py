"""The adversarial term of the loss: a discriminator, all that trains it, and what it thinks of reconstructions.

    x, recon ──augmented alike──> discriminator ──> logits ──┬─> its own loss, whose gradient its weights get
                                                             └─> the term, whose gradient the reconstruction gets

One forward pass of each network serves both sides, which learn in the same step from the weights before it. What goes from one to
the other is the gradient at the decoder's output and nothing else: neither model's backward pass ends in the other's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vaetrain.config import Config
from vaetrain.data.readers.order import BatchLayout
from vaetrain.distributed.processes import sum_over_processes
from vaetrain.distributed.randomness import uniform_of_training
from vaetrain.model.autoencoder import VAE, ElboTerms
from vaetrain.model.likelihood import Likelihood
from vaetrain.training.differentiable_augment import augment, num_draws
from vaetrain.training.discriminator import Discriminator, Opinion
from vaetrain.training.optimizer import restore_optimizer_state, split_optimizer_state
from vaetrain.training.spikes import SpikeDetector, skipping

BETAS = (0.5, 0.9)
"""AdamW's of the discriminator (Esser et al. 2021)."""
EPS = 1e-4
"""Added to the norm of the adversarial gradient, the ratio's denominator (Esser et al. 2021)."""
LARGEST_RATIO = 1e6
"""Of the two gradients' norms, where the adversarial one vanishes."""
RATIO_DECAY = 0.9
"""Per step, of the ratio's moving geometric mean: that of one step alone jumps tenfold from one to the next."""
LECAM_DECAY = 0.99
"""Per step, of the running means of logits."""

NAMES = (
    "adversarial", "adversarial_weight", "discriminator_loss", "discriminator_accuracy_real", "discriminator_accuracy_recon",
)  # fmt: skip
"""What training logs of it below train/; null before the discriminator has begun."""


def accuracies(
    of_images: Float[Tensor, "b h w"], of_recons: Float[Tensor, "b h w"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Shares of patches that are told right."""
    return (of_images > 0).float().mean((1, 2)), (of_recons < 0).float().mean((1, 2))


class Judged(NamedTuple):
    """What the adversary made of a micro-batch."""

    value: Float32[Tensor, " b"]
    """The term of each image, without its weight."""
    weight: Float[Tensor, ""]
    """Its weight now, adaptive factor included."""
    pull: Float32[Tensor, "b ck h w"]
    """Gradient of the weighted term, summed over images, at the likelihood's parameters."""
    totals: tuple[Tensor, ...]
    """Sums over images of what NAMES has."""


class Adversary:
    """The discriminator and its side of each step; its order is that of `TrainStep`: judge the micro-batches, then update."""

    names = ("adversarial", "discriminator_accuracy_real", "discriminator_accuracy_recon")

    def __init__(
        self, config: Config, layout: BatchLayout, vae: VAE, device: torch.device, accelerator: Accelerator | None
    ) -> None:
        """A new discriminator from torch's current seed. A collective, but without an accelerator for this process alone."""
        self.config = config.objective.adversarial
        self.config.check_images(config.model.image_size)
        self.seed = config.seed
        self.layout = layout
        self.likelihood: Likelihood = vae.likelihood
        self.decoder = vae.decoder
        self.lr_factor = 1.0 if self.config.lr is None else self.config.lr / config.optim.lr
        self.discriminator = Discriminator(self.config, config.model.in_channels, config.train.precision)
        self.discriminator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = list(self.discriminator.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.optim.lr, betas=BETAS, weight_decay=config.optim.weight_decay, fused=True
        )
        self.model: nn.Module = self.discriminator
        self.sum: Callable[[Tensor], Tensor] = lambda values: values
        if accelerator is not None:
            self.model = accelerator.prepare_model(self.discriminator)
            self.sum = lambda values: sum_over_processes(accelerator, values)
        if isinstance(self.model, DistributedDataParallel):
            self.model.broadcast_buffers = False  # singular vectors, which are functions of the weights
        self.spikes = SpikeDetector(config.train.skip_above, device)
        self.ratio = torch.zeros((), device=device)
        """Norm of the reconstruction's gradient over that of the adversarial one, a mean over steps; 0 before the first."""
        self.running_logits = torch.zeros(2, device=device)
        """Moving averages of the mean logit of images and of reconstructions (LeCam)."""
        self._begin()

    def _begin(self) -> None:
        self._last_layer_gradients: Tensor | float = 0.0
        self._logits: Tensor | float = 0.0
        self.has_judged = False

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad()
        self._begin()

    def judge(
        self,
        x: Float[Tensor, "b c h w"],
        terms: ElboTerms,
        params: Float32[Tensor, "b ck h w"],
        pull_of_others: Float32[Tensor, "b ck h w"] | None,
        positions: slice,
        weight: float,
        syncing: AbstractContextManager[Any],
    ) -> Judged:
        """Forward of the discriminator, its own backward, and the gradient at `params`, the decoder's output as a leaf.

        `pull_of_others`: of the other terms beyond the ELBO. Inside `syncing` gradients of processes are reduced, or not yet.
        """
        low, high = self.likelihood.pixel_range
        recon, image = ((each - low) * (2 / (high - low)) - 1 for each in (self.likelihood.raw_mean(params), x))
        if self.config.augment:
            draws = uniform_of_training(self.seed, positions, num_draws(self.config.augment), x.device)
            recon, image = (augment(each, self.config.augment, draws) for each in (recon, image))
        with syncing:
            opinion: Opinion = self.model(image, recon)
            value = self.reconstruction_loss(opinion)
            (pull,) = torch.autograd.grad(value.sum(), params, retain_graph=True)
            loss = self.discriminator_loss(opinion)
            # Into its own weights alone. DDP averages over processes, hence per process.
            (loss.sum() / self.layout.per_process_batch_size).backward(inputs=self.parameters)
        self.has_judged = True
        of_images, of_recons = (each.detach().mean((1, 2)) for each in (opinion.of_images, opinion.of_recons))
        self._logits = self._logits + torch.stack([of_images.sum(), of_recons.sum()])
        factor = torch.full_like(self.ratio, weight)
        if self.config.adaptive:
            self._last_layer_gradients = self._last_layer_gradients + self.at_last_layer(
                x, terms, params, pull_of_others, pull
            )
            factor = self.ratio * weight
        totals = (
            value.detach().sum(), factor * len(x), loss.detach().sum(),
            *(each.sum() for each in accuracies(opinion.of_images, opinion.of_recons)),
        )  # fmt: skip
        # Where the decoder is not to see it, not even a NaN of it.
        return Judged(value.detach(), factor, pull * factor if weight else torch.zeros_like(pull), totals)

    @torch.no_grad()
    def compare(
        self, recon: Float[Tensor, "b c h w"], image: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, " b"], ...]:
        """What `names` has of images on the [0, 1] scale, not augmented, for validation (a `Comparison`).

        Far less sure of validation images than of training images, it knows those by heart.
        """
        net = self.discriminator.net
        of_images, of_recons = (
            net((2 * each - 1).contiguous(memory_format=torch.channels_last)) for each in (image, recon)
        )
        value = self.reconstruction_loss(Opinion(of_images, of_recons, of_images))
        return value, *accuracies(of_images, of_recons)

    def reconstruction_loss(self, opinion: Opinion) -> Float[Tensor, " b"]:
        """What the decoder lowers, mean over patches: −logit (hinge) or softplus(−logit)."""
        logits = opinion.of_recons
        return (-logits if self.config.loss == "hinge" else F.softplus(-logits)).mean((1, 2))

    def discriminator_loss(self, opinion: Opinion) -> Float[Tensor, " b"]:
        """What the discriminator lowers, mean over patches: half the sum of both sides, plus LeCam and R1 as asked for."""
        images, recons = opinion.of_images, opinion.of_recons
        if self.config.loss == "hinge":
            sides = F.relu(1 - images), F.relu(1 + recons)
        else:
            sides = F.softplus(-images), F.softplus(recons)
        loss = 0.5 * (sides[0].mean((1, 2)) + sides[1].mean((1, 2)))
        if self.config.lecam:
            mean_image, mean_recon = self.running_logits
            apart = F.relu(images - mean_recon).square(), F.relu(mean_image - recons).square()
            loss = loss + self.config.lecam * (apart[0].mean((1, 2)) + apart[1].mean((1, 2)))
        if self.config.r1:
            loss = loss + 0.5 * self.config.r1 * opinion.penalty
        return loss

    def at_last_layer(
        self,
        x: Float[Tensor, "b c h w"],
        terms: ElboTerms,
        params: Float32[Tensor, "b ck h w"],
        pull_of_others: Float32[Tensor, "b ck h w"] | None,
        pull: Float32[Tensor, "b ck h w"],
    ) -> Float32[Tensor, "2 n"]:
        """Gradients at the decoder's last weights, summed over images: of distortion and other terms, and of this one.

        In fp32, from the last layer alone, computed once more.
        """
        assert terms.features is not None
        (of_distortion,) = torch.autograd.grad(-self.likelihood.log_prob(params, x).sum(), params)
        wanted = of_distortion if pull_of_others is None else of_distortion + pull_of_others
        weight = self.decoder.last_layer
        output = self.decoder.head(terms.features.detach().float())
        rows = [
            torch.autograd.grad(output, weight, gradient, retain_graph=gradient is wanted)[0].flatten()
            for gradient in (wanted, pull)
        ]
        return torch.stack(rows)

    def detect_spikes(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """As `SpikeDetector.detect`, of the discriminator's gradient, which is reduced by now."""
        norms = torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])
        return self.spikes.detect(torch.linalg.vector_norm(torch.stack(list(norms))))

    def update(self, lr: float, skipped: Float[Tensor, ""]) -> None:
        """Change weights and running numbers by what was judged, where not `skipped`; `lr` is the model's. A collective."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr_factor
        with skipping(skipped, self.optimizer):
            self.optimizer.step()
        self.discriminator.net.follow_weights()
        assert isinstance(self._logits, Tensor)
        gradients = self._last_layer_gradients if self.config.adaptive else None
        parts = [self._logits] if gradients is None else [self._logits, gradients.flatten()]  # type: ignore[union-attr]
        everywhere = self.sum(torch.cat(parts)) / self.layout.global_batch_size
        good = torch.isfinite(everywhere).all() & ~skipped.bool()
        moved = self.running_logits.lerp(everywhere[:2], 1 - LECAM_DECAY)
        self.running_logits = torch.where(good, moved, self.running_logits)
        if gradients is not None:
            wanted, own = everywhere[2:].view(2, -1).norm(dim=1)
            new = (wanted / (own + EPS)).clamp(max=LARGEST_RATIO)
            mean = torch.where(self.ratio > 0, self.ratio**RATIO_DECAY * new ** (1 - RATIO_DECAY), new)
            self.ratio = torch.where(good, mean, self.ratio)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it by name, for a checkpoint."""
        states = {
            "network": self.discriminator.net.state_dict(), "optimizer": split_optimizer_state(self.optimizer)[0],
            "judge": self.spikes.state_dict(), "running": {"ratio": self.ratio, "logits": self.running_logits},
        }  # fmt: skip
        return {f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned; raises RuntimeError where it is of another network."""
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}, "judge": {}, "running": {}}
        for key, tensor in saved.items():
            part, name = key.split(".", 1)
            parts[part][name] = tensor
        self.discriminator.net.load_state_dict(parts["network"])
        restore_optimizer_state(self.optimizer, parts["optimizer"], [{} for _ in self.optimizer.param_groups])
        self.spikes.load_state_dict(parts["judge"])
        self.ratio, self.running_logits = (parts["running"][name].to(self.ratio) for name in ("ratio", "logits"))
