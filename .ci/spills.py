"""Compiles every CUDA kernel for every architecture; one that spills registers, or keeps anything
else in local memory, is an error of ptxas's own. Without nvcc it says so and passes.
"""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import tempfile
from pathlib import Path

from tta_ext.build import BuildError, cuda, toolchain

CSRC = Path(__file__).resolve().parent.parent / "csrc"
STRICT = "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error"


def fault(toolkit: cuda.Toolkit, source: Path, arch: str) -> str:
    """What the compiler says against a file, empty if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *toolkit.compiler.command,
                *cuda.FLAGS,
                f"-gencode=arch=compute_{arch},code=sm_{arch}",
                STRICT,
                f"-I{CSRC}",
                *("-cubin", str(source), "-o", str(Path(folder) / "kernels.cubin")),
            ],
            capture_output=True,
            text=True,
        )
    return f"{source.name}, sm_{arch}\n{done.stdout}{done.stderr}" if done.returncode else ""


def main() -> int:
    try:
        toolkit = cuda.find_toolkit()
    except BuildError as error:
        print(f"spills: skipped, {error}")
        return 0
    archs = [arch for arch in cuda.ARCHITECTURES if arch in toolkit.known]
    jobs = [(source, arch) for source in sorted(CSRC.glob("cuda/*.cu")) for arch in archs]
    with concurrent.futures.ThreadPoolExecutor(toolchain.job_count(len(jobs))) as pool:
        faults = list(filter(None, pool.map(lambda job: fault(toolkit, *job), jobs)))
    print(*faults, sep="\n", end="")
    if not faults:
        print(f"no kernel spills or uses local memory on sm_{', sm_'.join(archs)}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
