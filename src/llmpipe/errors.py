"""The one exception that is for the user."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can mend: what was found, what was expected, in which file, what to do."""


def nearest(wrong: str, known: Iterable[str]) -> str:
    """The sentence that names the known word nearest to a wrong one, or all known words."""
    known = sorted(known)
    match = get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}"
