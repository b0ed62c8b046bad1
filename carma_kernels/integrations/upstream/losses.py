"""The published `MILoss` and `StabilityLoss`, name by name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from carma_kernels.functional import stability_loss
from carma_kernels.integrations.upstream.activations import Cache, activation, layer_names, no_layers
from carma_kernels.integrations.upstream.draws import draw_uniform
from carma_kernels.integrations.upstream.pairs import PairTerms, Span, check_strictly, pair_terms, places_in_gram
from carma_kernels.integrations.upstream.similarity import PairSimilarity


class MILoss(nn.Module):
    """Drop-in for the published `MILoss`: InfoNCE over pairs of tokens of a word, with sampled negatives.

        -log( e^{s_ij/tau} / (e^{s_ij/tau} + sum_k e^{s_in_k/tau}) ),  mean over pairs, then over layers

    The published arguments keep their places and defaults; the switches, by keyword only, each undo one of the
    published code's peculiarities. `docs/upstream.md` tells what each of them does to the loss.

    Args:
        start_layer: the first block.
        end_layer: the last block, included; beyond the last there is, and None, mean the last.
        temperature: tau; a tensor gets its gradient.
        n_negatives: K, drawn with replacement, at least 1.
        similarity_metric: "cosine" or "dot_product".
        max_length: taken and not needed; words may be longer.
        model_type: "GPT" for caches of `transformer.h.*`, anything else for `model.layers.*`.
        per_sample: evaluate a sample's pairs on its own sequence, not on every sequence of the batch.
        include_last_span: take the last span of each sample, too.
        padding_negatives: False draws negatives from the tokens before the end of the sequence's last span only.
        fresh_negatives: False draws once for all layers, not anew for each.
        stable: compute in fp32 at least, and with log-sum-exp: finite wherever the loss is.
        strict: raise for spans that are empty, overlap, are repeated or have negative bounds, and for another number of
            samples than sequences.
        rng: draw from this generator, not from Python's global one.

    Raises:
        ValueError: n_negatives below 1.
    """

    def __init__(
        self,
        start_layer: int = 0,
        end_layer: int | None = 11,
        temperature: float | Tensor = 0.1,
        n_negatives: int = 5,
        similarity_metric: str = "cosine",
        max_length: int = 58,
        model_type: str = "GPT",
        *,
        per_sample: bool = False,
        include_last_span: bool = False,
        padding_negatives: bool = True,
        fresh_negatives: bool = True,
        stable: bool = False,
        strict: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        """Keep the options; they are read at every call, as the published ones are."""
        super().__init__()
        if n_negatives < 1:
            raise ValueError(f"n_negatives must be at least 1, got {n_negatives}: without negatives the loss is 0.")
        self.start_layer = start_layer
        self.end_layer = end_layer
        self.temperature = temperature
        self.n_negatives = n_negatives
        self.similarity_metric = similarity_metric
        self.max_length = max_length
        self.model_type = model_type
        self.per_sample = per_sample
        self.include_last_span = include_last_span
        self.padding_negatives = padding_negatives
        self.fresh_negatives = fresh_negatives
        self.stable = stable
        self.strict = strict
        self.rng = rng

    def calculate_mi_loss(self, cache: Cache, token_spans: Sequence[Sequence[Span]]) -> Tensor:
        """The loss of one batch.

        Args:
            cache: a block's name to its output, `[B, T, D]` or a tuple whose item 0 that is; fp16 to fp64.
            token_spans: of each sample its words, objects with `start_idx` and `end_idx` (half-open).

        Returns:
            0-d, in the activations' dtype (fp32 for the halves if `stable`). Without a word of two tokens a 0 whose
            backward gives every layer a zero gradient.

        Raises:
            ValueError: no such layers, layers that differ in `[B, T]`, spans outside the sequence, an unknown metric.
        """
        if self.similarity_metric not in ("cosine", "dot_product"):
            raise ValueError(
                f"similarity_metric must be one of 'cosine', 'dot_product', got {self.similarity_metric!r}."
            )
        layers = self._layers(cache)
        terms = self._terms(token_spans, layers)
        scores = self._scores(layers, terms) / self.temperature  # [L, M, 1+K]
        if not len(terms.sequence):
            return scores.sum()
        positive, negatives = scores[..., 0], scores[..., 1:]
        if self.stable:
            information = -nn.functional.softplus(negatives.logsumexp(-1) - positive)  # [L, M]
        else:
            numerator = positive.exp()
            information = (numerator / (numerator + negatives.exp().sum(-1))).log()
        if not terms.candidates.all():  # a word may leave nothing to draw from: it costs 0, and counts
            information = information.masked_fill(torch.from_numpy(terms.candidates == 0).to(scores.device), 0.0)
        return -information.mean(1).sum() / len(layers)

    def _layers(self, cache: Cache) -> list[Tensor]:
        names = layer_names(cache, self.model_type)
        if not names:
            raise no_layers(cache, self.model_type)
        chosen = names[self.start_layer : None if self.end_layer is None else self.end_layer + 1]
        if not chosen:
            raise ValueError(
                f"start_layer={self.start_layer}, end_layer={self.end_layer} choose none of the {len(names)} layers in "
                "the cache. Both are included and count from 0."
            )
        layers = [activation(cache, name) for name in chosen]
        for name, layer in zip(chosen, layers, strict=True):
            if layer.shape[:2] != layers[0].shape[:2]:
                raise ValueError(
                    f"cache[{name!r}] is {list(layer.shape)}, cache[{chosen[0]!r}] {list(layers[0].shape)}; all layers "
                    "must have one [B, T]. Clear the cache after each step."
                )
        return layers

    def _terms(self, token_spans: Sequence[Sequence[Span]], layers: list[Tensor]) -> PairTerms:
        B, T, _ = layers[0].shape
        if len(token_spans) != B and (self.strict or self.per_sample or not self.padding_negatives):
            raise ValueError(
                f"token_spans must hold one list of words a sequence, got {len(token_spans)} for a batch of {B}."
            )
        if self.strict:
            check_strictly(token_spans)
        return pair_terms(
            token_spans,
            (B, T),
            per_sample=self.per_sample,
            include_last_span=self.include_last_span,
            padding_negatives=self.padding_negatives,
        )

    def _scores(self, layers: list[Tensor], terms: PairTerms) -> Tensor:
        """Similarities of every pair to its positive and its K negatives, `[L, M, 1+K]`."""
        _, T, _ = layers[0].shape
        draws = 1 if not self.fresh_negatives else len(layers)
        uniform = draw_uniform((draws, len(terms.sequence), self.n_negatives), self.rng)
        index, anchors = places_in_gram(terms, terms.draw(uniform), T)
        index = index.expand(len(layers), -1, -1)
        scores = []
        for h, index_of_layer in zip(layers, index, strict=True):
            dtype = torch.promote_types(h.dtype, torch.float32) if self.stable else h.dtype
            similarity = PairSimilarity.apply(
                h,
                index_of_layer.to(h.device),
                None if anchors is None else anchors.to(h.device),
                self.similarity_metric == "cosine",
                dtype,
            )
            scores.append(similarity.to(layers[0].device))
        return torch.stack(scores)


class StabilityLoss:
    """Drop-in for the published `StabilityLoss`: relative change from each layer to the next.

        sum_{l=start}^{end-1} mean((h_{l+1} - h_l)^2) / (mean(h_l^2) + mean(h_{l+1}^2) + 1e-8)

    with means over batch, tokens (padding included) and width.

    Args:
        start_layer: the first block.
        end_layer: the last block, included; None is the last one of the cache of the first call.
        model_type: "GPT" for caches of `transformer.h.*`, anything else for `model.layers.*`.
        stable: compute in fp32 at least: fp16's own squares overflow from activations of 256 on.
        strict: where there is no layer at all, raise; where there is no step, return a tensor, a 0 whose backward gives
            zero gradients (published is the Python number 0.0 for both); leave an `end_layer` of None as it is.
    """

    def __init__(
        self,
        start_layer: int = 0,
        end_layer: int | None = 11,
        model_type: str = "GPT",
        *,
        stable: bool = False,
        strict: bool = False,
    ) -> None:
        """Keep the options; they are read at every call, as the published ones are."""
        self.start_layer = start_layer
        self.end_layer = end_layer
        self.model_type = model_type
        self.stable = stable
        self.strict = strict

    def calculate_loss(self, cache: Cache, *, mask: Tensor | None = None) -> Tensor | float:
        """The loss of one batch.

        Args:
            cache: a block's name to its output, `[B, T, D]` or a tuple whose item 0 that is; fp16 to fp64.
            mask: `[B, T]`, non-zero for the tokens in the means; None for all, as published.

        Returns:
            0-d, in the activations' dtype (fp32 for the halves if `stable` or with a mask); 0.0 for
            `start_layer >= end_layer`.

        Raises:
            IndexError: a layer that the cache does not have; the range is not cut to those there are.
        """
        names = layer_names(cache, self.model_type)
        end_layer = len(names) - 1 if self.end_layer is None else self.end_layer
        if not self.strict:
            self.end_layer = end_layer
            if self.start_layer >= end_layer:
                return 0.0
        if not names:
            raise no_layers(cache, self.model_type)
        return self._of_layers([activation(cache, name) for name in self._chosen(names, end_layer)], mask)

    def _chosen(self, names: list[str], end_layer: int) -> list[str]:
        try:
            chosen = [names[layer] for layer in range(self.start_layer, end_layer + 1)]
        except IndexError:
            chosen = []
        if not chosen:
            raise IndexError(
                f"start_layer={self.start_layer}, end_layer={end_layer} are not among the {len(names)} layers in the "
                f"cache. Both are included and count from 0: pass end_layer=None or at most {len(names) - 1}."
            )
        return chosen

    def _of_layers(self, layers: list[Tensor], mask: Tensor | None) -> Tensor:
        layers = [h.to(layers[0].device) for h in layers]
        if layers[0].dtype in (torch.float16, torch.bfloat16) and not self.stable and mask is None:
            return sum(
                (_change(h, following) for h, following in pairwise(layers)),
                layers[0].new_zeros(()),
            )
        return stability_loss(layers, mask=mask, eps=1e-8)


def _change(h: Tensor, following: Tensor) -> Tensor:
    """One step in the activations' own dtype, overflow included: `[B, T, D]` twice to 0-d."""
    return ((following - h) ** 2).mean() / ((h**2).mean() + (following**2).mean() + 1e-8)
