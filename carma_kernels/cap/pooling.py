"""Which tokens become which word, and hidden states pooled to one row a word."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from carma_kernels import TokenSpans

Protocol = Literal["mean", "max", "sum"]
Positions = Literal["sequential", "first"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
POSITIONS: tuple[Positions, ...] = get_args(Positions)


@dataclass(frozen=True)
class WordRows:
    """Where the tokens of a batch go when each word becomes one row: W rows a sequence, words first, then padding.

    A valid token in no word is a word of one token; padding is dropped. The rows of a sequence with fewer than W words
    are filled up with copies of its first one, which nobody attends to.
    """

    valid_row: Tensor  # [B, W] bool, the row is a word
    first_token: Tensor  # [B, W] int64 flat b*T+t, of the row's word
    source: Tensor  # [B, W] int64, the token whose position, and whose line of the attention mask, the row takes over
    row_of_token: Tensor  # [B, T] int64 flat b*W+w
    valid_token: Tensor  # [B, T] bool
    split_token: Tensor  # [N] int64 flat b*T+t, the tokens of words of two tokens or more, in order
    split_length: Tensor  # [S] int64, how many of them belong to each such word
    split_row: Tensor  # [S] int64 flat b*W+w, its row

    @classmethod
    def of(cls, spans: TokenSpans, positions: Positions = "sequential") -> WordRows | None:
        """The rows of `spans`, on the host; None if no word has two tokens, so that there is nothing to pool."""
        if not spans.num_pairs:
            return None
        word = spans.to("cpu").word.long()  # [B, T], -1 for padding
        valid = word >= 0  # [B, T]
        starts = valid.clone()  # [B, T] the token is the first of its word
        starts[:, 1:] &= word[:, 1:] != word[:, :-1]
        num_words = starts.sum(dim=1)  # [B]
        W, T = int(num_words.max()), word.shape[1]
        sequence = torch.arange(len(word))[:, None]  # [B, 1]
        valid_row = torch.arange(W) < num_words[:, None]  # [B, W]
        first_token = _places(starts, W)
        length = word[valid].bincount()  # [words], of each word of the batch
        split = length > 1  # [words]
        return cls(
            valid_row=valid_row,
            first_token=first_token + T * sequence,
            source=first_token if positions == "first" else _places(valid, W),
            row_of_token=(starts.cumsum(dim=1) - 1).clamp_min(0) + W * sequence,
            valid_token=valid,
            split_token=(valid & split[word.clamp_min(0)]).flatten().nonzero().squeeze(1),
            split_length=length[split],
            split_row=valid_row.flatten().nonzero().squeeze(1)[split],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """`(B, T)` of the tokens."""
        B, T = self.row_of_token.shape
        return B, T

    def to(self, device: torch.device) -> WordRows:
        """The same rows on `device`."""
        return WordRows(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def pool(hidden: Tensor, rows: WordRows, protocol: Protocol) -> Tensor:
    """The words' hidden states, `[B, W, D]`, in the dtype of `hidden`.

    Args:
        hidden: `[B, T, D]`.
        rows: on the same device.
        protocol: `"mean"`, `"max"` (each channel by itself) or `"sum"` over a word's tokens, computed in fp32 or wider.
    """
    D = hidden.shape[2]
    flat = hidden.reshape(-1, D)  # [B*T, D]
    pooled = flat.index_select(0, rows.first_token.flatten())  # [B*W, D]
    tokens = flat.index_select(0, rows.split_token)  # [N, D]
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    words = torch.segment_reduce(wide, protocol, lengths=rows.split_length, axis=0)  # [S, D]
    return pooled.index_copy_(0, rows.split_row, words.to(hidden.dtype)).view(*rows.first_token.shape, D)


def spread(pooled: Tensor, rows: WordRows) -> Tensor:
    """Each token gets the row of its word, padding gets zeros: `[B, W, D]` to `[B, T, D]`."""
    D = pooled.shape[2]
    tokens = pooled.reshape(-1, D).index_select(0, rows.row_of_token.flatten())  # [B*T, D]
    return tokens.view(*rows.shape, D).masked_fill_(~rows.valid_token[:, :, None], 0)


def _places(chosen: Tensor, W: int) -> Tensor:
    """Of each row of `chosen` `[B, T]` the first W places where it holds, `[B, W]`; then the first one again."""
    ranked = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :W]  # [B, W]
    enough = torch.arange(W) < chosen.sum(dim=1, keepdim=True)  # [B, W]
    return ranked.where(enough, ranked[:, :1])
