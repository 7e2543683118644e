"""From what a person calls a model to the files on this computer.

`demo`, a folder, a `.gguf`, `org/name` or `org/name:Q4_K_M` on the hub. It opens no model file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moesaic.errors import CheckpointError, ModelNotFoundError
from moesaic.weights.hub import Hub
from moesaic.weights.safetensors_file import INDEX, SINGLE, read_shard_names

__all__ = ["ModelFiles", "quant_groups", "resolve"]

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<tag>[\w.-]+))?")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
# The last part of a GGUF's name that says how it is quantised, as publishers write it.
_LABEL = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4(?:_\w+)?|BF16|F16|F32|FP16|FP32))$", re.IGNORECASE)
_TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    }
)
_CONFIG_FILES = frozenset({"config.json", "generation_config.json"})


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model lies.

    Attributes:
        source: what the person wrote.
        checkpoint: a `.gguf` (a split one's first part) or a folder, for `open_checkpoint`.
        tokenizer: a folder with tokenizer files, or None if the model came without.
    """

    source: str
    checkpoint: Path
    tokenizer: Path | None


def resolve(model: str, gguf: str | Path | None = None, offline: bool = False, hub: Hub | None = None) -> ModelFiles:
    """Find a model; what is on the hub is downloaded into huggingface_hub's cache.

    Args:
        model: `demo`, a folder, a `.gguf`, `org/name` or `org/name:QUANT`.
        gguf: weights to use instead of the model's own; `model` then gives only the tokenizer.
        offline: take from the hub only what is in the cache.
        hub: another hub than the public one.

    Raises:
        ModelNotFoundError: there is no such model, or the name fits several files (the message lists them).
    """
    hub = Hub(offline=offline) if hub is None else hub
    if gguf is not None:
        weights = Path(gguf).expanduser()
        if not weights.is_file():
            raise ModelNotFoundError(f"{weights}: no such file.")
        return ModelFiles(model, weights, _tokenizer_of(model, hub))
    if model == "demo":
        return _demo()
    path = Path(model).expanduser()
    if path.exists():
        return ModelFiles(model, path, _tokenizer_folder(path if path.is_dir() else path.parent))
    match = _HUB_NAME.fullmatch(model)
    if match is None or (match["tag"] is None and model.endswith((".gguf", ".safetensors"))):
        raise ModelNotFoundError(
            f"{model}: no such file or folder; expected 'demo', a folder, a .gguf, or org/name[:QUANT] on the hub."
        )
    return _from_hub(model, match["repo"], match["tag"], hub)


def _demo() -> ModelFiles:
    """The model that is shipped inside the package."""
    folder = Path(__file__).parent.parent / "demo"
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelNotFoundError(f"{folder}: holds {len(files)} .gguf files: this installation has no demo model.")
    return ModelFiles("demo", files[0], _tokenizer_folder(folder / "tokenizer"))


def _tokenizer_folder(folder: Path) -> Path | None:
    known = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    return folder if known else None


def _tokenizer_of(model: str, hub: Hub) -> Path | None:
    """The tokenizer files of a model whose weights are not wanted."""
    if model == "demo":
        return _demo().tokenizer
    path = Path(model).expanduser()
    if path.exists():
        return _tokenizer_folder(path if path.is_dir() else path.parent)
    match = _HUB_NAME.fullmatch(model)
    if match is None:
        raise ModelNotFoundError(f"{model}: no such folder, and not the name of a hub repository (org/name).")
    return _fetch_tokenizer(match["repo"], hub.files(match["repo"]), hub)


def _fetch_tokenizer(repo: str, files: Iterable[str], hub: Hub) -> Path | None:
    names = sorted(_TOKENIZER_FILES.intersection(files))
    return _tokenizer_folder(hub.fetch(repo, names)) if names else None


def _from_hub(model: str, repo: str, tag: str | None, hub: Hub) -> ModelFiles:
    files = hub.files(repo)
    safetensors = INDEX in files or SINGLE in files
    if tag is None and safetensors:
        return ModelFiles(model, *_fetch_safetensors(repo, files, hub))
    names = _choose_gguf(repo, tag, files)
    folder = hub.fetch(repo, names)
    return ModelFiles(model, folder / names[0], _fetch_tokenizer(repo, files, hub))


def _fetch_safetensors(repo: str, files: list[str], hub: Hub) -> tuple[Path, Path | None]:
    """The shards that the index names, config and tokenizer; not what else a repository may hold."""
    names = sorted((_CONFIG_FILES | _TOKENIZER_FILES).intersection(files))
    if "config.json" not in names:
        raise ModelNotFoundError(f"{repo}: has safetensors but no config.json.")
    shards = [SINGLE]
    if INDEX in files:
        shards = read_shard_names(hub.fetch(repo, [INDEX]) / INDEX)
        names.append(INDEX)
    absent = [shard for shard in shards if shard not in files]
    if absent and not hub.is_offline:
        raise CheckpointError(repo, f"the index names {absent[0]}, which the repository does not have.", tensor=INDEX)
    folder = hub.fetch(repo, [*names, *shards])
    return folder, _tokenizer_folder(folder)


def quant_groups(files: Iterable[str]) -> dict[str, list[str]]:
    """Models among GGUF file names: label (quantisation, or the whole name) -> its parts in order.

    Names that share a label get their folder or whole name instead, so that each can be asked for.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(files):
        path = PurePosixPath(name)
        if path.suffix.lower() == ".gguf" and not path.name.lower().startswith("mmproj"):
            groups.setdefault(str(path.with_name(_SPLIT.sub("", path.stem))), []).append(name)
    labels = {stem: _label(stem) for stem in groups}
    counts = list(labels.values())
    return {
        label if counts.count(label) == 1 else PurePosixPath(stem).name: groups[stem] for stem, label in labels.items()
    }


def _label(stem: str) -> str:
    match = _LABEL.search(stem)
    return match[1].upper() if match else PurePosixPath(stem).name


def _choose_gguf(repo: str, tag: str | None, files: list[str]) -> list[str]:
    """The parts of the model that `tag` names, or of the only one."""
    groups = quant_groups(files)
    if not groups:
        raise ModelNotFoundError(f"{repo}: holds neither safetensors nor GGUF files.")
    if tag is None:
        chosen = next(iter(groups.values())) if len(groups) == 1 else None
    else:
        wanted = tag.removesuffix(".gguf").upper()
        by_label = {_SPLIT.sub("", PurePosixPath(parts[0]).stem).upper(): parts for parts in groups.values()}
        by_label |= {label.upper(): parts for label, parts in groups.items()}
        chosen = by_label.get(wanted) or by_label.get(f"UD-{wanted}")
    if chosen is None:
        listed = ", ".join(f"{repo}:{label}" for label in groups)
        problem = "holds several models" if tag is None else f"has no GGUF named {tag}"
        raise ModelNotFoundError(f"{repo}: {problem}; choose one of {listed}.")
    _check_parts(repo, chosen)
    return chosen


def _check_parts(repo: str, names: list[str]) -> None:
    """A split model must be there whole."""
    match = _SPLIT.search(PurePosixPath(names[0]).stem)
    if match is not None and (int(match[1]), int(match[2])) != (1, len(names)):
        raise ModelNotFoundError(f"{repo}: has {len(names)} of {int(match[2])} parts of {names[0]}.")
