"""The Hub's rules for the metadata of model cards, as far as its documentation states them."""

import re

import yaml

LICENSES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "openrail++", "afl-3.0",
    "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0",
    "epl-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc",
    "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "ofl-1.1", "osl-3.0", "postgresql", "ncsa", "unlicense", "zlib",
    "pddl", "unknown", "other",
}  # fmt: skip
REPO_ID = r"[\w.-]+(/[\w.-]+)?"


def card_errors(content):
    """The errors that the Hub's validator would report; none for a valid card."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if block is None:
        return []
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = []
    if data.get("license", "mit") not in LICENSES:
        errors.append(f'"license" must be one of the Hub\'s identifiers, not {data["license"]!r}')
    if not isinstance(data.get("pipeline_tag", ""), str):
        errors.append('"pipeline_tag" must be a string')
    for key in ("tags", "datasets", "base_model", "metrics"):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            errors.append(f'"{key}" must be a list of strings')
        elif key in ("datasets", "base_model"):
            errors += [f'"{key}" with value {v!r} is not valid' for v in values if not re.fullmatch(REPO_ID, v)]
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[].name" is required')
        for result in model.get("results") or []:
            needed = [result.get("task", {}).get("type"), *(result.get("dataset", {}).get(k) for k in ("type", "name"))]
            metrics = result.get("metrics") or []
            if not all(needed) or not metrics or any(m.get("type") is None or m.get("value") is None for m in metrics):
                errors.append('"model-index[].results[]" needs task.type, dataset.type, dataset.name and metrics')
            errors += ['"value" must be a finite number' for m in metrics if m.get("value") != m.get("value")]
    return errors
