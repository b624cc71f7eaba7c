"""The miniature's tokenizer: CLIP's byte-pair encoding with a small vocabulary of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from bench.data import world

MAX_LENGTH = 32  # tokens; the longest caption with three objects has 29 with its two ends
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def vocabulary_text() -> list[str]:
    """Every word that a caption can hold, as sentences to learn merges from."""
    things = [
        str(world.Thing(size, colour, shape))
        for size in world.SIZES
        for colour in world.COLOURS
        for shape in world.SHAPES
    ]
    joints = [joint for pair in world.RELATIONS.values() for joint in pair]
    return things + 20 * joints + 20 * ["a picture of"] + 20 * [f"on a {name} background" for name in world.BACKGROUNDS]


def build_tokenizer() -> CLIPTokenizer:
    """Learn the merges (deterministic: the text is fixed); any other text still falls back to bytes."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        vocabulary_text(),
        trainers.BpeTrainer(
            vocab_size=2000, initial_alphabet=sorted(letters), end_of_word_suffix="</w>", show_progress=False
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        learner.model.save(folder)
        merges = [tuple(line.split()) for line in (Path(folder) / "merges.txt").read_text().splitlines()[1:]]
    symbols = sorted(letters) + [letter + "</w>" for letter in sorted(letters)] + ["".join(merge) for merge in merges]
    vocabulary = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols + [BOS, EOS]))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token=EOS,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_LENGTH,
    )
