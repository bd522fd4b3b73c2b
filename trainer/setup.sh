#!/usr/bin/env bash
# Find or make a Python that can train, and leave it at ~/skyspot/python. Safe to run again; exits 0 or 1 and nothing else,
# because SkyPilot counts the exit codes of setup among those to recover on.
set -Eeuo pipefail
trap 'exit 1' ERR
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=$HOME/skyspot
mkdir -p "$base" || { echo "Error: $base cannot be created. Set HOME to a writable folder." >&2; exit 1; }
trap 'echo "$SECONDS" > "$base/setup-seconds" || true' EXIT  # For the attempt's record.

check() { (cd "$here/.." && timeout 120 "$@" -m trainer.check); }

# A script, not a symlink: started through a symlink in another folder, Python does not find its environment.
keep() { printf '#!/bin/sh\nexec "%s" "$@"\n' "$1" > "$base/python"; chmod +x "$base/python"; }

# The packages of the experiment trackers that the task reports to, where they are missing.
add_trackers() {
  local names=${SKYSPOT_REPORT_TO:-} name missing=()
  for name in ${names//,/ }; do
    case $name in tensorboard | wandb | trackio) ;; *) continue ;; esac  # The trainer refuses any other in a line.
    "$base/python" -c "import sys; from importlib.util import find_spec as find; sys.exit(find('$name') is None)" ||
      missing+=("$name")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  echo "Installing ${missing[*]}"
  if [ -x "$uv" ]; then
    timeout 600 "$uv" pip install -q --python "$("$base/python" -c 'import sys; print(sys.executable)')" "${missing[@]}" || exit 1
  else
    timeout 600 "$base/python" -m pip install -q "${missing[@]}" || exit 1
  fi
}

uv=$(command -v uv || true)
[ -n "$uv" ] || uv=$HOME/.local/bin/uv
if [ -x "$base/python" ] && check "$base/python" 2>/dev/null; then
  add_trackers
  exit 0
fi
for candidate in python3 python; do
  found=$(command -v "$candidate" || true)
  if [ -n "$found" ] && check "$found" 2>/dev/null; then
    keep "$("$found" -c 'import sys; print(sys.executable)')"
    check "$base/python"
    add_trackers
    exit 0
  fi
done

if [ ! -x "$uv" ]; then
  echo "Error: no Python on this machine meets the requirements of training, and there is no uv to install it with (looked for $uv)." >&2
  check python3 >&2 || true
  exit 1
fi
echo "Installing the requirements of training into $base/venv"
[ -x "$base/venv/bin/python" ] || timeout 300 "$uv" venv -q --python '>=3.10,<3.14' "$base/venv" || exit 1
VIRTUAL_ENV=$base/venv timeout 1800 "$uv" pip install -q -r "$here/requirements.lock" || exit 1
keep "$base/venv/bin/python"
check "$base/python" || { echo "Error: after the installation, $base/python still lacks the requirements above." >&2; exit 1; }
add_trackers
