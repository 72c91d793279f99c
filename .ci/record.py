"""Results of the long checks, tied to the sources they were run on.

``record.py run NAME COMMAND...`` runs a long check and notes how it ended in ``.ci/full.json``;
``record.py skip NAME REASON`` notes that one of ``OPTIONAL`` cannot run here;
``record.py check`` fails unless every check of ``CHECKS`` passed on the sources as they are now.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / ".ci" / "full.json"

# What the long checks are about: the kernels and the operators, and for some the tests they run
# (TESTS). A change to anything else cannot change how they end.
SOURCES = (
    "CMakeLists.txt",
    "csrc/**/*",
    "tta_ext/build/*.py",
    "tta_ext/rng.py",
    "tta_ext/rules.py",
    "tta_ext/schemas.py",
    "tta_ext/ops/*.py",
    "tta_ext/backends/**/*.py",
)
TESTS = {
    "grid": ("tests/*.py",),
    "oldest": (".ci/oldest", "tta_ext/decoding/*.py", "tta_ext/hf.py", "tests/*.py"),
    "device": (
        ".ci/fake_device",
        "tests/cases.py",
        "tests/conftest.py",
        "tests/test_bits.py",
        "tests/test_cuda_device.py",
    ),
}
CHECKS = ("sanitizers", "aarch64", "exhaustive", "grid", "oldest", "device")
# Those that need what not every machine has.
OPTIONAL = ("aarch64", "device")

# The lines of a check that sum it up.
SUMMARY = re.compile(r"\d+% tests passed|\d+ passed|^(exp|log|normal_pair): ")


def digest(name: str) -> str:
    """SHA-256 of the names and contents of a check's sources."""
    patterns = (*SOURCES, *TESTS.get(name, ()))
    found = sorted({p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()})
    text = hashlib.sha256()
    for path in found:
        if path.suffix != ".pyc":
            text.update(f"{path.relative_to(ROOT)}\0".encode())
            text.update(hashlib.sha256(path.read_bytes()).digest())
    return text.hexdigest()


def load() -> dict[str, dict[str, object]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def run(name: str, command: list[str]) -> int:
    """Run a check, show its output, record its end."""
    before, start = digest(name), time.monotonic()
    summary: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if SUMMARY.search(line):
                summary.append(re.sub(r" in [\d.]+s.*", "", line.strip("= \n")))
    passed = process.returncode == 0 and digest(name) == before
    record = load()
    record[name] = {
        "passed": passed,
        "sources": before,
        "seconds": round(time.monotonic() - start),
        "summary": "; ".join(summary),
    }
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return process.returncode or int(not passed)


def skip(name: str, reason: str) -> int:
    """Note that a check was not run on these sources, and why."""
    print(f"{name} skipped: {reason}")
    record = load()
    record[name] = {
        "passed": True,
        "sources": digest(name),
        "seconds": 0,
        "summary": f"skipped: {reason}",
    }
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return 0


def check() -> int:
    """0 if every long check passed on these sources, or says why it could not run."""
    record = load()
    stale = [
        name
        for name in CHECKS
        if not record.get(name, {}).get("passed") or record[name].get("sources") != digest(name)
    ]
    if stale:
        print(
            f"not passed on these sources: {', '.join(stale)}; run .ci/full and commit its record"
        )
        return 1
    for name in CHECKS:
        print(f"{name}: {record[name]['summary']} ({record[name]['seconds']} s)")
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        sys.exit(check())
    if len(sys.argv) > 3 and sys.argv[1] == "run" and sys.argv[2] in CHECKS:
        sys.exit(run(sys.argv[2], sys.argv[3:]))
    if len(sys.argv) == 4 and sys.argv[1] == "skip" and sys.argv[2] in OPTIONAL:
        sys.exit(skip(sys.argv[2], sys.argv[3]))
    sys.exit(__doc__)
