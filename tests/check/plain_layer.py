"""A mixture in plain PyTorch, each step a method that a defect can replace, in five shapes."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from moestro.check import (
    AdapterNames,
    Capacity,
    Description,
    ExpertNames,
    RouterRule,
    SharedNames,
)

SCALE = 1.5  # of adapters


class Shape(NamedTuple):
    """What sets a clean layer apart."""

    dim: int = 16
    hidden_dim: int = 8
    num_experts: int = 4
    top_k: int = 2
    score: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    bias: bool = False  # to choose by
    activation: str = "swiglu"
    listed: bool = False  # each expert has tensors of its own
    biases: bool = False
    interleaved: bool = False
    transposed: bool = False
    shared: bool = False
    capacity: float | None = None
    rank: int = 0  # of low-rank adapters on the experts


SHAPES = {
    "mixtral": Shape(),
    "deepseek": Shape(num_experts=8, top_k=3, score="sigmoid", scale=2.5, groups=2, bias=True,
                      shared=True),
    "switch": Shape(top_k=1, normalise=False, activation="relu", listed=True),
    "gpt_oss": Shape(num_experts=6, activation="geglu", biases=True, interleaved=True,
                     transposed=True),
    "gshard": Shape(num_experts=4, top_k=2, capacity=0.75, listed=True),
    "tuned": Shape(rank=2),
}  # fmt: skip


class PlainLayer(nn.Module):
    """[B, S, D] → [B, S, D], its balance loss and its z-loss."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        width = shape.hidden_dim * (1 if shape.activation == "relu" else 2)
        self.router = nn.Parameter(torch.randn(shape.num_experts, shape.dim) / 2)
        up = torch.randn(shape.num_experts, width, shape.dim) / 3
        down = torch.randn(shape.num_experts, shape.dim, shape.hidden_dim) / 2
        if shape.transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        if shape.listed:
            self.ups = nn.ParameterList(nn.Parameter(each) for each in up)
            self.downs = nn.ParameterList(nn.Parameter(each) for each in down)
        else:
            self.ups, self.downs = nn.Parameter(up), nn.Parameter(down)
        if shape.biases:
            self.up_bias = nn.Parameter(torch.randn(shape.num_experts, width) / 2)
            self.down_bias = nn.Parameter(torch.randn(shape.num_experts, shape.dim) / 2)
        self.make_bias()
        if shape.rank:
            self.add_adapters(up, down)
        if shape.shared:
            self.shared = nn.Sequential(nn.Linear(shape.dim, 6), nn.GELU(), nn.Linear(6, shape.dim))
            self.shared_gate = nn.Parameter(torch.randn(1, shape.dim) / 2)

    def add_adapters(self, up, down):
        for name, weight in (("up", up), ("down", down)):
            count, rows, inputs = weight.shape
            a = torch.randn(count, self.shape.rank, inputs) / inputs**0.5
            b = torch.randn(count, rows, self.shape.rank) / 4
            self.register_parameter(f"{name}_a", nn.Parameter(a))
            self.register_parameter(f"{name}_b", nn.Parameter(b))

    def make_bias(self):
        if self.shape.bias:
            self.register_buffer("bias", torch.randn(self.shape.num_experts) / 2)

    def forward(self, x, valid=None):
        x_TD = x.reshape(-1, self.shape.dim)
        valid_T = (
            torch.ones_like(x_TD[:, 0], dtype=torch.bool) if valid is None else valid.flatten()
        )
        x_TD = self.clean(x_TD, valid_T)
        logits_TE = self.logits(x_TD)
        scores_TE = self.scores(logits_TE)
        experts_TK = self.select(scores_TE)
        weights_TK = self.weigh(scores_TE, experts_TK, logits_TE)
        kept_TK = self.keep(experts_TK, valid_T)
        y_TD = self.mix(x_TD, experts_TK, weights_TK.to(x_TD.dtype), kept_TK)
        if self.shape.shared:
            y_TD = y_TD + self.shared_output(x_TD)
        losses = self.balance(scores_TE, experts_TK, valid_T), self.z(logits_TE, valid_T)
        return y_TD.view(x.shape), *losses

    def clean(self, x_TD, valid_T):
        return x_TD.masked_fill(~valid_T[:, None], 0)

    def logits(self, x_TD):
        with torch.autocast("cpu", enabled=False):
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            return F.linear(x_TD.to(dtype), self.router.to(dtype))

    def scores(self, logits_TE):
        return logits_TE.sigmoid() if self.shape.score == "sigmoid" else logits_TE.softmax(-1)

    def choosing(self, scores_TE):
        return scores_TE + self.bias.to(scores_TE.dtype) if self.shape.bias else scores_TE

    def group_scores(self, grouped_TGP):
        return grouped_TGP.topk(2, -1).values.sum(-1)

    def select(self, scores_TE):
        choice_TE = self.choosing(scores_TE)
        if self.shape.groups > 1:
            size = self.shape.num_experts // self.shape.groups
            grouped_TGP = choice_TE.view(-1, self.shape.groups, size)
            best_T1 = self.group_scores(grouped_TGP).argmax(1, keepdim=True)
            open_TG = torch.zeros_like(grouped_TGP[..., 0], dtype=torch.bool).scatter(1, best_T1, 1)
            choice_TE = grouped_TGP.masked_fill(~open_TG[..., None], float("-inf")).flatten(1)
        return choice_TE.topk(self.shape.top_k, -1).indices

    def weigh(self, scores_TE, experts_TK, logits_TE):
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.shape.normalise:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        return weights_TK * self.shape.scale

    def keep(self, experts_TK, valid_T):
        kept_TK = torch.ones_like(experts_TK, dtype=torch.bool)
        if self.shape.capacity is None:
            return kept_TK
        room, taken = self.room(int(valid_T.sum())), [0] * self.shape.num_experts
        for token, choice in self.order(experts_TK):
            expert = int(experts_TK[token, choice])
            if self.queues(valid_T[token]):
                kept_TK[token, choice] = taken[expert] < room
                taken[expert] += 1
        return kept_TK

    def room(self, tokens):
        rows = self.shape.capacity * tokens * self.shape.top_k / self.shape.num_experts
        return -int(-rows // 1)

    def order(self, experts_TK):
        return [(t, k) for k in range(experts_TK.shape[1]) for t in range(len(experts_TK))]

    def queues(self, valid):
        return valid

    def mix(self, x_TD, experts_TK, weights_TK, kept_TK):
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.shape.num_experts):
            tokens_R, choices_R = self.rows(experts_TK, kept_TK, expert)
            rows_RD = self.expert(expert, x_TD[tokens_R])
            rows_RD = rows_RD.to(x_TD.dtype) * weights_TK[tokens_R, choices_R, None]
            y_TD = self.add(y_TD, tokens_R, rows_RD)
        return y_TD

    def rows(self, experts_TK, kept_TK, expert):
        return ((experts_TK == expert) & kept_TK).nonzero(as_tuple=True)

    def add(self, y_TD, tokens_R, rows_RD):
        return y_TD.index_add(0, tokens_R, rows_RD)

    def matrices(self, expert):
        up, down = self.ups[expert], self.downs[expert]
        return (up.t(), down.t()) if self.shape.transposed else (up, down)

    def expert(self, expert, x_RD):
        up, down = self.matrices(expert)
        hidden_RH = F.linear(x_RD, up, self.up_bias[expert] if self.shape.biases else None)
        if self.shape.rank:
            hidden_RH = hidden_RH + self.low(x_RD, self.up_a, self.up_b, expert)
        return self.project(self.activate(hidden_RH), down, expert)

    def project(self, hidden_RF, down, expert):
        y_RD = F.linear(hidden_RF, down, self.down_bias[expert] if self.shape.biases else None)
        if self.shape.rank:
            y_RD = y_RD + self.low(hidden_RF, self.down_a, self.down_b, expert)
        return y_RD

    def merge(self):
        for weight, a, b in (
            (self.ups, self.up_a, self.up_b),
            (self.downs, self.down_a, self.down_b),
        ):
            weight.data += SCALE * b @ a
            b.data.zero_()

    def low(self, x_RI, a, b, expert):
        return SCALE * F.linear(F.linear(x_RI, a[expert]), b[expert])

    def activate(self, hidden_RH):
        if self.shape.activation == "relu":
            return hidden_RH.relu()
        gate_RF, up_RF = self.halves(hidden_RH)
        function = F.silu if self.shape.activation == "swiglu" else F.gelu
        return function(gate_RF) * up_RF

    def halves(self, hidden_RH):
        if self.shape.interleaved:
            return hidden_RH[:, ::2], hidden_RH[:, 1::2]
        return hidden_RH.chunk(2, -1)

    def shared_output(self, x_TD):
        return self.shared(x_TD) * F.linear(x_TD, self.shared_gate).sigmoid()

    def balance(self, scores_TE, experts_TK, valid_T):
        num_experts = self.shape.num_experts
        counts_E = torch.bincount(experts_TK[valid_T].flatten(), minlength=num_experts)
        share_E = counts_E.to(scores_TE.dtype) / counts_E.sum().clamp(min=1)
        probs_TE = scores_TE / scores_TE.sum(1, keepdim=True)
        return num_experts * (share_E * probs_TE[valid_T].mean(0)).sum()

    def z(self, logits_TE, valid_T):
        return logits_TE[valid_T].logsumexp(-1).square().mean()


def describe(shape: Shape) -> Description:
    """What its clean form is."""
    end = ".{e}" if shape.listed else ""
    return Description(
        router=RouterRule(
            top_k=shape.top_k, weight="router", choice_bias="bias" if shape.bias else None,
            score=shape.score, normalise=shape.normalise, scale=shape.scale,
            num_groups=shape.groups,
        ),
        experts=ExpertNames(
            **{"up" if shape.activation == "relu" else "gate_up": f"ups{end}"}, down=f"downs{end}",
            activation=shape.activation, interleaved=shape.interleaved,
            transposed=shape.transposed, up_bias="up_bias" if shape.biases else None,
            down_bias="down_bias" if shape.biases else None,
        ),
        shared=SharedNames(module="shared", gate="shared_gate") if shape.shared else None,
        capacity=Capacity(factor=shape.capacity) if shape.capacity else None,
        call=lambda module, x, valid=None: module(x, valid), takes_mask=True,
        balance=lambda module, output: output[1], z=lambda module, output: output[2],
        adapters=tuple(
            AdapterNames(weight=f"{name}s", a=f"{name}_a", b=f"{name}_b", scale=SCALE)
            for name in (("up", "down") if shape.rank else ())
        ),
        merge=(lambda module: module.merge()) if shape.rank else None,
    )  # fmt: skip


def factory(shape: Shape, *defects: type, seed: int = 0):
    """A function that makes the layer, with defects, also in other sizes."""
    kind = type("Layer", (*defects, PlainLayer), {})

    def make(dim=shape.dim, hidden_dim=shape.hidden_dim, num_experts=shape.num_experts,
             top_k=shape.top_k):  # fmt: skip
        groups = shape.groups if top_k < num_experts else 1
        sized = shape._replace(dim=dim, hidden_dim=hidden_dim, num_experts=num_experts,
                               top_k=top_k, groups=groups)  # fmt: skip
        torch.manual_seed(seed)
        return kind(sized), describe(sized)

    return make
