"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """How far a run is; the loop's only mutable state besides the tensors."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    images_seen: int = 0
    """Position in the training data, in images."""
    validated_at: int = 0
    """images_seen of the last validation."""
    best_score: float | None = None
    """Highest on the validation set of what `best_by` names (ValidationScores.score)."""
    best_by: str = "elbo"
    """By what the best is chosen (--train.best-by)."""
    best_step: int | None = None
    """Step of the checkpoint with that score."""
    validations_without_best: int = 0
    """Validations since; early stopping counts them."""
    skipped_steps: int = 0
    """Steps that changed no weight, since their loss or gradient was not finite or exploded."""
    exploded_steps: int = 0
    """Those of them whose gradient was finite but far larger than of late."""
    sound_step: int = 0
    """As the last training record knew: the last step before those skipped in a row up to now, or that record's step."""
    rollbacks: int = 0
    """Times that training went back to a checkpoint because it diverged."""
    lr_factor: float = 1.0
    """Factor on the learning rate, lowered when that happened."""

    def advance(self, global_batch_size: int) -> None:
        """One optimizer step on so many images has been taken, or skipped."""
        self.step += 1
        self.images_seen += global_batch_size

    def note_validation(self, score: float | None, by: str = "elbo") -> None:
        """Remember a validation at the current position, and whether it is the best so far by this score (NaN never is).

        In the middle of skipped steps it is neither better nor worse: the weights are those of `sound_step`; nor is it without
        a score. By another one than before, the search begins anew.
        """
        self.validated_at = self.images_seen
        if by != self.best_by:
            self.best_by, self.best_score, self.best_step, self.validations_without_best = by, None, None, 0
        if score is None or self.sound_step < self.step:
            return
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step, self.validations_without_best = score, self.step, 0
        else:
            self.validations_without_best += 1
