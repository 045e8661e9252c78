"""What the model card says of loading a model: a command or a few lines of code, and what to know of it."""

from collections.abc import Sequence
from dataclasses import dataclass

HERE = "PATH_OF_THIS_DIRECTORY"


@dataclass(frozen=True, slots=True)
class Usage:
    """How a system reads the model."""

    format: str
    """What the directory is, in a few words."""
    system: str
    """Who reads it, and where the command is run."""
    code: str
    language: str = "sh"
    notes: tuple[str, ...] = ()
    """What else to know, a sentence each, without its full stop."""

    def markdown(self) -> str:
        """The section of the card."""
        notes = "".join(f"\n- {note}." for note in self.notes)
        return f"Read by {self.system}:\n\n```{self.language}\n{self.code}\n```\n" + (f"{notes}\n" if notes else "")


def command(program: str, options: Sequence[str]) -> str:
    """A command line, some options on each of its lines."""
    lines, indent = [program], "    "
    for option in options:
        if len(lines) == 1 or len(lines[-1]) + len(option) > 110:
            lines.append(f"{indent}{option}")
        else:
            lines[-1] += f" {option}"
    return " \\\n".join(lines)
