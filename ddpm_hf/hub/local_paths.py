"""Texts without the paths of this machine: a published file names a local folder by the last part of its path only."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

PATHS = ("dataset", "init_from", "output_dir")  # options of a run that may be paths
TEXTS = (".json", ".yaml", ".yml", ".md")


def is_local(name: str) -> bool:
    """Whether a data set or folder is given as a path, not as a name on the Hub."""
    if not name:
        return False
    path = Path(name).expanduser()
    return path.is_absolute() or name[:1] in (".", "~") or name.count("/") > 1 or "\\" in name or path.exists()


def public_name(name: str) -> str:
    """The last part of a path; other names stay as they are."""
    if not is_local(name):
        return name
    return re.split(r"[/\\]", str(Path(name).expanduser().resolve()))[-1]


def public_config(config: dict) -> dict:
    """A training configuration with `public_name` of its data and its folder, and of any absolute path in it."""
    named = {key: public_name(config[key]) for key in PATHS if isinstance(config.get(key), str)}
    folder = config.get("output_dir")
    if isinstance(folder, str) and not (Path(folder).is_absolute() or folder[:1] in (".", "~")):
        named["output_dir"] = folder  # where a run with this configuration writes, on any machine
    return _with_names(config, {}) | named


def without_local_paths(files: dict[str, Path]) -> dict[str, bytes]:
    """The published JSON, YAML and Markdown files whose text names local folders, with the last parts of the paths instead.

    Raises ValueError if a file still names a folder of this machine, or cannot be read as text.
    """
    found: dict[str, str] = {}  # path -> its last part
    changed = {}
    for name, file in files.items():
        text = _text(name, file)
        if text is None or name.endswith(".md"):
            continue
        is_yaml = name.endswith((".yaml", ".yml"))
        try:
            value = yaml.safe_load(text) if is_yaml else json.loads(text)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} must be {'YAML' if is_yaml else 'JSON'} to be published: {reason}.") from error
        public = _with_names(value, found)
        if name.endswith("config.yaml") and isinstance(public, dict):
            public = public_config(public)
            found |= {value[key]: public[key] for key in PATHS if value.get(key) != public.get(key)}
        if public != value:
            text = (
                yaml.safe_dump(public, sort_keys=False, allow_unicode=True)
                if is_yaml
                else json.dumps(public, indent=2) + "\n"
            )
            changed[name] = text.encode()
    # "." and the like are no words to look for in a text.
    paths = {path: last for path, last in found.items() if is_local(path) and re.search(r"[/\\]\w", path)}
    for name, file in files.items():
        if name.endswith(".md"):
            text = public_text = _text(name, file)
            for path in sorted(paths, key=len, reverse=True):
                public_text = re.sub(
                    rf"(?<!\w){re.escape(path)}(?![\w-])", lambda _, last=paths[path]: last, public_text
                )
            if public_text != text:
                changed[name] = public_text.encode()
    _check_no_paths(files, changed, paths)
    return changed


def _text(name: str, file: Path) -> str | None:
    if not name.endswith(TEXTS):
        return None
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text to be published: {error.reason} at byte {error.start}.") from error


def _with_names(value: Any, found: dict[str, str]) -> Any:
    """A JSON value with `public_name` of the strings that are absolute paths, which are added to `found`."""
    if isinstance(value, dict):
        return {key: _with_names(entry, found) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_names(entry, found) for entry in value]
    if isinstance(value, str) and re.match(r"(/|~/|[A-Za-z]:\\|\\\\)[^/\s]", value):
        found[value] = public_name(value)
        return found[value]
    return value


def _check_no_paths(files: dict[str, Path], changed: dict[str, bytes], paths: dict[str, str]) -> None:
    """ValueError for a file that names one of the paths, or the home folder. Of weights, the metadata are searched."""
    home = str(Path.home())
    words = {path for path in paths if Path(path).is_absolute()} | ({home} if len(home) > 1 else set())
    for name, file in files.items():
        content = changed[name] if name in changed else _searched(file)
        behind = rb"(?<!\w)" if name.endswith(TEXTS) else b""  # https://host/data is not /data
        for word in words:
            if re.search(behind + re.escape(word.encode()) + rb"(?![\w-])", content):
                raise ValueError(f"{file} must not name a folder of this machine to be published, got {word!r}.")


def _searched(file: Path) -> bytes:
    with open(file, "rb") as stream:
        if file.suffix != ".safetensors":
            return stream.read()
        # 8 bytes for the length of the header (checked before), then JSON with the metadata.
        return stream.read(int.from_bytes(stream.read(8), "little"))
