# Look-ups in the project's config files; the logic is in llmpipe.project and llmpipe.launch.
import os
from pathlib import Path

from snakemake.exceptions import WorkflowError

from llmpipe import launch
from llmpipe.errors import UserError
from llmpipe.project import configs, inputs, left_jobs, needs, options, outputs
from llmpipe.train import lease


def told(look_up, *arguments):
    """What a look-up finds; a mistake in a config file is told without a traceback."""
    try:
        return look_up(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


def there(path):
    """Whether a path exists, or a rule makes it, as the demo's rules make its inputs."""
    return Path(path).exists() or any(
        known.is_producer(path) for known in workflow.rules
    )


def by(wildcard, look_up, *more):
    """A look-up by a wildcard's value, or by several's ("model corpus"), for input, params, threads and resources."""

    def found(wildcards):
        values = [getattr(wildcards, name) for name in wildcard.split()]
        return told(look_up, *values, *more)

    return found


def minutes(wildcard, look_up):
    """The same for a job's minutes, of which a retry has more."""

    def found(wildcards, attempt):
        return needs.retried(by(wildcard, look_up)(wildcards), attempt)

    return found


def checked(check, *names):
    """For a target's input: no file, but a look at all its config files, before outputs count for up to date."""

    def found(wildcards):
        for name in names:
            told(check, name, there)
        return []

    return found


PROJECT = told(configs.project, config)
os.environ.update(options.track_environment(PROJECT))
