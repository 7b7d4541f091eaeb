"""Read configurations of the format in which all attention kinds shared one record of fields.

The record had the fields of all kinds; fields of other kinds had their default. Fields of a single
kind were under its name: ``{"kind": "a", "window_size": None, "a": {...}}``. Older saved models and
files have this format, and everything that reads them calls this module.
"""

from dataclasses import fields
from typing import Any

from memattn.checks import must
from memattn.parts.base import PARTS, PartConfig, is_record, make_part, part_type

AT_REST = {"segment_len": None, "window_size": None, "num_persistent_tokens": 0}


def AttentionConfig(kind: str = "causal", **record: Any) -> PartConfig:  # noqa: N802 - a class in earlier versions
    """The attention of a kind, from its own fields or from the old record.

    Raises:
        TypeError: If the value under the kind's name is not a configuration.
        ValueError: If there is no such kind, or a field is unknown, wrong or belongs to another
            kind.
    """
    return make_part(upgrade_attention({"kind": kind, **record}), "attention", attention=True)


def upgrade_attention(record: Any) -> Any:
    """The fields of one kind, from a record that may have those of all kinds."""
    if not is_record(record):
        return record
    values: dict[str, Any] = {"kind": "causal", **record}
    kind = values["kind"]
    part = part_type(kind, "attention.kind", attention=True)
    inner = values.pop(kind, None)
    if isinstance(inner, PartConfig):
        inner = {name: value for name, value in inner.to_dict().items() if name not in values}
    elif inner is not None and not is_record(inner):
        wanted = f"be a {part.__name__} or a dict"
        must(f"attention.{kind}", wanted, type(inner).__name__, TypeError)
    own = {part_field.name for part_field in fields(part)}
    for name in [name for name in values if name not in own]:
        if name in AT_REST or name in PARTS:
            rest, value = AT_REST.get(name), values.pop(name)
            if value != rest:
                must(f"attention.{name}", f'be {rest} with attention.kind "{kind}"', value)
    return {**values, **(inner or {})}
