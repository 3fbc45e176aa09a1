#!/usr/bin/env bash
# Prints the path of a Python >= 3.12 that can make virtual environments: looks on PATH, then at the versions of
# pyenv, then asks uv. Without one it exits 1 with one sentence on stderr.
set -u

# A candidate counts only if it runs this: the shim of a pyenv version that is not active is on PATH, yet fails, and
# Debian's python3 has no ensurepip. The base interpreter is printed, for inside an active virtual environment
# "python3" may be the very .venv that is about to be rebuilt.
probe='
import sys
if sys.version_info < (3, 12):
    sys.exit(1)
import ensurepip, venv
print(getattr(sys, "_base_executable", None) or sys.executable)'

candidates() {
  local name dir
  for name in python3.12 python3.13 python3.14 python3 python; do
    type -aP "$name"
  done
  local IFS=:
  for dir in ${PYENV_ROOT:+"$PYENV_ROOT/shims"} ${HOME:+"$HOME/.pyenv/shims"} $PATH; do
    case $dir in
      */shims) printf '%s\n' "${dir%/shims}"/versions/*/bin/python ;;
    esac
  done
  if type -P uv >/dev/null; then
    UV_PYTHON_PREFERENCE=only-managed UV_PYTHON_DOWNLOADS=never uv python find --system '>=3.12' 2>/dev/null
  fi
}

while IFS= read -r candidate; do
  if [ -x "$candidate" ] && found=$("$candidate" -c "$probe" 2>/dev/null </dev/null) && [ -x "$found" ]; then
    printf '%s\n' "$found"
    exit 0
  fi
done < <(candidates)

echo "No Python >= 3.12 with venv and ensurepip was found on PATH, in pyenv or by uv: install one, for instance" \
  "with 'uv python install 3.12', 'pyenv install 3.12' or 'apt-get install python3.12-venv', and run this again." >&2
exit 1
