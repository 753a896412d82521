"""Which tokens are real: masks of every form, read where the tokens are routed."""

import inspect

import pytest
import torch
import transformers
from torch import nn

import moestro.hf as hf
from moestro.errors import ShapeError
from moestro.hf.watch import real_tokens

from .zoo import build, tokens

# Two texts and two tokens of padding in one row; a whole row of one text.
TEXTS = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9])
REAL = TEXTS > 0
SAME = (TEXTS[:, :, None] == TEXTS[:, None]) & REAL[:, None] & torch.ones(9, 9).tril().bool()
ADDED = torch.zeros(2, 9, 9).masked_fill(~SAME, torch.finfo(torch.float32).min)


def training(**changes):
    return build("qwen3_moe", 2, **changes).train()


def name_of_cache(model):
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def loss_of(model, balancer, *args, real=None, **kwargs):
    """The balance loss of a forward pass, and each layer's number of assignments in it."""
    if real is not None:
        balancer.valid(real)
    model(*args, **kwargs)
    counted = balancer._pending[0]
    return balancer.loss().detach(), [int(each.counts_E().sum()) for each in counted]


@pytest.mark.parametrize("scope", ["micro", "sequence"])
@pytest.mark.parametrize("mask", [SAME[:, None], ADDED[:, None], REAL.long(), REAL.float()])
def test_what_a_mask_says_is_what_it_was_meant_to_say(mask, scope):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=1.0, z=1.0, scope=scope)
    read, counts = loss_of(model, balancer, batch, attention_mask=mask)
    told, _ = loss_of(model, balancer, batch, attention_mask=mask, real=REAL)
    everything, _ = loss_of(model, balancer, batch, attention_mask=mask, real=torch.ones(18))
    assert torch.equal(read, told)
    assert not torch.equal(read, everything)
    assert counts == [REAL.sum() * 3] * 2


def test_a_mask_that_was_told_holds_for_one_pass():
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=1.0)
    _, first = loss_of(model, balancer, batch, real=REAL)
    _, second = loss_of(model, balancer, batch)
    assert (first[0], second[0]) == (REAL.sum() * 3, 18 * 3)


@pytest.mark.parametrize("unwatched", ["no_grad", "eval", "failed"])
def test_that_pass_need_not_be_watched(unwatched):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=1.0)
    balancer.valid(REAL)
    if unwatched == "failed":
        with pytest.raises(ValueError, match="specify"):
            model()
    else:
        with torch.set_grad_enabled(unwatched == "eval"):
            model.train(unwatched == "no_grad")(batch)
    _, counts = loss_of(model.train(), balancer, batch)
    assert counts == [18 * 3] * 2


@pytest.mark.parametrize("mask", [REAL.long(), ADDED[:, None, 5:], SAME[:, None, 5:]])
def test_with_a_cache_the_mask_is_longer(mask):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=1.0)
    cache = {name_of_cache(model): transformers.DynamicCache()}
    loss_of(model, balancer, batch[:, :5], use_cache=True, **cache)
    _, counts = loss_of(model, balancer, batch[:, 5:], attention_mask=mask, **cache)
    assert counts == [REAL[:, 5:].sum() * 3] * 2


def test_one_mask_for_all_sequences_and_masks_by_name():
    mask = SAME[:1, None]
    assert torch.equal(real_tokens(mask, 2, 9, None), REAL[0].repeat(2))
    by_name = {"full_attention": None, "sliding_attention": ADDED[:, None]}
    assert torch.equal(real_tokens(by_name, 2, 9, None), REAL.flatten())
    assert real_tokens({"full_attention": None}, 2, 9, None) is None


class Prompted(nn.Module):
    """Puts three tokens of its own before each text, as prompt tuning does."""

    def __init__(self, model):
        super().__init__()
        self.inside = model
        self.prompt = nn.Parameter(torch.randn(3, model.config.hidden_size))

    @property
    def config(self):
        return self.inside.config

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        texts = self.inside.get_input_embeddings()(input_ids)
        both = torch.cat([self.prompt.expand(len(texts), -1, -1), texts], 1)
        mask = torch.cat([attention_mask.new_ones(len(texts), 3), attention_mask], 1)
        return self.inside(inputs_embeds=both, attention_mask=mask)


class Prefixed(nn.Module):
    """Gives three keys and values to each layer, as prefix tuning does."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    @property
    def config(self):
        return self.inside.config

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        cache, config = transformers.DynamicCache(), self.config
        shape = (len(input_ids), config.num_key_value_heads, 3, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.ones(shape), torch.ones(shape), layer)
        mask = torch.cat([attention_mask.new_ones(len(input_ids), 3), attention_mask], 1)
        given = {name_of_cache(self.inside): cache}
        return self.inside(input_ids=input_ids, attention_mask=mask, **given)


@pytest.mark.parametrize(("wrap", "more"), [(Prompted, 3), (Prefixed, 0)])
@pytest.mark.parametrize("outer", [True, False])
def test_tokens_that_a_wrapper_adds_are_masked_by_the_wrappers_mask(wrap, more, outer):
    model, batch = training(), tokens()
    wrapped = wrap(model)
    balancer = hf.balance(wrapped if outer else model, switch=1.0, scope="sequence")
    found, counts = loss_of(wrapped, balancer, batch, attention_mask=REAL.long())
    assert counts == [(REAL.sum() + 2 * more) * 3] * 2
    real = torch.cat([torch.ones(2, more, dtype=torch.bool), REAL], 1)
    told, _ = loss_of(wrapped, balancer, batch, attention_mask=REAL.long(), real=real)
    assert torch.equal(found, told)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_virtual_tokens_of_peft(kind, outer):
    peft = pytest.importorskip("peft")
    model, batch = training(), tokens()
    made = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    wrapped = peft.get_peft_model(model, made(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    balancer = hf.balance(wrapped if outer else model, switch=1.0)
    mask = {"input_ids": batch, "attention_mask": REAL.long()}
    _, counts = loss_of(wrapped, balancer, **mask)
    assert counts == [(REAL.sum() + (8 if kind == "prompt" else 0)) * 3] * 2


@pytest.mark.parametrize(
    "mask", [torch.ones(3, 9), torch.ones(2, 12), torch.ones(2, 9, 9), ADDED[:, None, :5], "flex"]
)
def test_a_mask_that_cannot_be_read_has_a_way_out(mask):
    with pytest.raises(ShapeError, match=r"2 sequences of 9 tokens.*balancer\.valid\(mask\)"):
        real_tokens(mask, 2, 9, None)
    model = training()
    balancer = hf.balance(model, switch=1.0)
    with pytest.raises(ShapeError, match=r"attention_mask is .*2 sequences of 9"):
        model(tokens(), attention_mask=mask)
    balancer.valid(torch.ones(2, 7))
    with pytest.raises(ShapeError, match=r"18 tokens, and the mask has 14 places"):
        model(tokens())
