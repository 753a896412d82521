"""Experts split over two ranks: the gradients of one process, whatever the rows do."""

from ..ranks import run_two_ranks

RANK_OF_TWO = """
import warnings
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from moestro import MoE, MoEConfig
from moestro.moe import parallel
from moestro.moe.parallel import ParallelExperts

warnings.filterwarnings("error", module="moestro")
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
BASE = {"dim": 16, "hidden_dim": 24, "num_experts": 8, "top_k": 2}

def layers_of(dtype, **changes):
    torch.manual_seed(0)
    cfg = MoEConfig(**{**BASE, **changes})
    whole = MoE(cfg).to(dtype)
    for name, parameter in whole.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    mine = MoE(cfg).to(dtype)
    mine.load_state_dict(whole.state_dict())
    mine.experts = ParallelExperts(mine.experts)
    return whole, mine

def compare(dtype, lengths=(13, 13), valid=None, recompute=False, pull=None, **changes):
    '''Two micro-batches each, against one process with all of them; every gradient.'''
    whole, mine = layers_of(dtype, **changes)
    if pull is not None:
        with torch.no_grad():
            whole.router.weight[pull] = mine.router.weight[pull] = 5.0
    x_MRTD = torch.randn(2, size, max(lengths), 16, dtype=dtype)
    x_MRTD = x_MRTD.abs() if pull is not None else x_MRTD
    gaps = {}
    for x_RTD in x_MRTD:
        for r, length in enumerate(lengths):
            x_TD = x_RTD[r, :length]
            mask = None if valid is None else (torch.arange(length) % valid > 0)
            y_TD, routing = whole(x_TD, valid=mask)
            (y_TD.sin().sum() + routing.probs_TE.square().sum()).backward()
            if r == rank:
                kept, wanted_y = routing.kept_R, y_TD
        x_TD = x_RTD[rank, :lengths[rank]]
        mask = None if valid is None else (torch.arange(lengths[rank]) % valid > 0)
        run = (lambda x: checkpoint(mine, x, valid=mask, use_reentrant=False)) if recompute else (
            lambda x: mine(x, valid=mask))
        y_TD, routing = run(x_TD)
        (y_TD.sin().sum() + routing.probs_TE.square().sum()).backward()
        if kept is not None:
            assert torch.equal(kept, routing.kept_R) and not kept.all()
        gaps["y"] = float((y_TD - wanted_y).detach().abs().max()) if len(y_TD) else 0.0
    for name, parameter in mine.named_parameters():
        wanted = dict(whole.named_parameters())[name].grad
        grad = parameter.grad
        if name.startswith("experts."):
            wanted = wanted.chunk(size)[rank]
        else:
            dist.all_reduce(grad)
        gaps[name] = float((grad - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
        if not wanted.any():
            gaps[name] = float(grad.abs().max())
    return gaps

def check(**how):
    worst = max(compare(torch.float64, **how).values())
    assert worst <= 1e-12, (how, worst)
    worst = max(compare(torch.float32, **how).values())
    assert worst <= 1e-5, (how, worst)

check()
check(shared={"hidden_dim": 24, "gate": True}, experts={"bias": True})
check(shared={"hidden_dim": 24}, lengths=(13, 0), recompute=True)
check(lengths=(1, 7))
check(pull=slice(0, 2))                         # the other rank's experts idle
check(pull=slice(0, 2), lengths=(0, 5))
check(capacity={"factor": 0.5})                 # drops, as in one process with more micro-batches
check(capacity={"factor": 0.5, "priority": "router"}, valid=3)
check(valid=4)
check(recompute=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is not causal
    check(router={"kind": "expert_choice"})

def drops(lengths, valid=None, **capacity):
    '''Those of a capacity of all ranks are those of one process with the tokens of all.'''
    cfg = {**BASE, "capacity": {"factor": 0.5, **capacity}}
    torch.manual_seed(0)
    one = MoE(MoEConfig(**cfg))
    mine = MoE(MoEConfig(**{**cfg, "capacity": {**cfg["capacity"], "scope": "global"}}))
    mine.load_state_dict(one.state_dict())
    x_TD = torch.randn(sum(lengths), 16)
    mask_T = None if valid is None else torch.arange(len(x_TD)) % valid > 0
    _, wanted = one(x_TD, valid=mask_T)
    own = slice(sum(lengths[:rank]), sum(lengths[:rank + 1]))
    y_TD, routing = mine(x_TD[own], valid=None if valid is None else mask_T[own])
    rows = slice(own.start * 2, own.stop * 2)
    assert torch.equal(routing.kept_R, wanted.kept_R[rows]), (lengths, capacity)
    assert not wanted.kept_R.all() and wanted.dropped() > 0
    alone = MoE.forward(one, x_TD[own], valid=None if valid is None else mask_T[own])[1]
    return not torch.equal(alone.kept_R, routing.kept_R)

found = []
for priority in ("arrival", "router"):
    found.append(drops((13, 13), priority=priority))
    drops((13, 0), priority=priority)
    drops((3, 11), valid=3, priority=priority)
differs = torch.tensor([float(any(found))])
dist.all_reduce(differs)
assert differs > 0  # a rank's own capacity drops others
mine = MoE(MoEConfig(**BASE, capacity={"factor": 0.5, "scope": "global"})).eval()
if rank == 0:
    mine(torch.randn(3, 16))  # a call's own outside training: nothing is exchanged

# Only a share is ever held, and drawn as one process draws it.
torch.manual_seed(1)
whole = MoE(MoEConfig(**BASE)).experts
with torch.device("meta"):
    share = ParallelExperts(MoE(MoEConfig(**BASE)).experts)
assert share.down.is_meta and len(share.down) == 4
share.to_empty(device="cpu")
torch.manual_seed(1)
MoE(MoEConfig(**BASE)).router  # draws the router first
torch.manual_seed(1)
from moestro.moe.routers import build_router
build_router(MoEConfig(**BASE))
share.reset_parameters()
for name, parameter in share.named_parameters():
    assert torch.equal(parameter, dict(whole.named_parameters())[name].chunk(size)[rank]), name

# Autocast: the exchange carries bf16, and weights what it would in one process.
whole, mine = layers_of(torch.float32)
sent = []
exchange = dist.all_to_all_single

def counted(out, x, *rest, **named):
    sent.append(x.dtype)
    return exchange(out, x, *rest, **named)

dist.all_to_all_single = counted
x_TD = torch.randn(20, 16, requires_grad=True)
with torch.autocast("cpu", torch.bfloat16):
    y_TD, wanted_TD = mine(x_TD)[0], whole(x_TD)[0]
assert y_TD.dtype == wanted_TD.dtype and sent == [torch.int64, torch.bfloat16, torch.bfloat16]
torch.testing.assert_close(y_TD, wanted_TD, rtol=2e-2, atol=2e-2)
y_TD.float().sin().sum().backward()
assert sent == [torch.int64] + [torch.bfloat16] * 4, sent

# A shared expert is computed while rows travel, forward and backward.
_, mine = layers_of(torch.float32, shared={"hidden_dim": 24})
events, begin, end = [], parallel._Trip.begin, parallel._Trip.end
parallel._Trip.begin = lambda *given, **how: (events.append("begin"), begin(*given, **how))[1]
parallel._Trip.end = lambda trip: (events.append("end"), end(trip))[1]
mine.shared.register_forward_hook(lambda *_: events.append("shared"))
mine.shared.register_full_backward_hook(lambda *_: events.append("shared"))
y_TD, _ = mine(x_TD)
y_TD.sum().backward()
assert events == ["begin", "shared", "end"] * 2, events
dist.destroy_process_group()
"""


def test_gradients_are_those_of_one_process():
    """Uneven and empty ranks, idle experts, drops, padding, a shared expert, recomputation."""
    run_two_ranks(RANK_OF_TWO)
