"""Makes the demo's small tokenizer, `stepjax/assets/demo_tokenizer/tokenizer.json`.

Byte-level BPE: it encodes any text, and each word of the demo's prompts is one token. Every decimal digit is a token,
so a model reads and writes numbers digit by digit. Ids: 256 bytes, merges, control tokens named as in STEP3-VL.

    python tools/make_demo_tokenizer.py [FILE]
"""

import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PATH = Path(__file__).parents[1] / "stepjax" / "assets" / "demo_tokenizer" / "tokenizer.json"
MAX_VOCAB_SIZE = 384  # the corpus needs fewer

CORPUS = (
    "user\n",
    "assistant\n",
    "system\n",
    "Transcribe the digits from left to right.",
    "How many digits are in the image?",
    "Add up the digits.",
    "Point at the digit 7.",
    "(37, 52)",
    "What is 12 + 7?",
    "What is 12 - 7?",
)

CONTROL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"),
)
# Not "special", as in Qwen3's tokenizer: decoders show them.
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def make() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE - len(CONTROL_TOKENS) - len(MARKERS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in MARKERS])
    return tokenizer


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make().to_str(pretty=True) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
