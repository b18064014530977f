"""The models that are served: their names and their checkpoints."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import InvalidConfig, InvalidModel
from cluster.fleet import Fleet, ModelSpec
from controller.config.bounds import check_unique
from controller.config.groups import model_of
from workers.checkpoint import TOKENIZER, check_files

MAX_MODEL_CHARS = 200  # Hub names are up to 96; clients name a model in every request.


def check_model_names(fleet: Fleet) -> None:
    """Any that a client can ask for, once each."""
    for index, model in enumerate(fleet.models):
        if not model.name.isprintable() or " " in model.name or not 0 < len(model.name) <= MAX_MODEL_CHARS:
            raise InvalidConfig(f"models[{index}].name {model.name!r} is not 1 to {MAX_MODEL_CHARS} characters without spaces")
    check_unique([model.name for model in fleet.models], "models")


def check_checkpoint(fleet: Fleet, model: ModelSpec) -> None:
    """A path that looks like one must be a model directory; other names are left to the hub."""
    path = Path(model.path)
    if not path.is_absolute():
        return
    path = path.resolve()
    place = f"models[{fleet.models.index(model)}].path"
    if any(group.engine == "torch" for group in fleet.replicas if model_of(fleet, group) is model):
        try:
            check_files(path)
        except InvalidModel as error:
            raise InvalidConfig(f"{place}: {error}") from error
    elif not (path / TOKENIZER).is_file():  # All that the gateway needs of a model that nobody computes.
        raise InvalidConfig(
            f"{place}: {path / TOKENIZER} is missing"
            if path.is_dir()
            else f"{place}: {path} is no directory; `mobula model init` makes one"
        )
