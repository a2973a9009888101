"""The ids with which a model ends its replies, as the files of its folder name them."""

from pathlib import Path

from mtsql.files import read_json


def end_ids_of_folder(folder: Path | str) -> list[int]:
    """The `eos_token_id` of generation_config.json and config.json, in this order and each id once.

    For a folder of adapters the ids of its base model come after its own. Missing files, folders
    and keys name no ids. ValueError that names the file if it is damaged, or if its `eos_token_id`
    is not an id or a list of ids.
    """
    ids = _own_ids(Path(folder))
    adapter_file = Path(folder) / "adapter_config.json"
    if adapter_file.is_file():
        adapter = read_json(adapter_file, "model.path")
        base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
        if isinstance(base, str) and base:
            # load_policy looks for the base model in the same places.
            places = [start / base for start in (Path(), Path(folder), Path(folder).parent)]
            ids += _own_ids(next((place for place in places if place.is_dir()), places[0]))
    return list(dict.fromkeys(ids))


def _own_ids(folder: Path) -> list[int]:
    """The ids that the folder's own two files name."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name, "model.path")
        found = content.get("eos_token_id") if isinstance(content, dict) else None
        named = [] if found is None else found
        if not isinstance(named, list):
            named = [named]
        is_bad = any(type(i) is not int or i < 0 for i in named)
        if not isinstance(content, dict) or is_bad:
            raise ValueError(
                f"model.path {folder / name}: expected an object in which eos_token_id is a token "
                f"id or a list of them, not {found!r}"
            )
        ids += named
    return ids
