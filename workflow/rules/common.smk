# Look-ups in the project's config files; the logic is in llmpipe.project and llmpipe.launch.
from pathlib import Path

from snakemake.exceptions import WorkflowError

from llmpipe import launch, project
from llmpipe.errors import UserError


wildcard_constraints:
    model="[^/]+",
    corpus="[^/]+",
    run="[^/]+",
    name="[^/]+",
    tp="[0-9]+",
    pp="[0-9]+",


def told(look_up, *arguments):
    """What a look-up finds; a mistake in a config file is told without a traceback."""
    try:
        return look_up(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


def by(wildcard, look_up, *more):
    """A look-up by a wildcard's value, as a function for input, params, threads and resources."""

    def found(wildcards):
        return told(look_up, getattr(wildcards, wildcard), *more)

    return found


def there(path, message):
    """`path`, which exists or is made by a rule (the demo makes its own); else the message is for the user."""
    if Path(path).exists() or any(known.is_producer(path) for known in workflow.rules):
        return path
    raise UserError(message)


def source(model):
    return there(project.model(model).source, project.missing_source(model))


def corpus_files(corpus):
    files = project.corpus(corpus).files
    return [there(file, project.missing_corpus(corpus, file)) for file in files]


def training(run, resource):
    return launch.resources(project.layout(run))[resource]


def tracked_files(wildcards):
    return project.tracked_files(wildcards.name, wildcards.stage)


PROJECT = told(project.project, config)
