"""The chat template that a model was trained with, for an export whose tokenizer has none of its own."""

import logging
from pathlib import Path
from typing import Any

from llmpipe.data.chat.templates import OWN, OWN_FILE, open_template, own_texts
from llmpipe.data.tokenizer import find_tokenizer, open_tokenizer
from llmpipe.files import write_text

log = logging.getLogger(__name__)


def add_chat_template(directory: Path, run: dict[str, Any]) -> str | None:
    """Write the run's named template as transformers reads it; returns its name, None if there is nothing to write.

    Nothing is written over a template that is there, or where the run's chats had several.
    """
    names = sorted({part["template"] for part in run.get("data") or [] if part.get("template") not in (None, OWN)})
    if not names or own_texts(directory) or not find_tokenizer(directory):
        return None
    if len(names) > 1:
        log.warning("the chats had the templates %s: the export gets none of them", ", ".join(names))
        return None
    write_text(directory / OWN_FILE, open_template(names[0], open_tokenizer(directory)).for_serving)
    return names[0]
