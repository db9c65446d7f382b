"""First Python of scripts/launch and scripts/test: is it new enough? Any Python can read this file, 2.7 included, so that it can say no."""

# ruff: noqa: UP010, UP031
from __future__ import print_function

import os
import subprocess
import sys

OLDEST = (3, 10)
OTHERS = ("python3.11", "python3.12", "python3.13", "python3.10", "python3.14")


def too_old(version):
    return tuple(version[:2]) < OLDEST


def complaint(version, python, given):
    """What to say of a Python that is too old; `given`: the user named it with LF_PYTHON."""
    return "lf: %s is Python %d.%d; lf needs %d.%d or newer. %s" % (
        (python,) + tuple(version[:2]) + OLDEST
        + ("Name a newer one in LF_PYTHON." if given else "Install one, or name it: LF_PYTHON=/path/to/python3.11",)
    )


def newer_on_path(names=OTHERS):
    """The first of these commands that runs and is new enough, or None. It is run: a version manager's shim may exist and do nothing."""
    for name in names:
        try:
            with open(os.devnull, "w") as null:
                out = subprocess.check_output([name, "-c", "import sys; print(sys.executable, *sys.version_info[:2])"], stderr=null)
            python, major, minor = out.decode().strip().rsplit(" ", 2)
        except (OSError, ValueError, subprocess.CalledProcessError):
            continue
        if not too_old((int(major), int(minor))):
            return python
    return None


def main():
    if too_old(sys.version_info):
        given = bool(os.environ.get("LF_PYTHON"))
        other = None if given else newer_on_path()
        if other is None:
            print(complaint(sys.version_info, sys.executable, given), file=sys.stderr)
            return 1
        print("lf: %s is Python %d.%d, too old; %s is used" % ((sys.executable,) + tuple(sys.version_info[:2]) + (other,)), file=sys.stderr)
        sys.stderr.flush()
        os.execv(other, [other] + sys.argv)
    import environment  # from here on the syntax is that of Python 3.10

    return environment.start(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
