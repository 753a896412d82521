"""The vocabulary of a mixture: Routing holds each token's experts, Plan groups them by expert.

Letters: T tokens, D width, E experts, K experts per token, R assignments (token, expert).
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Every routing decision of one layer for one batch: a flat list of R assignments.

    Token choice, expert choice, hash and capacity drops share this one form, so that losses,
    counts and traces are plain functions of it. A layer returns it; nothing is kept behind.

    Attributes:
        tokens_R: int64, the token of each assignment.
        experts_R: int64, its expert.
        weights_R: fp32, the weight of that expert's output.
        logits_TE: fp32, what the router computed before any noise or bias.
        probs_TE: fp32, what the router makes of the logits as a distribution: rows sum to 1
            (softmax; for a sigmoid router its scores divided by their sum).
        top_k: K where every token has exactly K assignments, stored token by token with the
            first choice first; 0 where the number varies (expert choice).
        valid_T: bool, False for padding, which never counts; None where all tokens are real.
        kept_R: bool, False for an assignment dropped over capacity or for padding under a
            capacity; None where all are kept.
        load_TE: fp32, P(token picks expert) under fresh noise; noisy top-k only.
    """

    tokens_R: Tensor
    experts_R: Tensor
    weights_R: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    top_k: int
    valid_T: Tensor | None = None
    kept_R: Tensor | None = None
    load_TE: Tensor | None = None

    @classmethod
    def of_choice(
        cls,
        experts_TK: Tensor,
        weights_TK: Tensor,
        logits_TE: Tensor,
        probs_TE: Tensor,
        valid_T: Tensor | None = None,
        scale: float = 1.0,
    ) -> Self:
        """Token choice: K experts for each token, first choice first, and their weights · scale."""
        num_tokens, top_k = experts_TK.shape
        tokens_R = torch.arange(num_tokens, device=experts_TK.device).repeat_interleave(top_k)
        # Multiplied last: the result is not a view, which FSDP2 warns of in a module's outputs.
        weights_R = weights_TK.flatten() * scale
        return cls(tokens_R, experts_TK.flatten(), weights_R, logits_TE, probs_TE, top_k, valid_T)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.logits_TE.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits_TE.shape[1]

    def counts_E(self) -> Tensor:
        """Assignments each expert received, before any drop; padding excluded. int64 [E]."""
        experts_R = self.experts_R
        if self.valid_T is not None:
            experts_R = experts_R[self.valid_T[self.tokens_R]]
        return torch.bincount(experts_R, minlength=self.num_experts)

    def dropped(self) -> Tensor:
        """Number of real tokens' assignments that found no room. int64 scalar."""
        if self.kept_R is None:
            return self.experts_R.new_zeros(())
        lost_R = ~self.kept_R
        if self.valid_T is not None:
            lost_R = lost_R & self.valid_T[self.tokens_R]
        return lost_R.sum()

    def experts_TK(self) -> Tensor:
        """Experts by token, first choice first. int64 [T, K]; token choice only.

        Raises:
            ValueError: tokens have varying numbers of experts (expert choice).
        """
        if self.top_k == 0:
            raise ValueError("tokens have varying numbers of experts here; use the flat list")
        return self.experts_R.view(-1, self.top_k)


class Plan(NamedTuple):
    """The kept assignments grouped by expert: rows of one expert lie side by side.

    Each group may be padded with zero rows up to a multiple of what the kernel likes (a bf16 GEMM
    on CPU compiles a kernel for every new number of rows, so few distinct numbers are faster).
    Padded rows are neither copied from tokens nor read. R here counts the padded rows.

    Attributes:
        tokens_R: int64, the token each row holds; padding rows name token 0.
        padding_P: int64, the rows that are padding (may be empty).
        slots_TK: int64, the assignments of each token in their order in the Routing, as indices
            into it; the number of assignments marks an empty place (dropped, or fewer than K).
        rows_TK: int64, the row each of them went to; R marks an empty place.
        offsets_E: int64, end of each group, padding included; the last is R.
        experts_E: int64, expert of each group; None: group e is expert e's.
        counts_E: int64, real rows of each expert.
        complete: every place of slots_TK is filled.
    """

    tokens_R: Tensor
    padding_P: Tensor
    slots_TK: Tensor
    rows_TK: Tensor
    offsets_E: Tensor
    experts_E: Tensor | None
    counts_E: Tensor
    complete: bool
