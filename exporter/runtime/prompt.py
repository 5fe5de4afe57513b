"""Questions to token ids and back: `tokenizer.json` and the checkpoint's chat template, without transformers.

A folder is read as transformers reads it: `tokenizer.json`; special tokens from `tokenizer_config.json`, else
`special_tokens_map.json`; the chat template from the first of `chat_template.jinja`, `chat_template.json`,
`processor_config.json`, `tokenizer_config.json` that has one. Without any, prompts follow LLaVA-1.5:
`USER: <image>\n{question} ASSISTANT:`.

Image tokens are *not* expanded: the graphs want one per placeholder. Where a family's processor writes more than the template
does (markers, the places of tiles, times), `VisualLayout.mark` becomes `VisualLayout.written`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from exporter.errors import CheckpointError, UsageError
from exporter.graphset import GraphSet
from exporter.runtime import _tokenizer
from exporter.runtime._tokenizer import content
from exporter.runtime.question import Reader, readers
from exporter.runtime.sequence import Ints

Message = Mapping[str, Any]
"""{"role": "user", "content": text or [{"type": "image"}, {"type": "text", "text": …}]}"""

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' if message['role'] == 'assistant' else '' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ image_token + '\n' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ eos_token | default('') if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""For checkpoints without a chat template."""

IMAGE_TOKENS = ("<image>", "<|image_pad|>", "<IMG_CONTEXT>", "<image_soft_token>")
"""What the image token is called where no file says it; the first one in the vocabulary."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder makes of bytes that are no UTF-8 yet."""


class Prompt:
    """A tokenizer and a chat template; and CLIP's tokenizer, where a reduction reads the question with it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None,
        special: Mapping[str, str],
        image_token: str | None,
        readers: Sequence[Reader] = (),
        rewrite: tuple[str, str] = ("", ""),
        splice: int | None = None,
    ) -> None:
        """`splice`: the image token's id, where the tokenizer has none for it."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer, self.special, self.image_token, self._readers = tokenizer, dict(special), image_token, readers
        self._mark, self._written = rewrite
        self._splice = splice
        self._template = _compile(LLAVA_TEMPLATE if template is None else template)
        self._extra = {"image_token": image_token} if template is None and image_token else {}

    @classmethod
    def load(
        cls,
        folder: Path,
        image_token: str | int | None = None,
        clip: Path | None = None,
        rewrite: tuple[str, str] = ("", ""),
        template: str = "",
        spliced: str = "",
    ) -> Prompt:
        """Read a checkpoint's or bundle's folder.

        Args:
            folder: holds `tokenizer.json`.
            image_token: the token or id that stands for an image; else what the files say.
            clip: the CLIP checkpoint's folder; else the one that an export has in its own.
            rewrite: `VisualLayout.mark` and `VisualLayout.written`.
            template: `VisualLayout.template`, for a folder without a chat template.
            spliced: `VisualLayout.spliced`; `image_token` is its id then.
        Raises:
            CheckpointError: no tokenizer, or a file that cannot be read.
        """
        tokenizer = _tokenizer.read(folder)
        config = _tokenizer.config(folder)
        special = _tokenizer.special_tokens(config)
        processor = _tokenizer.json_object(folder / "processor_config.json")
        splice = image_token if spliced and isinstance(image_token, int) else None
        if splice is not None:
            image_token = spliced
        elif isinstance(image_token, int):
            name = tokenizer.id_to_token(image_token)
            if name is None:
                raise CheckpointError(
                    f"Image token {image_token} is not in {folder}/tokenizer.json ({tokenizer.get_vocab_size()} tokens)."
                )
            image_token = name
        image_token = image_token or _image_token(tokenizer, config, processor)
        found = _chat_template(folder, config, processor) or template or None
        return cls(tokenizer, found, special, image_token, readers(folder, clip), rewrite, splice)

    @classmethod
    def of(cls, folder: Path, graphs: GraphSet) -> Prompt:
        """That of an export, whose graphs lie in `folder`."""
        visual = graphs.visual
        return cls.load(
            folder / "processor",
            graphs.text.image_token,
            None,
            (visual.mark, visual.written),
            visual.template,
            visual.spliced,
        )

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """The text of a conversation; with `answer`, up to where the assistant's next answer begins.

        Raises:
            UsageError: the template refuses the messages.
        """
        # A template is foreign code: it sees JSON, nothing that has methods. An image's value is never read.
        plain = json.loads(
            json.dumps([dict(message) for message in messages], default=lambda value: type(value).__name__)
        )
        try:
            text = self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=answer, **self._extra, **self.special
            )
        except Exception as e:  # whatever its expressions raise
            raise UsageError(f"The chat template does not take these messages: {e}") from e
        return text.replace(self._mark, self._written) if self._mark else text

    def encode(self, messages: Sequence[Message], answer: bool = True) -> list[int]:
        """Token ids of a conversation, one image token per image.

        As transformers' processors do it: the tokenizer adds its own special tokens unless the template wrote BOS.
        """
        return self._ids(self.render(messages, answer))

    def question(self, text: str, placeholders: int = 1, kind: Literal["image", "video"] = "image") -> list[Message]:
        """One user message asking `text` about `placeholders` images, in the form this template understands."""
        shown = placeholders // self._each
        parts = [*({"type": kind} for _ in range(shown)), {"type": "text", "text": text}]
        message = {"role": "user", "content": parts}
        if self._images([message]) == placeholders:
            return [message]
        plain = {"role": "user", "content": f"{self._mark or self.image_token}\n" * shown + text}
        if self.image_token is not None and self._images([plain]) == placeholders:
            return [plain]
        raise UsageError(
            f"The chat template does not make {placeholders} image tokens ({self.image_token}) of a question about "
            "that many images. Does it belong to this tokenizer, and is the question free of image tokens?"
        )

    @property
    def _each(self) -> int:
        """Image tokens of one image or clip."""
        return self._written.count(self.image_token or "") if self._mark else 1

    def ask(self, text: str, placeholders: int = 1, kind: Literal["image", "video"] = "image") -> list[int]:
        """Token ids of a question about `placeholders` images (`VisualLayout.placeholders`)."""
        return self.encode(self.question(text, placeholders, kind))

    def side(self, texts: Sequence[str]) -> dict[str, Ints]:
        """What `Generator.generate` wants in `side` for these questions, one per row, where a reduction reads them."""
        return {name: ids for reader in self._readers for name, ids in reader.side(texts).items()}

    def follow(self, messages: Sequence[Message], reply: str, text: str) -> tuple[list[Message], list[int]]:
        """The next turn: the conversation with `reply` and a new question, and the token ids that are new in it.

        The ids begin behind the reply, with what the template writes to end it.

        Raises:
            UsageError: the template writes earlier turns differently once there are later ones.
        """
        longer = lengthened(messages, reply, text)
        before, after = self.render(messages), self.render(longer)
        reply = reply.strip()
        cut = after.find(reply, len(before))
        if not after.startswith(before) or cut < 0 or after[len(before) : cut].strip():
            raise UsageError("This chat template rewrites earlier turns: ask the whole conversation anew.")
        return longer, self.tokenizer.encode(after[cut + len(reply) :], add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> Stream:
        """A decoder for tokens that come one by one."""
        return Stream(self.decode)

    def _ids(self, text: str) -> list[int]:
        bos = self.special.get("bos_token")
        own = not (bos and (text.replace(self.image_token, "") if self.image_token else text).startswith(bos))
        first, *others = [text] if self._splice is None else text.split(self.image_token)
        ids: list[int] = self.tokenizer.encode(first, add_special_tokens=own).ids
        for part in others:
            assert self._splice is not None
            ids += [self._splice, *self.tokenizer.encode(part, add_special_tokens=False).ids]
        return ids

    def _images(self, messages: Sequence[Message]) -> int:
        """Image tokens in the rendered messages; -1 if the template refuses them."""
        try:
            text = self.render(messages)
        except UsageError:
            return -1
        return text.count(self.image_token) if self.image_token else 0


def lengthened(messages: Sequence[Message], reply: str, text: str) -> list[Message]:
    """A conversation with an answer and the next question, in the form that its messages have."""
    plain = isinstance(messages[-1]["content"], str)
    more = (("assistant", reply), ("user", text))
    return [*messages, *({"role": r, "content": t if plain else [{"type": "text", "text": t}]} for r, t in more)]


class Stream:
    """Decodes a growing sequence: what it returned so far, joined, is the text of all tokens.

    A character whose bytes are spread over several tokens comes with its last one.
    """

    WINDOW = 6
    """Tokens of context kept: decoders look at a token's neighbours, never far."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._told = 0  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token)
        return self._new(final=False)

    def finish(self) -> str:
        """What is left: bytes that never became a character."""
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        before, now = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not final):
            return ""
        surplus = max(0, self._told - self.WINDOW)
        self._ids, self._told = self._ids[surplus:], len(self._ids) - surplus
        return now[len(before) :]


def _compile(template: str) -> jinja2.Template:
    """A chat template in the sandbox, with what transformers offers templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except Exception as e:  # jinja2 makes Python of it, whose compiler has errors of its own
        raise CheckpointError(f"The chat template cannot be read: {e}") from e


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _image_token(tokenizer: Tokenizer, config: Mapping[str, Any], processor: Mapping[str, Any]) -> str | None:
    extra = config.get("extra_special_tokens")
    places = [config, extra if isinstance(extra, Mapping) else {}, processor]
    said = [content(place.get("image_token")) for place in places]
    return next((name for name in (*said, *IMAGE_TOKENS) if name and tokenizer.token_to_id(name) is not None), None)


def _chat_template(folder: Path, config: Mapping[str, Any], processor: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path} cannot be read: {e}") from e
    for place in (_tokenizer.json_object(folder / "chat_template.json"), processor, config):
        template = place.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {str(e.get("name")): e.get("template") for e in template if isinstance(e, Mapping)}
        if isinstance(template, Mapping):
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None
