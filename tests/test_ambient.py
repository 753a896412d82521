"""What surrounds a program changes no number: a default dtype of bf16, a default device of meta."""

import ast
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from moestro import Decoder, ModelConfig, MoE
from moestro.checkpoints import packed_files
from moestro.checkpoints.folders import atomic_folder
from moestro.checkpoints.opening import open_checkpoint
from moestro.checkpoints.quantize import WEIGHTS, pack
from moestro.checkpoints.writing import save_model, write_pretrained
from moestro.config import BalanceConfig, EncDecConfig, OptimConfig, RunConfig
from moestro.data.windows import prepare
from moestro.infer.engine import generate_batch, stream
from moestro.infer.sampling import SamplingConfig
from moestro.kernels import native_cpu
from moestro.models.build import new_model
from moestro.models.encdec import EncDec
from moestro.moe import balance
from moestro.probe.ablation.ablate import ablate
from moestro.probe.ablation.targets import Target
from moestro.probe.recording.passages import Passage
from moestro.probe.recording.record import record
from moestro.text import ByteTokenizer
from moestro.train.health import CollapseWatch, Tally
from moestro.train.loop import Trainer
from moestro.train.objective import Objective
from moestro.train.optim import make_optimizer

SRC = Path(__file__).parent.parent / "src" / "moestro"
BYTES = ByteTokenizer()
ROUTERS = {
    "softmax": {"kind": "softmax", "bias": True, "jitter": 0.1},
    "sigmoid": {"kind": "sigmoid", "selection_bias": True, "num_groups": 2, "scale": 1.7},
    "noisy": {"kind": "noisy_top_k"},
    "sparsemixer": {"kind": "sparsemixer", "jitter": 0.1},
    "hash": {"kind": "hash"},
    "expert choice": {"kind": "expert_choice"},
}
MOE = {"hidden_dim": 24, "num_experts": 6, "top_k": 2}
SHARED = {"shared": {"hidden_dim": 8, "gate": True}, "experts": {"bias": True, "dropout": 0.1}}
LOSS_FREE = {"kind": "sigmoid", "selection_bias": True, "renormalize": False}
LATENT = {"q_rank": 12, "kv_rank": 8, "nope_dim": 6, "rope_dim": 4, "value_dim": 8}
POSITIONS = {
    "plain": {},
    "linear": {"scaling": {"kind": "linear", "factor": 3.0}},
    "llama3": {"scaling": {"kind": "llama3", "factor": 3.0, "original_context": 8}},
    "yarn": {"scaling": {"kind": "yarn", "factor": 3.0, "original_context": 8}},
    "longrope": {
        "scaling": {
            "kind": "longrope",
            "original_context": 8,
            "short_factor": (1.0, 1.1),
            "long_factor": (1.7, 2.3),
            "short_scale": 1.1,
            "long_scale": 1.3,
        }
    },
    "relative": {"kind": "relative", "buckets": 8, "max_distance": 12},
}
ATTENTION = {
    **{name: {"positions": positions} for name, positions in POSITIONS.items()},
    "latent": {"latent": LATENT},
    "windows": {"window": {"size": 5, "full_every": 2}, "sinks": True, "bias": "all"},
}
SIZES = {"vocab_size": 256, "dim": 16, "num_layers": 2, "moe": {**MOE, "router": LOSS_FREE}}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "context": 24}
ENCDEC = {
    "vocab_size": 259,
    "dim": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "attention": {
        "num_heads": 2,
        "context": 24,
        "positions": {**POSITIONS["relative"], "shared": True},
    },
    "moe": {**MOE, "capacity": {"factor": 1.0}},
    "head": {"tied": False},
}

pytestmark = pytest.mark.filterwarnings("ignore:expert_choice routing is not causal")
native = pytest.mark.skipif(native_cpu.available() is not None, reason="no native library")


@contextmanager
def ambient(kind):
    """A program that has set a default dtype and is inside `with torch.device(...)`."""
    with ExitStack() as stack:
        if kind != "meta":
            torch.set_default_dtype(torch.bfloat16)
            stack.callback(torch.set_default_dtype, torch.float32)
        if kind != "bf16":
            stack.enter_context(torch.device("meta"))
        yield


@pytest.fixture(params=["bf16", "meta", "both"])
def same(request):
    """A function: does `run` give the same inside and, after that, outside? Returns what it gave.

    Inside first, so that what is kept there for later is met outside.
    """

    def check(run):
        with ambient(request.param):
            inside = run()
        outside = run()
        equal(inside, outside)
        return outside

    return check


def equal(one, two):
    """Bit for bit, through tuples, lists and dicts."""
    if isinstance(one, torch.Tensor):
        assert one.device.type == two.device.type == "cpu"
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, two, strict=True)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        equal(list(one.values()), list(two.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            equal(left, right)
    else:
        assert type(one) is type(two)
        assert one == two or repr(one) == repr(two)


def step(model, loss):
    """Loss, all gradients, and the weights after a step of the optimizer."""
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))
    optimizer.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    optimizer.step()
    return loss.detach(), gradients, {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("backend", ["auto", "reference", "segments"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer(same, tiny, router, backend):
    limited = {} if router == "expert choice" else {"capacity": {"priority": "router"}}
    cfg = tiny(**{**MOE, **SHARED, **limited, "router": ROUTERS[router]})
    state = MoE(cfg, backend).state_dict()
    x, ids = torch.randn(3, 20, 8), torch.randint(0, 50, (3, 20))
    valid = torch.rand(3, 20) < 0.8

    def run():
        layer = MoE(cfg, backend).to_empty(device="cpu").float()
        layer.load_state_dict(state)
        torch.manual_seed(1)
        y, routing = layer(x, token_ids=ids, valid=valid)
        losses = [balance.switch_loss(routing), balance.sequence_loss(routing, 3)]
        losses += [balance.importance_loss(routing), balance.z_loss(routing)]
        if routing.load_TE is not None:
            losses.append(balance.load_loss(routing))
        after = step(layer, y.square().sum() + sum(losses))
        if layer.cfg.router.selection_bias:
            balance.update_bias(layer.router.bias, routing.counts_E(), 1e-3)
        with torch.no_grad():
            few = layer.eval()(x[0, :3], token_ids=ids[0, :3])
        return y, routing, losses, after, few, list(layer.buffers())

    same(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ATTENTION)
def test_a_decoder(same, name, dtype):
    positions = ATTENTION[name]
    heads = {"num_heads": 4, "context": 24} if "latent" in positions else HEADS
    cfg = ModelConfig(**SIZES, attention={**heads, **positions})
    state = Decoder(cfg).state_dict()
    tokens_BS = torch.randint(0, 256, (2, 12))
    settings = BalanceConfig(switch=0.1, z=0.1, importance=0.1, scope="global")

    def run():
        model = Decoder(cfg).to_empty(device="cpu").to(dtype)
        model.load_state_dict(state)
        torch.manual_seed(1)
        output = model(tokens_BS)
        tally = Tally(2, 6, torch.device("cpu"))
        tally.add(output.routings)
        health = tally.unpack(tally.packed().tolist())
        collapsed = CollapseWatch(2, 6, 2).observe(20, tally.counts_LE)
        loss = Objective(settings)(output, tokens_BS)
        after = step(model, loss.total)
        with torch.no_grad():
            cache = model.eval().new_cache(2)
            steps = [model(part, cache=cache) for part in tokens_BS.split([9, 1, 2], dim=1)]
        return output, health, collapsed, loss.parts, after, steps

    same(run)


def test_an_encoder_decoder(same):
    cfg = EncDecConfig(**ENCDEC)
    state = EncDec(cfg).state_dict()
    source_BS, target_BT = torch.randint(0, 256, (2, 9)), torch.randint(0, 256, (2, 7))
    valid_BS = torch.arange(9) < torch.tensor([[9], [5]])

    def run():
        model = EncDec(cfg).to_empty(device="cpu").float()
        model.load_state_dict(state)
        torch.manual_seed(1)
        output = model(source_BS, target_BT, valid_BS=valid_BS)
        loss = Objective(BalanceConfig(switch=0.1, scope="sequence"))(output, target_BT)
        after = step(model, loss.total)
        said = list(stream(model.eval(), BYTES, "so it is", SamplingConfig(max_tokens=6)))
        return output, loss.parts, after, said

    same(run)


@native
@pytest.mark.parametrize("weights", [None, *WEIGHTS])
def test_generated_text(same, weights):
    """By the native step where it is there, plain and packed."""
    cfg = ModelConfig(**SIZES, attention={**HEADS, "qk_norm": "head"}, head={"tied": False})
    model = new_model(cfg).eval()
    if weights is not None:
        pack(model, WEIGHTS[weights])
    samplings = [
        SamplingConfig(seed=5, max_tokens=9, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingConfig(temperature=0.0, max_tokens=20),
    ]
    same(lambda: list(generate_batch(model, BYTES, ["one", "another one"], samplings)))


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=native)])
def test_a_saved_model(same, tmp_path, packed):
    cfg = ModelConfig(**{**SIZES, "moe": {**MOE, "top_k": 2}, "attention": HEADS})
    tokens_BS = torch.randint(0, 256, (2, 12))
    number = iter(range(100))

    def run():
        torch.manual_seed(3)
        model = new_model(cfg).eval()
        folder = tmp_path / str(next(number))
        if packed:
            pack(model, WEIGHTS["int4"])
            packed_files.save(model, folder / "packed", WEIGHTS["int4"], {"a": "b"})
            return model(tokens_BS), packed_files.load(folder / "packed", {"a": "b"})(tokens_BS)
        with atomic_folder(folder / "own") as inner:
            save_model(model, inner)
        write_pretrained(model, folder / "theirs", family="mixtral")
        read = [open_checkpoint(folder / "own").model, open_checkpoint(folder / "theirs").model]
        read.append(open_checkpoint(folder / "theirs", dtype=torch.bfloat16).model)
        return model(tokens_BS), [one(tokens_BS) for one in read]

    same(run)


def test_a_recording(same):
    model = new_model(ModelConfig(**SIZES, attention=HEADS)).eval()
    passages = [Passage(torch.randint(0, 256, (n,)), d) for n, d in ((9, "a"), (12, "b"), (7, "a"))]
    same(lambda: record(model, passages))
    same(lambda: ablate(model, passages, [Target(1, 2, "a", 3)], draws=9))


def test_a_training_run(same, tmp_path):
    """Weights are fp32 whatever the default; what was saved goes on in the other surroundings."""
    for name in ("a", "b"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number in range(9):
            text = f"{name} says {number} to the other; " * 9
            (tmp_path / "texts" / name / f"{number}.txt").write_text(text)
    cfg = RunConfig(
        model={**SIZES, "attention": {**HEADS, "context": 16}},
        data={"sources": (str(tmp_path / "texts"),), "seq_len": 16, "held_out": 0.2},
        balance={"switch": 0.01, "bias_rate": 0.01, "scope": "global"},
        train={
            "steps": 4,
            "batch_size": 4,
            "accumulate": 2,
            "dtype": "float32",
            "eval_every": 2,
            "eval_tokens": 128,
            "save_every": 2,
            "runtime": {"device": "cpu"},
        },
    )
    number = iter(range(100))

    def run():
        folder = tmp_path / str(next(number))
        corpus = prepare(cfg.data, folder / "data")
        result = Trainer(cfg, folder / "run", corpus).train()
        shutil.rmtree(folder / "run" / "checkpoints" / "step-000004")
        again = Trainer(cfg, folder / "run", corpus).train(resume=True)
        models = [open_checkpoint(folder / "run" / "checkpoints" / "step-000002").model]
        models.append(open_checkpoint(again.checkpoint).model)
        bits = [point.bits_per_byte for point in result.history + again.history]
        return bits, [model.state_dict() for model in models]

    same(run)
    # Begun outside, ended inside.
    folder = tmp_path / "0"
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000004")
    with ambient("both"):
        Trainer(cfg, folder / "run", prepare(cfg.data, folder / "data")).train(resume=True)
    ended = [open_checkpoint(tmp_path / name / "run").model.state_dict() for name in ("0", "1")]
    equal(*ended)


WAYS = {
    "built": lambda layer: layer,
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "assign": lambda layer: _assigned(layer, torch.bfloat16),
    "assign in double": lambda layer: _assigned(layer, torch.float64),
}


def _assigned(layer, dtype):
    state = {name: tensor.to(dtype) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    return layer


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_the_selection_bias_is_fp32(tiny, way, default):
    """A thousand steps of 1e-3 are worth 1, in a counts' difference that bf16 does not see."""
    torch.set_default_dtype(default)
    try:
        layer = MoE(tiny(num_experts=8, router=LOSS_FREE))
    finally:
        torch.set_default_dtype(torch.float32)
    layer = way(layer)
    assert layer.router.bias.dtype == torch.float32
    for _ in range(1000):
        balance.update_bias(layer.router.bias, torch.tensor([1001, 999, *[1000] * 6]), 1e-3)
    assert layer.router.bias.tolist() == pytest.approx([-1, 1, *[0] * 6], abs=1e-4)


# What makes a tensor from nothing; those on the right are of whole numbers unless told otherwise.
MAKERS = {"empty", "eye", "full", "linspace", "normal", "ones", "rand", "randn", "tensor", "zeros"}
WHOLE = {"arange", "as_tensor", "randint", "randperm", "tril_indices", "triu_indices"}


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: path.name)
def test_who_makes_a_tensor_says_where_and_of_what(path):
    """Parameters aside, for which the defaults are meant."""
    tree = ast.parse(path.read_text())
    parameters = {
        id(made)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "nn.Parameter"
        for made in ast.walk(call)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or id(call) in parameters:
            continue
        module, _, name = ast.unparse(call.func).rpartition(".")
        if module == "torch" and name in MAKERS | WHOLE:
            given = {keyword.arg for keyword in call.keywords}
            wanted = {"device"} if name in WHOLE else {"device", "dtype"}
            assert wanted <= given, f"line {call.lineno}: {ast.unparse(call)}"
