"""The gated delta rule in chunks against its definition, and the definition against the paper."""

import pytest
import torch
from torch.nn import functional as F

from moestro.kernels import delta, reference_delta

CHUNK = delta.CHUNK
# bf16 rounds what is given; both compute in fp32.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
NAMES = ["outputs", "state", "q", "k", "v", "log_decay", "beta", "first state"]


def random_case(length, groups=2, heads=4, dtype=torch.float64, begun=True, decay=1.0):
    """Queries and keys of width 5, values of width 3, in the order of the arguments."""
    q, k = F.normalize(torch.randn(2, 2, length, groups, 5, dtype=torch.float64), dim=-1)
    case = [
        q,
        k,
        torch.randn(2, length, heads, 3, dtype=torch.float64),
        -decay * torch.rand(2, length, heads, dtype=torch.float64),
        torch.rand(2, length, heads, dtype=torch.float64),
    ]
    case = [x.to(dtype) for x in case]
    state = torch.randn(2, heads, 5, 3, dtype=torch.promote_types(dtype, torch.float32))
    return [*case, state] if begun else case


def run(function, case):
    """Outputs, the last state, and the gradients of all that was given."""
    leaves = [x.detach().clone().requires_grad_() for x in case]
    y_BSHO, state_BHAO = function(*leaves)
    torch.manual_seed(3)
    sums = [(x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in (y_BSHO, state_BHAO)]
    sum(sums).backward()
    return [y_BSHO.detach(), state_BHAO.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 130])
def test_chunks_equal_the_definition(length, begun, dtype):
    case = random_case(length, dtype=dtype, begun=begun)
    fast, slow = run(delta.gated_delta, case), run(reference_delta.gated_delta, case)
    for name, a, b in zip(NAMES, fast, slow, strict=False):
        assert a.dtype == b.dtype, name
        tolerance = TOLERANCES[dtype] if a.dtype != torch.bfloat16 else 1e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 5), (3, 3), (2, 6)])
def test_key_heads_serve_value_heads_in_a_row(groups, heads):
    case = random_case(9, groups, heads)
    apart = [x.repeat_interleave(heads // groups, dim=2) for x in case[:2]] + case[2:]
    alone = reference_delta.gated_delta(*apart)
    for function in (delta.gated_delta, reference_delta.gated_delta):
        for a, b in zip(function(*case), alone, strict=True):
            torch.testing.assert_close(a, b)


def test_the_definition_is_equation_10():
    """S_t = S_{t−1} (α_t (I − β_t k_t k_tᵀ)) + β_t v_t k_tᵀ, and the output is S_t q_t."""
    q, k, v, log_decay, beta, state = random_case(6, groups=1, heads=1)
    y_BSHO, last_BHAO = reference_delta.gated_delta(q, k, v, log_decay, beta, state)
    for b in range(2):
        S = state[b, 0].T
        for t in range(6):
            alpha, rate = log_decay[b, t, 0].exp(), beta[b, t, 0]
            erased = alpha * (torch.eye(5) - rate * torch.outer(k[b, t, 0], k[b, t, 0]))
            S = S @ erased + rate * torch.outer(v[b, t, 0], k[b, t, 0])
            torch.testing.assert_close(y_BSHO[b, t, 0], S @ q[b, t, 0])
        torch.testing.assert_close(last_BHAO[b, 0], S.T)


@pytest.mark.parametrize("cuts", [(CHUNK, 2 * CHUNK), (1, 2, 3), (50,), (0, 149)], ids=str)
def test_a_text_in_parts_is_the_text(cuts):
    """The state is all that is carried."""
    *case, state = random_case(150)
    whole_BSHO, last_BHAO = delta.gated_delta(*case, state)
    outputs = []
    for part in zip(*(x.tensor_split(cuts, dim=1) for x in case), strict=True):
        y_BSHO, state = delta.gated_delta(*part, state)
        outputs.append(y_BSHO)
    torch.testing.assert_close(torch.cat(outputs, 1), whole_BSHO)
    torch.testing.assert_close(state, last_BHAO)


def test_a_token_replaces_what_its_key_holds():
    """β = 1 without decay: each of a few orthogonal keys returns the value it was given last."""
    keys = torch.eye(5, dtype=torch.float64)[[0, 3, 1, 0, 3]][None, :, None]
    values = torch.randn(1, 5, 1, 3, dtype=torch.float64)
    none, all_of_it = torch.zeros(1, 5, 1).double(), torch.ones(1, 5, 1).double()
    _, state_BHAO = delta.gated_delta(keys, keys, values, none, all_of_it)
    for key, token in ((0, 3), (3, 4), (1, 2)):
        torch.testing.assert_close(state_BHAO[0, 0, key], values[0, token, 0])
    assert not state_BHAO[0, 0, [2, 4]].any()


def test_tokens_without_decay_and_rate_leave_the_state():
    q, k, v, log_decay, beta, state = random_case(70)
    _, last_BHAO = delta.gated_delta(q, k, v, 0 * log_decay, 0 * beta, state)
    torch.testing.assert_close(last_BHAO, state)


@pytest.mark.parametrize("decay", [50.0, 5_000.0])
def test_a_state_that_decays_at_once_does_not_overflow(decay):
    case = [x.float() for x in random_case(100, decay=decay)]
    fast, slow = run(delta.gated_delta, case), run(reference_delta.gated_delta, case)
    for name, a, b in zip(NAMES, fast, slow, strict=True):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("length", [1, 5])
def test_gradcheck(monkeypatch, length):
    monkeypatch.setattr(delta, "CHUNK", 2)
    leaves = [x.requires_grad_() for x in random_case(length, groups=1, heads=2)]
    assert torch.autograd.gradcheck(delta.gated_delta, leaves)


def test_no_position_sees_the_future():
    case = random_case(100)
    before = delta.gated_delta(*case)[0][:, :80]
    for x in case[:5]:
        x[:, 80:] = -x[:, 80:].abs() * 0.5
    after = delta.gated_delta(*case)[0]
    torch.testing.assert_close(after[:, :80], before)


@pytest.mark.parametrize("function", [delta.gated_delta, reference_delta.gated_delta])
def test_no_tokens_leave_the_state(function):
    *case, state = random_case(0)
    y_BSHO, last_BHAO = function(*case, state)
    assert y_BSHO.shape == (2, 0, 4, 3)
    assert torch.equal(last_BHAO, state)
