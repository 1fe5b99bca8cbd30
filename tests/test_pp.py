from __future__ import annotations

import logging
import re
from datetime import timedelta

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from sklearn.preprocessing import StandardScaler

import sctraj as sct


def cells(labels, **columns) -> anndata.AnnData:
    obs = pd.DataFrame({"day": labels, **columns}, index=[f"cell{i}" for i in range(len(labels))])
    return anndata.AnnData(obs=obs)


def parsed(labels, **kwargs) -> tuple[list[float], str]:
    """The cells' times and their unit, after checking that all of parse_time's results agree."""
    adata = cells(labels)
    before = adata.obs["day"].copy()
    assert sct.pp.parse_time(adata, "day", **kwargs) is None
    pd.testing.assert_series_equal(adata.obs["day"], before)  # dtype and categories too
    record = adata.uns["time"]
    assert adata.obs["time"].dtype == np.float64
    assert record["source"] == "day"
    assert set(record) == {"unit", "source", "labels", "values"}
    assert np.all(np.diff(record["values"]) >= 0)
    times = dict(zip(record["labels"], record["values"]))
    assert [times[str(label)] for label in adata.obs["day"].astype(object)] == adata.obs["time"].tolist()
    return adata.obs["time"].tolist(), record["unit"]


def refusal(labels, **kwargs) -> str:
    """The message parse_time refuses with, after checking that nothing was written."""
    adata = cells(labels)
    before = adata.copy()
    with pytest.raises(ValueError) as error:
        sct.pp.parse_time(adata, "day", **kwargs)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert adata.uns == {}
    return str(error.value)


# --- parse_time: what is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "time", "unit"),
    [
        ("3", 3, "unknown"),
        ("-3", -3, "unknown"),
        ("−3", -3, "unknown"),
        (" 3.5 ", 3.5, "unknown"),
        ("1e3", 1000, "unknown"),
        ("2.5e-1", 0.25, "unknown"),
        (".5", 0.5, "unknown"),
        ("t=3", 3, "unknown"),
        ("T = -3", -3, "unknown"),
        ("time=3h", 3, "hour"),
        ("D3", 3, "day"),
        ("d3", 3, "day"),
        ("D03", 3, "day"),
        ("D1.5", 1.5, "day"),
        ("D+3", 3, "day"),
        ("day 7", 7, "day"),
        ("Day_7", 7, "day"),
        ("DAY7", 7, "day"),
        ("day=7", 7, "day"),
        ("day -7", -7, "day"),
        ("3d", 3, "day"),
        ("-3 days", -3, "day"),
        ("12h", 12, "hour"),
        ("12 hrs", 12, "hour"),
        ("12_hrs.", 12, "hour"),
        ("hour 12", 12, "hour"),
        ("30 min", 30, "minute"),
        ("2 weeks", 2, "week"),
        ("Week 2", 2, "week"),
        ("6 mo", 6, "month"),
        ("E8.5", 8.5, "day"),
        ("e8.5", 8.5, "day"),
        ("embryonic day 8.5", 8.5, "day"),
        ("P0", 0, "day"),
        ("36 hpf", 36, "hour"),
        ("3 dpf", 3, "day"),
        ("7dpi", 7, "day"),
        ("8 PCW", 8, "week"),
        ("GW12", 12, "week"),
    ],
)
def test_reads_the_label_alone_and_as_a_category(label, time, unit):
    assert parsed([label]) == ([time], unit)
    assert parsed(pd.Categorical([label, label])) == ([time, time], unit)


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint16", "float64", "Int64", "Float64", object, "category"])
def test_reads_numbers_of_every_dtype(dtype):
    assert parsed(pd.Series([10, 0, 2, 10]).astype(dtype).to_numpy()) == ([10, 0, 2, 10], "unknown")
    assert parsed(pd.array([10, 0, 2, 10], dtype="Int64"), unit="h") == ([10, 0, 2, 10], "hour")


@pytest.mark.parametrize("seed", range(5))
def test_times_do_not_depend_on_how_they_are_written_nor_on_the_order_of_cells(seed):
    rng = np.random.default_rng(seed)
    times = rng.permutation(np.repeat(rng.choice(400, 12, replace=False) / 4, 3))
    expected = times.tolist()
    for write in ("{}", "D{}", "day {}", "Day_{}", "{}d", "{} days", "t={}"):
        assert parsed([write.format(time) for time in times])[0] == expected
    for write, per_day in (("{}h", 24), ("{} min", 1440)):
        assert parsed([write.format(time * per_day) for time in times], unit="days") == (expected, "day")
    assert parsed(pd.to_timedelta(times, unit="D"), unit="day") == (expected, "day")


def test_the_map_is_sorted_by_time_not_as_text():
    adata = cells(["D10", "D2", "D0", "D1.5", "D2"])
    sct.pp.parse_time(adata, "day")
    assert adata.uns["time"]["labels"].tolist() == ["D0", "D1.5", "D2", "D10"]
    assert adata.uns["time"]["values"].tolist() == [0, 1.5, 2, 10]


def test_a_category_without_cells_is_not_read():
    assert parsed(pd.Categorical(["D3", "D0"], categories=["early", "12h", "E8.5", "D0", "D3"])) == ([3, 0], "day")


def test_units_of_one_kind_become_one():
    assert parsed(["12h", "day 2"]) == ([12, 48], "hour")
    assert parsed(["12h", "day 2"], unit="day") == ([0.5, 2], "day")
    assert parsed(["D3", "2 weeks"]) == ([3, 14], "day")
    assert parsed(["36 hpf", "3 dpf"]) == ([36, 72], "hour")
    assert parsed(["18 months", "2 years"]) == ([18, 24], "month")
    assert parsed(["E8.5"], unit="hours") == ([204], "hour")


def test_one_time_written_in_two_units_is_one_number():
    labels = [label for k in range(1, 200) for label in (f"D{k / 10}", f"{k * 24 / 10}h")]
    for unit in (None, "minute", "hour", "day", "week"):
        times = np.array(parsed(labels, unit=unit)[0])
        assert np.array_equal(times[::2], times[1::2])


def test_timedeltas_take_the_coarsest_unit_that_divides_them():
    hours = [timedelta(hours=h) for h in (0, 36, 72)]
    assert parsed(pd.to_timedelta(hours)) == ([0, 36, 72], "hour")
    assert parsed(pd.Categorical(pd.to_timedelta(hours)), unit="day") == ([0, 1.5, 3], "day")
    assert parsed(pd.to_timedelta([0, 7], unit="D")) == ([0, 7], "day")


def test_unit_names_what_has_none_and_converts_what_has():
    assert parsed([0.0, 2.5], unit="d") == ([0, 2.5], "day")
    assert parsed([0.0, 2.5], unit="passage") == ([0, 2.5], "passage")
    assert parsed(["D1", "D2"], unit="h") == ([24, 48], "hour")
    for unit in ("month", "passage"):
        assert f"not to be converted to {unit}: expected all of one kind" in refusal(["D1", "D2"], unit=unit)
    assert "unit must be a name" in refusal(["D1"], unit="")
    assert "unit must be a name" in refusal(["D1"], unit=3)


def test_mapping_is_taken_at_its_word():
    assert parsed(["early", "rep2", "D3"], mapping={"early": 0, "rep2": np.float32(1.5), "D3": -7}) == (
        [0, 1.5, -7],
        "unknown",
    )
    assert parsed(["E18.5", "P0"], mapping={"E18.5": 18.5, "P0": 19.5, "P7": 26.5}, unit="day") == (
        [18.5, 19.5],
        "day",
    )
    assert parsed([1, 2, 3], mapping={1: 0, 2: 4, 3: 16}, unit="hour") == ([0, 4, 16], "hour")
    assert parsed(["none", "D1"], mapping={"none": 0, "D1": 1})[0] == [0, 1]


# --- parse_time: what is refused -----------------------------------------------------------------------------------


NOT_TIMES = """
early ctrl_2 rep2 batch3 D3_rep1 rep1_D3 sample_1 S1 H9 T2 W3 MEF iPSC D E 3E 3p D3h 3m m3 Day=x 0x10 ١
1,5 1_5 D1_5 1.2.3 D1-2-3 day-7 D-3 3-1 D3-3 0h-D3 E8-P9 0d-3h 0d-3 12-h inf infinity 1e999
"""


@pytest.mark.parametrize("label", NOT_TIMES.split())
def test_text_that_is_no_time_is_refused(label):
    for window in ("error", "midpoint"):
        message = refusal(["D0", label], window=window)
        assert repr(label) in message
        assert "1 of 2 labels" in message
        assert "mapping={" in message


@pytest.mark.parametrize(
    "labels",
    [
        [True, False],
        np.array([True, False]),
        pd.Categorical([True, False]),
        pd.array([True, False], dtype="boolean"),
        [1.0, np.inf],
        [1j, 2j],
        pd.to_datetime(["2024-01-01", "2024-01-02"]),
    ],
    ids=["bool list", "bool", "bool categories", "boolean", "inf", "complex", "date"],
)
def test_values_that_are_no_times_are_refused(labels):
    message = refusal(labels)
    assert "cannot be read as one" in message  # and why, and what to do
    assert re.search("true or false|not finite|neither number nor text|a date", message)
    assert "Say the times yourself: mapping={" in message


def test_the_times_that_could_be_read_are_in_the_advice():
    assert "mapping={'D1': 1, 'D2.5': 2.5, 'iPSC': ...}." in refusal(["D1", "D2.5", "iPSC"])
    mixed = refusal(["D1", "12h", "iPSC"])  # in what unit would they be?
    assert "mapping={'12h': ..., 'D1': ..., 'iPSC': ...}." in mixed
    assert "..., ...}." in refusal([f"D{n}" for n in range(1, 30)] + ["iPSC"])


def test_dates_are_told_what_to_do():
    assert "subtract the date of the start" in refusal(pd.to_datetime(["2024-01-01", "2024-01-02"]))


@pytest.mark.parametrize("missing", [np.nan, None, "", "  ", "nan", "NA", "<NA>"])
def test_missing_times_are_counted_and_named(missing):
    for labels in (["D0", missing, "D1", missing], pd.Categorical(["D0", missing, "D1", missing])):
        for mapping in (None, {"D0": 0, "D1": 1}):
            message = refusal(labels, mapping=mapping)
            assert "2 of 4 cells have none (cell1, cell3)" in message
    assert "98 of 100 cells have none (cell2, cell3, cell4, cell5, cell6, ...)" in refusal([0.0, 1.0] + [np.nan] * 98)


def test_embryonic_beside_postnatal_is_refused_with_the_reason():
    message = refusal(["E18.5", "P0", "P7"])
    for part in ('"E18.5" counts from conception', '"P7" counts from birth', "species", "mapping={'E18.5': ..."):
        assert part in message


@pytest.mark.parametrize(
    "labels", [["D3", "E8.5"], ["36 hpf", "40 h"], ["3 dpf", "3 dpi"], ["E8", "3 dpf"], ["8 PCW", "GW12"], ["E8", "9"]]
)
def test_labels_of_two_clocks_are_refused(labels):
    assert "share one clock" in refusal(labels)
    assert "share one clock" in refusal(labels, unit="day")


def test_a_unit_on_some_labels_only_is_refused():
    assert '"D3" has a unit and "4" has none' in refusal(["D3", "4"])
    assert '"D3" has a unit and "4" has none' in refusal(["D3", 4], unit="day")


def test_units_of_two_kinds_are_refused():
    assert "not to be converted to one unit" in refusal(["2 weeks", "1 month"])
    assert "not to be converted to day" in refusal(["2 weeks", "1 month"], unit="day")


@pytest.mark.parametrize(
    ("label", "middle", "unit"),
    [
        ("Day 00-03", 1.5, "day"),
        ("Day 00 to 03", 1.5, "day"),
        ("0-3", 1.5, "unknown"),
        ("0 – 3 h", 1.5, "hour"),
        ("0h-3h", 1.5, "hour"),
        ("D0-D3", 1.5, "day"),
        ("E8.5-9.5", 9, "day"),
        ("E8.5-E9.5", 9, "day"),
        ("-3-0", -1.5, "unknown"),
        ("36_to_48_hpf", 42, "hour"),
        ("time = 1 to 2 weeks", 1.5, "week"),
    ],
)
def test_windows_are_refused_unless_their_middle_is_asked_for(label, middle, unit):
    message = refusal([label])
    assert 'window="midpoint"' in message
    assert f'"{label}" -> {middle:g}' in message
    assert parsed([label], window="midpoint") == ([middle], unit)


def test_windows_beside_times():
    assert parsed(["D0", "D1-2", "12h"], window="midpoint", unit="day") == ([0, 1.5, 0.5], "day")
    assert '1 of 3 are windows: "D1-2"' in refusal(["D0", "D1-2", "12h"])
    assert "window must be" in refusal(["D0"], window="middle")


def test_mapping_must_cover_every_label_with_finite_numbers():
    message = refusal(["a", "b", "c", "c"], mapping={"a": 0})
    assert "2 of 3 are absent: 'b', 'c'" in message
    for bad in (np.nan, np.inf, None, "3", True):
        assert "finite numbers" in refusal(["a", "b"], mapping={"a": 0, "b": bad})
    assert "absent: 3" in refusal([3], mapping={"3": 3})
    with pytest.raises(TypeError, match="dict of label to time"):
        sct.pp.parse_time(cells(["a"]), "day", mapping=[0])


def test_no_such_column_names_those_that_look_like_times():
    adata = cells(["D0"], batch=["b1"], sampled=["12h"], n_genes=[3], percentage=[0.1], pseudotime=[1.0], hpf=[36])
    with pytest.raises(KeyError) as error:
        sct.pp.parse_time(adata, "tmie")
    named = re.search(r"look like times: (.*)\. Pass", error.value.args[0])[1]
    assert named == '"day", "sampled", "hpf"'
    with pytest.raises(KeyError, match='there are: "n_genes"'):
        sct.pp.parse_time(anndata.AnnData(obs=pd.DataFrame({"n_genes": [3]}, index=["a"])), "day")


def test_no_cells():
    assert "no cells" in refusal([])


# --- parse_time: what is written -----------------------------------------------------------------------------------


def test_the_source_is_never_overwritten():
    assert "never overwritten" in refusal(["D0"], key_added="day")
    for name in ("a/b", ""):
        assert 'without "/"' in refusal(["D0"], key_added=name)


def test_a_column_of_someone_else_is_not_overwritten():
    adata = cells(["D0", "D1"], time=[7.0, 8.0], stage=["E1", "E2"])
    with pytest.raises(ValueError, match=r'del adata.obs\["time"\]'):
        sct.pp.parse_time(adata, "day")
    assert adata.obs["time"].tolist() == [7, 8]
    sct.pp.parse_time(adata, "day", key_added="real_time")
    sct.pp.parse_time(adata, "day", key_added="real_time", unit="hour")  # its own result it may replace
    assert adata.obs["real_time"].tolist() == [0, 24]
    with pytest.raises(ValueError, match="not parsed from"):
        sct.pp.parse_time(adata, "stage", key_added="real_time")
    adata.uns["clock"] = "mine"
    with pytest.raises(ValueError, match=r'del adata.uns\["clock"\]'):
        sct.pp.parse_time(adata, "day", key_added="clock")
    assert adata.uns["clock"] == "mine"


def test_copy_leaves_the_original_alone():
    adata = cells(["D0", "D1"])
    result = sct.pp.parse_time(adata, "day", copy=True)
    assert "time" not in adata.obs
    assert adata.uns == {}
    assert result.obs["time"].tolist() == [0, 1]
    assert sct.pp.parse_time(adata[:1], "day", copy=True).obs["time"].tolist() == [0]  # no warning for a view either


def test_a_view_becomes_an_actual_and_its_parent_stays():
    adata = cells(pd.Categorical(["D0", "D1", "D2"]))
    view = adata[1:]
    with pytest.warns(UserWarning, match="view of an AnnData") as caught:
        sct.pp.parse_time(view, "day")
    assert caught[0].filename == __file__
    assert not view.is_view
    assert view.obs["time"].tolist() == [1, 2]
    assert view.uns["time"]["labels"].tolist() == ["D1", "D2"]
    assert "time" not in adata.obs
    assert "time" not in adata.uns


def test_a_view_stays_a_view_where_the_labels_are_refused():
    view = cells(["early", "late"])[:1]
    with pytest.raises(ValueError):
        sct.pp.parse_time(view, "day")
    assert view.is_view


def test_one_log_line_shows_the_map_and_the_slots(caplog):
    caplog.set_level(logging.INFO, logger="sctraj")
    sct.pp.parse_time(cells(["D10", "D1.5", "D0"]), "day")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        'parsed obs["day"] (day): D0 -> 0, D1.5 -> 1.5, D10 -> 10; wrote obs["time"], uns["time"]'
    )
    caplog.clear()
    sct.pp.parse_time(cells(["E8.5"]), "day")
    assert "(day since conception)" in caplog.text
    caplog.clear()
    sct.pp.parse_time(cells(np.arange(1000) / 8), "day")
    (record,) = caplog.records
    assert "(unit unknown)" in record.getMessage()
    assert "... (960 more)" in record.getMessage()


def test_two_labels_of_one_time_are_warned_of(caplog):
    assert parsed(["D1", "24h", "D2", "d1"], unit="day") == ([1, 1, 2, 1], "day")
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert '"24h", "D1", "d1" are all time 1' in warning.getMessage()


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")  # anndata's choice of format, not ours
@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.parametrize("labels", [["D10", "D2", "D0"], [10.0, 2.0, 0.0]], ids=["text", "number"])
def test_what_is_written_survives_a_file(tmp_path, suffix, labels):
    adata = cells(labels)
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(3, 2))
    sct.pp.parse_time(adata, "day")
    sct.pp.standardize(adata, n_dims=2)
    path = tmp_path / f"a.{suffix}"
    getattr(adata, f"write_{suffix}")(path)
    back = getattr(anndata, f"read_{suffix}")(path)
    assert back.obs["time"].dtype == np.float64
    assert back.obs["time"].tolist() == [10, 2, 0]
    for key, record in adata.uns.items():
        assert set(back.uns[key]) == set(record)
        for name, value in record.items():
            np.testing.assert_array_equal(back.uns[key][name], value)
    assert back.uns["time"]["values"].dtype == np.float64
    assert back.obsm["X_std"].dtype == np.float32
    np.testing.assert_array_equal(back.obsm["X_std"], adata.obsm["X_std"])
    sct.pp.parse_time(back, "day")  # still known as its own
    assert back.uns["time"]["labels"].tolist() == adata.uns["time"]["labels"].tolist()


# --- parse_time: real labels ---------------------------------------------------------------------------------------


def test_days_of_the_ipsc_cardiomyocytes(real_data):
    adata = anndata.read_h5ad(real_data("ipsc_cardiomyocyte_1081.h5ad"))
    sct.pp.parse_time(adata, "day")
    assert adata.uns["time"]["unit"] == "day"
    assert adata.uns["time"]["labels"].tolist() == ["D0", "D1", "D1.5", "D2", "D2.5", "D3"]
    assert adata.uns["time"]["values"].tolist() == [0, 1, 1.5, 2, 2.5, 3]
    assert (adata.obs["day"].astype(str).str[1:].astype(float) == adata.obs["time"]).all()


def test_windows_of_the_embryoid_bodies(real_data):
    adata = anndata.read_h5ad(real_data("embryoid_body_2750.h5ad"))
    ranks = adata.obs["time"].copy()
    with pytest.raises(ValueError, match="not parsed from"):  # its obs["time"] counts snapshots, not days
        sct.pp.parse_time(adata, "day", window="midpoint")
    with pytest.raises(ValueError, match=r'5 of 5 are windows.*\("Day 00-03" -> 1.5\)'):
        sct.pp.parse_time(adata, "day", key_added="real_time")
    sct.pp.parse_time(adata, "day", key_added="real_time", window="midpoint")
    assert adata.uns["real_time"]["values"].tolist() == [1.5, 7.5, 13.5, 19.5, 25.5]
    np.testing.assert_allclose(adata.obs["real_time"], 1.5 + 6 * ranks)
    pd.testing.assert_series_equal(adata.obs["time"], ranks)


# --- standardize ---------------------------------------------------------------------------------------------------


def embedded(n=60, d=8, seed=0, dtype=np.float64) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    adata = cells(["D0"] * n)
    adata.obsm["X_pca"] = (rng.normal(size=(n, d)) * rng.uniform(0.01, 100, d) + rng.normal(size=d) * 50).astype(dtype)
    return adata


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
@pytest.mark.parametrize("n_dims", [1, 5, 8])
def test_standardize_is_the_standard_scaler_of_the_first_dimensions(dtype, n_dims):
    adata = embedded(dtype=dtype)
    if dtype is np.int32:
        adata.obsm["X_pca"] *= 3
        adata.obsm["X_pca"][0] += 7  # no column may be constant after rounding
    before = adata.obsm["X_pca"].copy()
    assert sct.pp.standardize(adata, n_dims=n_dims) is None
    np.testing.assert_array_equal(adata.obsm["X_pca"], before)
    scaler = StandardScaler().fit(before[:, :n_dims].astype(np.float64))
    expected = scaler.transform(before[:, :n_dims].astype(np.float64))
    assert adata.obsm["X_std"].dtype == np.float32
    np.testing.assert_allclose(adata.obsm["X_std"], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(adata.uns["X_std"]["mean"], scaler.mean_)
    np.testing.assert_allclose(adata.uns["X_std"]["std"], scaler.scale_)
    assert adata.uns["X_std"]["use_rep"] == "X_pca"


def test_standardize_takes_no_notice_of_shift_scale_or_order():
    adata = embedded()
    sct.pp.standardize(adata)
    other = embedded()
    order = np.random.default_rng(1).permutation(other.n_obs)
    other.obsm["X_pca"] = other.obsm["X_pca"][order] * [2, 0.1, 30, 4, 5, 6, 7, 8] + 11
    sct.pp.standardize(other)
    np.testing.assert_allclose(other.obsm["X_std"], adata.obsm["X_std"][order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(adata.obsm["X_std"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(adata.obsm["X_std"].std(0), 1, rtol=1e-5)


def test_standardize_can_be_undone_from_its_record():
    adata = embedded()
    sct.pp.standardize(adata)
    record = adata.uns["X_std"]
    np.testing.assert_allclose(
        adata.obsm["X_std"] * record["std"] + record["mean"], adata.obsm["X_pca"][:, :5], rtol=1e-4, atol=1e-3
    )


def test_standardize_does_not_lose_a_large_mean():
    adata = embedded()
    adata.obsm["X_pca"] = (adata.obsm["X_pca"] * 1e-3 + 1e6).astype(np.float64)
    sct.pp.standardize(adata)
    np.testing.assert_allclose(adata.obsm["X_std"].std(0), 1, rtol=1e-5)


def test_standardize_takes_x_dense_or_sparse_and_tables():
    values = np.random.default_rng(0).poisson(1.0, size=(40, 6)).astype(np.float32)
    results = []
    for matrix in (values, scipy.sparse.csr_matrix(values), scipy.sparse.csc_array(values)):
        adata = anndata.AnnData(matrix)
        adata.obsm["table"] = pd.DataFrame(values, index=adata.obs_names, columns=list("abcdef"))
        for use_rep in ("X", "table"):
            sct.pp.standardize(adata, use_rep, n_dims=4)
            results.append(adata.obsm["X_std"])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_standardize_copy_and_view():
    adata = embedded()
    result = sct.pp.standardize(adata, copy=True, key_added="X_z")
    assert list(adata.obsm) == ["X_pca"]
    assert adata.uns == {}
    assert result.obsm["X_z"].shape == (60, 5)
    view = adata[:30]
    with pytest.warns(UserWarning, match="view of an AnnData") as caught:
        sct.pp.standardize(view)
    assert caught[0].filename == __file__
    assert not view.is_view
    assert list(adata.obsm) == ["X_pca"]
    np.testing.assert_allclose(view.obsm["X_std"].mean(0), 0, atol=1e-6)  # the view's own mean


def test_standardize_names_its_slots(caplog):
    caplog.set_level(logging.INFO, logger="sctraj")
    sct.pp.standardize(embedded())
    (record,) = caplog.records
    assert 'wrote obsm["X_std"], uns["X_std"]' in record.getMessage()


def broken(kind: str) -> anndata.AnnData:
    adata = embedded(d=6)
    values = adata.obsm["X_pca"]
    if kind == "constant":
        values[:, [1, 3]] = 0.1
    elif kind == "rounding":
        values[:, 2] = np.where(np.arange(60) % 2, 0.3, 0.1 + 0.2)
    elif kind == "zero":
        values[:, 0] = 0
    elif kind == "nan":
        values[[7, 9], 0] = np.nan
    elif kind == "inf":
        values[7, 4] = -np.inf
    return adata


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("constant", "dimension 1, 3 "),
        ("rounding", "dimension 2 "),
        ("zero", "dimension 0 "),
        ("nan", r"2 of 60 cells have NaN or inf \(cell7, cell9\)"),
        ("inf", r"1 of 60 cells have NaN or inf \(cell7\)"),
    ],
)
def test_standardize_refuses_what_it_cannot_scale(kind, message):
    adata = broken(kind)
    with pytest.raises(ValueError, match=message):
        sct.pp.standardize(adata)
    assert list(adata.obsm) == ["X_pca"]
    assert adata.uns == {}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n_dims": 0}, ValueError, "1 to 8"),
        ({"n_dims": -1}, ValueError, "1 to 8"),
        ({"n_dims": 9}, ValueError, "1 to 8"),
        ({"n_dims": 2.0}, TypeError, "integer"),
        ({"use_rep": "X_umap"}, KeyError, 'there are: "X_pca"'),
        ({"use_rep": "X"}, ValueError, "X"),
        ({"key_added": "X_pca"}, ValueError, "never overwritten"),
        ({"key_added": "a/b"}, ValueError, 'without "/"'),
    ],
)
def test_standardize_refuses_what_it_cannot_do(kwargs, error, message):
    adata = embedded()
    with pytest.raises(error, match=message):
        sct.pp.standardize(adata, **kwargs)
    assert list(adata.obsm) == ["X_pca"]
    assert adata.uns == {}


@pytest.mark.parametrize("slot", ["obsm", "uns"])
def test_standardize_overwrites_nothing_of_others(slot):
    adata = embedded()
    getattr(adata, slot)["own"] = adata.obsm["X_pca"][:, :2].copy()
    with pytest.raises(ValueError, match=rf'adata.{slot}\["own"\] is there already, without the record of'):
        sct.pp.standardize(adata, key_added="own")
    sct.pp.standardize(adata)
    sct.pp.standardize(adata, n_dims=3)  # its own
    assert adata.obsm["X_std"].shape[1] == 3


def test_standardize_refuses_other_shapes_and_one_cell():
    adata = embedded()
    adata.obsm["cube"] = np.zeros((60, 3, 2))
    with pytest.raises(ValueError, match="cells x dimensions"):
        sct.pp.standardize(adata, "cube", n_dims=2)
    with pytest.raises(ValueError, match="all 1 cells"):
        sct.pp.standardize(embedded(n=1))
