"""What goes wrong around the library: damaged and planted files, folders of others, odd machines.

Whatever it is, the reference serves after one warning that names it; nothing is loaded that is not
as it was written, and nothing outside our own folders is touched.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from test_build_cache import Process, slow, wait_for  # noqa: F401

from tta_ext import build, dispatch
from tta_ext.build import Library, LoadResult, cache, files, library, toolchain
from tta_ext.build.toolchain import BuildError

pytestmark = pytest.mark.usefixtures("cxx")


def refusal(library: Library) -> str:
    """Why a library is not loaded: the reason, which one warning has said in a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = library.load()
        assert Library.load(library) is result
    assert not result.loaded
    assert [warning.category for warning in caught] == [build.NativeWarning]
    assert result.reason in str(caught[0].message)
    assert "\n" not in result.reason
    return result.reason


def program(path: Path, text: str) -> str:
    """A shell script under the name that it is called by."""
    path.write_bytes(b"#!/bin/sh\n" + text.encode("latin-1"))
    path.chmod(0o755)
    return str(path)


# ---------------------------------------------------------------------------- damaged entries


def cut(size: int) -> Callable[[Path], None]:
    def run(entry: Path) -> None:
        with (entry / "_C.so").open("r+b") as file:
            file.truncate(size)

    return run


def zeroed(entry: Path) -> None:
    path = entry / "_C.so"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


def replaced(make: Callable[[Path], object], name: str = "_C.so") -> Callable[[Path], None]:
    def run(entry: Path) -> None:
        (entry / name).unlink()
        make(entry / name)

    return run


def moved_to(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(entry: Path) -> None:
        shutil.rmtree(entry)
        make(entry)

    return run


def shared(name: str) -> Callable[[Path], None]:
    return lambda entry: (entry / name).chmod(0o777)


DAMAGE = {
    "empty": cut(0),
    "a page": cut(4096),
    "a byte short": lambda entry: cut((entry / "_C.so").stat().st_size - 1)(entry),
    "zeroed": zeroed,
    "a pipe": replaced(os.mkfifo),
    "a link to itself elsewhere": replaced(lambda path: path.symlink_to(sys.executable)),
    "no library": replaced(lambda path: None),
    "no record": replaced(lambda path: None, "build.json"),
    "a record of another kind": replaced(lambda path: path.write_text("[1]"), "build.json"),
    "a record that is none": replaced(lambda path: path.write_bytes(b"\xff{"), "build.json"),
    "a record in a pipe": replaced(os.mkfifo, "build.json"),
    "an empty folder": moved_to(Path.mkdir),
    "a dangling link": moved_to(lambda path: path.symlink_to("nowhere")),
    "a file": moved_to(lambda path: path.write_text("")),
    "a folder that all can write": shared("."),
    "a library that all can write": shared("_C.so"),
    "a record that all can write": shared("build.json"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_as_written_is_built_anew(
    tiny: Library, damage: Callable[[Path], None]
) -> None:
    recipe = tiny.recipe(None)
    path, built = cache.get(recipe, "cpu")
    assert built
    assert cache.get(recipe, "cpu") == (path, False)
    damage(path.parent)
    assert cache.get(recipe, "cpu") == (path, True)
    assert cache.get(recipe, "cpu") == (path, False)
    assert ctypes.CDLL(str(path)).tta_answer() == 42
    assert [entry.name for entry in cache.cache_dir().iterdir()] == [path.parent.name]


def test_a_prebuilt_library_is_looked_at_too(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "PACKAGE", tmp_path)
    prebuilt = tmp_path / tiny.name
    prebuilt.write_bytes(b"half a lib")
    record = {"digest": tiny.digest(), **files.stamp(b"half a library")}
    prebuilt.with_suffix(".json").write_text(json.dumps(record))
    result = tiny.load()
    assert result.built
    assert "the prebuilt library is damaged (_C.so is not the file that was rec" in result.reason


def test_the_record_says_what_was_built(tiny: Library) -> None:
    path, _ = cache.get(tiny.recipe(None), "cpu")
    record = json.loads((path.parent / "build.json").read_text())
    assert not files.damage(path, record, private=True)
    assert record["size"] == path.stat().st_size
    for trusted in (path, path.parent, path.parent.parent, path.parent / "build.json"):
        assert not stat.S_IMODE(trusted.stat().st_mode) & 0o077


# ---------------------------------------------------------------------------- folders of others


def of_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir()
    real = os.lstat

    def lstat(asked: Path) -> os.stat_result:
        found = list(real(asked))
        if asked == path:
            found[stat.ST_UID] += 1
        return os.stat_result(found)

    monkeypatch.setattr(os, "lstat", lstat)


def linked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    path.symlink_to(elsewhere)


def writable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir()
    path.chmod(0o1777)


def in_the_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("mine")


@pytest.mark.parametrize("name", ["cache", "lock"])
@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (of_another, "belongs to user"),
        (linked, "is a symbolic link"),
        (writable, "can be written by others (mode 1777), so what it holds cannot be trusted"),
        (in_the_way, "is not a folder"),
    ],
)
def test_folders_of_others_are_refused(
    tiny: Library,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    plant: Callable[[Path, pytest.MonkeyPatch], None],
    words: str,
) -> None:
    folder = {"cache": cache.cache_dir(), "lock": tmp_path / f"tta_ext-{files.user()}"}[name]
    plant(folder, monkeypatch)
    reason = refusal(tiny)
    assert reason.startswith(f"the {name} folder {folder} {words}")
    assert f"export {'TTA_EXT_CACHE_DIR' if name == 'cache' else 'TMPDIR'}=" in reason
    assert not list(tmp_path.glob("elsewhere/*"))


def test_the_owners_note_follows_no_link(tiny: Library, tmp_path: Path) -> None:
    """Whoever can write the lock folder could have our note written over any file."""
    precious = tmp_path / "precious"
    precious.write_text("keep")
    folder = tmp_path / f"tta_ext-{files.user()}"
    cache.get(tiny.recipe(None), "first")
    for path in folder.iterdir():  # the same entry's lock, planted
        path.unlink()
        path.symlink_to(precious)
    shutil.rmtree(cache.cache_dir())
    with pytest.raises(BuildError, match=r"^cannot lock .*mend it with: export TMPDIR="):
        cache.get(tiny.recipe(None), "first")
    assert precious.read_text() == "keep"


def test_caches_do_not_wait_for_each_other(tiny: Library, tmp_path: Path) -> None:
    with cache._build_lock(tmp_path / "one cache" / "entry"):
        lock = cache._build_lock(tmp_path / "another cache" / "entry")
        with lock:
            pass


# ---------------------------------------------------------------------------- odd machines


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TTA_EXT_LOCK_TIMEOUT", "abc", "TTA_EXT_LOCK_TIMEOUT='abc' is no number of seconds"),
        ("TTA_EXT_LOCK_TIMEOUT", "-1", "TTA_EXT_LOCK_TIMEOUT='-1' is no number of seconds"),
        ("TTA_EXT_LOCK_TIMEOUT", "nan", "TTA_EXT_LOCK_TIMEOUT='nan' is no number of seconds"),
        ("TTA_EXT_COMPILE_TIMEOUT", "1h", "TTA_EXT_COMPILE_TIMEOUT='1h' is no number of seconds"),
        ("MAX_JOBS", "all", "MAX_JOBS='all' is no number"),
        ("MAX_JOBS", "0", "MAX_JOBS='0' is no number"),
        ("CXX", 'g++ "oops', "CXX='g++ \"oops' cannot be read (No closing quotation)"),
        ("TTA_EXT_CACHE_DIR", "~nosuchuser/cache", "TTA_EXT_CACHE_DIR='~nosuchuser/cache'"),
    ],
)
def test_a_bad_variable_is_named(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    reason = refusal(tiny)
    assert words in reason
    assert "mend it with: " in reason


def test_an_empty_variable_is_as_none(tiny: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "TTA_EXT_LOCK_TIMEOUT TTA_EXT_COMPILE_TIMEOUT MAX_JOBS CXX TTA_EXT_CPU_ISA".split():
        monkeypatch.setenv(name, "")
    assert tiny.load().loaded


@pytest.mark.parametrize("value", ["avx1024", "sse"])
def test_an_unknown_instruction_set_is_an_error(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TTA_EXT_CPU_ISA", "AVX2")
    assert tiny.wanted() == "auto"
    monkeypatch.setenv("TTA_EXT_CPU_ISA", value)
    with pytest.raises(ValueError, match=f"^TTA_EXT_CPU_ISA='{value}' is not one of avx512, avx2"):
        tiny.load()


def test_a_user_without_a_name_and_a_home(tiny: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number of its own."""

    def nobody(*asked: object) -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert tiny.load().loaded  # the cache folder is named
    monkeypatch.delenv("TTA_EXT_CACHE_DIR")
    if sys.platform == "linux":
        assert "mend it with: export TTA_EXT_CACHE_DIR=" in refusal(Library(tiny.root))


@pytest.mark.parametrize("error", [KeyError("planted"), UnicodeError("planted"), TypeError("a\nb")])
def test_any_failure_leaves_the_reference(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> toolchain.Torch:
        raise error

    monkeypatch.setattr(library, "find_torch", fail)
    assert f"getting the CPU library ended with {type(error).__name__}: " in refusal(tiny)
    monkeypatch.setenv("TTA_EXT_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"^TTA_EXT_NATIVE=1, but getting the CPU library"):
        Library(tiny.root).load()


def test_a_torch_without_a_number_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"__version__": "nightly", "cuda": None}
    monkeypatch.setattr(toolchain.runpy, "run_path", lambda path: facts)
    assert toolchain.find_torch().version == "nightly"


def test_messages_in_any_encoding(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cxx = program(
        tmp_path / "cxx",
        'case "$*" in *--version*) echo "compilador versi\xf3n 1";;\n'
        '*) echo "error: l\xednea mala" >&2; exit 1;; esac\n',
    )
    monkeypatch.setenv("CXX", cxx)
    assert "the compiler failed: error: l\ufffdnea mala" in refusal(tiny)


def test_a_compiler_that_writes_nothing(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", program(tmp_path / "cxx", "echo all is well\n"))
    assert "the compiler failed: error: wrote no 0_" in refusal(tiny)


@pytest.mark.parametrize("asked", ["--version", "-c"])
def test_a_compiler_that_never_ends(
    tiny: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str
) -> None:
    """Ended with the programs that it started itself, which hold its output open."""
    started = tmp_path / "started"
    text = f'case "$*" in *{asked}*) sleep 100000 & echo $! >> {started}; wait;; esac\necho 1\n'
    monkeypatch.setenv("CXX", program(tmp_path / "cxx", text))
    monkeypatch.setenv("TTA_EXT_COMPILE_TIMEOUT", "0.5")
    monkeypatch.setattr(toolchain, "ANSWER_SECONDS", 0.5)
    words = {"--version": "does not run", "-c": "error: no end after 0.5 s; raise TTA_EXT_COMPILE_"}
    assert words[asked] in refusal(tiny)
    for number in map(int, started.read_text().split()):
        wait_for(lambda number=number: not alive(number))


def alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_an_old_failure_of_another_time_does_not_count(tiny: Library) -> None:
    """Nor does one of tomorrow, by a clock that is wrong."""
    log = cache.cache_folder() / f"cpu-{tiny.recipe(None).key()}.log"
    log.write_text("planted")
    os.utime(log, (2**32, 2**32))
    assert cache.get(tiny.recipe(None), "cpu")[1]
    assert not log.exists()


def test_a_failure_that_was_waited_for_counts(
    slow: tuple[Library, Path, Path],  # noqa: F811
) -> None:
    library, calls, gate = slow
    (library.root / "cpu" / "answer.cpp").write_text("int answer() { return forty_two; }\n")
    processes = [Process(library, MAX_JOBS="1") for _ in range(3)]
    wait_for(lambda: sum("waiting for process" in p.log.read_text() for p in processes) == 2)
    gate.unlink()
    assert all("forty_two" in process.finish()["error"] for process in processes)
    assert len(calls.read_text().split()) <= 2  # one process has compiled the two files


def test_disks_that_cannot_hold_or_run_a_library(
    tiny: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before anything is compiled, every time."""
    compiled = pytest.fail
    monkeypatch.setattr(toolchain.Recipe, "compile", lambda *given: compiled("compiled"))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 << 20))
    assert "is full (5 MiB left, a build needs 64)" in refusal(tiny)
    real = os.statvfs("/")
    noexec = os.statvfs_result([*real[:8], os.ST_NOEXEC, real[9]])
    monkeypatch.setattr(os, "statvfs", lambda path: noexec)
    reason = refusal(Library(tiny.root))
    assert "from which no code may run (mounted noexec); mend it with: export TTA_EXT_" in reason


def test_no_folder_for_temporary_files(tiny: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.gettempdir", fail)
    assert "no folder for temporary files (no usable" in refusal(tiny)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_a_thread_compiles(
    slow: tuple[Library, Path, Path],  # noqa: F811
) -> None:
    """The child waits for its parent's compiler and then has the library too."""
    library, calls, gate = slow
    thread = threading.Thread(target=library.load)
    thread.start()
    wait_for(calls.exists)
    child = os.fork()
    if child == 0:
        gate.unlink()
        os._exit(0 if library.load().loaded else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
    assert library.result is not None and library.result.built


def test_a_library_of_something_else_is_walked_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads, but has none of our operators (this torch has no CUDA library of ours)."""
    if hasattr(torch_ops(), "cuda_version") and dispatch.has_kernel("philox", "cuda"):
        pytest.skip("a CUDA library is loaded")
    monkeypatch.setattr(build, "load", lambda device: LoadResult(True, "", Path("/other/_C.so")))
    monkeypatch.setattr(dispatch, "_stale", set())
    with pytest.warns(UserWarning, match=r"/other/_C.so was built for something else, this is"):
        assert "reinstall tta_ext" in dispatch._load("cuda")


def torch_ops() -> object:
    import torch

    return torch.ops.tta_ext
