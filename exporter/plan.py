"""Where checkpoint, reductions and profile meet: everything is checked here, in words, before anything is traced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import exporter.families
from exporter import _discover, clip
from exporter.checkpoint import INSTRUCTION_FOLDER, Checkpoint
from exporter.errors import CheckpointError, UsageError
from exporter.families import _traced
from exporter.families._contract import ALIGNED, INSTRUCTION, Family, Geometry, Request
from exporter.graphset import tokens_in_words
from exporter.kv import Inside, KvLayout
from exporter.nn.specs import HANDED, IN_CACHE_SIGNALS, IN_LLM_SIGNALS, DecoderShape, DecoderSpec, Fixed
from graphs import _spec
from graphs._compressor import Compressor
from graphs._contract import (
    OF_PROMPT,
    BeforeLLM,
    InCache,
    InLLM,
    InTower,
    Reduction,
    ReductionError,
    Site,
    Skipping,
    Summarizing,
    WhileDecoding,
)

if TYPE_CHECKING:
    from profiles._schema import Profile

SIDE = ("text", "text_mask", "aligned_text", "instruction_ids", "instruction_mask", "warp")
"""Signals of a reduction before the LLM that do not come from the tower, in the order of the graph's inputs."""

GUIDING = frozenset(
    "text_hidden text_embeds text_mask instruction_mask attention_row plain_row next_row text_attention head_attention "
    "received last_scores last_log_attention".split()
)
"""Signals inside the language model that depend on the text behind the image."""


@dataclass(frozen=True)
class Step:
    """One fitted reduction: its name, the site it acts at, and the visual tokens before and after."""

    name: str
    method: Reduction
    site: Site
    before: int
    after: int

    @property
    def weights(self) -> str:
        """The safetensors file with the method's own trained tensors; empty if it has none."""
        return str(getattr(self.method, "weights", None) or "")

    @property
    def summary(self) -> str:
        """ "visionzip: 576 → 64 tokens (11 % kept, 9.0× fewer)" """
        return f"{self.name}: {tokens_in_words(self.before, self.after)}"


@dataclass(frozen=True)
class Plan:
    """What will be exported. Build one with `make_plan`.

    taps: signals the vision graph has to output, in order. kept: visual tokens that enter the language model.
    policy: position policy of those tokens.
    """

    checkpoint: Checkpoint
    family: Family
    geometry: Geometry
    request: Request
    profile: Profile
    steps: tuple[Step, ...]
    taps: tuple[str, ...]
    kept: int
    policy: Literal["keep", "compact"]
    sites: dict[str, Site] = field(default_factory=dict)

    def at(self, place: str) -> list[Step]:
        return [s for s in self.steps if s.method.place == place]

    @property
    def fixed(self) -> Fixed | None:
        g = self.geometry
        return (
            Fixed(g.placeholders, g.tower.total // g.placeholders, g.fixed, g.tower.class_tokens) if g.fixed else None
        )

    @property
    def in_tower(self) -> tuple[str, InTower] | None:
        found = self.at("in_tower")
        return (found[0].name, cast(InTower, found[0].method)) if found else None

    @property
    def before_llm(self) -> list[tuple[str, BeforeLLM | Compressor, Site]]:
        """What `reduce` holds, in order."""
        return [(s.name, s.method, s.site) for s in self.steps if isinstance(s.method, BeforeLLM | Compressor)]

    @property
    def places_shared(self) -> bool:
        """Whether two kept tokens may stand at one place of the prompt: CLS and the first patch."""
        passed = any(isinstance(method, BeforeLLM) and method.passes_cls for _, method, _ in self.before_llm)
        return passed and self.policy == "keep"

    @property
    def compressed(self) -> bool:
        """Whether a compressor takes the place of the family's projector."""
        return bool(self.at("projector"))

    @property
    def in_llm(self) -> list[tuple[str, InLLM]]:
        return [(s.name, cast(InLLM, s.method)) for s in self.at("in_llm")]

    @property
    def in_cache(self) -> list[tuple[str, InCache]]:
        return [(s.name, cast(InCache, s.method)) for s in self.at("in_cache")]

    @property
    def kv(self) -> KvLayout:
        return self.inside.layout(self.geometry.layers)

    @property
    def inside(self) -> Inside:
        trained = {s.name: s.method.trained(s.site) for s in self.steps}
        return Inside(self.kept, self.in_llm, self.in_cache, trained)

    def unreduced(self) -> Plan:
        """The same model with all its visual tokens."""
        own = unreduced([_spec.format(s.method) for s in self.steps])
        return make_plan(self.checkpoint, own, self.profile, self.request)

    def exact(self) -> Plan:
        """The same with keys and values in the cache as they are: what PyTorch is the reference of."""
        precision = replace(self.profile.precision, kv="none")
        return replace(self, profile=replace(self.profile, precision=precision))

    @property
    def for_prefill(self) -> tuple[str, ...]:
        """Those of `taps` that reductions inside the language model read; `reduce` does not take them."""
        return tuple(name for _, method in self.in_llm for name in method.of_tower)

    @property
    def for_reduce(self) -> tuple[str, ...]:
        return tuple(name for name in self.taps if name not in self.for_prefill)

    @property
    def while_decoding(self) -> tuple[str, WhileDecoding] | None:
        found = [(name, method) for name, method in self.in_llm if isinstance(method, WhileDecoding)]
        return found[0] if found else None

    @property
    def separate_prefill(self) -> bool:
        """Whether prefill is a graph of its own, because it drops tokens that decoding does without."""
        return bool(self.in_llm or self.in_cache)

    @property
    def guided(self) -> bool:
        """Whether another question makes a reduction inside the language model keep other tokens."""
        read = {name for _, method in (*self.in_llm, *self.in_cache) for name in method.needs}
        return bool(read & GUIDING) or self.while_decoding is not None

    @property
    def side(self) -> tuple[str, ...]:
        """Signals that have to come from elsewhere than the tower."""
        needed = {name for _, method, _ in self.before_llm for name in method.needs}
        return tuple(name for name in SIDE if name in needed)

    @property
    def clip(self) -> Checkpoint | None:
        """The CLIP checkpoint that a reduction reads the question with; None where none does."""
        return self.request.clip if "aligned_text" in self.side else None

    @property
    def instruction(self) -> Path | None:
        """The folder of the tokenizer that a reduction reads the question with; None where none does."""
        return self.checkpoint.folder / INSTRUCTION_FOLDER if "instruction_ids" in self.side else None

    @property
    def sized(self) -> bool:
        """Whether the language model counts a merged token as many times as it has parts."""
        return any(s.method.sized for s in self.steps if isinstance(s.method, BeforeLLM | InLLM))

    def record(self) -> list[dict[str, Any]]:
        """The reductions as data, for manifests and reports."""
        return [
            {
                "name": s.name,
                "place": s.method.place,
                "spec": _spec.format(s.method),
                "before": s.before,
                "after": s.after,
                "knobs": {k: _spec.format(v) if isinstance(v, Reduction) else v for k, v in s.method.knobs().items()},
                "paper": s.method.paper,
            }
            for s in self.steps
        ]


class Unfit(UsageError):
    """A reduction, `method`, asks of the model what it does not have."""

    def __init__(self, text: str, method: str) -> None:
        super().__init__(text)
        self.method = method


def make_plan(
    checkpoint: Checkpoint, reductions: Sequence[str], profile: Profile, request: Request | None = None
) -> Plan:
    """Fit reductions to a model; their trained weights are not looked at, see `check_weights`.

    Args:
        reductions: specs as typed, `NAME[:knob=value,…]`, in the order of composition.
    Raises:
        UsageError: unknown family, method or knob; a method whose signal the model cannot give; counts that do not fit.
    """
    request = request or Request()
    if request.clip is not None:
        request = replace(request, clip=request.clip.named(clip.canonical))
    family = find_family(checkpoint)
    checkpoint = family.reads(checkpoint, request)
    _check_limits(request, profile)
    try:
        geometry = family.geometry(checkpoint, request)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json is not that of a {family.model_type} model ({type(e).__name__}: {e})."
        ) from e
    if request.clip is not None and not geometry.shared:
        raise UsageError(
            f"--clip-model {request.clip.folder}: this {family.model_type} model's tower is not CLIP's, so its patches have no "
            "place in the space of CLIP's text. Leave --clip-model out."
        )
    if (checkpoint.folder / INSTRUCTION_FOLDER / "tokenizer.json").is_file():
        tower = replace(geometry.tower, signals=geometry.tower.signals | INSTRUCTION)
        geometry = replace(geometry, tower=tower)
    methods = []
    for text in reductions:
        try:
            methods.append((text, _spec.parse(text)))
        except ReductionError as e:
            raise UsageError(f"--reduce {text}: {e}") from e
    methods.sort(key=lambda item: ORDER[item[1].place])
    if geometry.compressor and not any(isinstance(method, Compressor) for _, method in methods):
        own = geometry.compressor, _spec.parse(geometry.compressor)
        methods.insert(sum(_before_projector(method) for _, method in methods), own)
    return _Fitting(checkpoint, family, geometry, request, profile).run(methods)


def unreduced(reductions: Sequence[str]) -> tuple[str, ...]:
    """Those of them that are the model itself: compressors whose tensors are in its own checkpoint, with all the tokens that they
    were trained to give. Raises ReductionError for a spec that is none."""
    found = []
    for text in reductions:
        method = _spec.parse(text)
        if isinstance(method, Compressor) and not method.weights:
            whole = replace(method, **{knob: None for knob in ("keep", "keep_ratio") if hasattr(method, knob)})
            found.append(text if whole == method else _spec.format(whole))
    return tuple(found)


ORDER = {"in_tower": 0, "before_llm": 1, "projector": 1, "in_llm": 2, "in_cache": 3}
"""Which reduction comes before which; at equal places, as they were given."""


def _before_projector(method: Reduction) -> bool:
    return isinstance(method, InTower) or (isinstance(method, BeforeLLM) and method.space == "tower")


def find_family(checkpoint: Checkpoint) -> Family:
    kind = str(checkpoint.config["model_type"])
    file = kind.replace("-", "_")  # what a module can be called
    known = _discover.names(exporter.families)
    if file not in known and _traced.known(kind):
        return _traced.Traced(kind)
    if file not in known:
        raise UsageError(
            f"{checkpoint.folder}/config.json says model_type '{kind}', and there is no such family. "
            f"Known: {', '.join(known)}. A family is one file, see CONTRIBUTING.md."
        )
    named = cast(Family, _discover.load(exporter.families, "family", file).FAMILY)
    return named.of(checkpoint.config)


def _check_limits(request: Request, profile: Profile) -> None:
    if request.frames < 1:
        raise UsageError(f"--frames {request.frames}: at least one frame is needed.")
    if request.frames > profile.limits.frames:
        raise UsageError(
            f"Profile `{profile.name}` allows {profile.limits.frames} frames, --frames asks for {request.frames}. "
            "Pass fewer frames or raise `frames` under [limits] in a profile of your own."
        )
    size, most = request.image_size, profile.limits.image
    if size is not None and (size[0] > most[0] or size[1] > most[1]):
        raise UsageError(
            f"Profile `{profile.name}` allows images of {most[0]}×{most[1]}, --image-size asks for {size[0]}×{size[1]}. "
            "Ask for a smaller one or raise `image` under [limits] in a profile of your own."
        )


class _Fitting:
    """Walks the places in order, handing each method the site its predecessors left."""

    def __init__(
        self, checkpoint: Checkpoint, family: Family, geometry: Geometry, request: Request, profile: Profile
    ) -> None:
        self.checkpoint, self.family, self.geometry = checkpoint, family, geometry
        self.request, self.profile = request, profile
        self.steps: list[Step] = []
        self.policies: list[str] = []

    def fit(self, text: str, method: Reduction, site: Site) -> Reduction:
        try:
            fitted = method.fit(site)
            fitted.require(site)
            return fitted
        except ReductionError as e:
            name = _spec.title(method)
            hint = ""
            if self.request.clip is None and any(f"needs `{signal}`" in str(e) for signal in ALIGNED):
                hint = " Models with a CLIP tower give `aligned` and `aligned_text` if --clip-model names their CLIP."
            if "`instruction_ids`" in str(e).partition(", but")[0]:
                hint = f" Checkpoints with a Q-Former's tokenizer in their folder `{INSTRUCTION_FOLDER}` give `instruction_ids`."
            raise Unfit(
                f"--reduce {text} does not fit {self.family.model_type}: {e}.{hint} `edgetrim list reductions` shows what "
                f"`{name}` needs.",
                _spec.name(method),
            ) from e

    def run(self, methods: list[tuple[str, Reduction]]) -> Plan:
        site = self.geometry.tower
        taps: list[str] = ["hidden", *(["deepstack"] if self.geometry.planes else [])]
        taps += ["cls"] if self.geometry.tower.class_tokens else []
        projected = False
        llm_site: Site | None = None
        for text, method in methods:
            if isinstance(method, InTower):
                site = self._in_tower(text, method, site)
                if site.total < self.geometry.tower.total:
                    taps.append("anchor")
            elif isinstance(method, BeforeLLM):
                fitted = self.fit(text, method, site)
                assert isinstance(fitted, BeforeLLM)
                if fitted.passes_cls and site.class_tokens:
                    raise UsageError(
                        f"--reduce {text} passes class tokens on, which {self.family.model_type} does anyway with every frame's. "
                        "Set its knob `cls` to off."
                    )
                if projected and fitted.space == "tower":
                    raise UsageError(
                        f"--reduce {text} works on tower features, but a reduction before it already works behind the projector. "
                        "Put it first."
                    )
                projected = projected or fitted.space == "llm"
                taps += [n for n in fitted.needs if n not in SIDE and n not in taps]
                after = fitted.after(site)
                self._add(fitted, site, site.total, after.total)
                self.policies.append(fitted.resolved_position(site))
                site = after
            elif isinstance(method, Compressor):
                site = self._compressor(text, method, site, projected)
                taps += [n for n in self.steps[-1].method.needs if n not in SIDE and n not in taps]
                projected = True
            elif isinstance(method, InCache):
                self._alone(text, method)
                self._in_cache(text, method, site)
            else:
                assert isinstance(method, InLLM)
                self._alone(text, method)
                if any(isinstance(s.method, WhileDecoding) for s in self.steps):
                    raise UsageError(
                        f"--reduce {text} acts behind a reduction that goes on while decoding. Put it first."
                    )
                llm_site = llm_site or self._inside(self._with_fixed(site))
                fitted_llm = self.fit(text, method, llm_site)
                assert isinstance(fitted_llm, InLLM)
                taps += fitted_llm.of_tower
                after = fitted_llm.after(llm_site)
                self._add(fitted_llm, llm_site, llm_site.total, after.total)
                llm_site = after
        names = [s.name for s in self.steps]
        if len(set(names)) < len(names):
            raise UsageError(f"The same reduction is given twice ({', '.join(names)}). Give each once.")
        layers = [layer for s in self.steps if isinstance(s.method, InLLM) for layer in s.method.layers]
        if layers != sorted(set(layers)):
            raise UsageError(
                f"Reductions inside the language model must act at ascending layers; found {layers}. Reorder them."
            )
        return Plan(
            self.checkpoint, self.family, self.geometry, self.request, self.profile, tuple(self.steps), tuple(taps),
            self._with_fixed(site).total, "compact" if "compact" in self.policies else "keep",
        )  # fmt: skip

    def _compressor(self, text: str, method: Compressor, site: Site, projected: bool) -> Site:
        """What it yields is what the language model's positions count."""
        g = self.geometry
        if projected:
            raise UsageError(
                f"--reduce {text} works on tower features, but a reduction before it already works behind the projector. "
                "Put it first, and give no other compressor."
            )
        if g.fixed or g.planes:
            what = "row ends or class tokens" if g.fixed else "vectors of its tower for the first layers"
            raise UsageError(
                f"--reduce {text} does not fit {self.family.model_type}: this model's projector gives {what}, which a "
                "compressor does not have."
            )
        fitted = self.fit(text, method, site)
        assert isinstance(fitted, Compressor)
        after = fitted.after(site)
        self._add(fitted, site, site.total, after.total)
        each = after.total // g.placeholders
        if after.frames != site.frames or after.total % g.placeholders or g.position_axes > 1:
            self.policies.append("compact")  # they cannot be dealt out among the placeholders
        else:
            self.geometry = replace(g, ids=tuple((i,) for i in range(each)), span=each)
        self.geometry = replace(self.geometry, numbered=after, grid=after.grid)
        return after

    def _with_fixed(self, site: Site) -> Site:
        """The visual tokens as the language model gets them."""
        fixed = self.geometry.fixed * self.geometry.placeholders
        if not fixed:
            return site
        per_prompt = site.signals & {"hidden", "cls", *OF_PROMPT}  # the tower knows nothing of the others
        return replace(site, tokens=site.total + fixed, frames=1, grid=None, signals=per_prompt)

    def _alone(self, text: str, method: Reduction) -> None:
        """Refuse a reduction where none fits inside, and a second one beside one that sets every layer's cache."""
        if self.geometry.in_llm:
            raise UsageError(
                f"--reduce {text} does not fit {self.family.model_type}: {self.geometry.in_llm}. Choose a reduction that acts before the LLM."
            ) from ReductionError(self.geometry.in_llm)
        inside = [s for s in self.steps if isinstance(s.method, InLLM | InCache)]
        acting = [method, *(s.method for s in inside)]
        if inside and any(isinstance(m, InCache | Skipping) or (isinstance(m, InLLM) and m.everywhere) for m in acting):
            raise UsageError(
                f"--reduce {text} and {inside[0].name} both act inside the language model, and one of them decides what every "
                "layer's cache holds. Give one of the two."
            )

    def _inside(self, site: Site) -> Site:
        """The site inside the language model, given what enters it."""
        named = {name for name in site.signals if "@" in name and name.partition("@")[0] in HANDED}
        if not site.patch_dim:
            named = {name for name in named if not name.startswith("patches@")}
        heads = self.family.decoder(self.checkpoint).heads
        return replace(site, signals=IN_LLM_SIGNALS | named, depth=self.geometry.layers, heads=heads)

    def _in_cache(self, text: str, method: InCache, site: Site) -> None:
        g = self.geometry
        spec = self.family.decoder(self.checkpoint)
        here = replace(
            self._with_fixed(site), signals=IN_CACHE_SIGNALS, depth=g.layers, heads=spec.heads, kv_heads=g.kv_heads,
            head_dim=g.head_dim, llm_dim=g.hidden, qkv_bias=isinstance(spec, DecoderSpec) and spec.qkv_bias,
        )  # fmt: skip
        if isinstance(method, Summarizing):
            self._summarizes(text, method, spec)
        fitted = self.fit(text, method, here)
        self._add(fitted, here, here.total, fitted.after(here).total)

    def _summarizes(self, text: str, method: Summarizing, spec: DecoderShape) -> None:
        """Refuse summaries where the language model has no place for them; else they are counted as if they were the visual tokens."""
        g = self.geometry
        plain = isinstance(spec, DecoderSpec) and bool(spec.inv_freq) and not (spec.mrope_section or any(spec.windows))
        written = [place for place, *_ in g.ids]
        if not plain or spec.reach or spec.planes or written != sorted(written) or (g.fixed and g.placeholders > 1):
            raise Unfit(
                f"--reduce {text} does not fit {self.family.model_type}: its summaries are placed among the visual tokens, which takes a "
                "language model with one rotary position per token that looks back as far as the prompt reaches, and visual tokens that "
                "stand in the prompt as the tower gives them. Choose another reduction.",
                _spec.name(method),
            )
        if any(s.method.sized for s in self.steps if isinstance(s.method, BeforeLLM | InLLM)):
            raise UsageError(
                f"--reduce {text}: a reduction before it has the language model count how many tokens each one stands for, which "
                "summaries do not tell. Leave one of the two out."
            )
        self.policies.append("compact")

    def _in_tower(self, text: str, method: InTower, site: Site) -> Site:
        where = self.geometry.in_tower
        if isinstance(where, str):
            raise UsageError(
                f"--reduce {text} does not fit {self.family.model_type}: {where}. Choose a reduction that acts before or inside the LLM."
            ) from ReductionError(where)
        if any(isinstance(s.method, InTower) for s in self.steps):
            raise UsageError(f"--reduce {text}: only one reduction can act inside the tower.")
        fitted = self.fit(text, method, where)
        assert isinstance(fitted, InTower)
        after = fitted.after(where)
        if where.class_tokens and after.frames != where.frames:
            raise UsageError(
                f"--reduce {text} merges frames, and {self.family.model_type} gives the language model the class token of every one. "
                "Choose a reduction that keeps the frames."
            )
        self._add(fitted, where, where.total, after.total)
        self.policies.append(fitted.resolved_position())
        left = site.signals & {"hidden", "cls", *OF_PROMPT}
        if after.frames == where.frames and not fitted.proportional:  # taps know nothing of sizes
            last = max(fitted.blocks, default=-1)
            left |= {name for name in site.signals if "@" in name and int(name.partition("@")[2]) > last}
        return replace(site, tokens=after.tokens, frames=after.frames, grid=None, signals=left)

    def _add(self, method: Reduction, site: Site, before: int, after: int) -> None:
        self.steps.append(Step(_spec.title(method), method, site, before, after))
