"""Every layout of experts, alone: forward and gradients are those of transformers' own class."""

import contextlib
import types
import warnings

import pytest
import torch

import moestro.hf as hf
from moestro.errors import BackendError
from moestro.foreign import layouts
from moestro.hf import forward
from moestro.kernels import backends, native_cpu, reference
from moestro.moe.experts import Experts
from moestro.moe.routing import Routing

from .zoo import build, tokens

transformers = pytest.importorskip("transformers")

E, K, D, F, T = 5, 2, 16, 24, 9
NATIVE = native_cpu.available() is None


class Settings(types.SimpleNamespace):
    """What an experts class asks its configuration for, whatever the names."""

    def __init__(self, **changes):
        sizes = {
            "num_local_experts": E, "num_experts": E, "n_routed_experts": E, "moe_num_experts": E,
            "hidden_size": D, "intermediate_size": F, "moe_intermediate_size": F,
            "moe_hidden_size": D, "moe_latent_size": None, "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0, "post_norm_eps": 1e-6, "mlp_gate_softcap": 5.0,
            "mlp_up_softcap": 5.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "mlp_hidden_act": "relu2", "hidden_activation": "gelu_pytorch_tanh",
            "_experts_implementation": "eager",
        }  # fmt: skip
        super().__init__(**{**sizes, **changes})


# class, its module, what the plug recognises, whether the native kernels take it as it lies.
LAYOUTS = [
    ("MixtralExperts", "mixtral", "swiglu", True),
    ("Lfm2MoeExperts", "lfm2_moe", "swiglu", True),
    ("MiniMaxM3VLExperts", "minimax_m3_vl", "clamped_swiglu", True),
    ("GptOssExperts", "gpt_oss", "clamped_swiglu", True),
    ("OpenAIPrivacyFilterExperts", "openai_privacy_filter", "clamped_swiglu", True),
    ("AriaExperts", "aria", "swiglu", True),
    ("DeepseekV4Experts", "deepseek_v4", "limited_swiglu", True),
    ("Glm5NextTextExperts", "glm5_next", "limited_swiglu", True),
    ("HYV4Experts", "hy_v4", "limited_swiglu", True),
    ("HYV4VLExperts", "hy_v4_vl", "limited_swiglu", True),
    ("Gemma4TextExperts", "gemma4", "geglu_tanh", True),
    ("DiffusionGemmaTextExperts", "diffusion_gemma", "geglu_tanh", True),
    ("NemotronHExperts", "nemotron_h", "relu2", True),
    ("BeamExperts", "beam", None, False),
    ("Inkling2Experts", "inkling2", None, False),
    ("MuseSparkExperts", "muse_spark", "swiglu", False),
]


def make(name="MixtralExperts", module="mixtral", **changes):
    modeling = f"transformers.models.{module}.modeling_{module}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(__import__(modeling, fromlist=[name]), name)
    experts = kind(Settings(**changes)).eval()
    for key, parameter in experts.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in key else 0.0, std=0.5)
    return experts


def make_layout(name, module, activation):
    """Those of a row of `LAYOUTS`, with the limit of that activation."""
    return make(name, module, swiglu_limit=reference.LIMITS.get(activation, 7.0))


def draw():
    return torch.randn(T, D), torch.rand(T, E).topk(K)[1], torch.rand(T, K)


def run(experts, implementation, *inputs):
    hf.install()
    experts.config._experts_implementation = implementation
    return experts(*inputs)


def gradients(experts, implementation, x_TD, experts_TK, weights_TK):
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    y_TD = run(experts, implementation, x_TD, experts_TK, weights_TK)
    return torch.autograd.grad(y_TD.square().sum(), [x_TD, weights_TK, *experts.parameters()])


def close(ours, theirs, tolerance=1e-5):
    atol = tolerance * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(("name", "module", "activation", "native"), LAYOUTS)
def test_every_layout(name, module, activation, native):
    experts, (x_TD, *chosen) = make_layout(name, module, activation), draw()
    inputs = (3 * x_TD, *chosen)  # beyond the limits
    assert layouts.read(experts).activation == activation
    native = native and NATIVE
    said = contextlib.nullcontext() if native else pytest.warns(UserWarning, match=name)
    with torch.no_grad(), forward.watching() as ran, said:
        ours = run(experts, "moestro", *inputs)
    assert ran[id(experts)][0].startswith("native" if native else "torch kernels")
    with torch.no_grad():
        close(ours, run(experts, "eager", *inputs))
    pairs = zip(
        gradients(experts, "moestro", *inputs), gradients(experts, "eager", *inputs), strict=True
    )
    for grad, theirs in pairs:
        close(grad, theirs)


@pytest.mark.parametrize(
    ("name", "module"),
    [("GptOssExperts", "gpt_oss"), ("DeepseekV4Experts", "deepseek_v4"), ("HYV4Experts", "hy_v4")],
)
def test_other_values_of_a_known_gate_are_not_recognised(name, module):
    assert layouts.read(make(name, module, swiglu_limit=5.0)).activation is None


def test_another_activation_in_a_known_gate_is_not_recognised():
    changes = {"swiglu_limit": 10.0, "hidden_act": "gelu"}
    assert layouts.read(make("DeepseekV4Experts", "deepseek_v4", **changes)).activation is None


def test_the_gate_of_a_subclass_is_not_recognised():
    experts = make()
    kind = type(experts)
    changed = type("Changed", (kind,), {"_apply_gate": lambda self, h: h.chunk(2, -1)[0].tanh()})
    experts.__class__ = changed
    assert layouts.read(experts).activation is None
    inputs = draw()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="gate of their own" if NATIVE else "torch kernels"),
    ):
        ours = run(experts, "moestro", *inputs)
    theirs = run(experts, "grouped_mm", *inputs)
    close(ours, theirs.detach())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_gelu_is_the_exact_one(activation):
    experts, inputs = make(hidden_act=activation), draw()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(run(experts, "moestro", *inputs), run(experts, "eager", *inputs))


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("gradient", [False, True])
def test_experts_of_other_ranks_take_no_part(name, gradient):
    """Poison where nobody may read: tokens and weights that only such places have."""
    experts = make(name, {"MixtralExperts": "mixtral", "GptOssExperts": "gpt_oss"}[name])
    x_TD, experts_TK, weights_TK = draw()
    experts_TK[0, 1] = experts_TK[4, 0] = E
    experts_TK[7] = E
    weights_TK[experts_TK == E] = float("nan")
    x_TD[7] = float("nan")
    here_TK = experts_TK < E
    clean = (
        x_TD.nan_to_num(0), experts_TK.masked_fill(~here_TK, 0), weights_TK.nan_to_num(0),
    )  # fmt: skip
    if not gradient:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = run(experts, "moestro", x_TD, experts_TK, weights_TK)
            close(ours, run(experts, "eager", *clean))
        assert not ours[7].any()
        return
    theirs = list(gradients(experts, "eager", *clean))
    theirs[1] = theirs[1] * here_TK
    ours = gradients(experts, "moestro", x_TD, experts_TK, weights_TK)
    for grad, expected in zip(ours, theirs, strict=True):
        close(grad, expected)
    assert not ours[0][7].any()
    assert not ours[1][~here_TK].any()


@pytest.mark.parametrize("native", [True, False])
def test_no_tokens_and_no_experts_here(native, monkeypatch):
    if not native:
        monkeypatch.setattr(native_cpu, "available", lambda: "there is no library")
    experts = make()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = run(experts, "moestro", *(each[:0] for each in draw()))
        x_TD, experts_TK, weights_TK = draw()
        away = run(experts, "moestro", x_TD, torch.full_like(experts_TK, E), weights_TK)
    assert none.shape == (0, D)
    assert torch.equal(away, torch.zeros(T, D))


@pytest.mark.parametrize("length", [1, T])
def test_without_the_native_library(length, monkeypatch):
    monkeypatch.setattr(native_cpu, "available", lambda: "there is no library")
    experts, inputs = make(), [each[:length] for each in draw()]
    with torch.no_grad():
        with pytest.warns(UserWarning, match="there is no library"):
            ours = run(experts, "moestro", *inputs)
        run(experts, "moestro", *inputs)  # said once: a second warning would be an error
        close(ours, run(experts, "eager", *inputs))


def test_dtypes_of_router_and_autocast():
    """fp32 weights of a sigmoid router beside bf16 tokens; autocast over fp32 weights."""
    experts, (x_TD, experts_TK, weights_TK) = make(), draw()
    inputs = (x_TD, experts_TK, weights_TK)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(UserWarning, match="without autocast" if NATIVE else "torch kernels"):
            ours = run(experts, "moestro", *inputs)
        close(ours, run(experts, "eager", *inputs), 2**-6)
    assert ours.dtype == torch.float32
    experts.bfloat16()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = run(experts, "moestro", x_TD.bfloat16(), experts_TK, weights_TK)
        close(ours, run(experts, "eager", x_TD.bfloat16(), experts_TK, weights_TK), 2**-6)
    assert ours.dtype == torch.bfloat16


def test_weights_are_not_copied(monkeypatch):
    """The native kernels read the model's own memory: a changed weight is seen at once."""
    experts, inputs, read, mixture = make(), draw(), [], native_cpu.mixture
    monkeypatch.setattr(
        native_cpu, "mixture", lambda given, *rest: read.append(given) or mixture(given, *rest)
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = run(experts, "moestro", *inputs)
        experts.down_proj.mul_(2.0)
        close(run(experts, "moestro", *inputs), 2 * before)
    assert len(read) == (2 if NATIVE else 0)
    for plain in read:
        assert plain.data.data_ptr() == experts.gate_up_proj.data_ptr()
        assert plain.down.data_ptr() == experts.down_proj.data_ptr()


@pytest.mark.skipif(not NATIVE, reason="no native library on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, T])
def test_the_same_bits_as_our_own_layer(length, dtype):
    """One table: without gradients, weights as they lie go through the same native call."""
    experts, own = make().to(dtype), Experts(E, D, F).to(dtype)
    own.gate_up, own.down = experts.gate_up_proj, experts.down_proj
    x_TD, experts_TK, weights_TK = (each[:length] for each in draw())
    any_TE = torch.empty(length, E)
    routing = Routing.of_choice(experts_TK, weights_TK, any_TE, any_TE)
    with torch.no_grad():
        ours = run(experts, "moestro", x_TD.to(dtype), experts_TK, weights_TK)
        assert torch.equal(ours, own(x_TD.to(dtype), routing))
        plain = native_cpu.plain_experts(own.gate_up, own.down, "swiglu")
        chosen = (routing.tokens_R, routing.experts_R, routing.weights_R)
        assert torch.equal(ours, native_cpu.mixture(plain, x_TD.to(dtype), *chosen))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["segments", "reference", "native", "torch", "nonsense"])
def test_a_backend_asked_for_by_name(name, compiled, monkeypatch):
    """It runs or raises, with gradients and without; nothing is said where it was asked for."""
    monkeypatch.setenv(backends.ENVIRONMENT, name)
    experts, inputs = make(), draw()
    experts.config._experts_implementation = "moestro"
    forwards = torch.compile(experts, backend="eager") if compiled else experts
    hf.install()
    refused = {"torch": "slower than segments", "nonsense": "unknown kernel backend"}
    if not NATIVE:
        refused["native"] = str(native_cpu.available())
    with torch.no_grad(), forward.watching() as ran:
        if name in refused:
            with pytest.raises(BackendError, match=refused[name]):
                forwards(*inputs)
            return
        ours = forwards(*inputs)
        if not compiled:
            (line,) = ran[id(experts)]
            assert line.startswith(
                "native" if name == "native" else f"torch kernels: the kernel backend {name}"
            )
        close(ours, run(experts, "eager", *inputs))


def test_native_asked_for_names_both_reasons(monkeypatch):
    """Of the kernel for whole mixtures, and of the one that trains."""
    monkeypatch.setenv(backends.ENVIRONMENT, "native")
    experts, inputs = make("BeamExperts", "beam"), draw()
    whole = "activation or gate of their own" if NATIVE else str(native_cpu.available())
    with torch.no_grad(), pytest.raises(BackendError, match=f"{whole}.*for bfloat16 only"):
        run(experts, "moestro", *inputs)


@pytest.mark.skipif(not NATIVE, reason="no native library on this machine")
def test_packed_weights_refuse_another_backend(monkeypatch):
    model = build("mixtral")
    hf.quantize(model, "int8")
    monkeypatch.setenv(backends.ENVIRONMENT, "segments")
    with pytest.raises(
        BackendError,
        match=r"'segments' was asked for.*packed weights run by native alone.*MOESTRO_BACKEND",
    ):
        hf.check(model, tokens())
