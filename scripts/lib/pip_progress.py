"""What pip is doing, read from what it prints: one live line on a terminal, a line now and then elsewhere; and what a failure means."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from typing import TextIO
from urllib.parse import unquote

UNIT = {"bytes": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}
EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Follows one run of pip."""

    def __init__(self, expected: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.expected, self.began, self.shown = expected, time.monotonic(), 0.0
        self.seen: set[str] = set()  # packages met
        self.downloaded = self.kept = 0.0  # MB from an index; MB from pip's cache or local files
        self.now, self.installing, self.rest = "asking the package index", 0, ""

    def read(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.line(line.strip())

    def line(self, line: str) -> None:
        if got := re.match(r"(Downloading|Using cached) (\S+) \(([\d.]+) (bytes|kB|MB|GB)\)", line):
            how, name, number, unit = got.groups()
            name = unquote(name.rsplit("/", 1)[-1])
            megabytes = float(number) * UNIT[unit]
            if how == "Downloading":
                self.downloaded += megabytes
            else:
                self.kept += megabytes
            if not name.endswith(".metadata"):
                self.met(name, f"downloading ({megabytes:.1f} MB)" if how == "Downloading" else "cached")
        elif (got := re.match(r"Processing (/\S+\.(?:whl|tar\.gz))", line)) and os.path.exists(got.group(1)):
            self.kept += os.path.getsize(got.group(1)) / 1e6
            self.met(os.path.basename(got.group(1)), "local file")
        elif line.startswith("WARNING: Retrying"):
            self.now = "the package registry does not answer; trying again"
        elif line.startswith("Installing collected packages:"):
            self.installing = line.count(",") + 1

    def met(self, file: str, how: str) -> None:
        name = "-".join(file.split("-")[:2])
        self.seen.add(name)
        self.now = f"{name} {how}"

    def text(self, installed: int = 0) -> str:
        head = f"{self.downloaded:.0f} MB downloaded, {time.monotonic() - self.began:.0f} s"
        if self.installing:
            return f"installing {min(installed, self.installing)} of {self.installing} packages; {head}"
        return f"{len(self.seen)} of about {self.expected} packages; {head}; {self.now}"

    def show(self, installed: int = 0) -> None:
        now = time.monotonic()
        if self.live:
            width = os.get_terminal_size(self.stream.fileno()).columns or 80
            self.stream.write("\r\x1b[K" + f"lf: {self.text(installed)}"[: width - 1])
            self.stream.flush()
        elif now - max(self.shown, self.began) >= EVERY:
            self.shown = now
            print(f"lf: {self.text(installed)}", file=self.stream, flush=True)

    def close(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def summary(self) -> str:
        kept = f" (and {self.kept:.0f} MB from pip's cache or local files)" if self.kept >= 1 else ""
        return f"{self.installing or len(self.seen)} packages, {self.downloaded:.0f} MB downloaded{kept}"


NO_LINK = (
    r"Failed to establish a new connection|Could not resolve|Max retries exceeded|ConnectTimeout|ReadTimeout|ProxyError|SSLError|"
    r"Temporary failure in name resolution|Network is unreachable|Connection refused|RemoteDisconnected|[45]\d\d (?:Client|Server) Error"
)


def diagnose(log: str, index: str, answers: Callable[[], bool] = lambda: True) -> str:
    """What a failed pip means, in words, and the end of what it said."""
    tail = "\n".join("    " + line for line in log.strip().splitlines()[-12:])
    version = ".".join(map(str, sys.version_info[:2]))
    if "No space left on device" in log or "[Errno 28]" in log:
        return f"the disk became full during the set-up. Free some and run the same again.\n{tail}"
    none = re.search(r"No matching distribution found for (\S+)", log)
    lost = re.search(NO_LINK, log)
    if lost or (none and not answers()):  # told not to try again, pip does not mention that nobody answered
        why = lost.group() if lost else "no answer"
        return (
            f"the package registry {index} cannot be reached ({why}). Check the network; behind a proxy set HTTPS_PROXY, and for a mirror "
            f"set PIP_INDEX_URL or `pip config set global.index-url URL`. Then run the same again.\n{tail}"
        )
    if none:
        return (
            f"{index} has no {none.group(1)} that fits Python {version} on this machine. Name another Python "
            f"(LF_PYTHON=, or put python3.11 first on PATH), or another index (PIP_INDEX_URL).\n{tail}"
        )
    return f"pip failed:\n{tail}"
