"""What installed distributions require."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import Distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements_below(*names: str) -> dict[str, Distribution]:
    """These distributions and everything that they require here, by name; what is not installed is left out."""
    found: dict[str, Distribution] = {}
    asked = [Requirement(name) for name in names]
    seen: set[tuple[str, str]] = set()
    while asked:
        requirement = asked.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            lines = map(Requirement, found[name].requires or [])
            asked += [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
    return found
