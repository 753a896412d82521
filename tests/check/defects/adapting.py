"""Defects of low-rank adapters on experts."""

import torch

from .catalogue import defect


@defect("adapters miss the last expert (unsloth#11014)", "adapter-outputs", "tuned")
class AdapterMissesOne:
    def low(self, x_RI, a, b, expert):
        return super().low(x_RI, a, b, expert) * (expert < self.shape.num_experts - 1)


@defect("one pair for all experts (vllm#41384 class)", "adapter-outputs", "tuned")
class OnePair:
    def low(self, x_RI, a, b, expert):
        return super().low(x_RI, a, b, 0)


@defect("A of the next expert: rank-major read as expert-major (peft#3009)", "adapter-outputs",
        "tuned")  # fmt: skip
class AdaptersMixed:
    def low(self, x_RI, a, b, expert):
        return super().low(x_RI, a.roll(1, 0), b, expert)


@defect("alpha / rank forgotten", "adapter-outputs", "tuned")
class AdapterUnscaled:
    def low(self, x_RI, a, b, expert):
        return super().low(x_RI, a, b, expert) / 1.5


@defect("adapters of the down projection not called (transformers' fused experts)",
        "adapter-outputs", "tuned")  # fmt: skip
class DownUnadapted:
    def low(self, x_RI, a, b, expert):
        return super().low(x_RI, a, b, expert) * (a is self.up_a)


@defect("A without gradient: a product that is not differentiated", "adapter-gradients", "tuned")
class ADetached:
    def low(self, x_RI, a, b, expert):
        return super().low(x_RI, a.detach(), b, expert)


@defect("gradients of one expert's pair written to all (sglang#25528 class)", "adapter-gradients",
        "tuned")  # fmt: skip
class GradientsOfAll:
    def low(self, x_RI, a, b, expert):
        mean = b.mean(0, keepdim=True)
        return super().low(x_RI, a, b.detach() + (mean - mean.detach()), expert)


@defect("scale left out when merging", "adapter-merge", "tuned")
class MergedUnscaled:
    def merge(self):
        self.up_b.data /= 1.5
        super().merge()


@defect("merged twice: pairs stay active beside the merged weight", "adapter-merge", "tuned")
class MergedTwice:
    def merge(self):
        kept = self.up_b.data.clone()
        super().merge()
        self.up_b.data.copy_(kept)


@defect("a graph cut where the base weights are frozen", "adapter-frozen", "tuned")
class FrozenAdapters:
    def low(self, x_RI, a, b, expert):
        added = super().low(x_RI, a, b, expert)
        return added if self.ups.requires_grad else added.detach() + 0 * torch.sum(added)
