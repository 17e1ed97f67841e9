"""Merging two versions of a model card: what a person has changed in the older one is kept.

A card ends with a comment that records what was generated: a hash of every section, the metadata, a hash of the whole,
and the facts that it was generated from. Whatever differs from the record was changed by a person.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.utils import yaml_dump

MARKER = re.compile(r"<!-- (/?)ddpm-hf:(\w{1,40}) -->")
RECORD_START, RECORD_END = "<!-- ddpm-hf generated the sections above: ", " -->"
RECORD_TYPES = {"sections": dict, "metadata": dict, "facts": dict, "whole": str, "weights": str}
MAX_DEPTH = 50
MAX_CHARACTERS = 1_000_000  # far beyond any card; cards come from strangers, too
RESULTS = "model-index"
AUTOMATIC = "This model card has been automatically generated"  # by diffusers' push_to_hub, not written by a person


@dataclass
class Card:
    """A card, taken apart.

    Args:
        metadata: the YAML block.
        text: the Markdown without the record, with Unix line ends.
        record: what was generated: "sections" (hashes by name), "metadata", "whole" (hash), and the caller's additions.
        front: the YAML block as written, with its comments.
    """

    metadata: dict[str, Any]
    text: str
    record: dict[str, Any]
    front: str = ""

    def sections(self) -> dict[str, str]:
        """The text of each generated section, by name."""
        return {name: self.text[start:end].strip() for name, start, end in self.places()}

    def places(self) -> list[tuple[str, int, int]]:
        """Name, start and end of what stands between the markers of each section, in order. Linear in the text."""
        found: list[tuple[str, int, int]] = []
        opened: re.Match[str] | None = None
        for marker in MARKER.finditer(self.text):
            if not marker[1]:
                opened = marker
            elif opened is not None and marker[2] == opened[2]:
                found.append((marker[2], opened.end(), marker.start()))
                opened = None
        return found

    def fingerprint(self) -> str:
        """A hash of all that a person can edit."""
        return _hash(json.dumps(self.metadata, sort_keys=True, default=str) + self.text.strip())

    def is_edited(self) -> bool:
        """Whether a person has changed the card since this module wrote it."""
        return self.record.get("whole") != self.fingerprint() and AUTOMATIC not in self.text


def parse_card(content: str) -> Card:
    """Take a card apart.

    The time and the memory that it takes are linear in its length, whoever wrote it.

    Raises:
        ValueError: where its metadata is not a YAML mapping, and for cards of more than a million characters.
    """
    if len(content) > MAX_CHARACTERS:
        raise ValueError(
            f"README.md has {len(content):,} characters, but must have at most {MAX_CHARACTERS:,}: shorten it."
        )
    content = content.replace("\r\n", "\n").removeprefix("\ufeff")
    front, text = _split_front(content)
    try:
        _check_events(front)
        metadata = yaml.safe_load(front) or {}
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the metadata of README.md is not valid YAML ({reason}): fix it, or remove the file."
        ) from error
    if not isinstance(metadata, dict):
        raise ValueError("the metadata of README.md is not a mapping: fix it, or remove the file.")
    text, record = _split_record(text)
    return Card(metadata, text, record, front)


def _check_events(front: str) -> None:
    """Refuse YAML whose cost is not linear in its length: nested deeply, or with aliases, which multiply.

    Raises:
        ValueError: before the whole of it has been read.
    """
    depth = 0
    for event in yaml.parse(front, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("the metadata of README.md has YAML aliases (*name): write the values out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"the metadata of README.md is nested more than {MAX_DEPTH} levels deep: simplify it.")


def _split_front(content: str) -> tuple[str, str]:
    """The YAML block at the start of a card, if there is one, and the text after it."""
    lines = content.lstrip().split("\n")
    if lines[0].rstrip() != "---":
        return "", content
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    return ("", content) if end is None else ("\n".join(lines[1:end]), "\n".join(lines[end + 1 :]))


def _split_record(text: str) -> tuple[str, dict[str, Any]]:
    """The text without the record, and what of the record is sound: it may have been edited, too."""
    start = text.find(RECORD_START)
    end = text.find(RECORD_END, start)
    if start < 0 or end < 0:
        return text, {}
    try:
        record = json.loads(text[start + len(RECORD_START) : end])
    except (ValueError, RecursionError):
        record = {}
    record = record if isinstance(record, dict) else {}
    sound = {k: v for k, v in record.items() if isinstance(v, RECORD_TYPES.get(k, object))}
    before, after = text[:start].rstrip("\n"), text[end + len(RECORD_END) :].lstrip("\n")
    return f"{before}\n\n{after}", sound


def format_card(card: Card) -> str:
    """The text of the card's file, with the record of what was generated."""
    text = card.text.strip() + "\n"
    written = Card(card.metadata, text, card.record)
    record = json.dumps({**card.record, "whole": written.fingerprint()}, default=str).replace(">", "\\u003e")
    unchanged = card.front and yaml.safe_load(card.front) == card.metadata
    front = card.front if unchanged else yaml_dump(card.metadata, sort_keys=False).strip()
    return f"---\n{front}\n---\n\n{text}\n<!-- ddpm-hf generated the sections above: {record} -->\n"


def stamp(content: str, record: dict[str, Any]) -> str:
    """A newly generated card with a record of what was generated, extended by `record`."""
    card = parse_card(content)
    sections = {name: _hash(text) for name, text in card.sections().items()}
    card.record = {**record, "sections": sections, "metadata": card.metadata}
    return format_card(card)


def merge_cards(existing: str, new: str) -> str:
    """The existing card, with all generated parts that nobody has edited replaced by those of the new one."""
    old, fresh = parse_card(existing), parse_card(new)
    if AUTOMATIC in old.text:
        old.text, old.record = fresh.text, fresh.record
    known, texts = old.record.get("sections", {}), fresh.sections()
    sections = dict(known)

    parts, done = [], 0
    for name, start, end in old.places():
        if name in texts and _hash(old.text[start:end]) == known.get(name):
            sections[name] = fresh.record.get("sections", {}).get(name, "")
            parts += [old.text[done:start], f"\n\n{texts[name]}\n\n"]
            done = end
    text = "".join([*parts, old.text[done:]])
    metadata = merge_metadata(old.record.get("metadata", {}), old.metadata, fresh.metadata)
    return format_card(Card(metadata, text, {**fresh.record, "sections": sections}, old.front))


def merge_metadata(generated: dict[str, Any], existing: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Three-way merge: keys and list entries that a person has changed, added or removed stay as they are."""
    merged = {k: v for k, v in existing.items() if k in new or v != generated.get(k)}
    for key, value in new.items():
        before, now = generated.get(key), existing.get(key)
        if isinstance(value, list):
            before, now = _as_list(before), _as_list(now)
            removed = [v for v in before if v not in now]
            added = [v for v in now if v not in before]
            merged[key] = [v for v in value if v not in removed and v not in added] + added
        elif now == before or (key not in existing and key not in generated):
            merged[key] = value
    if RESULTS in generated or RESULTS in new:
        merged[RESULTS] = _merge_results(*(data.get(RESULTS) or [] for data in (generated, existing, new)))
    return {key: value for key, value in merged.items() if value not in (None, [])}


def _merge_results(generated: list[dict], existing: list[dict], new: list[dict]) -> list[dict]:
    """The results of a `model-index`: new ones replace those that were generated, those of a person are kept.

    Each result, and the model's name, is compared separately: editing one does not preserve the others.
    """

    def by_metric(index: list[dict]) -> dict[str, dict]:
        return {
            json.dumps([result.get("task"), result.get("dataset"), metric.get("type"), metric.get("name")]): {
                **result,
                "metrics": [metric],
            }
            for model in index
            for result in model.get("results") or []
            for metric in result.get("metrics") or []
        }

    try:
        before, now, fresh = by_metric(generated), by_metric(existing), by_metric(new)
    except (AttributeError, TypeError) as error:
        raise ValueError("the `model-index` of README.md is not a list of results: fix it, or remove it.") from error
    own = {k for k in before | now if now.get(k) != before.get(k)}  # changed, added or removed by a person
    kept = {k: v for k, v in now.items() if k in fresh or k in own}  # in the existing order
    together: dict[str, dict] = {}
    for result in {**kept, **{k: v for k, v in fresh.items() if k not in own}}.values():
        key = json.dumps([result.get("task"), result.get("dataset")])
        if key in together:
            together[key]["metrics"] += result["metrics"]
        else:
            together[key] = {**result, "metrics": list(result["metrics"])}
    if not together:
        return []
    model = {**(existing or new)[0], "results": list(together.values())}
    if new and model.get("name") == (generated or [{}])[0].get("name"):
        model["name"] = new[0]["name"]
    return [model]


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _hash(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
