"""Hooks of one module alone, in the module and in its copies."""

import copy
import pickle

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moestro.foreign import hooks

CALLED = []


def instead(*args):
    CALLED.append(args)


def listened():
    """A layer with a hook before and one after it, and what these have seen."""
    layer, seen = nn.Linear(2, 2), []
    hooks.add(layer.register_forward_pre_hook, lambda *args: seen.append(args), with_kwargs=True)
    hooks.add(layer.register_forward_hook, lambda *args: seen.append(args), in_copies=instead)
    return layer, seen


def test_a_hook_is_called_and_removed_as_torchs_own():
    layer, seen = listened()
    x = torch.ones(1, 2)
    layer(input=x)
    assert [len(args) for args in seen] == [3, 3]
    assert seen[0][2] == {"input": x}
    handle = hooks.add(layer.register_forward_hook, lambda *_: torch.zeros(1))
    assert layer(x).numel() == 1
    handle.remove()
    assert layer(x).numel() == 2


def test_a_copy_calls_what_is_meant_for_copies():
    for copied in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        layer, seen = listened()
        twin = copied(copied(layer))
        CALLED.clear()
        twin(torch.ones(1, 2))
        assert not seen
        assert [module for module, *_ in CALLED] == [twin]
        hooks.drop_copied(twin)
        hooks.drop_copied(layer)
        twin(torch.ones(1, 2))
        assert len(CALLED) == 1
        assert hooks.functions(twin) == []
        assert len(hooks.functions(layer)) == 2


def test_hooks_of_another_process_take_no_number_twice(monkeypatch):
    layer, _ = listened()
    saved = pickle.dumps(layer)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    twin = pickle.loads(saved)
    for _ in range(40):  # one of the same number would be given keywords, as the old one was
        twin.register_forward_pre_hook(lambda module, args: None)
    twin(torch.ones(1, 2))
