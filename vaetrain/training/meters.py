"""Sums over the steps between two training records, on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from vaetrain.distributed.processes import sum_over_processes
from vaetrain.training.gradient_step import StepResult


@dataclass(frozen=True)
class LogWindow:
    """What happened since the last training record, over all processes."""

    means: dict[str, float | None]
    """Mean per image of each meter, over the steps that were not skipped; None if all were."""
    skipped_steps: int
    """Steps whose loss or gradient was not finite, or whose gradient exploded."""
    exploded_steps: int
    """Those of them whose gradient was finite."""
    longest_streak: int
    """The most steps in a row that were skipped, counted from before the interval."""
    skip_streak: int
    """The steps in a row that were skipped up to its end, 0 where the last one was not."""


class Meters:
    """Sums that stay on the device until `fetch` brings them all to the host in one synchronisation."""

    def __init__(self, names: tuple[str, ...], accelerator: Accelerator) -> None:
        self.names = names
        self.accelerator = accelerator
        device = accelerator.device
        self.sums = torch.zeros(len(names) + 3, dtype=torch.float64, device=device)
        self.streak = torch.zeros((), dtype=torch.float64, device=device)
        self.longest = torch.zeros_like(self.streak)
        self.columns = (*names, "num_images", "skipped_steps", "exploded_steps", "streak", "longest_streak")

    def add(self, num_images: int, skipped: Float[Tensor, ""], spiked: Float[Tensor, ""], **totals: Tensor) -> None:
        """Add a step: totals over this process's `num_images`, which a skipped step (1 on the device) leaves out."""
        values = [totals[name].detach().double() for name in self.names]
        row = torch.stack([*values, torch.full_like(self.streak, num_images)])
        self.sums[:-2] += torch.where(skipped.bool(), 0.0, row)
        self.sums[-2:] += torch.stack([skipped, spiked])
        self.streak = (self.streak + 1) * skipped
        self.longest = torch.maximum(self.longest, self.streak)

    def add_step(self, result: StepResult) -> None:
        """Add what a step showed."""
        self.add(result.num_images, result.skipped, result.spiked, **result.sums)

    def fetch(self) -> LogWindow:
        """The interval that ends now; start the next. A collective and a synchronisation with the device."""
        # The streak is the same on every process, so its sum is too.
        everything = sum_over_processes(
            self.accelerator, torch.cat([self.sums, self.streak[None], self.longest[None]])
        ).tolist()
        *totals, num_images, skipped_steps, exploded_steps, streak, longest = everything
        self.sums.zero_()
        self.longest = self.streak
        return LogWindow(
            means={
                name: total / num_images if num_images else None for name, total in zip(self.names, totals, strict=True)
            },
            skipped_steps=round(skipped_steps / self.accelerator.num_processes),
            exploded_steps=round(exploded_steps / self.accelerator.num_processes),
            longest_streak=round(longest / self.accelerator.num_processes),
            skip_streak=round(streak / self.accelerator.num_processes),
        )

    def reset(self) -> None:
        """Forget everything, the running streak of skipped steps too."""
        self.sums, self.streak, self.longest = map(torch.zeros_like, (self.sums, self.streak, self.longest))

    def state_dict(self) -> dict[str, Float[Tensor, " processes"]]:
        """Every sum of the running interval as every process has it; a collective."""
        row = torch.cat([self.sums, self.streak[None], self.longest[None]])
        return dict(zip(self.columns, self.accelerator.gather(row[None]).T, strict=True))

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on with the interval of `state_dict`; on another number of processes the main one has all totals."""
        if saved.keys() != set(self.columns):  # --log.noise-scale was changed: the interval begins anew
            return
        rows = torch.stack([saved[name] for name in self.columns], dim=1).to(self.sums)
        if len(rows) == self.accelerator.num_processes:
            row = rows[self.accelerator.process_index]
        else:
            totals = rows[:, : len(self.names) + 1].sum(0)
            # Steps are skipped by all processes together: those counts are the same in every row.
            row = torch.cat([totals * self.accelerator.is_main_process, rows[0, len(totals) :]])
        self.sums, self.streak, self.longest = row[:-2].clone(), row[-2].clone(), row[-1].clone()
