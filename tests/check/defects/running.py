"""Defects of state, dtypes, modes and sizes."""

import copy

import torch
from torch import nn

from .catalogue import defect


@defect("residual stream changed in place", "unchanged")
class InPlace:
    def forward(self, x, valid=None):
        output = super().forward(x, valid)
        if not torch.is_grad_enabled():
            x.add_(output[0])
        return output


@defect("bias counted twice under recomputation (torchtitan#1593)", "recomputation")
class CountedTwice:
    def make_bias(self):
        super().make_bias()
        self.register_buffer("counts", torch.zeros(()))

    def select(self, scores_TE):
        self.counts += 1
        return super().select(scores_TE)


@defect("inference with a rule of its own (AReaL#1207, Megatron-LM#4168)", "evaluation",
        "mixtral deepseek switch gpt_oss")  # fmt: skip
class OtherInference:
    def weigh(self, *args):
        weights_TK = super().weigh(*args)
        return weights_TK if torch.is_grad_enabled() else weights_TK * 0.9


@defect("output in fp32 whatever comes in", "bf16 float64")
class AlwaysFp32:
    def forward(self, x, valid=None):
        y, *losses = super().forward(x, valid)
        return y.float(), *losses


@defect("sums of experts in fp16", "outputs float64")
class SumsInHalf:
    def add(self, y_TD, tokens_R, rows_RD):
        return super().add(y_TD, tokens_R, rows_RD.half().to(rows_RD.dtype))


@defect("a copy that shares its experts", "deepcopy")
class SharedCopy:
    def __deepcopy__(self, memo):
        return self if hasattr(self, "once") else self._once(memo)

    def _once(self, memo):
        kind = type(self)
        made = kind.__new__(kind)
        nn.Module.__init__(made)
        made.shape = self.shape
        for name, each in self._parameters.items():
            made._parameters[name] = copy.deepcopy(each, memo)
        for name, each in self._modules.items():
            made._modules[name] = copy.deepcopy(each, memo)
        for name, each in self._buffers.items():
            made._buffers[name] = copy.deepcopy(each, memo)
        made.__dict__["once"] = True
        return made


@defect("loss-free bias not saved (Megatron-LM#5844 class)", "save-load", "deepseek")
class BiasNotSaved:
    def make_bias(self):
        self.register_buffer("bias", torch.randn(self.shape.num_experts) / 2, persistent=False)


@defect("routing of the step before used again", "state determinism")
class StaleRouting:
    def select(self, scores_TE):
        stale = getattr(self, "stale", None)
        self.stale = super().select(scores_TE)
        return self.stale if stale is None or stale.shape != self.stale.shape else stale


@defect("gradients of the first micro-batch lost", "accumulation micro-batches")
class Lost:
    def forward(self, x, valid=None):
        if torch.is_grad_enabled():
            self.zero_grad()
        return super().forward(x, valid)


@defect("no gradient to the router where experts are frozen", "frozen")
class FrozenCutsAll:
    def weigh(self, *args):
        experts = next(iter(self.ups)) if self.shape.listed else self.ups
        weights_TK = super().weigh(*args)
        return weights_TK if experts.requires_grad else weights_TK.detach()


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if grad.is_contiguous():
            return grad
        return grad.new_zeros(grad.shape)


@defect("upstream gradient of other strides misread (pytorch#172440 class)", "strides")
class Strides:
    def forward(self, x, valid=None):
        y, *losses = super().forward(x, valid)
        return _Contiguous.apply(y), *losses


@defect("hidden widths cut to multiples of 8 (grouped kernels)", "odd-widths")
class WidthsOf8:
    def project(self, hidden_RF, down, expert):
        width = hidden_RF.shape[1] // 8 * 8
        return super().project(hidden_RF * torch.arange(hidden_RF.shape[1]).lt(width), down, expert)


@defect("K = E taken for a dense layer: even weights", "all-experts")
class EvenWeights:
    def weigh(self, *args):
        weights_TK = super().weigh(*args)
        every = self.shape.top_k == self.shape.num_experts > 1
        return torch.full_like(weights_TK, 1 / self.shape.top_k) if every else weights_TK


@defect("E = 1 squeezed away", "single-expert")
class OneExpertLost:
    def mix(self, x_TD, *args):
        y_TD = super().mix(x_TD, *args)
        return y_TD if self.shape.num_experts > 1 else 0 * y_TD


@defect("a pass changes the bias that the next one chooses by", "state determinism", "deepseek")
class BiasMoves:
    def select(self, scores_TE):
        experts_TK = super().select(scores_TE)
        if len(experts_TK) > 1:
            self.bias -= experts_TK.flatten().bincount(minlength=len(self.bias)) / len(experts_TK)
        return experts_TK
