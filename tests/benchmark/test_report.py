"""What is written: wide tables with the right numbers, and a page that is whole, escaped and needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from sctraj.benchmark import Data, make_grid
from sctraj.benchmark._judge import COMPOSITION, GENES, METRICS
from sctraj.benchmark._published import (
    METHODS,
    SAME,
    VALUES,
    beside_published,
    published_data,
    published_grid,
)
from sctraj.benchmark._report import MEANINGS, as_text, html_report, side_by_side, wide
from sctraj.benchmark._uncertainty import paired, summary

EVIL = "<script>alert('x')</script> & \"co\" $x^2_"
VOID = {"meta", "img", "br"}


def rows(data: str = "a", methods: tuple[str, ...] = ("m", "n"), *, offset: float = 0.0, **same: object) -> list[dict]:
    """Rows whose value is 10 k + time + seed / 10, of method k."""
    return [
        {
            "data": data, "task": "leave-one-out", "method": method, "strict": False, "start": "both", "held_out": time,
            "seed": seed, "space": "common", "metric": metric, "value": offset + 10 * k + time + seed / 10,
            "error": np.nan, "bootstrap": half,
        }
        | same
        for k, method in enumerate(methods)
        for time in (1.0, 2.5)
        for seed in (0, 1)
        for metric in ("w1", "energy")
        for half in (-1, 0, 1)
    ]  # fmt: skip


def both_forms(data: str = "a", methods: tuple[str, ...] = ("m", "n")) -> pd.DataFrame:
    published, strict = rows(data, methods), rows(data, methods, offset=0.5, strict=True)
    own = rows(data, methods, offset=0.3, strict=True, space="own")
    return pd.DataFrame(published + strict + own)


def page(table: pd.DataFrame, **more: object) -> str:
    told: dict[str, object] = {"title": "sctraj benchmark", "summary": summary(table)}
    told |= {"protocol": {"tasks": "leave-one-out"}, "versions": {"sctraj": "1"}}
    told |= {"data": pd.DataFrame({"data": table["data"].unique(), "fingerprint": "abc123"})}
    if "paired" not in more:
        told["paired"] = paired(table, metric="energy") if "energy" in set(table["metric"]) else None
    return html_report(table, **told | more)


class Read(HTMLParser):
    """Checks that tags are closed in order; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# --- tables --------------------------------------------------------------------------------------------------------
def test_wide_tables_hold_means_and_spreads_over_seeds():
    table = wide(pd.DataFrame(rows()))
    assert list(table.columns) == ["data", "task", "strict", "start", "space", "method", "1", "2.5", "mean"]
    assert table["method"].tolist() == ["m", "n"]
    sd = np.std([0.0, 0.1], ddof=1)
    assert table.loc[0, "1"] == f"1.050 ± {sd:.3f}"
    assert table.loc[1, "mean"] == f"{10 + 1.75 + 0.05:.3f} ± {sd:.3f}"  # over seeds, of the mean over times
    assert wide(pd.DataFrame(rows()), metric="none").empty


def test_what_has_one_seed_or_depends_on_none_has_no_spread():
    table = pd.DataFrame(rows())
    assert wide(table[table["seed"] == 0])["1"].tolist() == ["1.000", "11.000"]
    assert wide(table.assign(value=0.25))["mean"].tolist() == ["0.250", "0.250"]


def test_held_out_times_that_six_digits_do_not_tell_apart_have_columns_of_their_own():
    table = pd.DataFrame(rows())
    found = wide(table.assign(held_out=table["held_out"] + 1e6))
    assert found.loc[0, ["1000001.0", "1000002.5"]].tolist() == wide(table).loc[0, ["1", "2.5"]].tolist()


def test_a_value_that_is_not_known_is_no_mean_of_the_others():
    table = pd.DataFrame(rows())
    table.loc[(table["method"] == "m") & (table["held_out"] == 1) & (table["seed"] == 0), "value"] = np.nan
    found = wide(table, metric="w1").set_index("method")
    assert found.loc["m", ["1", "mean"]].tolist() == ["-", "-"]
    assert found.loc["m", "2.5"] == wide(pd.DataFrame(rows())).loc[0, "2.5"]
    assert "-" not in set(found.loc["n"])
    assert page(table)


def test_a_held_out_time_that_a_data_set_does_not_have_stays_empty():
    table = wide(pd.DataFrame(rows("a") + [row | {"held_out": row["held_out"] + 1} for row in rows("b")]))
    assert table.loc[table["data"] == "a", "3.5"].tolist() == ["", ""]
    assert "t = 3.5" not in as_text(pd.DataFrame(rows("a")))


def test_the_leak_is_strict_less_published_in_the_common_space():
    table = side_by_side(both_forms())
    assert table["strict - published"].tolist() == ["+0.500", "+0.500"]
    assert table["95 % interval"].tolist() == ["+0.500 to +0.500"] * 2  # no seed and no half-sample disagrees
    assert set(table["space"]) == {"common"}
    assert set(side_by_side(both_forms().query("bootstrap < 0"))["95 % interval"]) == {""}
    assert table.loc[0, "published"].startswith("1.800")
    assert table.loc[0, "strict"].startswith("2.300")


# --- the page ------------------------------------------------------------------------------------------------------
def test_every_name_is_escaped():
    table = both_forms(f"data {EVIL}", (f"m {EVIL}", f"n {EVIL}")).replace({"task": "leave-one-out"}, f"task {EVIL}")
    failures = [{"unit": f"unit {EVIL}", "error": f"error {EVIL}"}]
    beside = pd.DataFrame({"method": [EVIL], f"column {EVIL}": [EVIL]})
    text = page(
        table, title=f"title {EVIL}", failures=failures, published=beside, protocol={f"key {EVIL}": f"value {EVIL}"},
        versions={f"library {EVIL}": f"1 {EVIL}"},
    )  # fmt: skip
    read = Read(text)
    assert "<script" not in text.lower()
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "iframe", "object"})
    shown = "".join(read.texts)
    for what in ("data", "task", "m", "n", "unit", "error", "title", "column", "key", "value", "library"):
        assert f"{what} {EVIL}" in shown, what
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)


def test_the_page_needs_nothing_beside_it_and_its_pictures_are_pictures():
    text = page(both_forms())
    read = Read(text)
    assert not re.findall(r"(?:https?:)?//", re.sub(r"base64,[^\"]+", "", text))
    pictures = [attrs for tag, attrs in read.tags if tag == "img"]
    assert len(pictures) == 1
    assert pictures[0]["alt"]
    image = matplotlib.image.imread(io.BytesIO(base64.b64decode(str(pictures[0]["src"]).split(",")[1])))[..., :3]
    assert (image != image[0, 0]).any(-1).mean() > 0.01
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):  # no label reaches the edge, where it would be cut
        assert (edge == 1).all()


def test_long_names_are_not_cut_off():
    names = tuple(f"package.module.with.a.long.name:function_{k} (n_steps=10, width=128)" for k in range(12))
    read = Read(page(both_forms(methods=names)))
    source = next(str(attrs["src"]) for tag, attrs in read.tags if tag == "img")
    image = matplotlib.image.imread(io.BytesIO(base64.b64decode(source.split(",")[1])))[..., :3]
    assert all((edge == 1).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))


def test_the_page_says_strict_beside_published_protocol_versions_and_fingerprints():
    shown = " ".join(Read(page(both_forms())).texts)
    for words in (
        "Strict beside published",
        "+0.500",
        "Protocol",
        "leave-one-out",
        "Versions",
        "abc123",
        "Methods in pairs",
    ):
        assert words in shown
    assert "Strict beside published" not in " ".join(Read(page(pd.DataFrame(rows()))).texts)


def test_every_metric_that_is_measured_is_on_the_page():
    assert set(MEANINGS) == {one for one in (*METRICS, COMPOSITION, *GENES) if not one.endswith("_unweighted")}
    table = pd.concat([both_forms().query("metric == 'w1'").assign(metric=metric) for metric in MEANINGS])
    shown = " ".join(Read(page(table)).texts).lower()
    assert all(f"{meaning}, by held-out time".lower() in shown for meaning in MEANINGS.values())


def test_no_rank_is_shown_without_an_interval():
    shown = " ".join(Read(page(both_forms())).texts)
    assert "rank" in shown
    shown = " ".join(Read(page(both_forms().query("bootstrap < 0"))).texts)
    assert "skill" in shown
    assert "rank" not in shown
    assert "95 %" not in shown


def test_the_same_table_makes_the_same_page():
    assert page(both_forms()) == page(both_forms())


# --- published values ----------------------------------------------------------------------------------------------
def test_ours_stand_beside_the_published_ones():
    methods = ("ot-cfm (sigma=0.1)", "uot-cfm", "ot-interpolation")
    table = pd.DataFrame(
        rows("cite, index clock", methods)
        + rows("cite, real clock", methods)
        + rows("embryoid-body, index clock", methods)
    )
    out = beside_published(table).set_index("method")
    assert out.columns.tolist() == [
        "embryoid-body, published", "embryoid-body, here, index clock",
        "cite, published", "cite, here, index clock", "cite, here, real clock", "multiome, published",
    ]  # fmt: skip
    assert out.loc["OT-CFM", "cite, published"] == "0.882"
    assert out.loc["OT-CFM", "cite, here, index clock"].startswith("1.800 ± ")
    assert out.loc["uot-cfm", "cite, published"] == ""
    assert out.loc["TrajectoryNet", "embryoid-body, published"] == "0.848"
    assert out.loc["Cell-MNN", "multiome, published"] == "0.742"  # which could not be had
    assert set(VALUES) | {"uot-cfm"} <= set(out.index)


def test_the_published_protocol():
    grid = published_grid([Data("cite, real clock", "cite")])
    assert {(unit.task, unit.start, unit.strict, unit.seeds) for unit in grid.units} == {
        ("leave-one-out", "before", False, (0, 1, 2, 3, 4))
    }
    assert grid.data[0].n_dims == 5
    sigma = {unit.method: dict(unit.settings).get("sigma") for unit in grid.units}
    assert {name: sigma[name] for name in METHODS} == {"ot-cfm": 0.1, "i-cfm": 0.1, "sb-cfm": 1.0, "uot-cfm": None}
    assert set(SAME.values()) <= set(VALUES)
    assert make_grid(grid.data, tasks=["leave-one-out"], methods=METHODS).data == grid.data


def test_data_that_cannot_be_had_are_left_out_with_the_reason(monkeypatch):
    from sctraj import datasets

    def absent(**_: object) -> None:
        raise ConnectionError("no\n way")

    course = datasets.simulated_course("crossing", 80, times=(2, 3, 4, 7))
    for name in ("embryoid_body", "multiome"):
        monkeypatch.setattr(datasets, name, absent)
    monkeypatch.setattr(datasets, "cite", lambda **_: course.copy())
    data, cells, reasons = published_data()
    assert reasons == {"embryoid-body": "no way", "multiome": "no way"}
    assert [one.name for one in data] == ["cite, index clock", "cite, real clock"]
    clocks = [np.unique(cells[one.name].obs["time"]).tolist() for one in data]
    assert clocks == [[0, 1, 2, 3], [2, 3, 4, 7]]


@pytest.mark.parametrize("missing", ["w1", "energy"])
def test_a_table_without_a_metric_still_makes_a_page(missing):
    table = both_forms()
    told = " ".join(Read(page(table[table["metric"] != missing], paired=None)).texts)
    there = next(metric for metric in ("w1", "energy") if metric != missing)
    assert f"{MEANINGS[there]}, by held-out time".lower() in told.lower()
    assert f"{MEANINGS[missing]}, by held-out time".lower() not in told.lower()
