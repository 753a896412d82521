"""Models built on meta and given memory: the same model, only not yet filled."""

import subprocess
import sys
from pathlib import Path

import torch

from moestro import Decoder, ModelConfig
from moestro.models.materialize import materialize, without_memory

SOURCE = Path(__file__).parents[2] / "src"


def test_materialize_keeps_ties_and_the_dtype_of_buffers():
    router = {"kind": "sigmoid", "selection_bias": True}
    moe = {"hidden_dim": 8, "num_experts": 4, "router": router}
    cfg = ModelConfig(vocab_size=20, dim=8, attention={"num_heads": 2}, moe=moe)
    with without_memory():
        model = Decoder(cfg)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    materialize(model, torch.bfloat16, "cpu")
    assert model.head.weight is model.embed.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    plain = Decoder(cfg)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(not t.is_meta for t in model.state_dict().values())
    model.load_state_dict(plain.state_dict())
    tokens_BS = torch.arange(20).view(1, 20)
    assert torch.isfinite(model(tokens_BS).logits).all()


def test_large_parameters_work_like_any_other():
    """They lie in memory of their own: written, differentiated, and freed with the model."""
    with without_memory():
        linear = torch.nn.Linear(1024, 1024)
    materialize(linear, torch.float32, "cpu")
    with torch.no_grad():
        linear.weight.copy_(torch.eye(1024))
        linear.bias.zero_()
    x = torch.randn(2, 1024)
    linear(x).sum().backward()
    assert torch.equal(linear(x), x)
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(1024, 1024))


def test_building_without_memory_imports_no_compiler():
    """Random numbers on meta would: seconds before the first token."""
    code = (
        "import sys\n"
        "from moestro import Decoder, ModelConfig\n"
        "from moestro.models.materialize import without_memory\n"
        "with without_memory():\n"
        "    Decoder(ModelConfig(moe={'hidden_dim': 8}, head={'tied': False}))\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=SOURCE, check=False).returncode == 0
