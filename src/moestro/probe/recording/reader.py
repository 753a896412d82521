"""A model as the probe reads it: its mixtures, and forward passes with what they decided."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moestro.errors import DataError, MoestroError
from moestro.foreign.taps import RawChoice, tapped, taps
from moestro.models.count import count
from moestro.models.decoder import Decoder
from moestro.models.encdec import EncDec
from moestro.probe.recording.choices import LayerRecord, TokenChoice, choice_of, layer_record
from moestro.probe.recording.passages import Batch, Reading


class Mixture(NamedTuple):
    """A mixture layer of a model: the number of its layer, and E."""

    layer: int
    num_experts: int


class ForwardRecord(NamedTuple):
    """What one forward pass gave: logits [B, S, V], and each mixture's choices."""

    logits_BSV: Tensor
    layers: list[LayerRecord]


class Reader(Protocol):
    """What the probe asks of a model, whoever wrote it.

    Attributes:
        model: the model.
        mixtures: its mixture layers in order, the L of a trace.
        vocab_size: V.
        context: most tokens of a text; None where there is no limit.
        in_order: records hold a token's experts in the order in which the model adds them up;
            otherwise the heaviest comes first.
        has_head: it predicts tokens.
    """

    model: nn.Module
    mixtures: Sequence[Mixture]
    vocab_size: int
    context: int | None
    in_order: bool
    has_head: bool

    def logits(self, batch: Batch) -> Tensor:
        """[B, S, V] of a forward pass without a cache; hidden states of a model without a head."""
        ...

    def record(self, batch: Batch) -> ForwardRecord:
        """A forward pass with what its mixtures decided.

        Raises:
            MoestroError: a mixture did not run, or not once over all tokens; names its class.
        """
        ...

    def write(self, prompt_1S: Tensor, most: int, ends: Collection[int]) -> Tensor:
        """At most so many tokens after the prompt, each the most likely one. int64 [S].

        Args:
            prompt_1S: int64, on any device.
            most: tokens to write.
            ends: tokens after which our own models stop; others know theirs.

        Raises:
            MoestroError: the model cannot generate.
        """
        ...

    def size(self) -> tuple[int, int | None, int | None]:
        """Parameters, those that a token passes, and all layers; None where unknown."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run in evaluation mode without gradients; restore the modes after."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            # Models of transformers keep tensors that they make on the way (rotary tables of a
            # length); made in inference mode, they would break later training.
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def check(self, readings: Sequence[Reading], generate: int = 0) -> None:
        """Refuse tokens that the model does not know, and texts longer than it can read.

        Raises:
            DataError: names the text.
        """
        for place, reading in enumerate(readings):
            low, high = int(reading.tokens_S.min()), int(reading.tokens_S.max())
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"text {place} ({reading.document}) has token {low if low < 0 else high}; the "
                    f"model's vocabulary is 0 to {self.vocab_size - 1}. Leave the text out, or use "
                    "the tokenizer that the model was trained with"
                )
            length = len(reading.tokens_S) + generate
            if self.context is not None and length > self.context:
                raise DataError(
                    f"text {place} ({reading.document}) has {length} tokens with what is to be "
                    f"generated; the model's context is {self.context}. Cut it (moestro.probe.cut)"
                )


def reader_of(model: nn.Module) -> Reader:
    """How to read a model.

    Raises:
        MoestroError: it has no mixture, or one that cannot be recorded, or is an encoder-decoder.
        DataError: it does not say how many tokens it knows.
    """
    if isinstance(model, EncDec):
        raise MoestroError(
            "this model is an encoder-decoder; traces are of decoders, which read one text from "
            "left to right. Give a decoder"
        )
    return OwnModel(model) if isinstance(model, Decoder) else TransformersModel(model)


class OwnModel(Reader):
    """A `Decoder`: it returns its routing."""

    context, in_order, has_head = None, True, True

    def __init__(self, model: Decoder) -> None:
        if not model.moe_layers or model.cfg.moe is None:
            raise MoestroError(
                "this model has no mixture layer (a dense model), so there is no routing to look "
                "at; give a model whose settings have model.moe"
            )
        self.model: Decoder = model
        self.mixtures = [Mixture(layer, model.cfg.moe.num_experts) for layer in model.moe_layers]
        self.vocab_size = model.cfg.vocab_size

    def logits(self, batch: Batch) -> Tensor:
        """See `Reader`."""
        batch = batch.to(self.device)
        logits_BSV: Tensor = self.model(batch.tokens_BS, valid_BS=batch.valid_BS).logits
        return logits_BSV

    def record(self, batch: Batch) -> ForwardRecord:
        """See `Reader`."""
        batch = batch.to(self.device)
        output = self.model(batch.tokens_BS, valid_BS=batch.valid_BS)
        layers = [layer_record(choice_of(routing), batch) for routing in output.routings]
        return ForwardRecord(output.logits, layers)

    def write(self, prompt_1S: Tensor, most: int, ends: Collection[int]) -> Tensor:
        """See `Reader`."""
        cache, tokens_1S, new = self.model.new_cache(1), prompt_1S.to(self.device), []
        for _ in range(most):
            tokens_1S = self.model(tokens_1S, cache=cache).logits[:, -1:].argmax(-1)
            new.append(tokens_1S[0])
            if ends and int(tokens_1S) in ends:
                break
        return torch.cat(new)

    def size(self) -> tuple[int, int, int]:
        """See `Reader`."""
        counted = count(self.model.cfg)
        return counted.total, counted.active, self.model.cfg.num_layers


class TransformersModel(Reader):
    """A causal language model of transformers: hooks see the routing of each layer."""

    in_order = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._taps = taps(model)
        self.mixtures = [Mixture(tap.layer, tap.num_experts) for tap in self._taps]
        config: Any = getattr(model, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        size = getattr(config, "vocab_size", None)
        if not isinstance(size, int):
            raise DataError(f"{type(model).__name__} does not say how many tokens it knows")
        self.vocab_size, self.context = size, getattr(config, "max_position_embeddings", None)
        self.has_head = getattr(model, "get_output_embeddings", lambda: None)() is not None

    def logits(self, batch: Batch) -> Tensor:
        """See `Reader`."""
        batch = batch.to(self.device)
        mask_BS = None if batch.valid_BS is None else batch.valid_BS.long()
        output = self.model(input_ids=batch.tokens_BS, attention_mask=mask_BS, use_cache=False)
        logits: Tensor | None = getattr(output, "logits", None)
        return output.last_hidden_state if logits is None else logits

    def record(self, batch: Batch) -> ForwardRecord:
        """See `Reader`."""
        records: dict[int, LayerRecord] = {}

        def see(place: int, raw: RawChoice) -> None:
            tap = self._taps[place]
            if place in records or len(raw.experts_TK) != batch.tokens_BS.numel():
                raise MoestroError(
                    f"{tap.name} ({type(tap.experts).__name__}) does not route all tokens of a "
                    f"forward pass together: it was given {len(raw.experts_TK)} of "
                    f"{batch.tokens_BS.numel()}; this way of routing cannot be recorded"
                )
            # Many routers return a token's experts in no order.
            weights_TK, order_TK = (
                raw.weights_TK.detach().float().sort(dim=1, descending=True, stable=True)
            )
            experts_TK, probs_TE = (
                raw.experts_TK.gather(1, order_TK),
                tap.probabilities(raw.logits_TE),
            )
            choice = TokenChoice(
                experts_TK, weights_TK, probs_TE, tap.num_experts, experts_TK.shape[1]
            )
            records[place] = layer_record(choice, batch)

        with tapped(self._taps, see):
            logits_BSV = self.logits(batch)
        missed = [tap for place, tap in enumerate(self._taps) if place not in records]
        if missed:
            raise MoestroError(
                f"{missed[0].name} ({type(missed[0].experts).__name__}) was not reached by text, "
                f"like {len(missed)} of {len(self._taps)} mixtures: other code may stand in for "
                "its block. Load the model without use_kernels, and give the one that reads text"
            )
        return ForwardRecord(logits_BSV, [records[place] for place in range(len(self._taps))])

    def write(self, prompt_1S: Tensor, most: int, ends: Collection[int]) -> Tensor:
        """See `Reader`."""
        if not hasattr(self.model, "generate"):
            raise MoestroError(
                f"{type(self.model).__name__} cannot generate; give its causal language model "
                "(…ForCausalLM), or generate=0"
            )
        prompt_1S = prompt_1S.to(self.device)
        whole_1S: Tensor = self.model.generate(
            input_ids=prompt_1S,
            attention_mask=torch.ones_like(prompt_1S),
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
        )
        return whole_1S[0, prompt_1S.shape[1] :]

    def size(self) -> tuple[int, None, None]:
        """See `Reader`."""
        return sum(each.numel() for each in self.model.parameters()), None, None
