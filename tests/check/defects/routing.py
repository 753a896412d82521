"""Defects of routers and balance losses."""

import torch

from .catalogue import defect

_SUM = "mixtral deepseek gpt_oss"


@defect("transformers norm_topk_prob ignored (Qwen2-MoE ports)", "weights", _SUM)
class NotNormalised:
    def weigh(self, scores_TE, experts_TK, logits_TE):
        return scores_TE.gather(1, experts_TK) * self.shape.scale


@defect("Switch gate normalised to the constant 1 (Fedus et al. 2021, §2.1)", "weights", "switch")
class Normalised:
    def weigh(self, scores_TE, experts_TK, logits_TE):
        return torch.ones_like(scores_TE.gather(1, experts_TK))


@defect("routed_scaling_factor forgotten (DeepSeek-V3 ports)", "weights", "deepseek")
class NoScale:
    def weigh(self, *args):
        return super().weigh(*args) / self.shape.scale


@defect("routed_scaling_factor applied twice (DeepSeek-V3 ports)", "weights", "deepseek")
class ScaledTwice:
    def weigh(self, *args):
        return super().weigh(*args) * self.shape.scale


@defect("bias added to the weights (Wang et al. 2024, eq. 3; maxtext#2494)", "weights", "deepseek")
class BiasInWeights:
    def weigh(self, scores_TE, experts_TK, logits_TE):
        return super().weigh(self.choosing(scores_TE), experts_TK, logits_TE)


@defect("loss-free bias not used (maxtext#2494)", "choice", "deepseek")
class BiasIgnored:
    def choosing(self, scores_TE):
        return scores_TE


@defect("group limit left out (DeepSeek-V2 §2.1.2)", "choice", "deepseek")
class NoGroups:
    def select(self, scores_TE):
        return self.choosing(scores_TE).topk(self.shape.top_k, -1).indices


@defect(
    "a group's score is its best expert's, not the two best (DeepSeek-V3)", "choice", "deepseek"
)
class GroupByMax:
    def group_scores(self, grouped_TGP):
        return grouped_TGP.amax(-1)


@defect("softmax where sigmoid is meant (DeepSeek-V3 ports)", "weights", "deepseek")
class SoftmaxForSigmoid:
    def weigh(self, scores_TE, experts_TK, logits_TE):
        return super().weigh(logits_TE.softmax(-1), experts_TK, logits_TE)


@defect("softmax of a softmax as weights (transformers#45120)", "weights", "mixtral gpt_oss switch")
class SoftmaxTwice:
    def scores(self, logits_TE):
        return logits_TE.softmax(-1).softmax(-1)


@defect("weights divided by their mean over the batch", "batch-split", "switch")
class NormalisedOverBatch:
    def weigh(self, *args):
        weights_TK = super().weigh(*args)
        return weights_TK / weights_TK.mean()


@defect("router detached from the main loss (Automodel#2995)", "router-gradient")
class Detached:
    def weigh(self, *args):
        # For one expert of weight 1 there is nothing to detach.
        return super().weigh(*args).detach()


@defect("router gradient scaled by the ranks (transformers#48687)", "router-gradient")
class RouterGradientDoubled:
    def logits(self, x_TD):
        logits_TE = super().logits(x_TD)
        return logits_TE * 2 - logits_TE.detach()


@defect("weights rounded to bf16 (prime-rl#3411)", "weights outputs")
class WeightsRounded:
    def weigh(self, *args):
        weights_TK = super().weigh(*args)
        return weights_TK + (weights_TK.bfloat16().to(weights_TK.dtype) - weights_TK).detach()


@defect("epsilon in the sum (Megatron-LM#1545)", "weights", _SUM)
class Epsilon:
    def weigh(self, *args):
        return super().weigh(*args) / 1.01


@defect("one expert too few", "choice", "mixtral deepseek gpt_oss")
class OneTooFew:
    def weigh(self, *args):
        weights_TK = super().weigh(*args)
        return weights_TK * torch.arange(weights_TK.shape[1]).ne(weights_TK.shape[1] - 1)


@defect("weights in another order than their experts (torchtitan#2416 class)", "weights", _SUM)
class WeightsFlipped:
    def weigh(self, *args):
        return super().weigh(*args).flip(1)


@defect("smallest scores chosen: topk(largest=False)", "choice outputs")
class SmallestChosen:
    def select(self, scores_TE):
        return super().select(-scores_TE)


@defect("logits normalised by the batch's mean", "batch-split outputs")
class BatchStatistics:
    def logits(self, x_TD):
        return super().logits(x_TD - (x_TD.mean(0) if len(x_TD) else 0))


@defect("noise of training left on", "determinism")
class Noise:
    def logits(self, x_TD):
        logits_TE = super().logits(x_TD)
        return logits_TE + 0.01 * torch.randn_like(logits_TE)


@defect("auxiliary loss without gradient (Automodel#1408)", "balance-gradient")
class BalanceDetached:
    def balance(self, *args):
        return super().balance(*args).detach()


@defect("auxiliary loss times N (Automodel#1408)", "balance-loss")
class BalanceTimesN:
    def balance(self, scores_TE, *args):
        return super().balance(scores_TE, *args) * self.shape.num_experts


@defect("gradient of the auxiliary loss times the ranks (Megatron-LM#3769)", "balance-gradient")
class BalanceGradientHalved:
    def balance(self, *args):
        loss = super().balance(*args)
        return loss / 2 + loss.detach() / 2


@defect("softmax of a softmax in the auxiliary loss (transformers#45120)", "balance-loss")
class BalanceOfSoftmaxTwice:
    def balance(self, scores_TE, *args):
        return super().balance(scores_TE.softmax(-1).softmax(-1), *args)


@defect("padding counted in the auxiliary loss (Megatron-LM#1617)", "balance-mask")
class BalanceOfPadding:
    def balance(self, scores_TE, experts_TK, valid_T):
        return super().balance(scores_TE, experts_TK, torch.ones_like(valid_T))


@defect("shares of first choices only", "balance-loss", "mixtral deepseek gpt_oss gshard")
class BalanceOfFirst:
    def balance(self, scores_TE, experts_TK, valid_T):
        return super().balance(scores_TE, experts_TK[:, :1], valid_T)


@defect("1e-20 in the sum of scores, which a router can fall below (Megatron-LM#1545)",
        "balance-epsilon", "deepseek")  # fmt: skip
class BalanceEpsilon:
    def balance(self, scores_TE, experts_TK, valid_T):
        share = scores_TE.sum(1, keepdim=True)
        return super().balance(scores_TE, experts_TK, valid_T) * (share / (share + 1e-20)).mean()


@defect("losses of earlier batches added up (MegaBlocks' global list)", "balance-state")
class BalanceKept:
    def balance(self, *args):
        loss = super().balance(*args)
        kept = getattr(self, "losses", 0.0)
        self.losses = kept + float(loss.detach())
        return loss + kept


@defect("z-loss of probabilities: logsumexp after a softmax", "z-loss")
class ZOfProbabilities:
    def z(self, logits_TE, valid_T):
        return super().z(logits_TE.softmax(-1), valid_T)


@defect("z-loss a sum over tokens (Automodel#1408's factor N)", "z-loss")
class ZSummed:
    def z(self, logits_TE, valid_T):
        return super().z(logits_TE, valid_T) * valid_T.sum()


@defect("z-loss detached (Automodel#1408)", "z-gradient")
class ZDetached:
    def z(self, logits_TE, valid_T):
        return super().z(logits_TE.detach(), valid_T)


@defect("padding counted in the z-loss (Megatron-LM#1617 class)", "z-mask")
class ZOfPadding:
    def z(self, logits_TE, valid_T):
        return super().z(logits_TE, torch.ones_like(valid_T))


@defect("z-losses of earlier batches added up (MegaBlocks' global list)", "z-state")
class ZKept:
    def z(self, *args):
        loss, kept = super().z(*args), getattr(self, "z_kept", 0.0)
        self.z_kept = kept + float(loss.detach())
        return loss + kept
