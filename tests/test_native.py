"""The loader, and the kernel that sorts edges, against a stable argsort."""

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import sysconfig
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyattention.errors import AttentionError, IndexRangeError, InvalidConfigError, InvalidInputError, OutOfMemoryError
from anyattention.native import load
from anyattention.native.compressed_rows import EdgeOutOfRange, compressed_rows


def oracle(rows, columns, num_rows):
    edges = torch.argsort(rows, stable=True)
    counts = torch.bincount(rows, minlength=num_rows)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return offsets, columns[edges], edges


@contextlib.contextmanager
def the_kernel_runs():
    """Fails unless the edges are sorted by the kernel, and not by PyTorch."""
    called = []
    kernel = load.kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "kernel", lambda name, count: called.append(name) or kernel(name, count))
        yield
    assert called == ["compressed_rows"]


def assert_sorted(rows, columns, num_rows, num_columns):
    with the_kernel_runs():
        actual = compressed_rows(rows, columns, num_rows, num_columns)
    for name, found, expected in zip(actual._fields, actual, oracle(rows, columns, num_rows), strict=True):
        assert torch.equal(found, expected), name


def in_fresh_process(code, **environment):
    """Runs code in a process of its own; a hang is a failure."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("num_edges", "num_rows", "num_columns"),
    [
        (0, 0, 0),
        (0, 1, 1),
        (0, 5, 3),
        (1, 1, 1),
        (1, 7, 2),
        (13, 5, 7),
        (1000, 3, 700),
        (50, 900, 2),
    ],
)
def test_sorts_random_edges(native, num_edges, num_rows, num_columns):
    rows = torch.randint(max(num_rows, 1), (num_edges,))
    columns = torch.randint(max(num_columns, 1), (num_edges,))
    assert_sorted(rows, columns, num_rows, num_columns)
    assert_sorted(columns, rows, num_columns, num_rows)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edges=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=40),
    isolated=st.integers(0, 3),
)
def test_sorts_any_small_multiset(native, edges, isolated):
    rows = torch.tensor([row for row, _ in edges], dtype=torch.int64)
    columns = torch.tensor([column for _, column in edges], dtype=torch.int64)
    assert_sorted(rows, columns, 5 + isolated, 3)


# Few rows give several chunks per histogram, many rows fewer chunks than threads.
@pytest.mark.parametrize("num_rows", [1, 11, 5_000, 90_000, 400_000])
@pytest.mark.parametrize("skewed", [False, True])
def test_threads_do_not_change_the_result(native, two_threads, num_rows, skewed):
    num_edges = 300_007
    rows = torch.randint(num_rows, (num_edges,))
    if skewed:
        rows[torch.rand(num_edges) < 0.9] = num_rows // 2
    columns = torch.randint(1_009, (num_edges,))
    with the_kernel_runs():
        parallel = compressed_rows(rows, columns, num_rows, 1_009)
    torch.set_num_threads(1)
    with the_kernel_runs():
        serial = compressed_rows(rows, columns, num_rows, 1_009)
    for one, other in zip(parallel, serial, strict=True):
        assert torch.equal(one, other)
    assert_sorted(rows, columns, num_rows, 1_009)


def test_more_threads_than_cores(native):
    before = torch.get_num_threads()
    rows = torch.randint(17, (500_000,))
    try:
        torch.set_num_threads(7)
        assert_sorted(rows, rows, 17, 17)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
@pytest.mark.parametrize("array", ["rows", "columns"])
def test_names_the_first_index_out_of_range(native, array, bad):
    rows, columns = torch.randint(5, (13,)), torch.randint(5, (13,))
    {"rows": rows, "columns": columns}[array][[4, 9]] = bad
    with pytest.raises(EdgeOutOfRange, match=rf"{array}\[4\] is {bad}, .* < 5") as caught:
        compressed_rows(rows, columns, 5, 5)
    error = caught.value
    assert (error.array, error.edge, error.index, error.size) == (array, 4, bad, 5)


def test_names_the_first_index_out_of_range_among_threads(native, two_threads):
    rows = torch.randint(5, (300_000,))
    rows[[120_000, 299_999]] = 5
    with pytest.raises(EdgeOutOfRange, match=r"rows\[120000\] is 5"):
        compressed_rows(rows, rows, 5, 5)


def test_no_index_fits_into_no_rows(native):
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(EdgeOutOfRange, match=r"rows\[0\] is 0"):
        compressed_rows(zero, zero, 0, 1)


def test_refuses_what_is_not_int64_on_the_cpu(native):
    right = torch.zeros(4, dtype=torch.int64)
    for wrong in (right.int(), right.to("meta")):
        with pytest.raises(TypeError, match=f"columns: expected int64 on the CPU, got {wrong.dtype} on {wrong.device}"):
            compressed_rows(right, wrong, 1, 1)
    with pytest.raises(TypeError, match=r"rows: expected int64 on the CPU, got torch\.int32 on cpu"):
        compressed_rows(right.int(), right, 1, 1)
    with pytest.raises(ValueError, match="equal sizes"):
        compressed_rows(right, right[1:], 1, 1)


def test_sorts_what_is_not_contiguous(native):
    rows, columns = torch.randint(5, (13, 2)).unbind(1)
    assert not rows.is_contiguous()
    assert_sorted(rows, columns, 5, 5)


def test_refuses_negative_sizes_before_touching_memory(native):
    library, none = native.library(), None
    bad_edge = torch.zeros(1, dtype=torch.int64)
    sizes = [(-1, 1, 1), (0, -1, 1), (0, 1, -1), (1, 1, 1)]
    for num_edges, num_rows, num_columns in sizes:
        status = library.anyattention_compressed_rows(
            none, none, num_edges, num_rows, num_columns, 1, bad_edge.data_ptr(), none, none,
            bad_edge.data_ptr(),
        )  # fmt: skip
        assert status == 1


def test_each_level_that_this_cpu_runs(native, monkeypatch):
    about = native.info()
    levels = [level for level in about.supported if level in about.built]
    assert "baseline" in levels
    rows = torch.randint(11, (70_000,))
    for level in levels:
        monkeypatch.setattr(native, "_state", native._State())
        monkeypatch.setenv("ANYATTENTION_LEVEL", level)
        assert_sorted(rows, rows, 11, 11)
        assert native.info().level == native.library().anyattention_level().decode() == level


def test_picks_the_fastest_level(native):
    about = native.info()
    if "ANYATTENTION_LEVEL" not in os.environ:
        assert about.level == next(level for level in about.supported if level in about.built)


@pytest.mark.parametrize("level", ["v9", "V4"])
def test_refuses_an_unknown_level(level):
    with pytest.raises(InvalidConfigError, match=f"ANYATTENTION_LEVEL: expected one of .*'{level}'"):
        load._open(level)


def test_refuses_a_level_beyond_the_cpu(native, monkeypatch):
    monkeypatch.setattr(load, "_cpu_flags", lambda: load._FLAGS_V3 - {"fma"})
    assert native._open(None)[1].level == "baseline"
    with pytest.raises(InvalidConfigError, match="ANYATTENTION_LEVEL"):
        native._open("v3")


def test_one_openmp_runtime_that_of_torch(native):
    in_fresh_process(
        """
        import os
        import torch
        from pathlib import Path
        from anyattention.native import load
        from anyattention.native.compressed_rows import compressed_rows
        torch.set_num_threads(2)
        rows = torch.randint(11, (200_000,))
        rows + rows
        threads = len(os.listdir("/proc/self/task"))
        compressed_rows(rows, rows, 11, 11)
        assert len(os.listdir("/proc/self/task")) == threads
        paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
        runtimes = {p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp"))}
        assert runtimes == {load.info().openmp}, runtimes
        """
    )


def test_names_no_openmp_runtime_of_its_own(native):
    # Under a name that torch's copy does not bear, the loader would bring in a second one.
    for path in native._built().values():
        assert b"libgomp" not in path.read_bytes()


@pytest.mark.exhaustive
def test_shares_the_runtime_of_torch_beside_another_one(native, require):
    require("sklearn")
    in_fresh_process(
        """
        import sklearn.cluster
        import torch
        from anyattention.native import load
        from anyattention.native.compressed_rows import compressed_rows
        rows = torch.randint(11, (200_000,))
        compressed_rows(rows, rows, 11, 11)
        assert "torch" in load.info().openmp, load.info()
        """
    )


def test_a_forked_child_runs_kernels_on_one_thread(native):
    printed = in_fresh_process(
        """
        import os, signal, warnings, torch
        from anyattention.native import load
        from anyattention.native.compressed_rows import compressed_rows
        torch.set_num_threads(2)
        rows = torch.randint(11, (200_000,))
        expected = compressed_rows(rows, rows, 11, 11).edges.tolist()
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            same = compressed_rows(rows, rows, 11, 11).edges.tolist() == expected
            os._exit(0 if same and load.num_threads() == 1 else 1)
        _, status = os.waitpid(child, 0)
        print(status, load.num_threads())
        """
    )
    assert printed.split() == ["0", "2"]


def test_a_child_that_was_forked_before_the_first_use_runs_kernels_on_one_thread(native):
    printed = in_fresh_process(
        """
        import os, signal, sys, warnings, torch, anyattention
        torch.set_num_threads(2)
        rows = torch.arange(200_000) % 11
        # PyTorch has had a team of threads, which the child is without.
        torch.ones(1_000_000).exp()
        assert "anyattention.native" not in sys.modules
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            from anyattention.native import load
            from anyattention.native.compressed_rows import compressed_rows
            offsets = compressed_rows(rows, rows, 11, 11).offsets
            os._exit(0 if load.num_threads() == 1 and offsets[-1] == 200_000 else 1)
        _, status = os.waitpid(child, 0)
        print(status)
        """
    )
    assert printed.split() == ["0"]


@pytest.fixture
def nothing_built(monkeypatch):
    monkeypatch.setattr(load, "_state", load._State())
    monkeypatch.setattr(load, "_built", dict)


def test_warns_once_where_nothing_was_built(nothing_built):
    assert "reinstall" in load.info().reason
    with pytest.warns(load.MissingKernelsWarning, match="reference implementation") as caught:
        assert not load.available()
    assert len(caught) == 1
    assert not load.available()
    assert load.library() is None
    zero = torch.zeros(1, dtype=torch.int64)
    for call in (load.run, load.kernel):
        with pytest.raises(RuntimeError, match="not available"):
            call("compressed_rows", zero.data_ptr())
    assert compressed_rows(zero, zero, 1, 1).offsets.tolist() == [0, 1]


def test_warns_about_a_library_that_does_not_load(monkeypatch, tmp_path):
    broken = tmp_path / "libanyattention_baseline.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(load, "_state", load._State())
    monkeypatch.setattr(load, "_built", lambda: {"baseline": broken})
    with pytest.warns(load.MissingKernelsWarning, match="cannot be used"):
        assert not load.available()


@pytest.fixture
def libraries(native, monkeypatch, tmp_path):
    """Copies of the libraries with their digests, as an installation has them."""
    found = {}
    for level, path in load._built().items():
        if level in load._supported():
            found[level] = tmp_path / path.name
            found[level].write_bytes(path.read_bytes())
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[level].with_name(f"{path.name}.sha256").write_text(f"{digest}\n")
    monkeypatch.setattr(load, "_state", load._State())
    monkeypatch.setattr(load, "_built", lambda: found)
    return found


@pytest.mark.parametrize("kept", [0, 100, 4096, 1 << 20, -1])
def test_a_library_that_is_cut_off_is_not_opened(libraries, kept):
    best, *slower = libraries
    libraries[best].write_bytes(libraries[best].read_bytes()[:kept])
    reason = "cannot be used \\(it is not the file that was built\\)"
    expected = rf"runs its kernels for {slower[0]}, which are slower: .*{reason}\. Reinstall" if slower else reason
    with pytest.warns(load.MissingKernelsWarning, match=expected) as caught:
        assert load.available() == bool(slower)
    assert load.available() == bool(slower)
    assert len(caught) == 1
    assert load.info().level == (slower[0] if slower else None)
    assert [level for level, _ in load.info().refused] == [best]


def test_the_next_level_runs_where_one_cannot_be_used(libraries):
    """Also one that the system refuses, without a digest."""
    *broken, last = libraries
    for level in broken:
        libraries[level].write_bytes(b"not a library")
        libraries[level].with_name(f"{libraries[level].name}.sha256").unlink()
    found, about = load._open(None)
    assert found is not None
    assert about.level == last
    assert [level for level, _ in about.refused] == broken
    assert about.reason is None


def test_an_installation_has_digests():
    folder = Path(sysconfig.get_path("purelib")) / "anyattention"
    built = [path for path in folder.glob("libanyattention_*") if path.suffix != ".sha256"]
    if not built and not os.environ.get("CI"):
        pytest.skip("no libraries are installed")
    assert built
    for path in built:
        digest = path.with_name(f"{path.name}.sha256").read_text().strip()
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


class OtherEdgeSum(ctypes.Structure):
    """As another version of csrc/anyattention.h might have it."""

    _fields_ = [("batch", ctypes.c_int64)]


@pytest.mark.parametrize("name", ["edge_sum", "no_such_structure"])
def test_refuses_a_library_from_other_sources(native, monkeypatch, name):
    assert native._open(None)[0] is not None
    monkeypatch.setitem(load.structures, name, OtherEdgeSum)
    found, about = native._open(None)
    assert found is None
    assert f"it was compiled from other sources: its {name} has another size" in about.reason


def test_refuses_a_library_that_lacks_a_function(native, monkeypatch):
    monkeypatch.setitem(load._SIGNATURES, "anyattention_no_such_function", (ctypes.c_int32, []))
    found, about = native._open(None)
    assert found is None
    assert "anyattention_no_such_function" in about.reason
    assert "Reinstall anyattention" in about.reason


def test_loads_once_from_many_threads(native, monkeypatch):
    opened = []
    original = load._open
    monkeypatch.setattr(load, "_state", load._State())
    monkeypatch.setattr(load, "_open", lambda level: opened.append(level) or original(level))
    threads = [threading.Thread(target=native.available) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("status", "kind", "built_in", "text"),
    [
        (1, InvalidInputError, ValueError, r"edge_dot: invalid argument \(status 1\)"),
        (2, IndexRangeError, IndexError, "edge_dot: the arrays of a graph or pattern name a place that does not exist"),
        (3, OutOfMemoryError, MemoryError, "edge_dot: no memory for the workspace"),
        (9, InvalidInputError, ValueError, r"edge_dot: invalid argument \(status 9\)"),
    ],
)
def test_a_status_is_an_error_of_ours_and_a_built_in(status, kind, built_in, text):
    with pytest.raises(kind, match=text) as caught:
        load.check_status(status, "edge_dot")
    assert isinstance(caught.value, AttentionError)
    assert isinstance(caught.value, built_in)


def test_edges_that_change_while_they_are_sorted(native, monkeypatch):
    # The kernel says so without naming an edge: by the time it is asked for, it may be a sound one.
    monkeypatch.setattr(load, "kernel", lambda name, count: lambda *arguments: 2)
    index = torch.tensor([0, 1])
    with pytest.raises(IndexRangeError, match="compressed_rows: the arrays"):
        compressed_rows(index, index, 2, 2)
