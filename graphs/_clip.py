"""What methods for clips share: they need frames, and their free rate reaches only some counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from graphs._contract import ReductionError, Site, keep_count


def require_frames(site: Site) -> None:
    """Refuse a single frame."""
    if site.frames < 2:
        raise ReductionError(f"it reduces a clip over time, so it needs at least 2 frames; found {site.frames}")


def reachable(keep: int | None, keep_ratio: float | None, counts: Collection[int], most: int) -> int:
    """The member of `counts` that `keep` names exactly, or that is nearest to `keep_ratio` of the tokens (of two
    equally near ones the smaller).

    Args:
        most: all the tokens there are.
    Raises:
        ReductionError: `keep` is none of them; names the nearest.
    """
    wanted = keep_count(keep, keep_ratio, most, what="tokens in the clip")
    if keep is None:
        return min(counts, key=lambda n: (abs(n - wanted), n))
    if keep not in counts:
        near = [max((n for n in counts if n < keep), default=None), min((n for n in counts if n > keep), default=None)]
        words = " or ".join(str(n) for n in near if n is not None)
        raise ReductionError(f"`keep` = {keep} cannot be reached on this clip; the nearest would be {words}")
    return keep


def rate(
    knob: str,
    value: int | None,
    keep: int | None,
    keep_ratio: float | None,
    counts: Mapping[int, int],
    most: int,
    default: int | None = None,
) -> int:
    """The value of a knob that sets how many tokens stay, given itself or as `keep` or `keep_ratio`.

    Args:
        counts: value of the knob → tokens that stay in the clip. Of values with one count the first is taken.
        most: all the tokens there are. default: the value if nothing is given.
    Raises:
        ReductionError: nothing is given and there is no default, a value outside `counts`, or two that disagree.
    """
    if value is None and keep is None and keep_ratio is None and default is not None:
        return default
    if value is None:
        found = reachable(keep, keep_ratio, counts.values(), most)
        return next(v for v, count in counts.items() if count == found)
    if value not in counts:
        raise ReductionError(f"`{knob}` must be in {min(counts)}..{max(counts)} on this clip; found {value}")
    if keep_ratio is not None or keep not in (None, counts[value]):
        given = f"`keep` = {keep}" if keep_ratio is None else f"`keep_ratio` = {keep_ratio:g}"
        raise ReductionError(f"`{knob}` = {value} keeps {counts[value]} of {most} tokens; leave out {given}")
    return value


def segments(site: Site, knob: str, given: int | None, wanted: float) -> int:
    """Into how many equal segments the clip is cut: `given`, or the possible number nearest to `wanted`, the smaller
    of equally near ones.

    Raises:
        ReductionError: the frames do not divide into `given` segments; names those possible.
    """
    possible = [n for n in range(1, site.frames + 1) if site.frames % n == 0]
    if given is None:
        return min(possible, key=lambda n: (abs(n - wanted), n))
    if given not in possible:
        listed = ", ".join(str(n) for n in possible)
        raise ReductionError(f"`{knob}` must divide the {site.frames} frames (one of {listed}); found {given}")
    return given
