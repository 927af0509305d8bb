"""What is taken from the hub: of a model the safetensors, config and tokenizer, of a data set one split as a Parquet file.

Everything is of one commit, which the manifest names. Nothing that is taken can run code: no pickles, and Python files only where
the recipe says `trust_remote_code`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from curvelora.errors import UserError
from curvelora_eval.spec import DataSpec, ModelSpec

T = TypeVar("T")
# Files in the root of a repository; what lies in folders (original/, onnx/) are the same weights in another form.
WEIGHTS = re.compile(r"[\w.-]+\.safetensors")
DUPLICATES = re.compile(r"consolidated[\w.-]*\.safetensors")  # Mistral's own names, beside transformers' model-*
REST = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|tokenizer[\w.-]*|[\w.-]+\.safetensors\.index\.json|vocab\.txt|merges\.txt|[\w.-]+\.(model|tiktoken|jinja)|LICENSE[\w.-]*"
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class Remote:
    """A repository at one commit.

    Attributes:
        files: name -> (bytes, sha256), either null where the hub does not say it.
    """

    name: str
    commit: str
    files: dict[str, tuple[int | None, str | None]]


def find_model(spec: ModelSpec) -> Remote:
    """What will be taken of a model.

    Raises:
        UserError: the hub cannot be asked, has no such model or does not give it, or it has no safetensors.
    """
    from huggingface_hub import HfApi

    info = _asked(spec.path, lambda: HfApi().model_info(spec.path, revision=spec.revision, files_metadata=True))
    sizes = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings or ()}
    return Remote(spec.path, info.sha, choose(spec, sizes))


def choose(spec: ModelSpec, files: dict[str, Any]) -> dict[str, Any]:
    """The files of a repository that are taken. Raises `UserError` where it has no safetensors or no config.json."""
    weights = [name for name in files if WEIGHTS.fullmatch(name)]
    if any(not DUPLICATES.fullmatch(name) for name in weights):
        weights = [name for name in weights if not DUPLICATES.fullmatch(name)]
    if not weights:
        pickled = sorted(name for name in files if name.endswith(PICKLED))
        where = f" at {spec.revision}" if spec.revision else ""
        if pickled:
            raise UserError(
                f"{spec.path}{where} has its weights as {pickled[0]} only, which can run code when it is loaded: name a "
                "repository with safetensors (a pull request on the hub may have them: model.revision=refs/pr/N), or convert "
                "it yourself"
            )
        raise UserError(f"{spec.path}{where} has no .safetensors files, so it is no model that can be loaded")
    if "config.json" not in files:
        raise UserError(f"{spec.path} has no config.json, so transformers cannot load it")
    kept = {*weights, *(name for name in files if REST.fullmatch(name))}
    if spec.trust_remote_code:
        kept |= {name for name in files if re.fullmatch(r"\w+\.py", name)}
    return {name: files[name] for name in sorted(kept)}


def bring_model(remote: Remote, folder: Path) -> None:
    """Download the files into `folder`; what is there already and whole is kept.

    Raises:
        UserError: the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    what = {"revision": remote.commit, "allow_patterns": list(remote.files)}
    _asked(remote.name, lambda: snapshot_download(remote.name, local_dir=str(folder), **what))
    if lacking := [name for name in remote.files if not (folder / name).is_file()]:
        raise UserError(f"{remote.name}: the hub did not give {', '.join(lacking)}: fetch again")


def find_rows(spec: DataSpec) -> str:
    """The commit of a data set. Raises `UserError` where the hub cannot be asked, or has no such one."""
    from huggingface_hub import HfApi

    return _asked(spec.path, lambda: HfApi().dataset_info(spec.path)).sha


def bring_rows(spec: DataSpec, commit: str, file: Path) -> int:
    """Write a split as a Parquet file; returns how many rows it has.

    Raises:
        UserError: the hub does not give it, or it has several splits and the recipe names none.
    """
    from datasets import DatasetDict, load_dataset

    rows = _asked(spec.path, lambda: load_dataset(spec.path, split=spec.split, revision=commit))
    if isinstance(rows, DatasetDict):
        raise UserError(f"{spec.path} has the splits {', '.join(rows)}: name one of them as `split`")
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        rows.to_parquet(str(temporary))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows)


def _asked(name: str, ask: Callable[[], T]) -> T:
    """What the hub answers; its errors, and those of the network, as one sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{name} has to come from the hub, and HF_HUB_OFFLINE is set: unset it on a machine with network"
        )
    try:
        return ask()
    except GatedRepoError as error:
        raise UserError(
            f"{name} is given to those only who accepted its licence on the hub and log in (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name} is neither here nor on the hub (or it is private: `hf auth login`)") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no such revision on the hub") from error
    except OSError as error:
        # a full disk is one as well as everything that the network and the hub's answers can be
        raise UserError(f"{name} did not come: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # httpx and `datasets` have errors of their own that share no class
        raise UserError(f"{name} did not come: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
