# Sourced by scripts/launch and scripts/test. Leaves in $python the Python to begin with: LF_PYTHON, else the caller's.
for python in ${LF_PYTHON:+"$LF_PYTHON"} python3 python python3.11 python3.12 python3.13 python3.10 ''; do
    command -v "${python:-python3}" >/dev/null 2>&1 && break
    [ -z "${LF_PYTHON:-}" ] || { echo "lf: LF_PYTHON=$LF_PYTHON is no program; give the path of a Python 3.10 or newer" >&2; exit 1; }
done
[ -n "$python" ] || { echo "lf: no python3 on PATH; install Python 3.10 or newer, or give one with LF_PYTHON=/path/to/python" >&2; exit 1; }
