"""InTI against a loop over places, with and without a trained network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs._contract import ReductionError, Site
from graphs.inti import InTI
from tests.graphs.oracle import KINDS, Array, features

T, H, W, DIM = 6, 3, 4, 5
P = H * W
SITE = Site(P, T, (H, W), frozenset({"hidden", "cls"}), dim=DIM)


def blend(a: Array, b: Array, weight: Array | None) -> Array:
    """Two frames [P, dim] become one."""
    if weight is None:
        return (a + b) / 2
    out = np.zeros_like(a)
    for r in range(H):
        for c in range(W):
            scores = []
            for frame in (a, b):
                around = [(y, x) for y in (r - 1, r, r + 1) for x in (c - 1, c, c + 1) if 0 <= y < H and 0 <= x < W]
                near = np.mean([frame[y * W + x] for y, x in around], 0)
                scores.append(frame[r * W + c] @ weight[:, 0] + near @ weight[:, 1] + frame.mean(0) @ weight[:, 2])
            share = np.exp(scores) / np.exp(scores).sum()
            out[r * W + c] = share[0] * a[r * W + c] + share[1] * b[r * W + c]
    return out


def expected(clip: Array, weights: list[Array | None]) -> list[tuple[int, Array, int]]:
    slots = [(t, frame.astype(np.float64), 1) for t, frame in enumerate(clip)]
    for weight in weights:
        merged = []
        for i in range(0, len(slots), 2):
            pair = slots[i : i + 2]
            token = pair[0][1] if len(pair) == 1 else blend(pair[0][1], pair[1][1], weight)
            merged.append((pair[0][0], token, sum(n for _, _, n in pair)))
        slots = merged
    return slots


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("trained", [False, True])
def test_against_the_definition(kind: str, stages: int, trained: bool) -> None:
    method = InTI(stages=stages, weights="inti.safetensors" if trained else None).fit(SITE)
    shapes = method.trained(SITE)
    assert shapes == ({f"score_{i}": (DIM, 3) for i in range(stages)} if trained else {})
    weights = {name: features("random", shape, 5 + i) for i, (name, shape) in enumerate(shapes.items())}
    hidden = features(kind, (2, T, P, DIM))
    out = method.forward({k: torch.from_numpy(v) for k, v in ({"hidden": hidden} | weights).items()})
    assert out.size is not None
    for b in range(2):
        slots = expected(hidden[b], [weights.get(f"score_{i}") for i in range(stages)])
        np.testing.assert_allclose(out.tokens[b].numpy(), np.concatenate([x for _, x, _ in slots]), atol=1e-5)
        assert out.index[b].tolist() == [t * P + p for t, _, _ in slots for p in range(P)]
        assert out.size[b].tolist() == [n for _, _, n in slots for _ in range(P)]
    assert (out.size.sum(1) == T * P).all()
    assert method.after(SITE).frames == len(slots)


def test_keeping_all_is_the_identity() -> None:
    hidden = features("random", (2, T, P, DIM))
    out = InTI(stages=0).fit(SITE).forward({"hidden": torch.from_numpy(hidden)})
    assert (out.tokens.numpy() == hidden.reshape(2, -1, DIM)).all()
    assert (out.index.numpy() == np.arange(T * P)).all()


def test_counts() -> None:
    fitted = InTI().fit(SITE)
    assert (fitted.stages, fitted.keep, fitted.position) == (1, 3 * P, "compact")
    assert fitted.fit(SITE) == fitted
    assert [InTI(keep_ratio=r).fit(SITE).stages for r in (1.0, 0.5, 0.3, 0.01)] == [0, 1, 2, 3]
    after = fitted.after(SITE)
    assert (after.tokens, after.grid, after.signals) == (P, (H, W), frozenset({"hidden"}))


def test_exports_with_its_network() -> None:
    """The contract tests run it untrained only."""
    from exporter.stages._trace import trace

    method = InTI(stages=2, weights="inti.safetensors").fit(SITE)

    class Once(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, score_0: torch.Tensor, score_1: torch.Tensor) -> torch.Tensor:
            return method.forward({"hidden": hidden, "score_0": score_0, "score_1": score_1}).tokens

    given = {"hidden": features("random", (3, T, P, DIM))}
    given |= {f"score_{i}": features("random", (DIM, 3), 5 + i) for i in range(2)}
    tensors = {k: torch.from_numpy(v) for k, v in given.items()}
    model = trace(Once(), tensors, {"hidden": {0: "batch"}}, ["tokens"])
    import onnx_ir as ir
    import onnxruntime as ort

    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, given)
    np.testing.assert_allclose(found, Once()(**tensors).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "site", "message"),
    [
        (InTI(stages=4), SITE, "`stages` must be in 0..3 on this clip; found 4"),
        (InTI(keep=30), SITE, "`keep` = 30 cannot be reached on this clip; the nearest would be 24 or 36"),
        (InTI(stages=1, keep_ratio=0.25), SITE, "`stages` = 1 keeps 36 of 72 tokens; leave out `keep_ratio` = 0.25"),
        (InTI(weights="x"), Site(P, T, (H, W), frozenset({"hidden"})), "need the width of the tokens"),
        (InTI(weights="x"), Site(P, T, None, frozenset({"hidden"}), dim=DIM), "needs the raster of the tokens"),
        (InTI(), Site(P, 1, (H, W), frozenset({"hidden"})), "needs at least 2 frames; found 1"),
    ],
)
def test_refusals(method: InTI, site: Site, message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        method.fit(site)
