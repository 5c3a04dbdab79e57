"""Files that are written whole, and what becomes of those of an earlier run."""

import json
import re
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replace a file whole or not at all; two runs may write the same one, and the later stays."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("w", newline="") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def environment_in(path: Path) -> dict[str, Any]:
    """What a result file says of the run that wrote it; nothing where there is none, or none that can be read."""
    try:
        return dict(json.loads(path.read_text())["environment"])
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def keep_earlier(path: Path) -> None:
    """Move what another run of any command left at `path` to earlier/<when it started>-<its name>."""
    if path.exists():
        started = str(environment_in(path).get("started", "unknown")).partition("+")[0]
        kept = path.parent / "earlier" / f"{re.sub('[^0-9A-Za-z]+', '-', started)}-{path.name}"
        kept.parent.mkdir(exist_ok=True)
        path.replace(kept)
