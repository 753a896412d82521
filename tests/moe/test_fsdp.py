"""A layer under FSDP2, its experts sharded on their own: two processes give what one gives."""

from ..ranks import run_two_ranks

RANK_OF_TWO = """
import warnings
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from moestro import MoE, MoEConfig

warnings.filterwarnings("error", module="moestro")
warnings.filterwarnings("error", message="FSDP2")
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
cfg = MoEConfig(dim=32, hidden_dim=32, top_k=3, shared={"hidden_dim": 16, "gate": True})

def layer_of(sharded, **how):
    torch.manual_seed(0)
    layer = MoE(cfg)
    if sharded:
        for module in (layer.router, layer.experts, layer.shared, layer):
            fully_shard(module, mesh=mesh, **how)
    return layer

def results(layer, x_BSD):
    with torch.no_grad():
        few = [layer(x_BSD[:1, :n])[0] for n in (1, 4)]
    y_BSD, routing = layer(x_BSD)
    y_BSD += 1  # in place, on what a sharded module returned
    (y_BSD.float().sin().sum() + routing.probs_TE.square().sum()).backward()
    grads = [getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for p in layer.parameters()]
    with torch.no_grad():
        few += [layer(x_BSD[:1, :4])[0]]
    return [*few, y_BSD, routing.weights_R, *grads]

x_BSD = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))
for one, other in zip(results(layer_of(True), x_BSD), results(layer_of(False), x_BSD)):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

mixed = results(layer_of(True, mp_policy=MixedPrecisionPolicy(torch.bfloat16)), x_BSD)
assert all(y.dtype == torch.bfloat16 for y in mixed[:4])
assert all(grad.dtype == torch.float32 for grad in mixed[5:])

def dtypes(cast):  # of the routing's weights, as the experts get them
    layer, found = layer_of(False), []
    low = MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=cast)
    fully_shard(layer.experts, mesh=mesh, mp_policy=low)
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    layer.experts.register_forward_hook(lambda _, args, y: found.append(args[1].weights_R.dtype))
    layer(x_BSD)
    return found

assert dtypes(True) + dtypes(False) == [torch.bfloat16, torch.float32]
low = results(layer_of(False).bfloat16(), x_BSD.bfloat16())
for one, other in zip(mixed, low):
    scale = other.float().abs().max()
    assert (one.float() - other.float()).abs().max() <= 0.02 * scale
dist.destroy_process_group()
"""


def test_two_processes_give_what_one_gives():
    """Few tokens without gradients, training, and bf16 by FSDP2's mixed precision."""
    run_two_ranks(RANK_OF_TWO)
