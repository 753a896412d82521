"""The table of routers: what it may hold, and that no class stands in two rows."""

from collections import Counter

import torch
from torch import nn

from moestro.foreign import routers


def test_every_class_is_named_once():
    names = Counter(name for _, names in routers._ROWS for name in names.split())
    assert max(names.values()) == 1
    assert len(routers.ROUTERS) == len(names)


def test_what_is_chosen_by_a_rule_has_weights_of_its_scores():
    kind = type("MixtralTopKRouter", (nn.Module,), {"forward": lambda self, x: x, "top_k": 2})
    logits_TE = torch.tensor([[0.0, 2.0, 1.0]])
    weights_TK, experts_TK = routers.choose(kind(), logits_TE, torch.tensor([9.0, 0.0, 0.0]))
    assert experts_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(weights_TK, logits_TE[:, [0, 1]].softmax(-1))
    assert routers.scoring(kind()) == "softmax"
    assert routers.scoring(nn.Linear(2, 2)) is None
