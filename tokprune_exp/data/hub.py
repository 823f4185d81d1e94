"""The Hugging Face hub: asked once whether it answers, so that without a network nothing waits through its retries."""

import logging
from functools import cache

import datasets
import huggingface_hub
from huggingface_hub.utils import get_session

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that the hub has to answer."""


@cache
def local_cache_if_unreachable() -> None:
    """See whether the hub answers; if not, read from its local cache only, for the rest of the process."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # whatever the HTTP library of the day raises; an answer of any status is none
        log.warning(
            "%s cannot be reached (%s): only its local cache is read", huggingface_hub.constants.ENDPOINT, error
        )
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
