"""Average normalised Levenshtein similarity, for text read off images (DocVQA, ST-VQA): 1 − distance / longer length, and 0
where that is below a half.

Source: Biten et al. 2019, "Scene text visual question answering", arXiv:1905.13648.
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5


def anls(answer: str, expected: Sequence[str]) -> float:
    return max(_similarity(_plain(answer), _plain(e)) for e in expected)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _similarity(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    if not longer:
        return 1.0
    similarity = 1 - distance(a, b) / longer
    return similarity if similarity >= THRESHOLD else 0.0


def distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements from one to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


METRIC = anls
