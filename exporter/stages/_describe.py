"""What a runtime is told of a plan's graphs: their description, and what the reduce graph takes and gives."""

from __future__ import annotations

import torch

from exporter.clip import text_tokens
from exporter.graphset import GraphSet, TextSpec, VisualLayout
from exporter.plan import Plan
from exporter.stages._draw import Shape
from graphs._contract import INSTRUCTION_TOKENS


def describe(plan: Plan, files: dict[str, str], signals: dict[str, list[int]]) -> GraphSet:
    """The description that a runtime needs instead of the plan."""
    g = plan.geometry
    kv, decoder = plan.kv, plan.family.decoder(plan.checkpoint)
    return GraphSet(
        family=plan.family.model_type,
        compute=plan.profile.precision.compute,
        weights=plan.profile.precision.weights,
        kv=plan.profile.precision.kv,
        files=files,
        reductions=plan.record(),
        image=g.image,
        visual=VisualLayout(
            frames=g.frames,
            placeholders=g.placeholders,
            total=(g.numbered or g.tower).total + g.fixed * g.placeholders,
            kept=plan.kept,
            grid=g.grid,
            ids=[list(i) for i in g.ids],
            span=g.span,
            policy=plan.policy,
            readers=[token for _, method in plan.in_cache for token in method.readers],
            media=g.media,
            mark=g.mark,
            written=g.written,
            fixed=g.fixed,
            template=g.template,
            spliced=g.spliced,
            sees=g.sees,
        ),
        text=TextSpec(
            hidden=g.hidden,
            layers=g.layers,
            kv_heads=g.kv_heads,
            head_dim=g.head_dim,
            vocab=g.vocab,
            position_axes=g.position_axes,
            groups=list(kv.groups),
            kept=list(kv.kept),
            image_token=g.image_token,
            eos=list(g.eos),
            planes=g.planes,
            longest=decoder.longest,
            window=decoder.window,
            per_head=[group for group, apart in enumerate(kv.per_head) if apart],
        ),
        signals=signals,
        for_prefill=list(plan.for_prefill),
        side={name: list(shape) for name, (shape, _) in side_inputs(plan).items()},
        question_tokens=0 if plan.clip is None else text_tokens(plan.clip),
        sized=plan.sized,
        buckets=[list(b) for b in plan.while_decoding[1].buckets] if plan.while_decoding else [],
        state=plan.while_decoding[1].state if plan.while_decoding else 0,
        guided=plan.guided,
    )


def reduce_inputs(
    plan: Plan, signals: dict[str, tuple[Shape, torch.dtype]], dtype: torch.dtype
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Name → shape and dtype, in order. `signals`: those of vision that reduce takes."""
    side = {name: (("batch", *shape), kind or dtype) for name, (shape, kind) in side_inputs(plan).items()}
    return signals | side


def side_inputs(plan: Plan) -> dict[str, tuple[tuple[int | str, ...], torch.dtype | None]]:
    """Inputs of the reduce graph that do not come from vision: name → shape behind the batch axis, and dtype (None: as
    everything else)."""
    site = plan.geometry.tower
    known: dict[str, tuple[tuple[int | str, ...], torch.dtype | None]] = {
        "text": (("text", plan.geometry.hidden), None),
        "text_mask": (("text",), None),
        "aligned_text": ((plan.geometry.shared,), None),
        "instruction_ids": ((INSTRUCTION_TOKENS,), torch.int64),
        "instruction_mask": ((INSTRUCTION_TOKENS,), torch.int64),
        "warp": ((site.frames, site.tokens), torch.int64),
    }
    return {name: known[name] for name in plan.side}


def reduce_outputs(sized: bool) -> list[str]:
    return ["visual_embeds", "index", *(["visual_size"] if sized else [])]
