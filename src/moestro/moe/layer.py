"""MoE = router + dispatch + experts + combine (+ shared expert): one feed-forward layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from moestro.config import MoEConfig
from moestro.errors import ShapeError
from moestro.moe import dispatch, parallel
from moestro.moe.experts import Experts, FeedForward, hidden_from_compiler
from moestro.moe.parallel import ParallelExperts
from moestro.moe.routers import build_router
from moestro.moe.routing import Routing


class MoE(nn.Module):
    """A mixture-of-experts layer in place of a feed-forward network.

    Example:
        >>> import torch
        >>> from moestro import MoE, MoEConfig
        >>> layer = MoE(MoEConfig(dim=16, hidden_dim=32, num_experts=4, top_k=2))
        >>> y, routing = layer(torch.randn(3, 5, 16))
        >>> y.shape, routing.experts_TK().shape
        (torch.Size([3, 5, 16]), torch.Size([15, 2]))
    """

    def __init__(self, cfg: MoEConfig, backend: str = "auto", out_scale: float = 1.0) -> None:
        """Build the layer.

        Args:
            cfg: its settings.
            backend: a kernel's name, or "auto"; see `moestro.kernels.backends`.
            out_scale: of the σ of each `down` at the start.
        """
        super().__init__()
        self.cfg = cfg
        self.router = build_router(cfg)
        self.experts: nn.Module = Experts(
            cfg.num_experts, cfg.dim, cfg.hidden_dim, cfg.activation, cfg.experts.dropout,
            cfg.init_scale, backend, cfg.experts.bias, out_scale,
        )  # fmt: skip
        self.shared: nn.Module | None = None
        self.shared_gate: nn.Linear | None = None
        if cfg.shared is not None:
            self.shared = FeedForward(
                cfg.dim, cfg.shared.hidden_dim, cfg.activation, cfg.init_scale, backend, out_scale
            )
            if cfg.shared.gate:
                self.shared_gate = nn.Linear(cfg.dim, 1, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        valid: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Send each token to its experts and add up what they return.

        Args:
            x: [..., D]; leading dimensions are flattened to T tokens. Where there is more than
                one, the first is that of the sequences (`capacity.per_sequence` counts in each).
            token_ids: int64 [...], only for the hash router.
            valid: bool [...], False for padding: whatever x holds there, even NaN, y is 0, and
                nothing else sees or counts it.
            noise: int64 [...], keys of which what is random in training is a function
                (`moestro.moe.noise`); None: it is drawn by torch's generator.

        Returns:
            (y like x, the Routing of the T tokens).

        Raises:
            ShapeError: a shape or dtype does not fit.
        """
        self._check(x, token_ids=token_ids, valid=valid, noise=noise)
        x_TD = x.reshape(-1, self.cfg.dim)
        valid_T = None if valid is None else valid.reshape(-1)
        ids_T = None if token_ids is None else token_ids.reshape(-1)
        keys = () if noise is None else (noise.reshape(-1),)

        if valid_T is not None:
            x_TD = x_TD.masked_fill(~valid_T[:, None], 0)

        num_sequences = len(x) if x.dim() > 2 else 1
        routing = self._limit(self.router(x_TD, ids_T, valid_T, *keys), num_sequences)
        y_TD = self._mixed(x_TD, routing, *keys)
        if valid_T is not None:  # Experts with biases turn zeros into non-zeros.
            y_TD = y_TD.masked_fill(~valid_T[:, None], 0)
        # No view, which FSDP2 warns of: whoever changed it in place would bypass the hooks on it.
        return torch.ops.aten._unsafe_view(y_TD, x.shape), routing

    def _limit(self, routing: Routing, num_sequences: int) -> Routing:
        """Drop what is over capacity, where one is set."""
        cfg = self.cfg.capacity
        if cfg is None:
            return routing
        if cfg.per_sequence is not None:
            return dispatch.limit(routing, cfg.per_sequence, cfg.priority, max(num_sequences, 1))
        factor = cfg.factor if self.training else cfg.eval_factor
        if cfg.scope == "global" and self.training and parallel.several():
            return hidden_from_compiler(parallel.limit_together)(routing, factor, cfg.priority)
        tokens = routing.num_tokens
        if routing.valid_T is not None:
            tokens = int(routing.valid_T.sum())
        rows = dispatch.capacity(factor, tokens, self.cfg.top_k, self.cfg.num_experts)
        return dispatch.limit(routing, rows, cfg.priority)

    def _mixed(self, x_TD: Tensor, routing: Routing, *keys: Tensor) -> Tensor:
        """The outputs of the token's experts by their weights, and of the shared expert."""
        rows_TD = x_TD
        if self.cfg.router.weighs == "input":  # each token has one expert
            rows_TD = (x_TD * routing.weights_R[:, None]).to(x_TD.dtype)
            routing = routing._replace(weights_R=torch.ones_like(routing.weights_R))
        y_TD: Tensor
        if self.shared is not None and isinstance(self.experts, ParallelExperts):
            meanwhile = partial(self._shared, x_TD)
            y_TD = self.experts(rows_TD, routing, *keys, meanwhile=meanwhile)
            return y_TD
        y_TD = self.experts(rows_TD, routing, *keys)
        return y_TD if self.shared is None else y_TD + self._shared(x_TD)

    def _shared(self, x_TD: Tensor) -> Tensor:
        """The shared expert's output, scaled by its gate where it has one."""
        assert self.shared is not None
        y_TD: Tensor = self.shared(x_TD)
        if self.shared_gate is not None:
            gate_T1 = self.shared_gate(x_TD)
            gate_T1 = gate_T1.to(torch.promote_types(gate_T1.dtype, torch.float32))
            y_TD = y_TD * torch.sigmoid(gate_T1).to(y_TD.dtype)
        return y_TD

    def _check(self, x: Tensor, **others: Tensor | None) -> None:
        if x.shape[-1:] != (self.cfg.dim,):
            raise ShapeError(
                f"the layer takes [..., {self.cfg.dim}]; given {list(x.shape)}. "
                "Set MoEConfig.dim to the width of your tokens"
            )
        for name, value in others.items():
            if value is not None and value.shape != x.shape[:-1]:
                raise ShapeError(
                    f"{name} has shape {list(value.shape)}; x needs {list(x.shape[:-1])}"
                )
        valid = others["valid"]
        if valid is not None and valid.dtype != torch.bool:
            raise ShapeError(f"valid is {valid.dtype}; it must be bool, False for padding")
