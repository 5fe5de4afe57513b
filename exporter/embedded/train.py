"""The recipe of the embedded VLM: `python -m exporter.embedded.train --out DIR [--work DIR]`, under an hour on 2 cores.

Two stages, each seeded and resumable from the work folder:

1. *Tower*: the CLIP tower alone, on mosaics of augmented training digits. Throw-away heads ask every patch for its
   digit and its cell, and CLS for the digits that are present: so CLS attends where the digits are.
2. *Language*: projector and Llama decoder on the frozen tower, all three kinds of question in every step. The questions
   about a mosaic share one sequence: each sees the image and itself, at the positions it would have alone, so training
   runs on the very prompts of the chat template. Throw-away heads and one loss on attention pull out the hops that a
   question needs: after layer 1 the last token knows what is asked; in layer 2 one of its heads looks at the digits to
   count; after layer 2 a clip's patches know where a digit arrived or left.

What decided that it learns in minutes: those hints (without them an argument that is not the prompt's last token is not
found in the time, and counting stays a guess), matrices drawn at 1/√hidden instead of 0.02, embeddings at 0.5, and fresh
questions on fresh images in every step.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llama.modeling_llama import rotate_half

from exporter.embedded import digits
from exporter.embedded.prompt import build_processor

PATCH = 8
PATCHES = (digits.IMAGE // PATCH) ** 2
CELLS = digits.GRID**2
# The cell of every patch: [patches].
_PATCH_ROW = torch.arange(PATCHES) // (digits.IMAGE // PATCH) * PATCH // digits.CELL
_PATCH_COLUMN = torch.arange(PATCHES) % (digits.IMAGE // PATCH) * PATCH // digits.CELL
PATCH_CELL = _PATCH_ROW * digits.GRID + _PATCH_COLUMN


@dataclass(frozen=True)
class Recipe:
    """The knobs of a training run."""

    seed: int = 0
    copies: int = 40  # distorted variants of every training digit
    tower_steps: int = 1000
    tower_batch: int = 48
    tower_rate: float = 2e-3
    language_steps: int = 900
    language_rate: float = 1.5e-3
    mosaics: int = 40  # per step, each with `cell_questions` and `count_questions`
    cell_questions: int = 2
    count_questions: int = 5
    clips: int = 8  # per step, each with its one question
    thin_from: int = 600  # from this step on, empty patches are left out at random
    hint_weight: float = 0.3
    look_weight: float = 0.6
    hidden: int = 192
    layers: int = 4


LOOK_LAYER = 1
"""The decoder layer whose first head is taught to look at the digits that are counted."""


def build_model(recipe: Recipe, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The untrained model: CLIP ViT 4×128 with CLS, MLP projector, Llama decoder with grouped-query attention."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": digits.IMAGE,
            "patch_size": PATCH,
            "projection_dim": 128,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": recipe.hidden,
            "intermediate_size": recipe.hidden * 3,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": recipe.hidden // 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.5 if "embed" in name else recipe.hidden**-0.5)
    nn.init.normal_(model.lm_head.weight, std=recipe.hidden**-0.5)
    return model


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [batch, 64, 64] → float32 [batch, 3, 64, 64] in [-1, 1], as the image processor does."""
    grey = torch.from_numpy(images).float() / 127.5 - 1
    return grey[:, None].expand(-1, 3, -1, -1)


def rate_at(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """The learning rate: linear over the first steps, then a cosine down to 3 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warmup) * (0.97 * cosine + 0.03)


# --- Stage 1: the tower -------------------------------------------------------------------------------------------


def train_tower(model: LlavaForConditionalGeneration, source: digits.Glyphs, recipe: Recipe) -> None:
    """Train the vision tower in place by what its patches and CLS must know."""
    tower = model.model.vision_tower
    width = tower.config.hidden_size
    patch_head = nn.Linear(width, digits.EMPTY + 1 + CELLS)
    present_head = nn.Linear(width, 10)
    weights = [*tower.parameters(), *patch_head.parameters(), *present_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=recipe.tower_rate, weight_decay=0.02)
    rng = np.random.default_rng([recipe.seed, 1])
    started = time.time()
    for step in range(recipe.tower_steps):
        images, grids = _mosaics(rng, source, recipe.tower_batch)
        labels = torch.from_numpy(grids).flatten(1)  # [batch, cells]
        hidden = tower(pixels(images)).last_hidden_state  # [batch, 1 + patches, width]
        digit_logits, cell_logits = patch_head(hidden[:, 1:]).split([digits.EMPTY + 1, CELLS], -1)
        by_cell = _mean_over_cells(digit_logits)
        present = torch.stack([(labels == digit).any(1) for digit in range(10)], 1).float()
        loss = (
            F.cross_entropy(by_cell.flatten(0, 1), labels.flatten())
            + 0.3 * F.cross_entropy(digit_logits.flatten(0, 1), labels[:, PATCH_CELL].flatten())
            + 0.3 * F.cross_entropy(cell_logits.flatten(0, 1), PATCH_CELL.repeat(len(images)))
            + 0.5 * F.binary_cross_entropy_with_logits(present_head(hidden[:, 0]), present)
        )
        _update(optimizer, loss, weights, rate_at(step, recipe.tower_steps, recipe.tower_rate))
        if step % 100 == 99:
            held_out = _tower_accuracy(tower, patch_head)
            print(
                f"tower {step + 1} {time.time() - started:.0f}s loss {loss:.3f} held-out {held_out:.4f}",
                flush=True,
            )


@torch.no_grad()
def _tower_accuracy(tower: nn.Module, patch_head: nn.Linear) -> float:
    """How often an occupied cell's digit is read off its four patches, on held-out digits."""
    images, grids = _mosaics(np.random.default_rng(7), digits.glyphs(held_out=True), 300)
    logits = patch_head(tower(pixels(images)).last_hidden_state[:, 1:])[..., : digits.EMPTY + 1]
    labels = torch.from_numpy(grids).flatten(1)
    return (_mean_over_cells(logits).argmax(-1) == labels)[labels < digits.EMPTY].float().mean().item()


def _mean_over_cells(patches: Tensor) -> Tensor:
    """[batch, patches, n] → [batch, cells, n]."""
    side, per_cell = digits.GRID, digits.CELL // PATCH
    cells = patches.reshape(len(patches), side, per_cell, side, per_cell, patches.shape[-1]).mean((2, 4))
    return cells.flatten(1, 2)


# --- Stage 2: the language model ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A question as token ids.

    Attributes:
        tokens: the prompt after the image tokens, up to and with the generation prompt.
        asked: what the last token has to find out: a cell (0-15), a digit's count (16-25), or the move (26).
    """

    tokens: list[int]
    asked: int


class Questions:
    """Every question the task knows, through the chat template."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        self.prefix: list[int] = tokenizer.convert_tokens_to_ids(["<|user|>"])
        self.eos: int = tokenizer.eos_token_id
        self.labels: list[int] = tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])
        self.numbers: list[int] = tokenizer.convert_tokens_to_ids(list(digits.NUMBERS))
        self.cell = [self._ask(digits.cell_question(*divmod(cell, digits.GRID)), 1, cell) for cell in range(CELLS)]
        self.count = [self._ask(digits.count_question(digit), 1, CELLS + digit) for digit in range(10)]
        self.moved = self._ask(digits.MOVED_QUESTION, digits.FRAMES, CELLS + 10)

    def _ask(self, question: str, frames: int, asked: int) -> Ask:
        content = [{"type": "image"}] * frames + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self._processor.apply_chat_template(chat, add_generation_prompt=True)
        tokens = self._processor.tokenizer(text).input_ids
        assert tokens[: 1 + frames] == self.prefix + [self._processor.image_token_id] * frames
        return Ask(tokens[1 + frames :], asked)


class Layout:
    """Several questions behind one image, each seeing only the image and itself.

    Attributes:
        positions: int64 [1, seq], every question's positions go on from the image's.
        mask: bool [1, 1, seq, seq], True where a query (third) may look at a key (fourth).
        last: int64 [questions], where each question's prompt ends: there the answer is predicted.
    """

    def __init__(self, visual: int, lengths: list[int]) -> None:
        """`lengths`: tokens of each question with its answer."""
        shared = 1 + visual
        block = torch.cat([torch.full((n,), i) for i, n in enumerate([shared, *lengths])])
        order = torch.arange(len(block))
        self.positions = torch.cat([torch.arange(shared), *(shared + torch.arange(n) for n in lengths)])[None]
        seen = (block[None] == 0) | (block[None] == block[:, None])
        self.mask = (seen & (order[None] <= order[:, None]))[None, None]
        self.last = shared + torch.tensor(lengths).cumsum(0) - 2


@dataclass(frozen=True)
class Batch:
    """Images with their questions.

    Attributes:
        images: uint8 [batch, frames, 64, 64].
        text: int64 [batch, text], the questions with their answers, one after the other.
        layout: how they lie in the sequence.
        asked: int64 [batch, questions], see `Ask`.
        answers: int64 [batch, questions], token ids.
        events: int64 [batch, frames·patches], 1 where a digit arrived with this frame, 2 where one left; clips only.
        where: float32 [batch, questions, cells], 1 for the cells that the answer is about; mosaics only.
        seen: bool [batch, frames·patches], False for patches that are left out; None: all are there.
    """

    images: np.ndarray
    text: Tensor
    layout: Layout
    asked: Tensor
    answers: Tensor
    events: Tensor | None = None
    where: Tensor | None = None
    seen: Tensor | None = None

    def mask(self) -> Tensor:
        """bool [batch, 1, seq, seq], True where a query (third) may look at a key (fourth)."""
        mask = self.layout.mask.expand(len(self.images), -1, -1, -1)
        if self.seen is None:
            return mask
        present = torch.ones(len(mask), mask.shape[-1], dtype=torch.bool)
        present[:, 1 : 1 + self.seen.shape[1]] = self.seen
        return mask & present[:, None, None]


def thinned(rng: np.random.Generator, empty: np.ndarray) -> Tensor:
    """Leave out a random share, from none to all, of the patches of empty cells, another share for every image.

    Args:
        empty: bool [batch, frames·patches].
    Returns:
        bool of the same shape, False where a patch is left out.
    """
    return torch.from_numpy(~(empty & (rng.random(empty.shape) < rng.random((len(empty), 1)))))


def mosaic_batch(
    rng: np.random.Generator, source: digits.Glyphs, questions: Questions, recipe: Recipe, thin: bool = False
) -> Batch:
    """Mosaics, each with some `cell` and some `count` questions; with `thin`, some empty patches are left out."""
    images, grids = _mosaics(rng, source, recipe.mosaics)
    asks, answers, where = [], [], []
    for grid in grids:
        cells = rng.choice(np.flatnonzero(grid != digits.EMPTY), recipe.cell_questions)
        counted = [digits.asked_digit(rng, grid) for _ in range(recipe.count_questions)]
        asks.append([questions.cell[cell] for cell in cells] + [questions.count[digit] for digit in counted])
        answers.append(
            [questions.labels[grid.flat[cell]] for cell in cells]
            + [questions.numbers[int((grid == digit).sum())] for digit in counted]
        )
        where.append([np.arange(CELLS) == cell for cell in cells] + [grid.flatten() == digit for digit in counted])
    empty = grids.reshape(len(grids), -1)[:, PATCH_CELL.numpy()] == digits.EMPTY
    seen = thinned(rng, empty) if thin else None
    return _batch(images[:, None], asks, answers, where=torch.from_numpy(np.array(where)).float(), seen=seen)


def clip_batch(
    rng: np.random.Generator, source: digits.Glyphs, questions: Questions, recipe: Recipe, thin: bool = False
) -> Batch:
    """Clips, each with its `moved` question; with `thin`, some empty patches are left out."""
    clips = [digits.clip(rng, source) for _ in range(recipe.clips)]
    grids = torch.from_numpy(np.stack([grids for _, grids, _ in clips])).flatten(2)[..., PATCH_CELL]
    empty = grids == digits.EMPTY  # [batch, frames, patches]
    before = torch.cat([empty[:, :1], empty[:, :-1]], 1)
    events = (before & ~empty).long() + 2 * (~before & empty).long()
    answers = [[questions.labels[moved]] for _, _, moved in clips]
    return _batch(
        np.stack([frames for frames, _, _ in clips]),
        [[questions.moved]] * len(clips),
        answers,
        events=events.flatten(1),
        seen=thinned(rng, empty.flatten(1).numpy()) if thin else None,
    )


def _batch(
    images: np.ndarray,
    asks: list[list[Ask]],
    answers: list[list[int]],
    events: Tensor | None = None,
    where: Tensor | None = None,
    seen: Tensor | None = None,
) -> Batch:
    text = [
        [token for ask, answer in zip(*row, strict=True) for token in (*ask.tokens, answer)]
        for row in zip(asks, answers, strict=True)
    ]
    layout = Layout(images.shape[1] * PATCHES, [len(ask.tokens) + 1 for ask in asks[0]])
    asked = torch.tensor([[ask.asked for ask in row] for row in asks])
    return Batch(images, torch.tensor(text), layout, asked, torch.tensor(answers), events, where, seen)


class Hints(nn.Module):
    """Throw-away heads on the decoder's early layers, and the losses they carry."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.asked = nn.Linear(hidden, CELLS + 10 + 1)
        self.event = nn.Linear(hidden, 3)

    def forward(self, states: tuple[Tensor, ...], batch: Batch) -> dict[str, Tensor]:
        """The losses: `asked` by the last token after layer 1, `event` by a clip's patches after layer 2.

        Args:
            states: per layer, [batch, seq, hidden], the embeddings first.
        """
        last = batch.layout.last
        losses = {"asked": F.cross_entropy(self.asked(states[1][:, last]).flatten(0, 1), batch.asked.flatten())}
        if batch.events is not None:
            patches = states[2][:, 1 : 1 + batch.events.shape[1]]
            rare = torch.tensor([1.0, 10.0, 10.0])  # 4 patches in 256 each
            losses["event"] = F.cross_entropy(self.event(patches).flatten(0, 1), batch.events.flatten(), weight=rare)
        return losses


def look_loss(model: LlavaForConditionalGeneration, states: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """How far one head's attention is from the digits a `count` question asks for.

    The target spreads evenly over the patches of those digits, with as much on the first token as on one digit: then
    the first token gets 1 / (1 + count), which is what the layers above need to read the count off.

    Returns:
        float32 [], the Kullback-Leibler divergence from the target.
    """
    assert batch.where is not None
    decoder = model.model.language_model
    layer = decoder.layers[LOOK_LAYER]
    counted = batch.asked[0] >= CELLS
    last = batch.layout.last[counted]
    normed = layer.input_layernorm(states[LOOK_LAYER])
    width = layer.self_attn.head_dim
    query = layer.self_attn.q_proj(normed[:, last])[..., :width]
    key = layer.self_attn.k_proj(normed)[..., :width]
    cos, sin = decoder.rotary_emb(normed, batch.layout.positions)
    query = query * cos[:, last] + rotate_half(query) * sin[:, last]
    key = key * cos + rotate_half(key) * sin
    logits = (query @ key.transpose(1, 2) * width**-0.5).masked_fill(~batch.mask()[:, 0, last], -1e9)
    target = torch.zeros_like(logits)
    target[..., 1 : 1 + PATCHES] = batch.where[:, counted][..., PATCH_CELL]
    target[..., 0] = PATCHES / CELLS
    target = target / target.sum(-1, keepdim=True)
    return F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1).mean()


def answer_logits(
    model: LlavaForConditionalGeneration, batch: Batch, questions: Questions
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Run a batch.

    Returns:
        answers: float32 [batch, questions, vocab], at the end of every prompt.
        after: float32 [batch, questions, vocab], at every answer.
        states: per layer, float32 [batch, seq, hidden], the embeddings first.
    """
    count, frames = batch.images.shape[:2]
    with torch.no_grad():
        patches = model.model.vision_tower(pixels(batch.images.reshape(-1, digits.IMAGE, digits.IMAGE)))
        patches = patches.last_hidden_state[:, 1:]
    visual = model.model.multi_modal_projector(patches).reshape(count, frames * PATCHES, -1)
    embed = model.model.language_model.embed_tokens
    prefix = embed(torch.tensor([questions.prefix]).expand(count, -1))
    output = model.model.language_model(
        inputs_embeds=torch.cat([prefix, visual, embed(batch.text)], 1),
        attention_mask=batch.mask(),
        position_ids=batch.layout.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    last = batch.layout.last
    final = output.last_hidden_state
    return model.lm_head(final[:, last]), model.lm_head(final[:, last + 1]), output.hidden_states


def train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    hints: Hints,
    source: digits.Glyphs,
    recipe: Recipe,
    state: Path,
) -> Iterator[int]:
    """Train projector and decoder in place on the frozen tower, going on from `state` if that file is there.

    In the last third empty patches are left out at random, so that the model reads what is there and does not lean on
    the background. Large models bear missing background; this one has to be taught. No reduction method takes part.

    Yields the steps done, every hundred and at the end, when `state` has just been written.
    """
    questions = Questions(processor)
    weights = [weight for weight in [*model.parameters(), *hints.parameters()] if weight.requires_grad]
    steps = recipe.language_steps
    optimizer = torch.optim.AdamW(weights, lr=recipe.language_rate, weight_decay=0.05, betas=(0.9, 0.98))
    done = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        done = saved["done"]
        for part, name in ((model, "model"), (hints, "hints"), (optimizer, "optimizer")):
            part.load_state_dict(saved[name])
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)  # a third less time per step
    started, history = time.time(), []
    for step in range(done, steps):
        rng = np.random.default_rng([recipe.seed, 2, step])
        losses: dict[str, list[float]] = {}
        loss = torch.zeros(())
        for make in (mosaic_batch, clip_batch):
            batch = make(rng, source, questions, recipe, thin=step >= recipe.thin_from)
            loss = loss + _batch_loss(model, hints, batch, questions, recipe, losses)
        _update(optimizer, loss, weights, rate_at(step, steps, recipe.language_rate))
        history.append({name: float(np.mean(values)) for name, values in losses.items()})
        if step % 50 == 49:
            means = " ".join(f"{name} {np.mean([row[name] for row in history[-50:]]):.3f}" for name in history[-1])
            print(f"language {step + 1} {time.time() - started:.0f}s {means}", flush=True)
        if step % 100 == 99 or step + 1 == steps:
            print(f"language {step + 1} held-out {held_out_accuracy(model, questions, recipe)}", flush=True)
            parts = {"model": model.state_dict(), "hints": hints.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"done": step + 1, **parts}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
            yield step + 1


def _batch_loss(
    model: LlavaForConditionalGeneration,
    hints: Hints,
    batch: Batch,
    questions: Questions,
    recipe: Recipe,
    losses: dict[str, list[float]],
) -> Tensor:
    """One batch's loss; its parts are noted in `losses`, the answers' by kind."""
    logits, after, states = answer_logits(model, batch, questions)
    each = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), reduction="none")
    stop = F.cross_entropy(after.flatten(0, 1), torch.full_like(batch.answers, questions.eos).flatten())
    given = hints(states, batch)
    loss = (1.0 if batch.events is None else 0.5) * each.mean() + 0.1 * stop + recipe.hint_weight * sum(given.values())
    if batch.where is not None:
        given["look"] = look_loss(model, states, batch)
        loss = loss + recipe.look_weight * given["look"]
    for asked, value in zip(batch.asked[0].tolist(), each.detach().view_as(batch.answers).mean(0), strict=True):
        losses.setdefault(_kind(asked), []).append(value.item())
    for hint, value in given.items():
        losses.setdefault(hint, []).append(value.item())
    return loss


def _kind(asked: int) -> str:
    """The kind of a question, see `Ask`."""
    return "cell" if asked < CELLS else "count" if asked < CELLS + 10 else "moved"


def held_out_accuracy(
    model: LlavaForConditionalGeneration, questions: Questions, recipe: Recipe, batches: int = 8
) -> dict[str, float]:
    """A quick look on held-out digits: the answer token's accuracy by kind (`evaluate` measures properly).

    Batches have the training's shapes, and gradients stay on, so that the compiled layers are not compiled anew.
    """
    source, rng = digits.glyphs(held_out=True), np.random.default_rng(11)
    right: dict[str, list[float]] = {kind: [] for kind in digits.KINDS}
    for _ in range(batches):
        for make in (mosaic_batch, clip_batch):
            batch = make(rng, source, questions, recipe)
            hits = (answer_logits(model, batch, questions)[0].argmax(-1) == batch.answers).float().mean(0)
            for asked, hit in zip(batch.asked[0].tolist(), hits.tolist(), strict=True):
                right[_kind(asked)].append(hit)
    return {kind: round(float(np.mean(hits)), 3) for kind, hits in right.items()}


# --- Both ---------------------------------------------------------------------------------------------------------


def _mosaics(rng: np.random.Generator, source: digits.Glyphs, count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, 64, 64] and int64 [count, 4, 4]."""
    images, grids = zip(*(digits.mosaic(rng, source) for _ in range(count)), strict=True)
    return np.stack(images), np.stack(grids)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, weights: list[nn.Parameter], rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write a checkpoint folder in FP16; the model in memory stays as it is."""
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    half = half.half()
    half.generation_config.max_new_tokens = 32
    half.generation_config.do_sample = False
    half.save_pretrained(out)
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)  # transformers < 5 looks for preprocessor_config.json
    (out / "model.safetensors").chmod(0o644)


def main() -> None:
    """Run the stages that are not in the work folder yet, then write the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the embedded VLM.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("embedded-work"), help="folder for the stages' results")
    options = parser.parse_args()
    recipe = Recipe()
    options.work.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(2)
    torch.manual_seed(recipe.seed)
    processor = build_processor()
    model = build_model(recipe, processor)
    source = digits.augmented(np.random.default_rng([recipe.seed, 0]), recipe.copies)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M parameters, {recipe}", flush=True)

    tower_file = options.work / "tower.pt"
    if not tower_file.exists():
        train_tower(model, source, recipe)
        torch.save(model.model.vision_tower.state_dict(), tower_file)
    model.model.vision_tower.load_state_dict(torch.load(tower_file, weights_only=True))
    model.model.vision_tower.eval().requires_grad_(False)

    torch.manual_seed(recipe.seed)  # whether or not the tower has just been trained
    hints = Hints(recipe.hidden)
    for _ in train_language(model, processor, hints, source, recipe, options.work / "language.pt"):
        save(model, processor, options.out)
    save(model, processor, options.out)


if __name__ == "__main__":
    main()
