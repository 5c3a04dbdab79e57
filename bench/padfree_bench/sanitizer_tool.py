"""Where NVIDIA's compute-sanitizer is."""

import shutil
import sysconfig
from pathlib import Path

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")


def find_compute_sanitizer() -> str | None:
    """The tool on PATH, in a CUDA toolkit or in an installed wheel; None where there is none."""
    if found := shutil.which("compute-sanitizer"):
        return found
    places = [
        *Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/bin/compute-sanitizer"),
        *Path("/usr/local").glob("cuda*/bin/compute-sanitizer"),
    ]
    return next((str(place) for place in places if place.is_file()), None)
