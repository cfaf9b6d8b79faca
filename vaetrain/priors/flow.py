"""A normalising flow as prior: zuko's couplings, trained to a fixed budget."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import zuko
from jaxtyping import Float, Float64
from torch import Tensor, nn

from vaetrain.distributed.randomness import mixed_seed
from vaetrain.model.prior import standard_normal_log_density
from vaetrain.priors.aggregate import AggregatePosterior
from vaetrain.priors.config import PriorFitConfig
from vaetrain.priors.gaussian import WhitenedCodes, WhitePrior
from vaetrain.priors.whitening import Whitening
from vaetrain.progress_bar import counted
from vaetrain.upload import upload

BATCH_SIZE = 256
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
CLIP_NORM = 5.0
CHECK_EVERY = 50
"""Steps between two looks at the held-out likelihood."""
PATIENCE = 400
"""Steps without a better one after which training stops."""

FLOW = 12  # what the randomness is for


def build_flow(rank: int) -> zuko.flows.Flow:
    """A RealNVP (Dinh et al. 2017) in `rank` dimensions that starts as the identity: affine couplings of random halves.

    zuko calls it NICE, but its couplings scale and shift. In one dimension, where there are no halves, it is a spline. The
    identity matters: with zuko's own start 4,000 codes of 128 dimensions were fitted worse than by a Gaussian.
    """
    if rank == 1:
        flow = zuko.flows.NSF(1, transforms=1)
        outputs = list(flow.parameters())
    else:
        flow = zuko.flows.NICE(rank, transforms=8, randmask=True, hidden_features=(128, 128))
        outputs = [p for transform in flow.transform.transforms for p in transform.hyper[-1].parameters()]
    for parameter in outputs:
        nn.init.zeros_(parameter)
    return flow


class FlowPrior(WhitePrior):
    """A normalising flow in the leading white coordinates."""

    def __init__(self, latent_shape: tuple[int, ...], whitening: Whitening, flow: zuko.flows.Flow, rank: int) -> None:
        super().__init__(latent_shape, whitening)
        self.flow = flow
        self.rank = rank

    def draw(self, noise: Float[Tensor, "b d"], uniform: Float64[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """See `WhitePrior.draw`; the temperature scales the flow's base distribution."""
        leading = self.flow().transform.inv(noise[:, : self.rank])
        return torch.cat([leading, noise[:, self.rank :]], dim=1)

    def white_log_density(self, w: Float64[Tensor, "b d"]) -> Float64[Tensor, " b"]:
        """See `WhitePrior.white_log_density`; the flow itself computes in float32."""
        leading = self.flow().log_prob(w[:, : self.rank].float()).double()
        return leading + standard_normal_log_density(w[:, self.rank :])

    def tensors(self) -> dict[str, Tensor]:
        """See `Prior.tensors`."""
        state = {f"flow.{name}": tensor for name, tensor in self.flow.state_dict().items()}
        return super().tensors() | state | {"flow_rank": torch.tensor(self.rank)}


@torch.enable_grad()  # whatever the caller, who otherwise only evaluates, has switched off
def fit_flow(
    aggregate: AggregatePosterior, config: PriorFitConfig, whitening: Whitening
) -> tuple[FlowPrior, dict[str, Any]]:
    """A flow by maximum likelihood, with new z ~ q(z|x) at every step; the weights best on held-out codes are kept."""
    device = aggregate.train.mean.device
    train, num_dims = aggregate.train, aggregate.train.mean.shape[1]
    rank = min(config.leading_dims, num_dims)
    selection = WhitenedCodes.of(aggregate.selection_codes(config.seed), whitening, rank)
    seed = mixed_seed(config.seed, FLOW)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = build_flow(rank).to(device)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * math.cos(0.5 * math.pi * step / config.flow_steps)
    )
    checks: list[tuple[int, float]] = []  # (step, held-out nats per dimension)
    best, best_state = (0, -math.inf), copy.deepcopy(flow.state_dict())
    for step in counted(
        "fitting the flow, at most", range(config.flow_steps + 1), config.flow_steps, "steps", quiet=False
    ):
        if step % CHECK_EVERY == 0 or step == config.flow_steps:
            with torch.no_grad():
                log_density = flow().log_prob(selection.leading.float()).double()
            checks.append((step, selection.nats_per_dim(log_density, num_dims)))
            if checks[-1][1] > best[1]:
                best, best_state = checks[-1], copy.deepcopy(flow.state_dict())
        if step == config.flow_steps or step - best[0] >= PATIENCE:
            break
        rows = upload(torch.randint(len(train), (BATCH_SIZE,), generator=generator), device)
        noise = torch.randn(BATCH_SIZE, num_dims, generator=generator)  # the same on every device
        z = train.mean[rows] + train.std[rows] * upload(noise, device)
        loss = -flow().log_prob(whitening.whiten(z, rank).float()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
    flow.load_state_dict(best_state)
    flow.eval().requires_grad_(False)
    prior = FlowPrior(aggregate.latent_shape, whitening, flow, rank)
    return prior, {"leading_dims": rank, "best_step": best[0], "selection_nats_per_dim": checks}
