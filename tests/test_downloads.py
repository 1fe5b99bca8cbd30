"""Downloads, against a server on this machine that can be slow, broken or wrong; and the user's own files."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import anndata as ad
import numpy as np
import pandas as pd
import pooch
import pytest

from sctraj import datasets, pp
from sctraj.datasets import _real
from sctraj.datasets._download import ATTEMPTS, PIECE, Source, cache_folder, fetched, identity

N, D = 60, 6


class Server(ThreadingHTTPServer):
    """Serves one file; its faults are switched on by the tests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = b""
        self.etag = '"first"'
        self.ranges = True  # whether ranges are known
        self.heeds_if_range = True
        self.breaks: list[int] = []  # bytes after which each of the next answers breaks off
        self.status: list[int] = []  # of the next answers, where not a file
        self.pause = 0.0  # seconds before each piece
        self.asked: list[str | None] = []  # the Range of every request
        self.sent = 0  # bytes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        self.close_connection = True
        if server.status:
            self.send_error(server.status.pop(0))
            return
        start, size = 0, len(server.content)
        other_version = server.heeds_if_range and self.headers.get("If-Range", server.etag) != server.etag
        if wanted and server.ranges and not other_version:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        end = min(size, start + server.breaks.pop(0)) if server.breaks else size
        for k in range(start, end, 4096):
            time.sleep(server.pause)
            piece = server.content[k : min(end, k + 4096)]
            server.sent += len(piece)  # by the time that whoever asked has it
            try:
                self.wfile.write(piece)
            except OSError:  # whoever asked is gone
                server.sent -= len(piece)
                return

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("SCTRAJ_DATA", raising=False)
    one = Server()
    one.content = np.random.default_rng(0).bytes(200_000)
    thread = Thread(target=one.serve_forever, args=(0.01,))
    thread.start()
    yield one
    one.shutdown()
    thread.join()
    one.server_close()


def source_of(server: Server, name: str = "cells.npz") -> Source:
    return Source(name, server.url, f"sha256:{hashlib.sha256(server.content).hexdigest()}")


def fetch(source: Source, folder: Path) -> Path:
    return fetched(source, cache=folder, progress=False)


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


# --- what a file is known by


def test_identities_are_those_of_git_and_sha256sum(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"hello\n")  # printf 'hello\n' | git hash-object --stdin; ... | sha256sum
    assert identity(file, "git:") == "git:ce013625030ba8dba906f756967f9e9ca394464a"
    known = "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert identity(file, "sha256:") == known


@pytest.mark.parametrize("source", [_real.EMBRYOID_BODY, _real.CITE, _real.MULTIOME], ids=lambda s: s.name)
def test_every_published_file_has_a_whole_identity_and_a_secure_address(source):
    assert re.fullmatch(r"git:[0-9a-f]{40}|sha256:[0-9a-f]{64}", source.known)
    assert source.url.startswith("https://")


# --- downloading


def test_a_file_comes_once_and_nothing_is_left_beside_it(server, tmp_path):
    path = fetch(source_of(server), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "cells.npz"
    assert path.read_bytes() == server.content
    assert visible(path.parent) == ["cells.npz"]
    assert fetch(source_of(server), path.parent) == path
    assert server.asked == [None]


def test_a_download_that_breaks_off_goes_on_where_it_was(server, tmp_path):
    server.breaks = [6 * PIECE, 3 * PIECE]
    path = fetch(source_of(server), tmp_path)
    assert path.read_bytes() == server.content
    assert server.asked == [None, f"bytes={6 * PIECE}-", f"bytes={9 * PIECE}-"]
    assert server.sent == len(server.content)


def test_the_next_call_goes_on_where_the_last_one_gave_up(server, tmp_path):
    server.breaks = [6 * PIECE, 0]  # the second answer gives nothing: no third is asked for
    with pytest.raises(ConnectionError, match="98,304 bytes that arrived are kept"):
        fetch(source_of(server), tmp_path)
    assert visible(tmp_path) == ["cells.npz.part", "cells.npz.part.etag"]
    assert len(server.asked) == 2
    assert fetch(source_of(server), tmp_path).read_bytes() == server.content
    assert server.asked[2:] == [f"bytes={6 * PIECE}-"]
    assert server.sent == len(server.content)


def test_there_is_an_end_to_trying(server, tmp_path):
    server.breaks = [PIECE] * 100
    with pytest.raises(ConnectionError):
        fetch(source_of(server), tmp_path)
    assert len(server.asked) == ATTEMPTS


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    server.ranges, server.breaks = False, [6 * PIECE]
    assert fetch(source_of(server), tmp_path).read_bytes() == server.content
    assert server.sent == 6 * PIECE + len(server.content)


@pytest.mark.parametrize("heeds_if_range", [True, False])
@pytest.mark.parametrize("etag", ['"second"', None], ids=["etag", "no-etag"])
def test_two_versions_are_never_mixed(server, tmp_path, heeds_if_range, etag):
    """What had arrived of a version that is no longer served is given up, whether or not the server says so."""
    old = server.content
    server.breaks = [6 * PIECE, 0]
    with pytest.raises(ConnectionError):
        fetch(source_of(server), tmp_path)
    server.content, server.heeds_if_range = old[::-1], heeds_if_range
    server.etag = etag
    if etag is None and not heeds_if_range:  # then nothing tells before the end, but the content does
        with pytest.raises(ValueError, match="another file"):
            fetch(source_of(server), tmp_path)
        assert visible(tmp_path) == []
    assert fetch(source_of(server), tmp_path).read_bytes() == old[::-1]


def test_a_part_that_is_whole_is_taken_as_it_is(server, tmp_path):
    (tmp_path / "cells.npz.part").write_bytes(server.content)
    assert fetch(source_of(server), tmp_path).read_bytes() == server.content
    assert server.sent == 0


def test_a_part_that_is_too_long_is_given_up(server, tmp_path):
    (tmp_path / "cells.npz.part").write_bytes(server.content + b"more")
    assert fetch(source_of(server), tmp_path).read_bytes() == server.content


@pytest.mark.parametrize("what", ["truncated", "wrong"])
def test_another_file_is_refused_and_thrown_away(server, tmp_path, what):
    source, right = source_of(server), server.content
    server.content = right[:-1] if what == "truncated" else right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(ValueError, match=f"found another file of {len(server.content):,} bytes") as error:
        fetch(source, tmp_path)
    assert str(tmp_path / "cells.npz") in str(error.value)
    assert visible(tmp_path) == []
    server.content = right
    assert fetch(source, tmp_path).read_bytes() == right


@pytest.mark.parametrize("status", [403, 404, 503])
def test_an_error_of_the_server_is_told_and_what_arrived_is_kept(server, tmp_path, status):
    (tmp_path / "cells.npz.part").write_bytes(server.content[:1000])
    server.status = [status]
    with pytest.raises(ConnectionError, match=str(status)):
        fetch(source_of(server), tmp_path)
    assert fetch(source_of(server), tmp_path).read_bytes() == server.content
    assert server.asked[-1] == "bytes=1000-"


def test_without_a_server_the_error_says_what_to_put_where(server, tmp_path):
    source = Source("cells.npz", "http://127.0.0.1:9/file", "sha256:" + "0" * 64)  # the discard port: nobody there
    with pytest.raises(ConnectionError) as error:
        fetch(source, tmp_path)
    message = str(error.value)
    assert source.url in message
    assert str(tmp_path / "cells.npz") in message
    assert "kept" not in message


def test_a_file_put_there_by_hand_needs_no_server(server, tmp_path):
    source = Source("cells.npz", "http://127.0.0.1:9/file", source_of(server).known)
    (tmp_path / "cells.npz").write_bytes(server.content)
    assert fetch(source, tmp_path).read_bytes() == server.content
    assert visible(tmp_path) == ["cells.npz"]


def test_a_wrong_file_there_is_named_and_left_alone(server, tmp_path):
    path = tmp_path / "cells.npz"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="found another file of 4 bytes") as error:
        fetch(source_of(server), tmp_path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == b"mine"
    assert server.asked == []


FETCH = """
import sys
from sctraj.datasets._download import Source, fetched
print(fetched(Source(*sys.argv[1:4]), cache=sys.argv[4], progress=False))
"""


def started(source: Source, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, source.name, source.url, source.known, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_of_two_processes_one_downloads_and_both_get_the_file(server, tmp_path):
    server.pause = 0.02  # a second in all: both are there before it is done
    processes = [started(source_of(server), tmp_path) for _ in range(2)]
    assert [p.communicate(timeout=60)[0].strip() for p in processes] == [str(tmp_path / "cells.npz")] * 2
    assert (tmp_path / "cells.npz").read_bytes() == server.content
    assert server.asked == [None]


def test_a_process_that_is_killed_leaves_what_it_had(server, tmp_path):
    server.content = np.random.default_rng(1).bytes(4_000_000)
    server.pause = 0.002
    process, part = started(source_of(server), tmp_path), tmp_path / "cells.npz.part"
    while not (part.is_file() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert part.with_name("cells.npz.part.etag").is_file()
    arrived, server.pause = part.stat().st_size, 0.0
    assert fetch(source_of(server), tmp_path).read_bytes() == server.content
    assert server.asked == [None, f"bytes={arrived}-"]


def test_progress_shows_the_whole_file_however_it_came(server, tmp_path, capsys):
    server.breaks = [6 * PIECE]
    fetched(source_of(server), cache=tmp_path, progress=True)
    assert "200k/200k" in capsys.readouterr().err.replace("100%", "")


def test_the_folder_is_the_argument_or_the_variable_or_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("SCTRAJ_DATA", raising=False)
    assert cache_folder(None) == Path(pooch.os_cache("sctraj"))
    monkeypatch.setenv("SCTRAJ_DATA", str(tmp_path / "variable"))
    assert cache_folder(None) == tmp_path / "variable"
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache_folder("~/cells") == Path.home() / "cells"


# --- the published courses


def cells(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, D)), rng.standard_normal((N, D)), rng.permutation(np.arange(N) % 5)


def embryoid(**changes: object) -> bytes:
    pcs, velocity, label = cells()
    arrays = {"pcs": pcs, "pcs_delta": velocity, "sample_labels": label, "phate": pcs[:, :2]}
    arrays |= {"delta_embedding": velocity[:, :2]} | changes
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value for name, value in arrays.items() if value is not None})
    return buffer.getvalue()


def course(days: tuple[object, ...] = (2, 3, 4, 7), **changes: object) -> ad.AnnData:
    pcs, _, _ = cells()
    obs = pd.DataFrame({"day": np.resize(np.array(days), N), "donor": "13176"}, index=[f"c{i}" for i in range(N)])
    return ad.AnnData(np.ones((N, 3)), obs=obs, obsm={"X_pca": pcs, "X_umap": pcs[:, :2]})


def written(adata: ad.AnnData, path: Path) -> bytes:
    adata.write_h5ad(path)
    return path.read_bytes()


@pytest.fixture
def published(server, monkeypatch, tmp_path):
    """Serve a file as one of the published ones, known by its git id or its sha256."""

    def serve(name: str, content: bytes) -> None:
        server.content = content
        source = getattr(_real, name)
        (tmp_path / "content").write_bytes(content)
        known = identity(tmp_path / "content", source.known)
        monkeypatch.setattr(_real, name, Source(source.name, server.url, known))
        monkeypatch.setenv("SCTRAJ_DATA", str(tmp_path / "cache"))

    return serve


def test_embryoid_bodies_are_the_arrays_of_the_file(published):
    published("EMBRYOID_BODY", embryoid())
    pcs, velocity, label = cells()
    adata = datasets.embryoid_body(progress=False)
    np.testing.assert_array_equal(adata.obsm["X_pca"], pcs.astype(np.float32))
    np.testing.assert_array_equal(adata.obsm["velocity_pca"], velocity.astype(np.float32))
    np.testing.assert_array_equal(adata.obs["time"], label.astype(float))
    assert adata.obs["time"].dtype == np.float64
    # sampled over windows of three days, every six days
    pp.parse_time(adata, "day", window="midpoint", key_added="real")
    np.testing.assert_allclose(adata.obs["real"], 1.5 + 6 * label)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pcs_delta": None}, "expected pcs_delta in .*, found pcs, sample_labels, phate, delta_embedding"),
        ({"pcs_delta": np.ones((N, 2))}, "of one shape"),
        ({"sample_labels": np.zeros(N - 1)}, "of one shape"),
        ({"sample_labels": np.arange(N) % 4}, "expected sample_labels 0 to 4"),
    ],
)
def test_embryoid_bodies_of_another_layout_are_refused(published, changes, message):
    published("EMBRYOID_BODY", embryoid(**changes))
    with pytest.raises(ValueError, match=message):
        datasets.embryoid_body(progress=False)


@pytest.mark.parametrize("name", ["cite", "multiome"])
@pytest.mark.parametrize("days", [(2, 3, 4, 7), ("2", "3", "4", "7"), (7.0, 4.0, 3.0, 2.0)], ids=str)
def test_courses_from_kaggle_have_real_days(published, tmp_path, name, days):
    published(name.upper(), written(course(days), tmp_path / "course.h5ad"))
    adata = getattr(datasets, name)(progress=False)
    np.testing.assert_array_equal(adata.obs["time"], np.resize(np.array(days, dtype=float), N))
    np.testing.assert_array_equal(adata.obsm["X_pca"], cells()[0].astype(np.float32))
    assert adata.obs_names.tolist() == [f"c{i}" for i in range(N)]
    assert set(adata.obs["donor"]) == {"13176"}
    adata.write_h5ad(tmp_path / "back.h5ad")


def test_courses_of_another_layout_are_refused(published, tmp_path):
    broken = {"found .*donor.*X_umap": course(), "expected days": course((2, 3, 4, 10)), "found .*day": course()}
    del broken["found .*donor.*X_umap"].obs["day"]
    del broken["found .*day"].obsm["X_pca"]
    for message, adata in broken.items():
        (tmp_path / "cache" / _real.CITE.name).unlink(missing_ok=True)
        published("CITE", written(adata, tmp_path / "course.h5ad"))
        with pytest.raises(ValueError, match=message):
            datasets.cite(progress=False)
    (tmp_path / "cache" / _real.CITE.name).unlink()
    published("CITE", b"no hdf5")
    with pytest.raises(ValueError, match="anndata cannot read"):
        datasets.cite(progress=False)


# --- the user's own files


def own_files(folder: Path) -> dict[str, Path]:
    """The same cells in every form; coordinates in columns whose order as text is not their order."""
    pcs, velocity, label = (v.astype(np.float32) for v in cells())
    wide, moving = np.tile(pcs, 2), np.tile(velocity, 2)  # 12 columns
    order = sorted(range(12), key=str)
    table = pd.DataFrame({"day": label} | {f"PC{k + 1}": wide[:, k] for k in order} | {"batch": "a"})
    table = table.assign(**{f"V_{k + 1}": moving[:, k] for k in order})
    paths = {kind: folder / f"cells.{kind}" for kind in ("npz", "csv", "tsv", "csv.gz", "h5ad")}
    np.savez(paths["npz"], day=label, X_pca=wide, other=label[None], V=moving)
    table.to_csv(paths["csv"], index=False)
    table.to_csv(paths["tsv"], index=False, sep="\t")
    with gzip.open(paths["csv.gz"], "wt") as file:
        table.to_csv(file, index=False)
    obs = table[["day", "batch"]].set_index(pd.Index([f"cell_{i}" for i in range(N)]))
    ad.AnnData(np.ones((N, 3)), obs=obs, obsm={"X_pca": wide, "V": moving}).write_h5ad(paths["h5ad"])
    return paths


def test_every_form_of_a_file_gives_the_same_cells(tmp_path):
    pcs, velocity, label = (v.astype(np.float32) for v in cells())
    for kind, path in own_files(tmp_path).items():
        rep = "PC" if "sv" in kind else None
        adata = datasets.load(path, time_key="day", use_rep=rep, velocity_key="V")
        np.testing.assert_allclose(adata.obsm["X_pca"], np.tile(pcs, 2), rtol=1e-6, err_msg=kind)
        np.testing.assert_allclose(adata.obsm["velocity_pca"], np.tile(velocity, 2), rtol=1e-6, err_msg=kind)
        np.testing.assert_array_equal(adata.obs["time"], label)
        assert adata.obs["time"].dtype == np.float64
        assert adata.obs_names[1] == "cell_1"
        if kind != "npz":
            assert set(adata.obs["batch"]) == {"a"}
        adata.write_h5ad(tmp_path / "back.h5ad")


def test_a_table_keeps_names_of_cells_and_takes_named_columns(tmp_path):
    pcs, _, label = cells()
    table = pd.DataFrame(pcs[:, :3], columns=["x", "y", "z"], index=[f"c{i}" for i in range(N)]).assign(time=label)
    table.to_csv(tmp_path / "cells.csv")
    adata = datasets.load(tmp_path / "cells.csv", use_rep=["z", "x"])
    np.testing.assert_allclose(adata.obsm["X_pca"], pcs[:, [2, 0]], rtol=1e-6)
    assert adata.obs_names.tolist() == [f"c{i}" for i in range(N)]
    assert set(adata.obs) == {"time", "y"}


def test_labels_become_times_by_a_mapping_and_only_so(tmp_path):
    pcs, _, label = cells()
    names = np.array(["D0", "D2", "D10", "D10.5", "D30"])
    np.savez(tmp_path / "cells.npz", time=names[label], X_pca=pcs)
    with pytest.raises(ValueError, match=r"found 60 cells with .*D10.*mapping="):
        datasets.load(tmp_path / "cells.npz")
    mapping = {name: float(name[1:]) for name in names}
    adata = datasets.load(tmp_path / "cells.npz", mapping=mapping)
    np.testing.assert_array_equal(adata.obs["time"], np.array([0, 2, 10, 10.5, 30])[label])
    del mapping["D30"]
    with pytest.raises(ValueError, match="found none for D30"):
        datasets.load(tmp_path / "cells.npz", mapping=mapping)


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        ("npz", {}, "expected time in .*, found day, X_pca, other, V"),
        ("npz", {"time_key": "day", "use_rep": "pcs"}, "expected pcs in .*, found day, X_pca, other, V"),
        ("npz", {"time_key": "other"}, r"one time for each row of 'X_pca'"),
        ("npz", {"time_key": "day", "velocity_key": "other"}, r"expected numbers \(60, d\)"),
        ("npz", {"time_key": "day", "use_rep": ["a", "b"]}, "expected one name"),
        ("csv", {}, "expected a column 'time' in .*, found day, PC1"),
        ("csv", {"time_key": "day"}, "runs of numbered columns in .*: PC, V_"),
        ("csv", {"time_key": "day", "use_rep": "pca"}, "expected numeric columns pca1"),
        ("csv", {"time_key": "day", "use_rep": ["PC1", "PC99"]}, "expected columns PC99"),
        ("csv", {"time_key": "day", "use_rep": ["PC1", "batch"]}, "found 60 cells"),
        ("csv", {"time_key": "batch", "use_rep": "PC"}, "found 60 cells with a"),
        ("h5ad", {}, "expected a column 'time' in obs of .*, found day, batch"),
        ("h5ad", {"time_key": "day", "use_rep": "X_umap"}, "expected X_umap in obsm of .*, found V, X_pca"),
    ],
)
def test_errors_list_what_is_there(tmp_path, kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(own_files(tmp_path)[kind], **kwargs)


@pytest.mark.parametrize("key", ["time", "X_pca"])
def test_a_cell_without_time_or_place_is_refused(tmp_path, key):
    pcs, _, label = cells()
    arrays = {"time": label.astype(float), "X_pca": pcs}
    arrays[key][3] = np.nan
    np.savez(tmp_path / "cells.npz", **arrays)
    with pytest.raises(ValueError, match="found 1 cells"):
        datasets.load(tmp_path / "cells.npz")


def test_python_objects_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "cells.npz", time=np.array([{}, {}], dtype=object), X_pca=np.ones((2, 2)))
    with pytest.raises(ValueError, match="found Python objects in time"):
        datasets.load(tmp_path / "cells.npz")


@pytest.mark.parametrize("kind", ["npz", "csv", "h5ad", "txt.gz", "loom"])
def test_what_is_no_such_file_is_said(tmp_path, kind):
    path = tmp_path / f"cells.{kind}"
    with pytest.raises(FileNotFoundError, match="found nothing"):
        datasets.load(path)
    path.write_bytes(b"" if kind == "csv" else b"\x89 no such thing")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        datasets.load(path)
