"""Every dialect of Megatron that is read and written, and how a directory's own is told."""

import re
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from llmpipe.checkpoint.megatron.ali import ALI
from llmpipe.checkpoint.megatron.dialect import Dialect, fields_of
from llmpipe.checkpoint.megatron.epf import EPF, EPF_OLD
from llmpipe.checkpoint.megatron.legacy import LEGACY
from llmpipe.checkpoint.megatron.mcore import MCORE
from llmpipe.checkpoint.megatron.mfz import MFZ
from llmpipe.errors import UserError, nearest

DIALECTS = {dialect.name: dialect for dialect in (MCORE, LEGACY, EPF, EPF_OLD, ALI, MFZ)}


def named(name: str) -> Dialect:
    """The dialect that an option names."""
    if name not in DIALECTS:
        raise UserError(f"dialect {name!r}: {nearest(name, DIALECTS)}")
    return DIALECTS[name]


def detect(names: Iterable[str], args: Namespace | None, path: Path) -> Dialect:
    """The dialect of tensors with these names; UserError, which names the option, if none or several fit."""
    names, given = list(names), fields_of(args)
    fit = [dialect for dialect in DIALECTS.values() if not dialect.by_name_only and _fits(dialect, names)]
    if len(fit) > 1:
        fit = [dialect for dialect in fit if any(mark in given for mark in dialect.args_marks)] or fit
    if len(fit) != 1:
        known = f"may be of {' or '.join(d.system for d in fit)}"
        what = known if fit else f"holds tensors of no known Megatron ({', '.join(names[:4])})"
        options = "|".join(dialect.name for dialect in fit or DIALECTS.values())
        raise UserError(f"{path} {what}: say which with --source-dialect {options}")
    return fit[0]


def _fits(dialect: Dialect, names: list[str]) -> bool:
    there = all(any(re.search(mark, name) for name in names) for mark in dialect.marks)
    return there and not any(re.search(mark, name) for mark in dialect.unlike for name in names)
