"""Convert labels to real times: `parse_time`, and the small grammar of labels that it reads."""

from __future__ import annotations

import datetime
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from .._adata import check_anndata, check_key, looks_like_time, own
from .._log import logger

if TYPE_CHECKING:
    from anndata import AnnData


# --- the grammar ---------------------------------------------------------------------------------------------------
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_MONTHS = {"month": 1, "year": 12}  # separate, because a month is not a fixed number of days
_WORDS = {
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "d day days",
    "week": "w wk wks week weeks",
    "month": "mo month months",
    "year": "y yr yrs year years",
}
_UNIT_OF = {word: unit for unit, words in _WORDS.items() for word in words.split()}
_ORIGINS = {"f": "fertilization", "c": "conception", "i": "infection, injury or induction", "a": "amputation"}

# word -> (unit, what it counts from); "" if the label does not say
_AFTER = {word: (unit, "") for word, unit in _UNIT_OF.items()}
_AFTER |= {f"{u}p{o}": (_UNIT_OF[u], origin) for u in "hdw" for o, origin in _ORIGINS.items()}
_AFTER |= {"pcw": ("week", "conception")}
# of single letters before a number, only these mean a time: "S1" is a sample, "H9" a cell line, "T2" a second item
_BEFORE = {word: (unit, "") for word, unit in _UNIT_OF.items() if len(word) > 1 or word == "d"}
_BEFORE |= dict.fromkeys(("e", "embryonic day"), ("day", "conception"))
_BEFORE |= dict.fromkeys(("p", "pnd", "postnatal day"), ("day", "birth"))
_BEFORE |= {"pcw": ("week", "conception"), "gw": ("week", "last menstruation")}

_NUM, _WORD = r"(?:\d+\.?\d*|\.\d+)", r"[a-z]+(?: [a-z]+)*"
_NUMBER = re.compile(rf"[+-]?{_NUM}(?:e[+-]?\d+)?", re.ASCII)
_LABEL = re.compile(
    r"(?:(?:t|time) ?[=:] ?)?"
    rf"(?:(?P<before>{_WORD})(?P<gap> ?[=:]? ?))?(?P<low>[+-]?{_NUM})"
    rf"(?: ?(?P<after_low>{_WORD})? ?(?:-|to) ?(?P<before_high>{_WORD})? ?(?P<high>[+-]?{_NUM}))?"
    rf" ?(?P<after>{_WORD})?\.?",
    re.ASCII,
)
_MISSING = {"", "nan", "na", "n/a", "none", "null", "<na>", "nat"}


class _Reading(NamedTuple):
    low: float
    high: float  # == low, except for a window
    unit: str  # "" if the label does not say
    clock: str  # what the time is counted from, "" if the label does not say


def parse_time(
    adata: AnnData,
    key: str,
    *,
    mapping: Mapping[Any, float] | None = None,
    unit: str | None = None,
    window: Literal["error", "midpoint"] = "error",
    key_added: str = "time",
    copy: bool = False,
) -> AnnData | None:
    """Read the real time of every cell from a column of labels.

    Labels may be numbers, text such as ``"3"``, ``"D3"``, ``"day 7"``, ``"Day_7"``, ``"12h"``, ``"2 weeks"``,
    ``"t=3"``, ``"E8.5"``, ``"P0"``, ``"36 hpf"`` and ``"3 dpf"``, timedeltas, and categories of any of these. If labels
    that count from the same event have several units (``"12h"`` and ``"day 2"``), all are converted to one: `unit`, or
    the finest unit found. A label that can be read in two ways is refused rather than guessed. The source column is
    never changed.

    Parameters
    ----------
    adata
        Annotated data, cells in rows.
    key
        Column of ``adata.obs`` that says when a cell was sampled.
    mapping
        ``{label: time}`` with a finite number for every label of the column; the text of the labels is then not read.
    unit
        Unit of the result, such as ``"day"`` or ``"hour"``. Times whose labels state a unit are converted to it;
        times without a stated unit (numbers, a `mapping`) are assumed to be in it already.
    window
        How to treat a label that spans a range, such as ``"Day 00-03"``: refuse it, or take its midpoint (1.5).
    key_added
        Name of the column and of the record that are written.
    copy
        Return a modified copy and leave `adata` unchanged.

    Returns
    -------
    ``None``, or the copy if ``copy=True``. Sets:

    ``obs[key_added]`` : float64, n_obs
        Real time, in the unit recorded.
    ``uns[key_added]`` : dict
        ``unit`` (``"unknown"`` if neither the labels nor `unit` specify it), ``source`` (`key`), and ``labels`` (str)
        with their ``values`` (float64), n_labels each, sorted by time.

    Raises
    ------
    KeyError
        No such column.
    TypeError
        `mapping` is not a mapping.
    ValueError
        Missing times; labels that are not times or can be read in two ways; windows, unless midpoints are requested;
        labels that count from different events (``E`` from conception, ``P`` from birth); a `mapping` that lacks
        labels; a unit to which the times cannot be converted; a `key_added` that would overwrite something else.
        `adata` is then left as it was.
    """
    check_anndata(adata)
    _check_slots(adata, key, key_added)
    if window not in ("error", "midpoint"):
        raise ValueError(f'window must be "error" or "midpoint", not {window!r}.')
    labels, codes = _distinct_labels(adata, key, mapping)
    readings = _read_labels(labels, key) if mapping is None else _look_up(labels, key, mapping)
    if window == "error":
        _refuse_windows(labels, readings, key)
    clock = _one_clock(labels, readings, key)
    values, unit = _in_one_unit(readings, key, unit)

    adata = own(adata, copy=copy)
    order = np.argsort(values, kind="stable")
    names = np.array([str(label) for label in labels])[order]
    adata.obs[key_added] = values[codes]
    adata.uns[key_added] = {"unit": unit, "source": key, "labels": names, "values": values[order]}

    counted = f"{unit} since {clock}" if clock else "unit unknown" if unit == "unknown" else unit
    logger.info(
        f'parsed obs["{key}"] ({counted}): {_show_map(names, values[order])}; '
        f'wrote obs["{key_added}"], uns["{key_added}"]'
    )
    distinct, n_labels = np.unique(values, return_counts=True)
    for time in distinct[n_labels > 1]:
        shared = _quote(names[values[order] == time])
        logger.warning(f'obs["{key}"]: {shared} are all time {time:g}; their cells become one snapshot')
    return adata if copy else None


def _check_slots(adata: AnnData, key: str, key_added: str) -> None:
    if key not in adata.obs:
        there = list(adata.obs.columns)
        looks = [name for name in there if _looks_like_time(adata, name)]
        found = f"columns that look like times: {_quote(looks)}" if looks else f"there are: {_quote(there) or 'none'}"
        raise KeyError(f'No column "{key}" in adata.obs; {found}. Pass one of them as key.')
    if key_added == key:
        raise ValueError(
            f'key_added is "{key}", the source column, which is never overwritten. '
            f'Pass another, such as key_added="{key}_parsed".'
        )
    check_key(key_added)
    record = adata.uns.get(key_added)
    ours = isinstance(record, Mapping) and record.get("source") == key
    if (key_added in adata.obs or key_added in adata.uns) and not ours:
        slot = "obs" if key_added in adata.obs else "uns"
        raise ValueError(
            f'adata.{slot}["{key_added}"] is there already and was not parsed from obs["{key}"]. '
            f'Pass another key_added, or delete it first: del adata.{slot}["{key_added}"].'
        )


def _looks_like_time(adata: AnnData, name: str) -> bool:
    """Return whether a column is named like a time, or holds labels that state a unit of time."""
    if looks_like_time(name):
        return True
    column = adata.obs[name].dropna()
    if getattr(column.dtype, "kind", "O") != "O" or column.empty:
        return False
    try:
        return all(_read_label(label).unit for label in column.unique()[:20])
    except ValueError:
        return False


def _distinct_labels(adata: AnnData, key: str, mapping: Mapping[Any, float] | None) -> tuple[list[Any], np.ndarray]:
    """Return the labels that cells carry (no unused categories), and each cell's index among them."""
    if adata.n_obs == 0:
        raise ValueError(f'adata has no cells, so obs["{key}"] has no times. Check how it was subset.')
    column = adata.obs[key].astype("category").cat.remove_unused_categories()
    labels, codes = list(column.cat.categories), column.cat.codes.to_numpy()
    spared = mapping if isinstance(mapping, Mapping) else {}
    blank = [str(label).strip().lower() in _MISSING and label not in spared for label in labels]
    missing = np.flatnonzero((codes == -1) | np.isin(codes, np.flatnonzero(blank)))
    if missing.size:
        cells = ", ".join(map(str, adata.obs_names[missing[:5]])) + (", ..." if missing.size > 5 else "")
        raise ValueError(
            f'obs["{key}"] must hold a time for every cell; {missing.size} of {adata.n_obs} cells have none ({cells}). '
            f"Fill them in, or leave those cells out."
        )
    return labels, codes


def _look_up(labels: Sequence[Any], key: str, mapping: Mapping[Any, float]) -> list[_Reading]:
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping must be a dict of label to time, not a {type(mapping).__name__}.")
    if absent := [label for label in labels if label not in mapping]:
        raise ValueError(
            f'mapping must give a time for every label of obs["{key}"]; {len(absent)} of {len(labels)} are absent: '
            f"{', '.join(map(repr, absent))}. Add them, or leave their cells out."
        )
    times = {label: mapping[label] for label in labels}
    bad = {k: t for k, t in times.items() if isinstance(t, bool | np.bool_) or not isinstance(t, numbers.Real)}
    if bad := bad or {k: t for k, t in times.items() if not math.isfinite(t)}:
        raise ValueError(f"mapping must give finite numbers; found {bad}. Correct these.")
    return [_Reading(float(time), float(time), "", "") for time in times.values()]


def _read_labels(labels: Sequence[Any], key: str) -> list[_Reading]:
    readings, reasons = {}, {}
    for label in labels:
        try:
            readings[label] = _read_label(label)
        except ValueError as reason:
            reasons[label] = str(reason)
    if reasons:
        shown = "; ".join(f"{label!r}: {reason}" for label, reason in list(reasons.items())[:8])
        one_unit = len({reading.unit for reading in readings.values()}) == 1
        known = {label: one.low for label, one in readings.items() if one.low == one.high and one_unit}
        raise ValueError(
            f'Expected times in obs["{key}"], such as 3, "D3", "12h", "E8.5"; {len(reasons)} of {len(labels)} labels '
            f"cannot be read as one ({shown}{'; ...' if len(reasons) > 8 else ''}). {_mapping_advice(labels, known)}"
        )
    return [*readings.values()]


def _read_label(label: object) -> _Reading:
    """Read one label, or raise a ValueError that states only the reason."""
    if isinstance(label, datetime.timedelta):
        seconds = label.total_seconds()
        unit = next((u for u in ("day", "hour", "minute") if seconds % _SECONDS[u] == 0), "second")
        return _Reading(seconds / _SECONDS[unit], seconds / _SECONDS[unit], unit, "")
    if isinstance(label, datetime.date):
        raise ValueError("a date, not a time since the start; subtract the date of the start")
    if isinstance(label, bool | np.bool_):
        raise ValueError("true or false is no time")
    if isinstance(label, numbers.Real):
        if not math.isfinite(label):
            raise ValueError("not finite")
        return _Reading(float(label), float(label), "", "")
    if not isinstance(label, str):
        raise ValueError(f"a {type(label).__name__}, neither number nor text")
    return _read_text(" ".join(re.sub("[–—−]", "-", label).lower().replace("_", " ").split()))


def _read_text(text: str) -> _Reading:
    """Read lower-case text with single spaces and plain hyphens, or raise a ValueError that states only the reason."""
    if _NUMBER.fullmatch(text):
        if not math.isfinite(number := float(text)):
            raise ValueError("not finite")
        return _Reading(number, number, "", "")
    if (match := _LABEL.fullmatch(text)) is None:
        raise ValueError("not a number with a unit" if re.search(r"\d", text) else "no number in it")
    before, after, low, high = match["before"], match["after"], match["low"], match["high"]
    for word, known, side in ((before, _BEFORE, "before"), (after, _AFTER, "after")):
        if word == "m":
            raise ValueError('"m" may be minutes or months; write "min" or "mo"')
        if word and word not in known:
            raise ValueError(f'"{word}" {side} a number is no unit of time')
    if before and after:
        raise ValueError(f'two units, "{before}" and "{after}"')
    if before and low.startswith("-") and not match["gap"]:
        raise ValueError("the hyphen may be a minus or a dash")
    unit, clock = _BEFORE[before] if before else _AFTER[after] if after else ("", "")
    if high is None:
        return _Reading(float(low), float(low), unit, clock)
    if match["before_high"] not in (None, before) or match["after_low"] not in (None, after):
        raise ValueError("a window whose ends differ in unit")
    if float(high) <= float(low):
        raise ValueError("a window that does not end after it starts")
    return _Reading(float(low), float(high), unit, clock)


def _refuse_windows(labels: Sequence[Any], readings: list[_Reading], key: str) -> None:
    if windows := [(label, r) for label, r in zip(labels, readings) if r.low != r.high]:
        label, first = windows[0]
        raise ValueError(
            f'Expected one time per label of obs["{key}"]; {len(windows)} of {len(labels)} are windows: '
            f'{_quote([label for label, _ in windows])}. Pass window="midpoint" to take the middle '
            f'("{label}" -> {(first.low + first.high) / 2:g}), or mapping= to say the times yourself.'
        )


def _one_clock(labels: Sequence[Any], readings: list[_Reading], key: str) -> str:
    """Return the event from which all times are counted, or "" if the labels do not say."""
    clocks = {r.clock: label for label, r in zip(labels, readings)}
    units = {bool(r.unit): label for label, r in zip(labels, readings)}
    if len(clocks) == len(units) == 1:
        return readings[0].clock
    if len(clocks) == 1:
        found = f'"{units[True]}" has a unit and "{units[False]}" has none'
    else:
        found = "; ".join(
            f'"{label}" counts from {clock}' if clock else f'"{label}" does not say from when'
            for clock, label in clocks.items()
        )
    if {"conception", "birth"} <= clocks.keys():
        found += ", and how long after conception birth comes depends on the species"
    raise ValueError(f'Expected the labels of obs["{key}"] to share one clock; {found}. {_mapping_advice(labels)}')


def _in_one_unit(readings: list[_Reading], key: str, unit: str | None) -> tuple[np.ndarray, str]:
    """Return the times (n_labels; midpoints of windows) in one unit, and the name of that unit."""
    if unit is not None and (not isinstance(unit, str) or not unit.strip()):
        raise ValueError(f'unit must be a name such as "day", not {unit!r}.')
    target = None if unit is None else _UNIT_OF.get(unit.strip().lower(), unit.strip())
    found = {r.unit for r in readings}
    if found == {""}:
        return np.array([(r.low + r.high) / 2 for r in readings]), target or "unknown"
    size = _SECONDS if found <= _SECONDS.keys() else _MONTHS
    target = target or min(found, key=lambda name: size.get(name, math.inf))
    if not found | {target} <= size.keys():
        raise ValueError(
            f'The times of obs["{key}"] are in {_quote(sorted(found))}, not to be converted to {unit or "one unit"}: '
            f"expected all of one kind, {', '.join(_SECONDS)} or {', '.join(_MONTHS)}"
            f"{_unit_advice(found)}"
        )
    values = [((r.low + r.high) / 2, size[r.unit] / size[target]) for r in readings]
    # 12 digits, so that "D0.1" and "2.4h" are the same time despite rounding
    return np.array([time if ratio == 1 else float(f"{time * ratio:.12g}") for time, ratio in values]), target


def _unit_advice(found: set[str]) -> str:
    """Return what to do with units, where no one number converts them all."""
    if found <= _SECONDS.keys() or found <= _MONTHS.keys():
        return "; pass another unit=."
    if found <= _SECONDS.keys() | _MONTHS.keys():
        return ", as months and years have no fixed number of days. Say the times yourself with mapping=."
    return ". Say the times yourself with mapping=."


def _mapping_advice(labels: Sequence[Any], known: Mapping[Any, float] | None = None) -> str:
    """Return advice on how to give times by hand; ``known`` are the times of labels that could be read."""
    if known and len(labels) <= 20:
        shown = ", ".join(f"{label!r}: {f'{known[label]:.12g}' if label in known else '...'}" for label in labels)
    else:
        shown = ", ".join(f"{label!r}: ..." for label in labels[:3]) + (", ..." if len(labels) > 3 else "")
    return f"Say the times yourself: mapping={{{shown}}}."


def _quote(labels: Sequence[Any]) -> str:
    return ", ".join(f'"{label}"' for label in labels)


def _show_map(names: np.ndarray, values: np.ndarray) -> str:
    shown = [f"{name} -> {value:.10g}" for name, value in zip(names, values)]
    if len(shown) > 40:  # a continuous time; uns holds the whole map
        shown = [*shown[:20], f"... ({len(shown) - 40} more)", *shown[-20:]]
    return ", ".join(shown)
