"""Write a tiny Llama with random weights and a tokenizer trained on the spot, offline: what real vLLM serves in tests.

    python make_tiny_model.py DIRECTORY

Needs torch, transformers, tokenizers and safetensors, which come with vLLM.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

VOCABULARY = 512
CONTEXT = 2048  # tokens
HIDDEN = 64
HEADS = 2  # of 32 dimensions each: the smallest head that vLLM's CPU attention takes
SEED = 7
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
SYLLABLES = ("ka", "ro", "mi", "ten", "sul", "vor", "ea", "lin", "pos", "du", "gra", "ne", "tor", "qui", "ba")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def sentences(count: int) -> Iterator[str]:
    """Made-up sentences for the tokenizer to learn from, the same each time."""
    draw = random.Random(SEED)  # reproducible, not secret
    for _ in range(count):
        words = ("".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(draw.randint(3, 15)))
        yield " ".join(words).capitalize() + "."


def write_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE and save it in the form that transformers loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(2000), trainer)
    unknown, begin, end, padding = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=padding,
        model_max_length=CONTEXT,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def write_model(directory: Path) -> None:
    """Draw the weights and save configuration and safetensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    configuration = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(configuration).to(torch.float32).save_pretrained(directory, safe_serialization=True)


def main() -> int:
    """Write the model into the directory named on the command line."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"usage: {sys.argv[0]} DIRECTORY\n")
        return 2
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    write_model(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
