"""Defects of experts, shared experts, dispatch and combination."""

import torch
from torch.nn import functional as F

from .catalogue import defect

_GATED = "mixtral deepseek gpt_oss gshard"


@defect("gate and up exchanged (checkpoint converters, mergekit#692)", "outputs", _GATED)
class GateAndUp:
    def halves(self, hidden_RH):
        return super().halves(hidden_RH)[::-1]


@defect("interleaved weights read as halves (gpt-oss converters)", "outputs", "gpt_oss")
class Interleaved:
    def halves(self, hidden_RH):
        return hidden_RH.chunk(2, -1)


@defect("GELU by tanh for the exact one", "outputs", "gpt_oss")
class TanhGelu:
    def activate(self, hidden_RH):
        gate_RF, up_RF = self.halves(hidden_RH)
        return F.gelu(gate_RF, approximate="tanh") * up_RF


@defect("last expert never run: range(E - 1) (OLMoE#26 class)", "choice outputs")
class LastSkipped:
    def rows(self, experts_TK, kept_TK, expert):
        return super().rows(experts_TK, kept_TK & (expert < self.shape.num_experts - 1), expert)


@defect("weights of the next expert (offset of ranks, Megatron-Bridge#1716)", "outputs")
class NextExpert:
    def matrices(self, expert):
        return super().matrices((expert + 1) % self.shape.num_experts)


@defect("biases of experts left out (gpt-oss ports)", "outputs", "gpt_oss")
class NoBias:
    def project(self, hidden_RF, down, expert):
        return F.linear(hidden_RF, down)


@defect("down bias not weighted (gpt-oss ports)", "outputs", "gpt_oss")
class BiasUnweighted:
    def project(self, hidden_RF, down, expert):
        return F.linear(hidden_RF, down)

    def mix(self, x_TD, experts_TK, weights_TK, kept_TK):
        return super().mix(x_TD, experts_TK, weights_TK, kept_TK) + self.down_bias[experts_TK].sum(
            1
        )


@defect("weight on the input, before the activation (Llama 4's rule elsewhere)", "outputs",
        "mixtral deepseek gpt_oss gshard")  # fmt: skip
class WeightOnInput:
    def mix(self, x_TD, experts_TK, weights_TK, kept_TK):
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.shape.num_experts):
            tokens_R, choices_R = self.rows(experts_TK, kept_TK, expert)
            rows_RD = x_TD[tokens_R] * weights_TK[tokens_R, choices_R, None]
            y_TD = self.add(y_TD, tokens_R, self.expert(expert, rows_RD).to(x_TD.dtype))
        return y_TD


@defect("products of TF32, 10 bits, in an fp32 layer (scattermoe#5)", "outputs")
class Tf32:
    def matrices(self, expert):
        found = super().matrices(expert)
        low = [(w.detach().float().contiguous().view(torch.int32) & -8192).view(torch.float32)
               for w in found]  # fmt: skip
        return tuple(w + (cut.to(w.dtype) - w).detach() for w, cut in zip(found, low, strict=True))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@defect("expert gradients doubled at EP = 2 (pytorch#160285)", "expert-gradients")
class GradientsDoubled:
    def matrices(self, expert):
        return tuple(_Scaled.apply(each, 2.0) for each in super().matrices(expert))


@defect("expert gradients divided by the tokens (torchtitan#1551)", "expert-gradients")
class GradientsByTokens:
    def expert(self, expert, x_RD):
        self.seen = max(len(x_RD), 1)
        return super().expert(expert, x_RD)

    def matrices(self, expert):
        return tuple(_Scaled.apply(each, 1 / self.seen) for each in super().matrices(expert))


@defect("gradient of the down projections lost", "expert-gradients")
class DownDetached:
    def matrices(self, expert):
        up, down = super().matrices(expert)
        return up, down.detach()


@defect("no gradient from experts to the input (dispatch without backward)", "input-gradient")
class InputDetached:
    def expert(self, expert, x_RD):
        return super().expert(expert, x_RD.detach())


@defect("an expert with one token skipped: squeeze()", "one-token outputs")
class SingleSkipped:
    def rows(self, experts_TK, kept_TK, expert):
        tokens_R, choices_R = super().rows(experts_TK, kept_TK, expert)
        return (tokens_R[:0], choices_R[:0]) if len(tokens_R) == 1 else (tokens_R, choices_R)


@defect("results written, not added: y[rows] = …", "choice outputs",
        "mixtral deepseek gpt_oss gshard")  # fmt: skip
class Overwritten:
    def add(self, y_TD, tokens_R, rows_RD):
        return y_TD.index_copy(0, tokens_R, rows_RD)


@defect("NaN for an expert without tokens (pytorch#152668)", "empty-expert outputs")
class EmptyNan:
    def expert(self, expert, x_RD):
        return super().expert(expert, x_RD - 0 * x_RD.mean(0)) if len(x_RD) else x_RD / 0

    def matrices(self, expert):
        return super().matrices(expert)

    def mix(self, x_TD, experts_TK, weights_TK, kept_TK):
        y_TD = super().mix(x_TD, experts_TK, weights_TK, kept_TK)
        for expert in range(self.shape.num_experts):
            if len(x_TD) and not (experts_TK == expert).any():
                up = self.matrices(expert)[0]
                y_TD = y_TD + 0 * up[:0].mean()
        return y_TD


@defect("grad is None for an expert without tokens (Automodel#2995)", "empty-expert", "switch")
class EmptyNone:
    def mix(self, x_TD, experts_TK, weights_TK, kept_TK):
        y_TD = torch.zeros_like(x_TD)
        for expert in experts_TK.unique().tolist():
            tokens_R, choices_R = self.rows(experts_TK, kept_TK, expert)
            rows_RD = self.expert(expert, x_TD[tokens_R]) * weights_TK[tokens_R, choices_R, None]
            y_TD = self.add(y_TD, tokens_R, rows_RD.to(x_TD.dtype))
        return y_TD


@defect("rows of an expert cut at twice its even share", "one-expert outputs",
        "deepseek switch gpt_oss")  # fmt: skip
class BufferTooSmall:
    def rows(self, experts_TK, kept_TK, expert):
        room = max(1, 2 * experts_TK.numel() // self.shape.num_experts)
        return tuple(each[:room] for each in super().rows(experts_TK, kept_TK, expert))


@defect("early return without tokens (torchtitan#3686, Megatron-LM#4851)", "zero-tokens")
class EarlyReturn:
    def forward(self, x, valid=None):
        if x.numel():
            return super().forward(x, valid)
        return x.detach().clone(), x.new_zeros(()), x.new_zeros(())


@defect("a path for single tokens with one expert", "one-token", "mixtral deepseek gpt_oss gshard")
class SinglePath:
    def weigh(self, *args):
        weights_TK = super().weigh(*args)
        return (
            weights_TK * torch.arange(weights_TK.shape[1]).eq(0)
            if len(weights_TK) == 1
            else weights_TK
        )


@defect("permutation used as its inverse", "outputs permutation")
class NotInverted:
    def mix(self, x_TD, experts_TK, weights_TK, kept_TK):
        order_T = experts_TK[:, 0].argsort(stable=True)
        y_TD = super().mix(x_TD, experts_TK, weights_TK, kept_TK)
        return y_TD[order_T][order_T]


@defect("an expert's number decides how it computes", "relabelling outputs")
class FirstIsSpecial:
    def expert(self, expert, x_RD):
        y_RD = super().expert(expert, x_RD)
        return y_RD * 1.5 if expert == 0 else y_RD


@defect("shared expert left out", "outputs", "deepseek")
class NoShared:
    def shared_output(self, x_TD):
        return 0 * super().shared_output(x_TD)


@defect("gate of the shared expert left out (Qwen2-MoE ports)", "outputs", "deepseek")
class NoSharedGate:
    def shared_output(self, x_TD):
        return self.shared(x_TD)


@defect("shared expert under no_grad", "shared-gradients", "deepseek")
class SharedNoGrad:
    def shared_output(self, x_TD):
        with torch.no_grad():
            return super().shared_output(x_TD)


@defect("NaN of padding: mask by multiplication (torchtitan#1237, #2255)", "padding-nan")
class MaskedByProduct:
    def clean(self, x_TD, valid_T):
        return x_TD * valid_T[:, None]


@defect("padding takes capacity", "padding", "gshard")
class PaddingQueues:
    def queues(self, valid):
        return True

    def room(self, tokens):
        return super().room(tokens)


@defect("capacity rounded down (Fedus et al. 2021, eq. 3)", "outputs one-token", "gshard")
class CapacityDown:
    def room(self, tokens):
        return int(self.shape.capacity * tokens * self.shape.top_k / self.shape.num_experts)


@defect("capacity filled token by token, not first choices first", "outputs", "gshard")
class CapacityByToken:
    def order(self, experts_TK):
        return sorted(super().order(experts_TK))
