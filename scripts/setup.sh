#!/usr/bin/env bash
# Sets up everything that zenray needs, in .venv beside this folder. Run it as often as you like.
#   scripts/setup.sh                    the Python packages
#   scripts/setup.sh --servers wanted   and the servers that tests need; what cannot be installed is named
#   scripts/setup.sh --servers needed   the same, and fail when one is missing
# Settings: ZENRAY_PYTHON (a Python 3.11), ZENRAY_PLATFORM (cpu or gpu).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
test311='import sys; raise SystemExit(sys.version_info[:2] != (3, 11))'

shopt -s nullglob
for python in ${ZENRAY_PYTHON:+"$ZENRAY_PYTHON"} python3.11 python3 python \
  /usr/bin/python3.11 /usr/local/bin/python3.11 "$HOME"/.pyenv/versions/3.11*/bin/python \
  "$HOME"/.local/share/uv/python/cpython-3.11*/bin/python3.11; do
  if "$python" -c "$test311" >/dev/null 2>&1; then
    exec "$python" "$here/setup.py" "$@"
  fi
done

cat >&2 <<'EOF'
Set-up stopped: there is no Python 3.11 on this machine (zenray needs exactly 3.11: the pinned wheels are built for it).
What to do: install it, for example with one of
  sudo apt-get install python3.11 python3.11-venv      # Debian 12; Ubuntu with the deadsnakes archive
  sudo dnf install python3.11                          # Fedora, RHEL
  uv python install 3.11        or        pyenv install 3.11
or say where it is: ZENRAY_PYTHON=/path/to/python3.11 make setup
EOF
exit 1
