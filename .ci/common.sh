# Steps that the scripts beside it share.
export CI=true PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_WAIT_POLICY=passive
exec </dev/null

ci_say() { printf '\n== %s (%s)\n' "$1" "$(date -u +%T)"; }

# ci_packages NAME...: of the system, also on a machine that has no lists of them yet.
ci_packages() { apt-get update -q && apt-get install -y -q --no-install-recommends "$@"; }

# A fresh virtual environment and build cache outside the tree, removed at the end.
ci_environment() {
  ci_say "environment"
  CI_FOLDER=$(mktemp -d)
  trap 'rm -rf "$CI_FOLDER"' EXIT
  if ! command -v c++ >/dev/null; then
    ci_packages g++
  fi
  python3 -m venv "$CI_FOLDER/venv"
  source "$CI_FOLDER/venv/bin/activate"
  export TTA_EXT_CACHE_DIR="$CI_FOLDER/cache"
}

ci_install() { pip install -q -c constraints.txt -e "$1"; }

ci_cpp_files() {
  find csrc -name '*.h' -print0 -o -name '*.cpp' -print0 -o -name '*.inl' -print0 \
    -o -name '*.cu' -print0 -o -name '*.cuh' -print0
}

# ci_build FOLDER [CMake options]: configure and compile.
ci_build() {
  local folder=$1
  shift
  cmake -S . -B "$folder" -G Ninja "$@" >/dev/null
  cmake --build "$folder"
}

# ci_ctest FOLDER [CMake options]: and run the C++ tests.
ci_ctest() {
  ci_build "$@"
  ctest --test-dir "$1" --output-on-failure
}

# The command in the README's N-th fenced shell block.
ci_readme_command() {
  awk -v want="$1" '
    /^```/ { if (open) { open = 0; next } open = 1; shell = /^```(sh|bash|shell|console)$/;
             if (shell) ++count; next }
    open && shell && count == want { print }' README.md
}
