"""Token ids must be those of transformers, for templates and tokenizers of every kind we meet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exporter.errors import CheckpointError, UsageError
from exporter.runtime.prompt import REPLACEMENT, Prompt

SENTENCES = [
    "What is in the picture?", "Ist das schön? Ja, größer als 12.", "Describe the image in detail, please.",
    "数字はどこにありますか", "Emoji 🙂 and 👩‍🚀 are several bytes.", "USER: ASSISTANT: system user assistant",
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = """
{%- set image_count = namespace(value=0) %}
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] + '<|im_end|>\n' }}
    {%- else %}
        {%- for content in message['content'] %}
            {%- if content['type'] == 'image' or 'image' in content %}
                {%- set image_count.value = image_count.value + 1 %}
                {{- '<|image_pad|>' }}
            {%- elif 'text' in content %}
                {{- content['text'] }}
            {%- endif %}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}{% continue %}{% endif %}"
    "{% endfor %}"
)
"""For text only: takes strings, writes BOS itself."""
ODD = (
    "{% for message in messages %}\n  {% if true %}\n{{ message | tojson(indent=1) }}\n  {% endif %}\n{% endfor %}"
    "{{ {'größe': '<b>&'} | tojson }}{{ strftime_now('%Y') }}{{ tools is none }}"
)


def word_level() -> Tokenizer:
    words = sorted({word for sentence in SENTENCES for word in sentence.lower().split()})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def llama_like() -> Tokenizer:
    """Spaces as ▁, unknown characters as bytes, BOS added by the tokenizer."""
    alphabet = sorted({c for sentence in SENTENCES[:3] for c in sentence.replace(" ", "▁")})
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), "▁", *alphabet]
    model = models.BPE(
        {p: i for i, p in enumerate(dict.fromkeys(pieces))}, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


TOKENIZERS = [word_level, byte_level, llama_like]


def save(folder: Path, make: Callable[[], Tokenizer], template: str | None) -> Any:
    tokenizer = make()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.enable_truncation(8)  # left over from training; transformers ignores it
    tokenizer.enable_padding(length=64)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    hf.save_pretrained(folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return AutoTokenizer.from_pretrained(folder)


def text(words: str, images: int = 0) -> list[dict[str, str]]:
    return [*({"type": "image"} for _ in range(images)), {"type": "text", "text": words}]


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("template", [LLAVA, CHATML, ODD, MISTRAL])
def test_ids_are_those_of_transformers(tmp_path: Path, make: Callable[[], Tokenizer], template: str) -> None:
    hf = save(tmp_path, make, template)
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": text("What is in the größe 🙂?", 2)},
        {"role": "assistant", "content": text("Ein  <b>Bild</b>.")},
        {"role": "user", "content": text("Describe it.")},
    ]
    if template is MISTRAL:
        conversation = [{**m, "content": m["content"][-1]["text"]} for m in conversation]
    prompt = Prompt.load(tmp_path)
    for messages in (conversation[:1], conversation):
        for answer in (True, False):
            wanted = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
            assert prompt.render(messages, answer) == wanted
            ids = hf(wanted, add_special_tokens=not wanted.startswith("<s>"))["input_ids"]
            assert prompt.encode(messages, answer) == ids
            assert prompt.decode(ids) == hf.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_streamed_text_is_the_whole_text(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    save(tmp_path, make, CHATML)
    prompt = Prompt.load(tmp_path)
    ids = [t for s in SENTENCES for t in [*prompt.tokenizer.encode(s, add_special_tokens=False).ids, 5]]
    stream = prompt.stream()
    pieces = [stream.push(token) for token in ids]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == prompt.decode(ids)


def test_a_stream_that_ends_within_a_character(tmp_path: Path) -> None:
    save(tmp_path, byte_level, CHATML)
    prompt = Prompt.load(tmp_path)
    ids = prompt.tokenizer.encode("a€").ids  # not in the training sentences: its three bytes are three tokens
    stream = prompt.stream()
    assert [stream.push(token) for token in ids[:-1]] == ["a", "", ""]
    assert stream.finish() == REPLACEMENT == prompt.decode(ids[:-1])[1:]
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("template", "image"), [(LLAVA, "<image>"), (CHATML, "<|image_pad|>"), (MISTRAL, "<image>"), (None, "<image>")]
)
def test_ask_makes_one_image_token_per_placeholder(tmp_path: Path, template: str | None, image: str) -> None:
    hf = save(tmp_path, byte_level, template)
    prompt = Prompt.load(tmp_path, image_token=image)
    for count in (0, 1, 3):
        assert prompt.ask("What is it?", count).count(hf.convert_tokens_to_ids(image)) == count
    assert Prompt.load(tmp_path, hf.convert_tokens_to_ids(image)).ask("What?") == prompt.ask("What?")


def test_without_a_template_prompts_are_llavas(tmp_path: Path) -> None:
    save(tmp_path, byte_level, None)
    prompt = Prompt.load(tmp_path)
    assert prompt.render(prompt.question("What is it?")) == "USER: <image>\nWhat is it? ASSISTANT:"
    longer, _ = prompt.follow(prompt.question("What is it?"), "A cat.", "Sure?")
    assert prompt.render(longer) == "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"


@pytest.mark.parametrize("template", [LLAVA, CHATML, MISTRAL, None])
def test_the_next_turn_is_what_the_conversation_adds(tmp_path: Path, template: str | None) -> None:
    save(tmp_path, byte_level, template)
    prompt = Prompt.load(tmp_path, "<|image_pad|>" if template is CHATML else "<image>")
    messages = prompt.question("What is it?")
    longer, ids = prompt.follow(messages, " A cat. ", "Sure?")

    def raw(tokens: list[int]) -> str:
        return prompt.tokenizer.decode(tokens, skip_special_tokens=False)

    assert raw(prompt.encode(longer)).endswith(f"A cat.{raw(ids)}")
    assert "Sure?" in raw(ids)
    assert len(longer) == 3


def test_where_templates_and_image_tokens_come_from(tmp_path: Path) -> None:
    save(tmp_path, byte_level, None)
    messages = [{"role": "user", "content": "hi"}]

    def write(name: str, value: Any) -> None:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))

    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    several = [{"name": "default", "template": "4"}, {"name": "tool_use", "template": "5"}]
    write(
        "tokenizer_config.json", {**config, "chat_template": several, "bos_token": {"content": "<s>", "lstrip": False}}
    )
    assert Prompt.load(tmp_path).render(messages) == "4"
    assert Prompt.load(tmp_path).special["bos_token"] == "<s>"
    write("processor_config.json", {"chat_template": "3", "image_token": "<|image_pad|>"})
    assert Prompt.load(tmp_path).render(messages) == "3"
    assert Prompt.load(tmp_path).image_token == "<|image_pad|>"
    write("chat_template.json", {"chat_template": "2"})
    assert Prompt.load(tmp_path).render(messages) == "2"
    write("chat_template.jinja", "1{{ image_token is defined }}")
    assert Prompt.load(tmp_path).render(messages) == "1False"
    write("tokenizer_config.json", {**config, "extra_special_tokens": {"image_token": "<image>"}})
    assert Prompt.load(tmp_path).image_token == "<image>"


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no .*tokenizer\.json"):
        Prompt.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Prompt.load(tmp_path)
    save(tmp_path, byte_level, MISTRAL)
    with pytest.raises(CheckpointError, match="Image token 9999 is not in"):
        Prompt.load(tmp_path, 9999)
    with pytest.raises(UsageError, match="Roles must alternate"):
        Prompt.load(tmp_path).encode([{"role": "assistant", "content": "x"}])
    with pytest.raises(UsageError, match="does not make 1 image tokens"):
        Prompt.load(tmp_path).ask("Is <image> in the question?")
    (tmp_path / "chat_template.jinja").write_text("{{ messages.append(1) }}")
    with pytest.raises(UsageError, match="does not take these messages"):
        Prompt.load(tmp_path).encode([{"role": "user", "content": "It may not change what it is given."}])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="chat template cannot be read"):
        Prompt.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        Prompt.load(tmp_path)


@pytest.mark.parametrize("template", [CHATML, None])
def test_what_a_processor_writes_around_image_tokens(template: str | None, tmp_path: Path) -> None:
    """Two images of two tiles: where the template writes its mark, the prompt has markers and a token for each tile."""
    save(tmp_path, byte_level, template)
    mark = "<|image_pad|>" if template else "<image>"
    written = f"<s>{mark}\n{mark}</s>"
    prompt = Prompt.load(tmp_path, mark, rewrite=(mark, written))
    plain = Prompt.load(tmp_path, mark)
    messages = prompt.question("Where?", placeholders=4)
    assert prompt.render(messages) == plain.render(messages).replace(mark, written)
    assert prompt.render(messages).count(written) == 2
    assert prompt.encode(messages).count(prompt.tokenizer.token_to_id(mark)) == 4
