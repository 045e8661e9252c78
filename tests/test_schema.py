"""The schemas for editors: current, and of the same mind as the loader."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from llmpipe import schema
from llmpipe.errors import UserError
from llmpipe.yaml_file import load

ROOT = Path(__file__).parents[1]
KINDS = {"models": "model", "corpora": "corpus", "recipes": "recipe", "runs": "run", "config": "config"}
SHIPPED = sorted(path for project in (ROOT, ROOT / "demo") for path in (project / "config").rglob("*.yaml"))


def kind_of(path: Path) -> str:
    return KINDS[path.parent.name]


def validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        yaml.safe_load((ROOT / "workflow/schemas" / f"{kind}.schema.yaml").read_text())
    )


@pytest.mark.parametrize("kind", schema.FILES)
def test_shipped_schema_is_current(kind: str) -> None:
    shipped = (ROOT / "workflow/schemas" / f"{kind}.schema.yaml").read_text()
    assert shipped == schema.schema_text(kind), "run `python -m llmpipe.schema workflow/schemas`"
    jsonschema.Draft202012Validator.check_schema(yaml.safe_load(shipped))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_config_files_pass_schema_and_loader(path: Path) -> None:
    validator(kind_of(path)).validate(yaml.safe_load(path.read_text()))
    load(schema.FILES[kind_of(path)], path)
    first = path.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == ROOT / "workflow/schemas" / f"{kind_of(path)}.schema.yaml"


@pytest.mark.parametrize(
    "change", [{"stepz": 3}, {"steps": "many"}, {"precision": "fp8"}, {"schedule": {"warmp": 1}}, {"betas": 0.9}]
)
def test_what_the_loader_refuses_the_schema_refuses(change: dict, tmp_path: Path) -> None:
    values = {"seq_len": 8, "global_batch": 8, "steps": 8, "lr": 1e-3}
    validator("recipe").validate(values)
    assert list(validator("recipe").iter_errors(values | change))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | change))
    with pytest.raises(UserError):
        load(schema.FILES["recipe"], path)


def test_every_field_is_described() -> None:
    for kind in schema.FILES.values():
        bare = [
            name
            for name, entry in schema.schema_of(kind)["properties"].items()
            if "description" not in entry and name not in ("betas", "eps", "experiment")
        ]
        assert not bare, f"{kind.__name__}: a docstring is missing under {bare}"
