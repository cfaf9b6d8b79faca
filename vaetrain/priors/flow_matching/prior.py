"""A trained flow as prior: image i of class y, with guidance, by a solver in so many steps; and its log-density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vaetrain.distributed.randomness import mixed_seed, noise_of_images
from vaetrain.priors.config import FlowSettings
from vaetrain.priors.flow_matching.config import NetworkConfig, PriorTraining
from vaetrain.priors.flow_matching.model import FlowMatching
from vaetrain.priors.flow_matching.ode import MAX_EXACT_DIMS, integrate, log_density
from vaetrain.strict_json import from_json
from vaetrain.upload import upload

CLASSES, PROBES = 43, 44  # what the randomness is for

MAX_LABELS = 1_000_000

MAX_DENSITY_CLASSES = 16
"""Up to so many the log-density is that of their mixture, which takes one integration for each."""


@dataclass(frozen=True)
class FlowMatchingPrior:
    """A prior whose latents are integrated from noise. Its device is that of the model."""

    model: FlowMatching
    classes: tuple[str, ...]
    """By label; none if all labels were dropped in training."""
    knows_no_class: bool
    """Whether some labels were dropped, without which there is nothing that guidance could lead away from."""
    settings: FlowSettings = field(default_factory=FlowSettings)

    def __post_init__(self) -> None:
        """Refuse what it has not learned."""
        name, guidance = self.settings.class_, self.settings.guidance
        if name is not None and name not in self.classes:
            known = f"it knows {', '.join(self.classes)}" if self.classes else "it was trained without classes"
            raise ValueError(f"this flow-matching prior has no class {name!r}: {known}")
        if guidance != 1 and not (self.classes and self.knows_no_class):
            raise ValueError(
                f"--guidance is {guidance:g}, and the prior was trained with "
                f"{'every label (--objective.label-dropout 0)' if self.classes else 'no label'}; leave it at 1"
            )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return self.model.latent_shape

    def of_class(self, name: str | None) -> FlowMatchingPrior:
        """The same for one class."""
        return replace(self, settings=replace(self.settings, class_=name))

    def sample(self, seed: int, indices: Sequence[int], temperature: float = 1.0) -> Float[Tensor, "b *latent"]:
        """See `Prior.sample`; `temperature` scales the noise that the flow starts from."""
        noise = temperature * noise_of_images(seed, indices, self.latent_shape)
        labels = self.labels(seed, indices)
        steps, solver = self.settings.steps, self.settings.solver
        with torch.no_grad():
            x = integrate(lambda x, t: self.velocity(x, t, labels), self._on_device(noise), steps, solver)
            return (x * self.model.std + self.model.mean).cpu()

    def labels(self, seed: int, indices: Sequence[int]) -> Int64[Tensor, " b"]:
        """Class numbers of the images with these numbers, each a function of (seed, number); without classes that of none."""
        none = self.model.num_classes
        if not self.classes or self.settings.class_ is not None:
            label = none if self.settings.class_ is None else self.classes.index(self.settings.class_)
            return self._on_device(torch.full((len(indices),), label))
        uniform = torch.special.ndtr(noise_of_images(mixed_seed(seed, CLASSES), indices, (1,))[:, 0].double())
        shares = self.model.class_shares.double().cpu()
        drawn = torch.searchsorted(shares.cumsum(0) / shares.sum(), uniform, right=True)
        return self._on_device(drawn.clamp(max=int(shares.nonzero().max())))

    def velocity(
        self, x: Float[Tensor, "b *latent"], t: Float[Tensor, " b"], labels: Int64[Tensor, " b"]
    ) -> Float[Tensor, "b *latent"]:
        """Of normalised latents, guided."""
        network = self.model.network
        if self.settings.guidance == 1:
            guided: Tensor = network(x, t, labels)
            return guided
        none = network(x, t, torch.full_like(labels, self.model.num_classes))
        return torch.lerp(none, network(x, t, labels), self.settings.guidance)

    def log_density(self, z: Float[Tensor, "b d"]) -> Float64[Tensor, " b"] | None:
        """See `Prior.log_density`: of the class, or of the mixture of all by their shares; None with very many.

        In over 8 dimensions an unbiased estimate for each class, by one probe for each latent's number in the batch.
        """
        shape, model = self.latent_shape, self.model
        x = (self._on_device(z).view(-1, *shape) - model.mean) / model.std
        probe = None
        if math.prod(shape) > MAX_EXACT_DIMS:
            probe = self._on_device(noise_of_images(PROBES, range(len(z)), shape).sign())
        if not self.classes or self.settings.class_ is not None:
            weighted = [(1.0, self.labels(0, range(len(z))))]
        else:
            present = model.class_shares.nonzero().flatten().tolist()
            if len(present) > MAX_DENSITY_CLASSES:
                return None
            weighted = [
                (float(model.class_shares[label]), self._on_device(torch.full((len(z),), label))) for label in present
            ]
        parts = []
        for share, labels in weighted:

            def velocity(x: Tensor, t: Tensor, labels: Tensor = labels) -> Tensor:
                return self.velocity(x, t, labels)

            parts.append(log_density(velocity, x, self.settings.steps, probe) + math.log(share))
        scale = model.std.double().log().sum() * (math.prod(shape) / model.std.numel())
        return (torch.stack(parts).logsumexp(0) - scale).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """See `Prior.tensors`."""
        return {f"flow_matching.{name}": tensor for name, tensor in self.model.state_dict().items()}

    @classmethod
    def trained_as(cls, config: PriorTraining, model: FlowMatching, classes: tuple[str, ...]) -> FlowMatchingPrior:
        """Of weights that a training gave."""
        dropout = config.objective.label_dropout
        return cls(model, () if dropout == 1 else classes, knows_no_class=dropout > 0)

    @classmethod
    def of_tensors(
        cls, latent_shape: tuple[int, ...], details: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> FlowMatchingPrior:
        """From the tensors and details of a file (publish.py); raises ValueError, LookupError or RuntimeError for another's."""
        network: NetworkConfig = from_json(NetworkConfig, details["network"], "details.network")
        num_labels, classes = int(details["num_labels"]), tuple(map(str, details["classes"]))
        if not (1 <= num_labels <= MAX_LABELS and len(classes) in (0, num_labels)):
            raise ValueError(f"it has {num_labels} labels and {len(classes)} classes")
        state = {name.removeprefix("flow_matching."): tensor for name, tensor in tensors.items()}
        with torch.device("meta"):  # before anything is built that the file has no weights for
            wanted = FlowMatching(network, latent_shape, num_labels).state_dict()
        if {name: each.shape for name, each in state.items()} != {name: each.shape for name, each in wanted.items()}:
            raise ValueError("its tensors are not those of the network that it describes")
        model = FlowMatching(network, latent_shape, num_labels)
        model.load_state_dict(state)
        return cls(model.eval().requires_grad_(False), classes, knows_no_class=bool(details["knows_no_class"]))

    def to(self, device: torch.device) -> FlowMatchingPrior:
        """The same, integrated there; the model moves."""
        self.model.to(device)
        return self

    def _on_device(self, tensor: Tensor) -> Tensor:
        return upload(tensor, self.model.mean.device)
