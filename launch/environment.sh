# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment in .venv with lime_dist installed, made once, and again when
# pyproject.toml has changed.
# PYTHON names the interpreter to make it with (3.10 or newer); VENV another place for it.
VENV="$(realpath -m "${VENV:-.venv}")"
if [ pyproject.toml -nt "$VENV/.lime_dist_installed" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 2; }
  echo "Installing PyTorch and lime_dist into $VENV; this takes some minutes." >&2
  "${PYTHON:-python3}" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[test]"
  touch "$VENV/.lime_dist_installed"
fi
export PATH="$VENV/bin:$PATH"
