"""Is the Hub within reach? Asked once, with a short limit, so that an offline machine gets its answer at once."""

import os
import threading
import urllib.error
import urllib.request

from imdb_classifier.messages import UserError

PROBE_SECONDS = 3.0


def hub_is_reachable(seconds: float = PROBE_SECONDS) -> bool:
    """True if the Hub answers a HEAD request (any status) within `seconds`, False when set or found offline."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds
            ).close()
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


def go_offline() -> None:
    """Make the Hugging Face libraries use their local caches only, also where they are imported already."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def prepare_hub() -> bool:
    """Probe the Hub and switch to the local caches when it does not answer; True if it answered."""
    reachable = hub_is_reachable()
    if not reachable:
        go_offline()
    return reachable


def missing_from_hub(what: str, name: str, reachable: bool, hint: str) -> UserError:
    where = "on the Hub" if reachable else "in the local cache, and the Hub cannot be reached"
    return UserError(f"{what} {name!r} was not found {where}; {hint}")
