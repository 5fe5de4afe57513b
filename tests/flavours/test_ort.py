"""The flavour for ONNX Runtime: the plain graphs' results, by attention that appends in place."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.backends import _ort_cache
from exporter.backends._ort_cache import Grown
from exporter.backends.ort import OnnxRuntime
from exporter.errors import ExportError, UsageError, VerificationError
from exporter.families._contract import Request
from exporter.flavours import _apply
from exporter.graphset import PAD, GraphSet
from exporter.runtime.generate import Generator, embedding
from exporter.stages.export import export
from tests.families import tiny

SIZES = {"qwen2_5_vl": (140, 112), "qwen3_vl": (112, 84)}
MODELS: dict[str, Callable[[Path], object]] = {
    "llava": tiny.llava,
    "qwen2_5_vl": tiny.qwen2_5_vl,
    "qwen3_vl": tiny.qwen3_vl,
    "heads of 24": lambda folder: tiny.llava(folder, decoder="qwen3"),
}
GAPS = ("visionzip:keep=6,cls=off,position=keep",)
CASES = [
    ("llava", ()),
    ("llava", GAPS),
    ("llava", ("fastv:layer=1,keep=3",)),
    ("qwen2_5_vl", ()),
    ("qwen3_vl", ()),
    ("heads of 24", GAPS),
]
"""One graph; positions with gaps, other ones in every row; several KV groups and a prefill graph of its own; M-RoPE, with
biases; M-RoPE, with normed queries and keys; heads that GroupQueryAttention does not rotate."""
NORMED = {"qwen3_vl", "heads of 24"}


@dataclass(frozen=True)
class Exported:
    folder: Path
    graphs: GraphSet

    def plain(self) -> GraphSet:
        return replace(self.graphs, files={role: file.replace(".ort", "") for role, file in self.graphs.files.items()})

    def question(self, seed: int = 0, text: tuple[int, ...] = (11, 12, 13)) -> tiny.Question:
        return tiny.question(self.graphs, seed, text)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """exported(family, reductions): with profile cpu_fp32, once."""
    done: dict[Any, Exported] = {}
    checkpoints: dict[str, Path] = {}

    def run(family: str, reductions: tuple[str, ...] = ()) -> Exported:
        if family not in checkpoints:
            checkpoints[family] = tmp_path_factory.mktemp(family)
            MODELS[family](checkpoints[family])
        if (family, reductions) not in done:
            folder = tmp_path_factory.mktemp("graphs")
            plan = tiny.plan(checkpoints[family], reductions, Request(1, SIZES.get(family)))
            done[family, reductions] = Exported(folder, export(plan, folder))
        return done[family, reductions]

    return run


Open = Callable[[Path, GraphSet], Generator]


@pytest.fixture
def opened() -> Iterator[Open]:
    """opened(folder, graphs): a generator whose answers have no end."""
    with ExitStack() as stack:

        def run(folder: Path, graphs: GraphSet) -> Generator:
            runners = {}
            for file, roles in graphs.roles().items():
                runners |= dict.fromkeys(roles, stack.enter_context(OnnxRuntime(threads=1).runner(folder / file)))
            return Generator(runners, tiny.endless(graphs), embedding(folder, graphs))

        yield run


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that answers of a test outgrow them."""
    monkeypatch.setattr(_ort_cache, "BLOCK", 32)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


def close(found: Any, expected: Any) -> None:
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("family", "reductions"), CASES)
def test_every_layer_is_one_operator(exported: Any, family: str, reductions: tuple[str, ...]) -> None:
    case = exported(family, reductions)
    layers = case.graphs.text.layers
    for role in ("prefill", "decode"):
        assert case.graphs.files[role].endswith(".ort.onnx")
        found = operators(case.folder / case.graphs.files[role])
        apart = family == "heads of 24" or (role == "prefill" and case.graphs.prefill_apart)
        assert (found["GroupQueryAttention"], found["RotaryEmbedding"]) == (layers, 2 * layers * apart)
        plain = ir.load(case.folder / case.plain().files[role])
        assert set(plain.opset_imports) == {""}, "the graph of record stays plain"
    decode = operators(case.folder / case.graphs.files["decode"])
    assert decode["Softmax"] == 0
    assert decode["SkipSimplifiedLayerNormalization"] == 2 * layers, "all but the first norm"


@pytest.mark.parametrize(("family", "reductions"), CASES)
def test_behind_the_last_attention_only_the_last_token_goes_on(
    exported: Any, family: str, reductions: tuple[str, ...]
) -> None:
    case = exported(family, reductions)
    graph = ir.load(case.folder / case.graphs.files["decode"]).graph
    *_, last = (n for n in graph if n.op_type == "GroupQueryAttention")
    (taken,) = last.outputs[0].consumers()
    assert taken.op_type == "GatherND"
    seen = [shape for shape in (n.outputs[0].shape for n in behind(taken)) if shape is not None]
    assert seen
    assert not [shape for shape in seen if "seq" in map(str, shape)]


def behind(node: ir.Node) -> list[ir.Node]:
    """All that depends on a node."""
    found: dict[ir.Node, None] = {}
    waiting = [node]
    while waiting:
        for user in (user for value in waiting.pop().outputs for user in value.consumers()):
            if user not in found:
                found[user] = None
                waiting.append(user)
    return list(found)


@pytest.mark.parametrize(("family", "reductions"), CASES)
def test_attention_takes_what_one_matrix_makes(exported: Any, family: str, reductions: tuple[str, ...]) -> None:
    """Unless heads are normed or rotated in between."""
    case = exported(family, reductions)
    graph = ir.load(case.folder / case.graphs.files["decode"]).graph
    for node in (n for n in graph if n.op_type == "GroupQueryAttention"):
        key, value = node.inputs[1:3]
        assert (key is None, value is None) == (family not in NORMED,) * 2


@pytest.mark.parametrize("text", [(14, 15, 16, 17, 18, 19), (14, 15, 16)], ids=["padded", "of one length"])
@pytest.mark.parametrize(("family", "reductions"), CASES)
def test_as_the_plain_graphs_over_64_tokens_and_several_blocks(
    exported: Any, opened: Open, family: str, reductions: tuple[str, ...], text: tuple[int, ...]
) -> None:
    """A batch of two prompts."""
    case = exported(family, reductions)
    asked = [case.question(0), case.question(1, text)]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    ours, plain = opened(case.folder, case.graphs), opened(case.folder, case.plain())
    answers = [g.generate(pixels, prompts, 70).tokens for g in (ours, plain)]
    assert answers[0] == answers[1]
    assert len(answers[0][0]) == 70


@pytest.mark.parametrize(("family", "reductions"), CASES)
def test_logits_and_kept_tokens_are_the_plain_graphs(
    exported: Any, opened: Open, family: str, reductions: tuple[str, ...]
) -> None:
    case = exported(family, reductions)
    q = case.question()
    ours, plain = opened(case.folder, case.graphs), opened(case.folder, case.plain())
    visual = plain.reduce(plain.vision(q.pixels))
    a, b = ours.prefill(visual, [q.prompt]), plain.prefill(visual, [q.prompt])
    close(a.logits, b.logits)
    assert all(np.array_equal(a.kept[name], b.kept[name]) for name in b.kept)
    for token in (21, 22, 23):
        close(ours.step(a.cache, np.array([token])), plain.step(b.cache, np.array([token])))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_somebody_else_runs_the_graph_between_two_steps(exported: Any, opened: Open, family: str) -> None:
    """Another conversation, of two rows, and other rows of this one: what is bound and counted up belongs to them then."""
    case = exported(family)
    one, two, three = (case.question(seed) for seed in range(3))
    alone, generator = opened(case.folder, case.graphs), opened(case.folder, case.graphs)
    pixels, prompts = np.concatenate([two.pixels, three.pixels]), [two.prompt, three.prompt]
    asides: list[Any] = []

    def aside(row: int, token: int) -> None:
        if token and len(told) in (2, 3, 9):
            asides.append(generator.generate(pixels, prompts, 5).tokens)
        told.append(token)

    told: list[int] = []
    answer = generator.generate(one.pixels, [one.prompt], 40, aside)
    assert answer.tokens == alone.generate(one.pixels, [one.prompt], 40).tokens
    assert asides == [alone.generate(pixels, prompts, 5).tokens] * 3
    turn = [[31, 32]]
    close(generator.extend(answer.cache, turn), alone.extend(alone.generate(one.pixels, [one.prompt], 40).cache, turn))


def test_a_step_that_fails_is_told_and_can_be_made_again(
    exported: Any, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = exported("llava")
    q = case.question()
    generator = opened(case.folder, case.graphs)
    expected = generator.generate(q.pixels, [q.prompt], 12)
    appending: Any = generator._decode._appending  # type: ignore[attr-defined]
    real, runs = appending.run, list[int]()

    def failing() -> None:
        if len(runs) == 5:
            appending._session.nothing()
        runs.append(1)
        real()

    told: list[int] = []
    prefilled = generator.prefill(generator.reduce(generator.vision(q.pixels)), [q.prompt])
    monkeypatch.setattr(appending, "run", failing)

    def all_of_them() -> None:
        with generator._stepping(prefilled.cache, None) as step:
            for token in expected.tokens[0]:
                step([token])
                told.append(token)

    with pytest.raises(ExportError, match=r"decode.ort.onnx: .*nothing"):
        all_of_them()
    assert told == expected.tokens[0][:5], "one by `grow`, four as it was bound"
    monkeypatch.undo()
    for token in expected.tokens[0][5:11]:
        logits = generator.step(prefilled.cache, np.array([token]))
    assert logits.argmax() == expected.tokens[0][11]


def test_graphs_of_an_earlier_version_are_refused(exported: Any, tmp_path: Path) -> None:
    case = exported("llava")
    model = ir.load(case.folder / case.graphs.files["decode"])
    model.metadata_props.clear()
    ir.save(model, tmp_path / "decode.ort.onnx")
    shutil.copy(case.folder / "llm.data", tmp_path)
    with pytest.raises(VerificationError, match=r"an earlier version exported it\. Run export again"):
        OnnxRuntime().runner(tmp_path / "decode.ort.onnx").__enter__()


def test_rows_that_have_ended_and_further_turns(exported: Any, opened: Open) -> None:
    """What an ended row is fed leaves no trace; turns of several tokens, of two rows, are appended row by row."""
    case = exported("llava", ())
    asked = [case.question(0), case.question(1, (14, 15))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    ours, plain = opened(case.folder, case.graphs), opened(case.folder, case.plain())
    visual = plain.reduce(plain.vision(pixels))
    caches = [g.prefill(visual, prompts).cache for g in (ours, plain)]
    for active in ([True, True], [False, True], [True, True]):
        a, b = (
            g.step(cache, np.array([21, 22]), np.array(active)) for g, cache in zip((ours, plain), caches, strict=True)
        )
        close(a[active], b[active])
    turn = [[31, 32, 33], [34]]
    a, b = (g.extend(cache, turn) for g, cache in zip((ours, plain), caches, strict=True))
    close(a, b)


def test_keys_and_values_stay_where_they_are(exported: Any, opened: Open) -> None:
    """A new address only where a block is full, in every KV group."""
    case = exported("llava", ("fastv:layer=1,keep=3",))
    generator = opened(case.folder, case.graphs)
    q = case.question()
    cache = generator.prefill(generator.reduce(generator.vision(q.pixels)), [q.prompt]).cache
    generator.step(cache, np.array([21]))  # prefill is another graph: the first step takes its values over
    seen: Mapping[str, int] = {}
    moves = Counter[str]()
    for _ in range(64):
        generator.step(cache, np.array([21]))
        now = {n: v.ctypes.data for n, v in cache.past.memory.arrays.items()}
        assert len(now) == 2 * case.graphs.text.layers + 2
        moves.update(n for n in now if seen and now[n] != seen[n])
        seen = now
    assert set(moves.values()) == {2}, "64 tokens are two blocks"
    assert len(moves) == len(seen)


def test_two_conversations_that_begin_alike(exported: Any, opened: Open) -> None:
    """The second to go on from a cache gets a copy; neither sees the other's tokens."""
    case = exported("llava", ())
    generator = opened(case.folder, case.graphs)
    q = case.question()
    begun = generator.prefill(generator.reduce(generator.vision(q.pixels)), [q.prompt]).cache

    def go_on(*tokens: int) -> Any:
        cache = replace(begun)
        for token in tokens:
            logits = generator.step(cache, np.array([token]))
        return cache, logits

    first, _ = go_on(21, 22)
    _, expected = go_on(31, 32)
    generator.step(first, np.array([23]))
    _, again = go_on(31, 32)
    assert np.array_equal(again, expected)


def test_rows_of_a_cache(exported: Any, opened: Open) -> None:
    case = exported("llava", ())
    asked = [case.question(0), case.question(1, (14, 15))]
    pixels, prompts = np.concatenate([q.pixels for q in asked]), [q.prompt for q in asked]
    generator = opened(case.folder, case.graphs)
    cache = generator.prefill(generator.reduce(generator.vision(pixels)), prompts).cache
    mixed = generator.rows(cache, np.array([1, 0, 1]))
    expected = generator.step(cache, np.array([21, 22]))
    close(generator.step(mixed, np.array([22, 21, 22])), expected[[1, 0, 1]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("window", "layers attend in another form"),
        ("reader", "`reader` reads the cache"),
        ("mask", "something else than attention reads the mask"),
    ],
)
def test_refused_with_a_reason(exported: Any, tmp_path: Path, change: str, reason: str) -> None:
    """Then the plain graphs are used, all of them."""
    case = exported("llava", ())
    model = ir.load(case.folder / "decode.onnx")
    graph = model.graph
    if change == "window":
        node = next(n for n in graph if n.op_type == "LessOrEqual")
        node.outputs[0].replace_all_uses_with(graph_node(graph, "And", [node.outputs[0], node.outputs[0]], after=node))
    else:
        kind = {"reader": "Softmax", "mask": "Where"}[change]
        value = graph.inputs[3] if change == "reader" else next(n for n in graph if n.op_type == kind).outputs[0]
        out = graph_node(graph, "Identity", [value], name="reader")
        out.name = "read"
        graph.outputs.append(out)
    ir.save(model, tmp_path / "decode.onnx")
    told: list[str] = []
    plain = {"prefill": "decode.onnx", "decode": "decode.onnx"}
    (tmp_path / "llm.data").symlink_to(case.folder / "llm.data")
    assert _apply.apply("ort", "ort", tmp_path, plain, told.append) == plain
    assert reason in told[0]
    assert [p.name for p in tmp_path.glob("*.onnx")] == ["decode.onnx"]


def graph_node(graph: ir.Graph, kind: str, inputs: list[Any], name: str = "new", after: Any = None) -> ir.Value:
    out = ir.Value(name=f"{name}_out", shape=inputs[0].shape, type=inputs[0].type)
    users = [(use.node, use.idx) for use in inputs[0].uses()] if after is not None else []
    node = ir.Node("", kind, inputs, outputs=[out], name=name)
    if after is None:
        graph.append(node)
    else:
        graph.insert_after(after, node)
        for user, index in users:
            user.replace_input_with(index, out)
    return out


def test_sizes_keep_the_plain_graphs(exported: Any) -> None:
    """Where the language model counts merged tokens, attention is not causal by order alone."""
    case = exported("llava", ("restore:keep=4+divprune",))
    assert case.graphs.sized
    assert case.graphs.files["decode"] == "decode.onnx"


def test_two_tokens_at_one_place_keep_the_plain_graphs(exported: Any) -> None:
    """They see each other, which attention by place alone would not let them."""
    apart, together = (exported("llava", (f"visionzip:keep=6,position={p}",)) for p in ("compact", "keep"))
    assert apart.graphs.files["decode"] == "decode.ort.onnx"
    assert together.graphs.files["decode"] == "decode.onnx"


def test_a_flavour_belongs_to_a_backend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='Flavour "ort" is for backend "ort"; the profile has "trt"'):
        _apply.apply("ort", "trt", tmp_path, {}, print)


def test_memory_grows_by_blocks_and_is_copied_for_the_second() -> None:
    keys = np.arange(2 * 3 * 4, dtype=np.float32).reshape(1, 2, 3, 4)
    past = {"past_key_0": keys, "past_order_0": np.array([[0, 1, PAD]])}
    begun = Grown.of(past, 1)
    assert [array.shape for array in begun.memory.arrays.values()] == [(1, 2, 3 + 32, 4), (1, 3 + 32)]
    assert all(np.array_equal(begun[name], past[name]) for name in past)
    assert begun.padding["past_order_0"].tolist() == [1]
    grown = begun.grown(np.array([[7]]), None)
    assert grown["past_order_0"].tolist() == [[0, 1, PAD, 7]]
    assert {name: value.shape for name, value in grown.items()} == {"past_key_0": (1, 2, 4, 4), "past_order_0": (1, 4)}
    assert grown.padding["past_order_0"].tolist() == [1]
    assert Grown.of(grown, 31) is grown
    assert (grown.reserve(5), grown.reserve(40)) == (5, 31)
    assert Grown.of(grown, 1).memory is not grown.memory, "somebody else is going to write there"
    assert grown.grown(np.empty((1, 0), np.int64), None).memory.used == 1
    assert Grown.of(grown, 31) is grown
    assert Grown.of(grown, 32).memory.arrays["past_key_0"].shape[2] == 4 + 32
    assert Grown.of(grown, 33).memory.arrays["past_key_0"].shape[2] == 4 + 64
    fork = Grown.of(begun, 1)
    assert fork.memory is not begun.memory
    assert np.array_equal(fork["past_key_0"], keys)
    assert fork.grown(np.array([[8, PAD]]), np.array([1])).padding["past_order_0"].tolist() == [2]


def test_memory_that_nobody_holds_is_written_over() -> None:
    keys = np.arange(2 * 3 * 4, dtype=np.float32).reshape(1, 2, 3, 4)
    past = {"past_key_0": keys, "past_order_0": np.array([[0, 1, 2]])}
    first = Grown.of(past, 1)
    second = Grown.of(past, 1, first.memory)
    assert second.memory is not first.memory, "the first is still wanted"
    memory, shown = second.memory, second["past_key_0"]
    second = second.grown(np.array([[7]]), None)
    del second
    larger = Grown.of({**past, "past_key_0": keys[:, :1]}, 1, memory)
    assert larger.memory is not memory, "another shape"
    third = Grown.of({"past_key_0": -keys, "past_order_0": np.array([[4, 5, PAD]])}, 2, memory)
    assert third.memory is memory
    assert (memory.used, third.padding["past_order_0"].tolist()) == (0, [1])
    assert np.array_equal(third["past_key_0"], -keys)
    assert third["past_order_0"].tolist() == [[4, 5, PAD]]
    assert np.array_equal(shown, keys), "what was asked for was a copy"


def test_padding_is_far_from_any_place() -> None:
    """Sorting puts it last."""
    assert np.iinfo(np.int32).max == PAD


def test_a_step_binds_nothing(exported: Any, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a block, all memory stays bound."""
    monkeypatch.setattr(_ort_cache, "BLOCK", 256)
    case = exported("llava", ("fastv:layer=1,keep=3",))
    generator = opened(case.folder, case.graphs)
    q = case.question()
    cache = generator.prefill(generator.reduce(generator.vision(q.pixels)), [q.prompt]).cache
    runner: Any = generator._decode
    binding, bound = runner._appending._binding, list[str]()
    for name in dir(binding):
        if name.startswith("bind_"):
            real = getattr(binding, name)
            monkeypatch.setattr(binding, name, lambda *args, real=real: (bound.append(args[0]), real(*args)))
    counts = []
    for token in range(21, 26):
        generator.step(cache, np.array([token]))
        counts.append(len(bound))
    layers, groups = case.graphs.text.layers, 2
    assert counts == [4 * layers + 4 * groups + 4] * 5, (
        "caches in and out, lengths and tables, three inputs and the logits; once"
    )


def test_angles_are_looked_up(exported: Any, opened: Open) -> None:
    """As the model in the graph's metadata makes them, also where the table has to grow."""
    case = exported("llava", ())
    runner: Any = opened(case.folder, case.graphs)._decode
    angles, positions = runner._appending._tables._angles, np.array([[0, 300, 7], [255, 256, 1025]])
    expected = angles._run(positions)
    for asked in (positions % 256, positions):
        found = angles(asked)
        assert [table.shape for table in found.values()] == [table.shape for table in expected]
    for table, wanted in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(table, wanted, rtol=0, atol=1e-6)
    assert len({tuple(row) for row in expected[0].round(4)}) == positions.size, "rows that all differ"


def test_it_is_fed_as_the_plain_graph(exported: Any) -> None:
    """And says what is wrong with its feeds, rather than casting or broadcasting them."""
    case = exported("llava", ())
    graphs = case.graphs
    backend = OnnxRuntime(threads=1)
    with (
        backend.runner(case.folder / graphs.files["decode"]) as ours,
        backend.runner(case.folder / case.plain().files["decode"]) as plain,
    ):
        assert dict(ours.inputs) == dict(plain.inputs)
        assert set(ours.outputs) == set(plain.outputs)
        random, text = np.random.default_rng(0), graphs.text
        cache = (2, text.kv_heads, 0, text.head_dim)
        feeds = {
            name: np.zeros(cache, np.float32) for name in ours.inputs if name.startswith(("past_key", "past_value"))
        }
        feeds |= {
            "inputs_embeds": random.standard_normal((2, 3, text.hidden)).astype(np.float32), "past_order_0": np.zeros((2, 0), np.int64),
            "position_ids": np.array([[2, 0, 1], [1, 0, 0]]), "order": np.array([[2, 0, 1], [PAD, PAD, 0]]),
        }  # fmt: skip
        found, expected = ours.run(feeds), plain.run(feeds)
        close(ours.numpy(found["present_key_0"])[0], plain.numpy(expected["present_key_0"])[0][:, [1, 2, 0]])
        assert ours.numpy(found["present_order_0"]).tolist() == [[0, 1, 2], [0, PAD, PAD]]
        first = ours.numpy(found["logits"])
        kept = first.copy()
        assert np.isfinite(ours.run({**feeds, "inputs_embeds": feeds["inputs_embeds"] * 2})["logits"]).all()
        assert np.array_equal(first, kept), "a later run wrote into an earlier result"
        one = {
            **feeds,
            **{n: feeds[n][:, :1] for n in ("inputs_embeds", "position_ids")},
            "order": np.zeros((2, 1), np.int64),
        }
        close(ours.run(one)["logits"], plain.numpy(plain.run(one)["logits"]))
        with pytest.raises(UsageError, match="'position_ids' is int32, expected int64"):
            ours.run({**feeds, "position_ids": np.zeros((2, 3), np.int32)})
        with pytest.raises(UsageError, match=r"'position_ids' has shape \[1, 3\], expected \[2, 3\]"):
            ours.run({**feeds, "position_ids": np.zeros((1, 3), np.int64)})


def test_it_is_for_the_cpu(exported: Any) -> None:
    case = exported("llava", ())
    runner = OnnxRuntime(threads=1).runner(case.folder / case.graphs.files["decode"])
    runner._bound = True
    with pytest.raises(UsageError, match="leave `flavour` out"):
        runner.__enter__()
