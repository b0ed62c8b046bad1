"""Small tokenizers of every common kind, learnt from the demo's definitions, which hold nothing but ASCII."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from carma_kernels.demo.definitions import read_definitions, shipped_file

_PUNCTUATION_AND_BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _PUNCTUATION_AND_BLANKS
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}|" + _PUNCTUATION_AND_BLANKS
)
_SIZE = 700


@cache
def corpus() -> list[str]:
    definitions = [entry.definition for entry in read_definitions(shipped_file())[:300]]
    return [
        *definitions,
        "def main(argument):\n    if argument:\n        return 'it isn''t, they''re 1984'  # 12 345",
        "a  b   c",
    ]


def _learnt(
    *, pre: Any = None, normal: Any = None, prefix: str = "", fallback: bool = False, specials: tuple[str, ...] = ()
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.normalizer = pre, normal
    texts = [text.replace(" ", "\u2581") for text in corpus()] if fallback else corpus()
    special = [*specials, *(f"<0x{byte:02X}>" for byte in range(256) if fallback)]
    alphabet = [] if fallback else pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_SIZE + 256, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    state = json.loads(bpe.to_str())["model"]
    return state["vocab"], [tuple(merge) for merge in state["merges"]]


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def bytes_split_by(pre: Any, normal: Any = None) -> PreTrainedTokenizerFast:
    one = Tokenizer(models.BPE(*_learnt(pre=pre)))
    one.pre_tokenizer, one.normalizer, one.decoder = pre, normal, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=one, pad_token="<pad>", bos_token="<s>")


def gpt2(add_prefix_space: bool = False) -> Any:
    vocab, merges = _learnt(pre=pre_tokenizers.ByteLevel(False), specials=("<|endoftext|>",))
    return GPT2Tokenizer(vocab, merges, add_prefix_space=add_prefix_space, pad_token="<|endoftext|>")


def qwen() -> Any:
    vocab, merges = _learnt(pre=pre_tokenizers.ByteLevel(False), specials=("<|endoftext|>",))
    one = Qwen2Tokenizer(vocab, merges)
    one.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return one


def _sentence_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    pre = pre_tokenizers.Split("\u2581", "merged_with_next")
    return _learnt(pre=pre, fallback=True, specials=("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<s>", "</s>"))


def gemma() -> Any:
    vocab, merges = _sentence_pieces()
    one = GemmaTokenizer(vocab | {"\u2581\u2581": len(vocab)}, [*merges, ("\u2581", "\u2581")])
    one.add_tokens([AddedToken(text, normalized=False) for text in ("\u2581\u2581", "\n")])
    return one


def llama(**options: Any) -> Any:
    return LlamaTokenizer(*_sentence_pieces(), pad_token="<pad>", **options)


def _unigram(specials: list[str]) -> list[tuple[str, float]]:
    one = Tokenizer(models.Unigram())
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    one.train_from_iterator(
        corpus(),
        trainers.UnigramTrainer(vocab_size=400, special_tokens=specials, unk_token="<unk>", show_progress=False),
    )
    return [tuple(entry) for entry in json.loads(one.to_str())["model"]["vocab"]]


def bert(**options: Any) -> Any:
    one = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    one.normalizer, one.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    one.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    return BertTokenizer(one.get_vocab(), **options)


def clip() -> Any:
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *sorted(f"{char}</w>" for char in alphabet)],
    )
    bpe.train_from_iterator(corpus(), trainer)
    state = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(state["vocab"], [tuple(merge) for merge in state["merges"]])


KINDS: dict[str, Callable[[], Any]] = {
    "GPT-2": gpt2,
    "GPT-2 with a blank before": lambda: gpt2(add_prefix_space=True),
    "Qwen 2": qwen,
    "Llama 3": lambda: bytes_split_by(_split(LLAMA_3)),
    "GPT-4o": lambda: bytes_split_by(_split(GPT_4O)),
    "bytes after NFKC": lambda: bytes_split_by(_split(LLAMA_3), normalizers.NFKC()),
    "bytes of lower case without accents": lambda: bytes_split_by(
        pre_tokenizers.ByteLevel(False),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    ),
    "Falcon": lambda: bytes_split_by(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(False),
                pre_tokenizers.Digits(),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        )
    ),
    "Llama 2": llama,
    "Llama 2 without a blank before": lambda: llama(add_prefix_space=False),
    "Gemma": gemma,
    "T5": lambda: T5Tokenizer(_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=2),
    "XLM-R": lambda: XLMRobertaTokenizer(_unigram(["<s>", "<pad>", "</s>", "<unk>"])),
    "BERT": bert,
    "BERT, cased": lambda: bert(do_lower_case=False),
    "CLIP": clip,
}
"""By the name of a model that has such a one."""


@cache
def _of_kind(name: str) -> Any:
    return KINDS[name]()


def of_kind(name: str, truncation_side: str = "right") -> Any:
    one = _of_kind(name)
    one.truncation_side = truncation_side
    return one
