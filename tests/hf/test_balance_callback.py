"""Balance within transformers' Trainer: its calls in their order, and the Trainer itself."""

import types
import warnings

import pytest
import torch
from safetensors.torch import load_file

import moestro.hf as hf
from moestro.errors import CheckpointError, ConfigError, MoestroError
from moestro.hf.balance_callback import FILE, _share

from .zoo import build, tokens

transformers = pytest.importorskip("transformers")
SWITCH = 0.5


def training(name="qwen3_moe", **changes):
    return build(name, 2, **changes).train()


def begun(model, balancer, tmp_path, step=0, gpus=0, best=False, **options):
    """A callback that a Trainer has begun to train with, the Trainer's state, and its calls."""
    callback = balancer.callback(**options)
    args = types.SimpleNamespace(n_gpu=gpus, output_dir=str(tmp_path), load_best_model_at_end=best)
    state = transformers.TrainerState(global_step=step)
    control = transformers.TrainerControl()

    def call(event, **more):
        getattr(callback, event)(args, state, control, model=model, **more)

    call("on_train_begin")
    return callback, state, call


def gradient(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(batches, labels, shares):
    """Gradients of a step whose micro-batches' balance losses count by their shares."""
    model = training()
    with hf.balance(model, switch=SWITCH) as balancer:
        items = sum((each[:, 1:] != -100).sum() for each in labels)
        for batch, label, share in zip(batches, labels, shares, strict=True):
            loss = model(batch, labels=label, num_items_in_batch=items).loss
            (loss + balancer.loss() * share).backward()
    return gradient(model)


def test_a_step_adds_the_mean_of_its_micro_batches(tmp_path):
    batches = [tokens(), tokens()]
    wanted = by_hand(batches, batches, (0.5, 0.5))
    model = training()
    balancer = hf.balance(model, switch=SWITCH)
    _, _, call = begun(model, balancer, tmp_path)
    items = sum(batch[:, 1:].numel() for batch in batches)
    for batch in batches:
        model(batch, labels=batch, num_items_in_batch=items).loss.backward()
    call("on_optimizer_step")
    torch.testing.assert_close(gradient(model), wanted, rtol=1e-4, atol=1e-6)


def test_micro_batches_count_by_their_labels(tmp_path):
    batches = [tokens(1), tokens(3)]
    labels = [batch.clone() for batch in batches]
    labels[0][:, :5] = -100  # 4 labels stay; 24 in the other
    wanted = by_hand(batches, labels, (4 / 28, 24 / 28))
    model = training()
    _, _, call = begun(model, hf.balance(model, switch=SWITCH), tmp_path)
    for batch, label in zip(batches, labels, strict=True):
        model(batch, labels=label, num_items_in_batch=torch.tensor(28)).loss.backward()
    call("on_optimizer_step")
    torch.testing.assert_close(gradient(model), wanted, rtol=1e-4, atol=1e-6)


def test_shares_are_exact_whatever_the_default_dtype():
    labels = torch.full((1, 1002), 5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        share = _share(training(), {"labels": labels, "num_items_in_batch": torch.tensor(3003)})
    finally:
        torch.set_default_dtype(torch.float32)
    assert share.item() == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_loss_that_the_trainer_divides_itself_gets_it_whole(as_tuple, tmp_path):
    model, batch = training(), tokens()
    plain = model(batch, labels=batch).loss
    balancer = hf.balance(model, switch=SWITCH)
    begun(model, balancer, tmp_path)
    loss = model(batch, labels=batch, return_dict=not as_tuple)[0]
    torch.testing.assert_close(loss, plain + SWITCH * 2 * balancer.parts["switch"])
    with torch.no_grad():  # an evaluation's loss is the model's own
        torch.testing.assert_close(model(batch, labels=batch).loss, plain)
    model.eval()
    torch.testing.assert_close(model(batch, labels=batch).loss, plain)


def test_logs_tell_the_health(tmp_path):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=SWITCH)
    _, state, call = begun(model, balancer, tmp_path)
    model(batch, labels=batch).loss.backward()
    call("on_optimizer_step")
    logs = {"loss": 1.0}
    state.log_history.append({**logs, "step": 1})
    call("on_log", logs=logs)
    layers = balancer.health().values()
    assert logs["balance/worst"] == max(layer.imbalance for layer in layers)
    assert logs["balance/imbalance"] == sum(layer.imbalance for layer in layers) / 2
    assert logs["balance/dead"] == sum(layer.dead for layer in layers)
    assert logs["balance/switch"] == balancer.parts["switch"].item()
    assert 0 < logs["balance/entropy"] < 1
    assert state.log_history[-1] == {**logs, "step": 1}
    evaluation = {"eval_loss": 1.0}
    call("on_log", logs=evaluation)
    assert evaluation == {"eval_loss": 1.0}


def test_biases_go_into_checkpoints_and_come_back(tmp_path):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=0.0, bias_rate=0.1)
    _, state, call = begun(model, balancer, tmp_path)
    model(batch, labels=batch).loss.backward()
    call("on_optimizer_step")
    state.global_step = 1
    (tmp_path / "checkpoint-1").mkdir()
    call("on_save")
    saved = load_file(tmp_path / "checkpoint-1" / FILE)
    torch.testing.assert_close(saved, balancer.state_dict())

    again = training()
    balancer = hf.balance(again, switch=0.0, bias_rate=0.1)
    begun(again, balancer, tmp_path, step=1)
    torch.testing.assert_close(balancer.state_dict(), saved)
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        begun(again, balancer, tmp_path, step=2)


def test_the_best_checkpoint_has_its_own_biases(tmp_path):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=0.0, bias_rate=0.1)
    _, state, call = begun(model, balancer, tmp_path, best=True)
    for step in (1, 2):
        model(batch, labels=batch).loss.backward()
        call("on_optimizer_step")
        state.global_step = step
        (tmp_path / f"checkpoint-{step}").mkdir()
        call("on_save")
    state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    saved = load_file(tmp_path / "checkpoint-1" / FILE)
    assert any(not torch.equal(saved[n], b) for n, b in balancer.state_dict().items())
    call("on_train_end")
    torch.testing.assert_close(balancer.state_dict(), saved, rtol=0, atol=0)
    (tmp_path / "checkpoint-1" / FILE).unlink()
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        call("on_train_end")


def test_a_second_try_counts_nothing_of_the_first(tmp_path):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=SWITCH)
    _, _, call = begun(model, balancer, tmp_path)
    model(batch, labels=batch)  # and its backward pass finds no memory
    call("on_train_begin")
    call("on_log", logs={"loss": 1.0})  # a log before the first step tells no health
    once = training()
    with hf.balance(once, switch=SWITCH) as other:
        (once(batch, labels=batch).loss + other.loss()).backward()
        other.step()
        wanted = other.health()
    half = batch[:1]
    for each in (half, batch[1:]):
        model(each, labels=each).loss.backward()
    call("on_optimizer_step")
    for got, want in zip(balancer.health().values(), wanted.values(), strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_after_training_the_loss_is_the_models_own_and_biases_stay(tmp_path):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=SWITCH, bias_rate=0.1)
    _, _, call = begun(model, balancer, tmp_path)
    call("on_train_begin")  # a second try with a smaller batch begins anew
    model(batch, labels=batch).loss.backward()
    call("on_optimizer_step")
    call("on_train_end")
    model.eval()
    trained = model(batch, labels=batch)
    balancer.remove()
    assert not torch.equal(model(batch, labels=batch).loss, trained.loss)


def test_what_cannot_be_is_said(tmp_path):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=SWITCH)
    with pytest.raises(ConfigError, match="torchrun"):
        begun(model, balancer, tmp_path, gpus=2)
    with pytest.raises(ConfigError, match="not the balanced model"):
        begun(training(), balancer, tmp_path)
    begun(model, balancer, tmp_path)
    with pytest.raises(MoestroError, match="add_loss=False"):
        model(batch)


def test_a_loss_function_of_ones_own_adds_it_itself(tmp_path):
    model, batch = training(), tokens()
    balancer = hf.balance(model, switch=SWITCH)
    _, _, call = begun(model, balancer, tmp_path, add_loss=False)
    (model(batch).logits.mean() + balancer.loss()).backward()
    call("on_optimizer_step")


SETTINGS = {"switch": 0.1, "z": 0.01, "bias_rate": 0.01}


def run_trainer(model, folder, seen, resume=None):
    """The Trainer over five sequences: two a micro-batch, two of these a step, so 4 and 1."""
    torch.manual_seed(0)
    data = [{"input_ids": each, "labels": each} for each in tokens(5)]

    def collate(rows):
        seen.append(torch.stack([row["input_ids"] for row in rows]))
        return {"input_ids": seen[-1], "labels": seen[-1]}

    balancer = hf.balance(model, **SETTINGS)
    settings = transformers.TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        save_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, settings, data_collator=collate, train_dataset=data, callbacks=[balancer.callback()]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return balancer, trainer.state.log_history


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_trainer_does_what_a_loop_of_ones_own_does(name, tmp_path):
    pytest.importorskip("accelerate")
    seen = []
    model, twin = training(name), training(name)
    balancer, log = run_trainer(model, tmp_path / "run", seen)
    by_hand = hf.balance(twin, **SETTINGS)
    for micros in (seen[:2], seen[2:3], seen[3:5], seen[5:6]):
        items = sum(micro[:, 1:].numel() for micro in micros)
        for micro in micros:
            loss = twin(micro, labels=micro, num_items_in_batch=items).loss
            (loss + by_hand.loss() * len(micro) / sum(map(len, micros))).backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        by_hand.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(balancer.state_dict(), by_hand.state_dict())
    for ours, theirs in zip(balancer.health().values(), by_hand.health().values(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert sum("balance/switch" in line for line in log) == 4

    # The Trainer does not put experts back on resuming; loading the model does.
    folder = tmp_path / "run" / "checkpoint-2"
    assert (folder / FILE).is_file()
    again = type(model).from_pretrained(folder, experts_implementation="eager")
    resumed, _ = run_trainer(again, tmp_path / "run", [], str(folder))
    torch.testing.assert_close(resumed.state_dict(), balancer.state_dict())
