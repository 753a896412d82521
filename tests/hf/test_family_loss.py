"""A family's own balance loss beside ours: never paid for, whatever a trainer sets meanwhile."""

import pytest
import torch

import moestro.hf as hf

from .zoo import build, tokens


def training(**changes):
    return build("qwen3_moe", 2, **changes).train()


def reads_configuration(model):
    """As the families that hold no coefficient in the model itself."""
    del model.router_aux_loss_coef
    held = property(lambda self: self.config.router_aux_loss_coef)
    model.__class__ = type("Reads", (type(model),), {"router_aux_loss_coef": held})
    return model


def gradient(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reads", [False, True])
def test_what_was_on_is_off_and_on_again(reads):
    model = training(output_router_logits=True, router_aux_loss_coef=9.0)
    model = reads_configuration(model) if reads else model
    batch = tokens()
    with_own = model(batch, labels=batch).loss
    with pytest.warns(UserWarning, match="loss of its own"):
        balancer = hf.balance(model, switch=0.1)
    output = model(batch, labels=batch)
    torch.testing.assert_close(output.loss, with_own - 9 * output.aux_loss)
    assert not output.aux_loss.requires_grad
    assert model.config.router_aux_loss_coef == model.router_aux_loss_coef == 9.0
    model.eval()
    torch.testing.assert_close(model(batch, labels=batch).loss, output.loss)
    balancer.remove()
    torch.testing.assert_close(model(batch, labels=batch).loss, with_own)


@pytest.mark.parametrize("reads", [False, True])
def test_a_trainer_that_switches_it_on_again_pays_nothing(reads):
    model, batch = training(), tokens()
    model = reads_configuration(model) if reads else model
    balancer = hf.balance(model, switch=0.1)
    plain = model(batch, labels=batch).loss
    (plain + balancer.loss()).backward()
    wanted = gradient(model)
    for turn in range(2):
        (model.config if reads else model).router_aux_loss_coef = 7.0  # before each batch
        model.config.output_router_logits = True
        if turn == 0:
            with pytest.warns(UserWarning, match="aux_loss in its output is without gradient"):
                output = model(batch, labels=batch)
        else:
            output = model(batch, labels=batch, output_router_logits=True)
        torch.testing.assert_close(output.loss, plain, rtol=0, atol=0)
        assert output.aux_loss > 1
        # Some trainers add it themselves.
        (output.loss + 7.0 * output.aux_loss + balancer.loss()).backward()
        torch.testing.assert_close(gradient(model), wanted, rtol=0, atol=0)
        assert model.router_aux_loss_coef == 7.0
    balancer.remove()
    assert model(batch, labels=batch).loss > plain + 7


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_pass_that_was_interrupted_loses_no_coefficient(goes_on):
    model = training(router_aux_loss_coef=7.0)
    balancer = hf.balance(model, switch=0.1)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens())
    if goes_on:
        hook.remove()
        model(tokens())
        assert model.router_aux_loss_coef == 7.0
    balancer.remove()
    assert model.router_aux_loss_coef == model.config.router_aux_loss_coef == 7.0


def test_an_adapter_around_the_model_changes_nothing():
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = training(router_aux_loss_coef=7.0)
            self.config = self.inside.config

        def forward(self, *args, **kwargs):
            return self.inside(*args, **kwargs)

    model, batch = Wrapper(), tokens()
    plain = model(batch, labels=batch).loss
    hf.balance(model, switch=0.1)
    with pytest.warns(UserWarning, match="without gradient"):
        output = model(batch, labels=batch, output_router_logits=True)
    torch.testing.assert_close(output.loss, plain, rtol=0, atol=0)


def test_a_coefficient_of_zero_stays_zero():
    model = training(router_aux_loss_coef=0.0)
    balancer = hf.balance(model, switch=0.1)
    with pytest.warns(UserWarning, match="without gradient"):
        assert model(tokens(), output_router_logits=True).aux_loss > 0
    balancer.remove()
    assert model.router_aux_loss_coef == 0


def test_a_family_without_a_loss_goes_on_to_show_its_logits():
    model = build("deepseek_v3", 2).train()
    model.config.output_router_logits = True
    hf.balance(model, switch=0.1)
    assert model.config.output_router_logits
