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
    """What a look-up finds; a mistake in a config file is told in one sentence, without a traceback."""
    try:
        return look_up(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


def of_run(look_up):
    """A look-up by the {run} wildcard, as an input, param or resource function."""
    return lambda wildcards: told(look_up, wildcards.run)


def resource(name):
    """A resource of the {run} wildcard's training job."""
    return lambda wildcards: launch.resources(told(project.layout, wildcards.run))[name]


def there(path, message):
    """`path`, which exists or is made by a rule (the demo makes its own); else the message is for the user."""
    if Path(path).exists() or any(rule.is_producer(path) for rule in workflow.rules):
        return path
    raise WorkflowError(message)


def source(wildcards):
    path = told(project.model, wildcards.model).source
    return there(path, project.missing_source(wildcards.model))


def shape_option(wildcards):
    return project.shape_option(wildcards.model)


def corpus_files(wildcards):
    files = told(project.corpus, wildcards.corpus).files
    return [
        there(file, project.missing_corpus(wildcards.corpus, file)) for file in files
    ]


def tracked_files(wildcards):
    return project.tracked_files(wildcards.name, wildcards.stage)


RUNS = told(project.project).runs
