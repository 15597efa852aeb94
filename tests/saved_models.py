"""Folders of small models with their tokenizers, as `save_pretrained` leaves them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import processors

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.tokenization.bpe import train_bpe

EOS = "<|endoftext|>"
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}


def save_model(folder: Path, texts: Iterable[str], *, adds_bos: bool = False, **fields) -> Path:
    """A random masked network over a BPE of 280 tokens that is trained on the texts, in `folder`.

    adds_bos: the tokenizer puts a BOS token, which is EOS, before each text. fields: of the configuration.
    """
    torch.manual_seed(0)
    base, special = train_bpe(texts, 280), {"eos_token": EOS}
    if adds_bos:
        base.post_processor = processors.TemplateProcessing(f"{EOS} $A", None, [(EOS, 0)])
        special["bos_token"] = EOS
    build_tokenizer(base, special_tokens=special).save_pretrained(folder)
    config = PrimeV2Config(vocab_size=280, eos_token_id=0, **SHAPE | fields)
    PrimeV2ForMaskedDiffusion(config).save_pretrained(folder)
    return folder
