"""The embedded model's tokenizer, chat template and image processor, built from scratch.

A word-level vocabulary is enough for the task's sentences; unknown words become `<unk>`. The rendered prompt of a
question about a mosaic is `<|user|><image>Which digit is in row 2, column 3?<|assistant|>`; a clip has four `<image>`.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from exporter.embedded import digits

SPECIAL: tuple[str, ...] = ("<pad>", "<eos>", "<unk>", "<image>", "<|user|>", "<|assistant|>")
WORDS: tuple[str, ...] = (
    *(str(digit) for digit in range(10)),
    *digits.NUMBERS,
    *digits.PLURALS,
    *("which", "digit", "is", "in", "row", "column", "how", "many", "are", "there", "moved", ",", "?"),
)
VOCABULARY = 64
"""Rounded up to a multiple of 64 with reserved tokens, so that the LM head's width suits INT4 blocks."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer; digits, words and punctuation are tokens of their own."""
    names = [*SPECIAL, *WORDS]
    names += [f"<reserved_{i}>" for i in range(VOCABULARY - len(names))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=2048,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor() -> LlavaProcessor:
    """Images to 64×64 RGB in [-1, 1], text through the chat template, every `<image>` expanded to 64 tokens."""
    size = {"height": digits.IMAGE, "width": digits.IMAGE}
    images = CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
